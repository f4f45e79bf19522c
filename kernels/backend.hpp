// The one table of kernels. `reference` is the specification in plain loops; `avx2`, `avx512` and
// `avx512_bf16` are the same arithmetic in SIMD. Nothing above knows which one it holds.
//
// The arithmetic (docs/architecture.md, the determinism contract). A = activation dtype, F32 or
// BF16; "rounded" means rounded once to A where the result is stored.
//
//  * Batch invariance: the result for one row is a function of that row (and of weights and cache)
//    alone: not of the number, values or place of other rows, nor of threads.
//  * Linear: every output element is ONE chain of fused multiply-adds over ascending K in FP32,
//    starting from +0, per segment (and per scale block); segments add in a binary tree of
//    adjacent pairs. In the F32 arithmetic reference, avx2 and avx512 therefore give equal bits.
//    With BF16 inputs reference, avx2 and avx512 multiply-add in FP32 (exact products, one rounding
//    per add) in ascending K; avx512_bf16 uses vdpbf16ps, whose pairing is its own: another
//    arithmetic.
//  * Reductions along a row (norms, absorbed attention's dot products): 16 lanes, lane l takes the
//    elements i ≡ l (mod 16) in ascending order by fma, then lanes are added in halves
//    (l += l+8, l += l+4, l += l+2, l += l+1). A missing tail counts as +0. Equal bits everywhere,
//    except BF16 dots on avx512_bf16, where lane l takes the pairs (2i, 2i+1), i ≡ l (mod 16).
//  * exp, sigmoid, log, sin, cos are ours (kernels/math.hpp), the same operations in every backend.
//
// Threads: a call uses the given Workers and returns when done. Memory: the caller owns all of it;
// outputs may not alias inputs unless said; 64-byte alignment of rows is not required.
// Sizes of 0 rows are allowed everywhere and do nothing.
#pragma once

#include "config/dtype.hpp"
#include "config/model_config.hpp"
#include "kernels/packed_matrix.hpp"
#include "kernels/stream.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace troupe {

// A row-major matrix of activations, lent.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32; // f32 or bf16
  int64_t stride = 0;       // elements from one row to the next
};
struct MutableRows {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
};

// Rows quantized to E4M3 per 1×128 tile (§5.5): tile t of a row covers columns [128t, 128t+128),
// a ragged last tile takes its own amax. scale = max(amax, 1e-4)/448, or the next power of two.
struct QuantizedRows {
  const uint8_t* codes = nullptr; // [num_rows, k]
  const float* scales = nullptr;  // [num_rows, ceil(k/128)]
  int64_t code_stride = 0;
  int64_t scale_stride = 0;
};

// y = W x for each row. Exactly one of x.data and xq.codes is set; xq needs F8 weights whose k0 is
// a multiple of 128 and block_k == 128: then acc = fma(scale_x · scale_w, block_sum, acc).
// out: [num_rows, n]. With `residual` (A or F32, may alias out): out = round(residual + sum).
struct LinearArgs {
  int64_t num_rows = 0;
  Rows x;
  QuantizedRows xq;
  const PackedMatrix* w = nullptr;
  MutableRows out;
  Rows residual;
};

// out = round(residual + tree sum of partials): finishes a matrix cut along K over TP ranks.
// partials: num_partials (a power of two) pointers to F32 [num_rows, n], in rank order.
struct AddPartialsArgs {
  int64_t num_rows = 0, n = 0;
  std::span<const float* const> partials;
  Rows residual;
  MutableRows out;
};

// y_i = round(w_i · (x_i · r)), r = 1 / sqrt(sum(x²)/n + eps); x, y in A or F32; w F32. May be in
// place.
struct RmsNormArgs {
  int64_t num_rows = 0, n = 0;
  Rows x;
  const float* weight = nullptr;
  float eps = 0;
  MutableRows out;
};

