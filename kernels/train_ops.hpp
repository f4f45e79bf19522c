// The kernels of training, one narrow table: `reference` is the text of reference_backward*.hpp
// over threads; `simd` gives the same bits faster.
//
// Values. Rows and gradients lie in F32 memory whatever the precision; under bf16 and fp8 a result
// that a BF16 program would store is rounded to BF16 where `round` says so, so what crosses a wire
// or is kept for the backward pass fits BF16 exactly. Weights are prepared once per step from the
// F32 masters, in a form of the backend's own.
//
//   precision  operands of linear layers          sums
//   f32        as they are                        one chain of FMAs over the contraction
//   bf16       rounded to BF16                    pairs along the contraction, see BF16 below
//   fp8        E4M3, §5.5: rows 1×128 (wgrad      per block of 128 pairs from +0, then
//              128×1), weights 128×128            acc = fma(scale·scale, block, acc)
//
// BF16: acc = fma(a₀, b₀, fma(a₁, b₁, acc)) for the pair (2i, 2i+1) of the contraction counted from
// 0, without denormals: vdpbf16ps to the bit, see kernels/reference_backward_bf16.hpp. A missing
// partner is zero. FP8 blocks are such chains too.
//
// Order. Everything is a function of one row, but for gradients of weights, which go on from what
// they find in ascending rows: the cut of rows into calls, threads and other rows change no bit.
// (fp8 and bf16: calls end at multiples of 128 and 2 rows, or pad with zero rows.)
//
// Threads: a call uses the given Workers and returns when done. Memory is the caller's; outputs
// alias inputs only where said.
#pragma once

#include "config/errors.hpp"
#include "kernels/backend.hpp"
#include "kernels/stream.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace troupe {

enum class TrainPrecision : uint8_t { f32, bf16, fp8 };
[[nodiscard]] std::string_view to_string(TrainPrecision precision); // "f32", "bf16", "fp8"
[[nodiscard]] caf::expected<TrainPrecision> parse_precision(std::string_view name);

// Scratch of one compute stream, by worker; grows on demand and is kept between calls. One job at
// a time uses it.
class TrainScratch {
public:
  explicit TrainScratch(int num_threads);
  // `bytes` of memory, 64-byte aligned, whose contents are undefined. A worker asks for its own
  // only; `worker` -1 is the caller of the kernel. Throws std::bad_alloc.
  [[nodiscard]] std::byte* of(int worker, size_t bytes);

private:
  std::vector<std::vector<std::byte>> memory_;
};

// One product of a linear layer y = W x, W [n, k]. Row-major, strides in elements.
//   fprop  out [rows, n] = a · Wᵀ          a = x  [rows, k]
//   dgrad  out [rows, k] = a · W           a = dy [rows, n]
//   wgrad  out [n, k]   += aᵀ · b          a = dy [rows, n], b = x [rows, k], out has stride k
struct LinearTask {
  int64_t rows = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* b = nullptr; // wgrad only
  int64_t b_stride = 0;
  const std::byte* weight = nullptr; // prepared; fprop and dgrad
  float* out = nullptr;
  int64_t out_stride = 0;
  bool accumulate = false; // dgrad: go on from out; wgrad always does
  bool round = false;      // the finished sum to BF16; never of wgrad
  // fp8: scales of the rows of a, and of b, are powers of two (dispatched ones, §5.5)
  bool power_of_two = false, b_power_of_two = false;
};

// y = w ⊙ x·r.
struct NormTask {
  int64_t rows = 0, n = 0;
  float eps = 0;
  const float* x = nullptr; // [rows, n], stride x_stride
  int64_t x_stride = 0;
  const float* weight = nullptr; // [n], the F32 master
  const float* dy = nullptr;     // backward: [rows, n] dense
  float* out = nullptr;          // y or dx, stride out_stride; dx may be dy
  int64_t out_stride = 0;
  float* dweight = nullptr; // [n] +=
  bool accumulate = false;  // dx += (before rounding)
  bool round = false;
};

struct SwigluTask { // z = silu(a) ⊙ b, all dense [rows, n]
  int64_t rows = 0, n = 0;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* dz = nullptr;
  float* z = nullptr;  // forward
  float* da = nullptr; // backward; may be dz
  float* db = nullptr;
  bool round = false;
};