// cos/sin table of RoPE (§2.4, §2.5), angles in F64 rounded once; [max_positions, dim/2] each.
struct RopeTable {
  int64_t dim = 0, max_positions = 0;
  const float* cos = nullptr;
  const float* sin = nullptr;
  bool interleaved = true; // false: pairs are (i, i + dim/2)
};
// Rotates `heads` vectors of `table.dim` per row, in place: x[row·stride + head·head_stride +
// 0…dim). A pair (x, y) becomes round(fma(x, cos, -(y·sin))), round(fma(x, sin, y·cos)).
struct RopeArgs {
  int64_t num_rows = 0, heads = 1;
  MutableRows x;
  int64_t head_stride = 0;
  const int32_t* positions = nullptr; // [num_rows]
  const RopeTable* table = nullptr;
};

// The paged latent cache of one layer: row p of a sequence is at
// base + (pages[p / kPageTokens]·kPageTokens + p % kPageTokens)·row_elements, and holds
// [c (d_c, after its norm) ; k_rope (after rotation)] in the KV dtype (= A).
inline constexpr int64_t kPageTokens = 64; // also the key block of attention
struct LatentCacheLayer {
  std::byte* base = nullptr;
  DType dtype = DType::f32;
  int64_t row_elements = 0; // d_c + d_rope
};

// A run of consecutive positions of one sequence inside a step: rows [row_begin,
// row_begin+num_rows) of the step are positions first_position, first_position + 1, …
struct SequenceRows {
  int64_t row_begin = 0, num_rows = 0;
  int32_t first_position = 0;
  const int32_t* pages = nullptr; // page numbers of the whole sequence
};

// Causal MLA over the cache for rows of several sequences. The rows' own latents are already in
// the cache. Keys are walked in blocks of 64 aligned to position 0 with an online softmax in FP32:
//   s_j = tau · (q · k_j): in the naive form ONE fma chain over ascending elements, nope then rope
//   (on avx512_bf16 pairs, like Linear); in the absorbed form a 16-lane dot over latent then rope
//   elements;  block max m_b over valid keys;
//   m' = max(m, m_b); a = exp(m - m'); p_j = exp(s_j - m'), 0 for invalid j;
//   l = l·a + sum_j p_j (ascending j, plain FP32 adds);  o = o·a + sum_j p_j·v_j, where the inner
//   sum is one chain of fmas from +0 over ascending j of the block and p_j is first rounded to A (l
//   takes the unrounded p).
// Finally out = round(o · (1/l)). A row never reads keys beyond its own position.
// Scratch: see attention_scratch_bytes.
struct MlaShape {
  int64_t heads = 0; // of this rank
  int64_t qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0, kv_lora_rank = 0;
  float tau = 0;
};
// Naive form (§2.2), prompt positions: k_nope and v of every key are recomputed from the latent by
// kv_b (rounded to A). q: [rows, heads·(nope+rope)] rotated; out: [rows, heads·v].
struct MlaNaiveArgs {
  MlaShape shape;
  std::span<const SequenceRows> sequences;
  Rows q;
  LatentCacheLayer cache;
  const PackedMatrix* kv_b = nullptr; // [heads·(nope+v), d_c]
  MutableRows out;
  std::span<std::byte> scratch;
};
// Absorbed form (§2.3), answer positions: q_abs = round(W_UKᵀ q_nope) per head; scores dot
// [q_abs ; q_rope] with [c ; k_rope]; o_lat = round(softmax · c); out = round(W_UV o_lat).
struct MlaAbsorbedArgs {
  MlaShape shape;
  std::span<const SequenceRows> sequences;
  Rows q;
  LatentCacheLayer cache;
  std::span<const PackedMatrix> w_uk_t; // per head: [d_c, nope]
  std::span<const PackedMatrix> w_uv;   // per head: [v, d_c]
  MutableRows out;
  std::span<std::byte> scratch;
};