// Backward of an expert's weighted output, dense rows [rows, n]: dz arrives as W_downᵀ dy without
// the gate weight. dweight[r] = ⟨dz, z⟩; dz and z are multiplied by weight[r]: the product for
// W_down takes its weight on the side of z, because dy stays as it was sent.
struct ExpertWeightTask {
  int64_t rows = 0, n = 0;
  const float* weight = nullptr; // [rows]
  float* z = nullptr;
  float* dz = nullptr;
  float* dweight = nullptr; // [rows]
  bool round = false;
};

// Causal attention of packed rows, reference_backward_attention.hpp. q [rows, heads·(d_nope +
// d_rope)] rotated, kv [rows, heads·(d_nope + d_v)] as kv_b leaves it (per head nope, then v),
// k_rope [rows, d_rope] rotated, out and dout [rows, heads·d_v], lse [rows, heads].
struct AttentionTask {
  int64_t rows = 0, heads = 0, d_nope = 0, d_rope = 0, d_v = 0;
  float tau = 0;
  const int32_t* first_key = nullptr; // [rows]
  const float* q = nullptr;
  const float* kv = nullptr;
  const float* k_rope = nullptr; // stride k_rope_stride
  int64_t k_rope_stride = 0;
  float* out = nullptr;
  float* lse = nullptr;
  bool round = false; // BF16 products; out, dq, dkv and dk_rope are rounded
  // backward
  const float* dout = nullptr;
  float* dq = nullptr;      // like q
  float* dkv = nullptr;     // like kv
  float* dk_rope = nullptr; // [rows, d_rope] dense
};

struct AdamWTask {
  int64_t n = 0;
  float lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0, clip = 1;
  int64_t step = 1;           // of this update, from 1
  bool round_moments = false; // kept as BF16 values
  const float* g = nullptr;
  float* theta = nullptr;
  float* m = nullptr;
  float* v = nullptr;
};

struct TrainOps {
  const char* name = "";
  // ---- linear; tasks are independent and share the threads ----
  size_t (*weight_bytes)(TrainPrecision, int64_t n, int64_t k) = nullptr;
  void (*prepare_weight)(TrainPrecision, int64_t n, int64_t k, const float* master, std::byte* out,
                         Workers&) = nullptr;
  void (*fprop)(TrainPrecision, std::span<const LinearTask>, TrainScratch&, Workers&) = nullptr;
  void (*dgrad)(TrainPrecision, std::span<const LinearTask>, TrainScratch&, Workers&) = nullptr;
  void (*wgrad)(TrainPrecision, std::span<const LinearTask>, TrainScratch&, Workers&) = nullptr;
  // ---- rows ----
  void (*rms_norm)(const NormTask&, Workers&) = nullptr;
  void (*rms_norm_backward)(const NormTask&, TrainScratch&, Workers&) = nullptr;
  void (*swiglu)(const SwigluTask&, Workers&) = nullptr;
  void (*swiglu_backward)(const SwigluTask&, Workers&) = nullptr;
  void (*expert_weight_backward)(const ExpertWeightTask&, Workers&) = nullptr;
  // Rotates `heads` vectors per row in place, as Backend::rope; inverse: by the opposite angle.
  void (*rope)(const RopeArgs&, bool inverse, bool round, Workers&) = nullptr;
  void (*attention)(const AttentionTask&, TrainScratch&, Workers&) = nullptr;
  void (*attention_backward)(const AttentionTask&, TrainScratch&, Workers&) = nullptr;
  // logits [rows, vocab] become weight · (softmax - onehot) in place; loss[r] = lse - logit of the
  // target in F64, 0 where the target is kNoTarget.
  void (*cross_entropy)(int64_t rows, int64_t vocab, const int32_t* targets, float weight,
                        float* logits, double* loss, Workers&) = nullptr;
  // ---- optimizer ----
  void (*adamw)(const AdamWTask&, Workers&) = nullptr;
};

// "simd" (the best here) or "reference". Null: unknown.
[[nodiscard]] const TrainOps* find_train_ops(std::string_view name);
[[nodiscard]] const TrainOps& reference_train_ops();
[[nodiscard]] const TrainOps& simd_train_ops();

} // namespace troupe