// Gate (§3.2), every variant; ties to the lower index in groups and experts; dropped groups -inf.
// A NaN score ranks as the lowest finite number: behind every score, before what is masked; a
// chosen NaN makes the row's weights NaN. Needs top_k <= topk_group · (n_experts / n_group).
// norm_topk_prob normalizes for top_k > 1 only, as §3.2 and the code published with V3, Moonlight
// and Kimi-K2 have it: with one expert per token a quotient would be 1 whatever its score, and the
// gate would say nothing. (transformers' V3 class and DeepSeek's demo do divide a single score by
// itself. No published model has top_k == 1.) Every weight is then times routed_scaling_factor.
// logits: FP32, from a Linear with F32 rows.
struct GateArgs {
  int64_t num_rows = 0, n_experts = 0, n_group = 1, topk_group = 1, top_k = 0;
  ScoringFunc scoring = ScoringFunc::sigmoid;
  TopkMethod method = TopkMethod::noaux_tc;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1;
  const float* logits = nullptr; // [num_rows, n_experts]
  const float* bias = nullptr;   // [n_experts] or null; steers selection only
  int32_t* topk_idx = nullptr;   // [num_rows, top_k] out, best first
  float* topk_weight = nullptr;  // [num_rows, top_k] out
};

// SwiGLU FFN: out = round(W_down round(silu(W_gate x) ⊙ W_up x)); gate and up stay FP32 until their
// product is rounded. With xq, the product is quantized per 1×128 before W_down, with scales of the
// kind that xq has: `power_of_two` says which (QuantizeArgs).
struct FfnWeights {
  PackedMatrix gate, up; // [width, hidden]
  PackedMatrix down;     // [hidden, width]
};
// One expert's rows in a grouped call: rows of x chosen by index, results in place r of `out`.
struct ExpertGroup {
  const FfnWeights* weights = nullptr;
  std::span<const int32_t> row_of_x; // per output row: which row of x
  int64_t out_begin = 0;             // rows [out_begin, out_begin + row_of_x.size()) of out
};
struct GroupedFfnArgs {
  std::span<const ExpertGroup> groups; // any number, also empty ones
  Rows x;                              // or
  QuantizedRows xq;
  MutableRows out; // [rows, hidden] in the combine dtype, or F32 partials for a TP-cut FFN
  Rows residual;   // optional, only with one group and out rows == x rows
  std::span<std::byte> scratch;
  int64_t hidden = 0;
  bool power_of_two = false; // with xq
};

struct QuantizeArgs {
  int64_t num_rows = 0, k = 0;
  Rows x;
  bool power_of_two = false;
  uint8_t* codes = nullptr;
  float* scales = nullptr;
  int64_t code_stride = 0, scale_stride = 0;
};

struct Backend {
  const char* name; // "reference", "avx2", "avx512", "avx512_bf16"
  void (*linear)(const LinearArgs&, Workers&);
  void (*add_partials)(const AddPartialsArgs&, Workers&);
  void (*rms_norm)(const RmsNormArgs&, Workers&);
  void (*rope)(const RopeArgs&, Workers&);
  void (*mla_naive)(const MlaNaiveArgs&, Workers&);
  void (*mla_absorbed)(const MlaAbsorbedArgs&, Workers&);
  void (*gate)(const GateArgs&, Workers&);
  void (*grouped_ffn)(const GroupedFfnArgs&, Workers&);
  void (*quantize)(const QuantizeArgs&, Workers&);
};

// Scratch for the largest step: `max_rows` rows in all, the longest sequence `max_context`.
[[nodiscard]] int64_t mla_scratch_bytes(const MlaShape& shape, DType a, int64_t max_rows,
                                        int64_t max_context, int num_threads);
[[nodiscard]] int64_t ffn_scratch_bytes(int64_t width, int64_t hidden, int64_t max_rows,
                                        int num_threads);

[[nodiscard]] const Backend& reference_backend();
// nullptr where this CPU or build lacks it.
[[nodiscard]] const Backend* avx2_backend();
[[nodiscard]] const Backend* avx512_backend();
[[nodiscard]] const Backend* avx512_bf16_backend();
// The fastest one here.
[[nodiscard]] const Backend& best_backend();
// "simd" (the fastest), or one of the names. nullptr when unknown or absent here.
[[nodiscard]] const Backend* find_backend(std::string_view name);
[[nodiscard]] std::vector<std::string> available_backends();
// A hash of every kernel's output on fixed inputs in the given activation dtype, with the
// backend's arithmetic in it: equal fingerprints, equal bits (architecture, 1.7).
[[nodiscard]] uint64_t arithmetic_fingerprint(const Backend& backend, DType activations);

} // namespace troupe
