// What the SIMD backends share and what does not depend on the instruction set.
//
// One implementation serves three targets: the headers simd_*.hpp below are written over a small
// vector of 16 floats and have no include guard. Each backend_<target>.cpp switches its target on
// with a pragma, defines TROUPE_SIMD (the namespace) and includes them once, so every function of
// theirs belongs to one target by name and the linker can't mix them up. Nothing here may be
// included after the pragma: an inline function compiled twice for two CPUs would be one function
// to the linker.
#pragma once

#include "kernels/backend.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#define TROUPE_INLINE inline __attribute__((always_inline))

namespace troupe {

// Rows of activations a work unit takes at once. Its accumulators (and converted inputs) live on
// the worker's stack: 96 rows × 64 columns × 4 B = 24 KiB a level.
inline constexpr int64_t kRowBlock = 96;
// Columns of K between two visits to the accumulators: 192 × 64 BF16 weights are 24 KiB and stay
// in the first-level cache while all rows of the block pass.
inline constexpr int64_t kPieceColumns = 192;
inline constexpr int64_t kQuantTile = 128; // columns of one activation scale

[[nodiscard]] inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of one panel's pair of K columns.
[[nodiscard]] inline int64_t pair_bytes(DType dtype) { return 2 * kPanelRows * size_of(dtype); }

// Units of work a thread claims at once: about 256 KiB of weights or rows, which take a core some
// ten microseconds, so that claiming costs nothing and a descheduled thread holds up little.
[[nodiscard]] inline int64_t grain_for(int64_t units, int num_threads, int64_t unit_bytes) {
  const int64_t enough = (int64_t{256} << 10) / std::max<int64_t>(unit_bytes, 1);
  return std::clamp<int64_t>(units / (4 * int64_t{num_threads}), 1, std::max<int64_t>(enough, 1));
}

// The scale of a 1×128 tile with this amax (§5.5).
[[nodiscard]] inline float tile_scale(float amax, bool power_of_two) {
  const float scale = std::max(amax, 1e-4f) / 448.0f;
  if (!power_of_two)
    return scale;
  const uint32_t bits = std::bit_cast<uint32_t>(scale); // up to the next power of two: exact
  return std::bit_cast<float>((bits + 0x7fffffu) & 0xff800000u);
}

// The rows of one call, as the matrix kernels see them: plain rows, or quantized ones.
struct RowSource {
  Rows x;
  QuantizedRows xq;
  [[nodiscard]] bool quantized() const { return xq.codes != nullptr; }
};

// ---- scratch -------------------------------------------------------------------------------

// Lends consecutive 64-byte aligned parts of a scratch span.
class ScratchCursor {
public:
  explicit ScratchCursor(std::span<std::byte> scratch) : scratch_(scratch) {}
  // Aligned from the address up, so that a span of any alignment serves.
  std::byte* take(int64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(scratch_.data()) + static_cast<size_t>(used_);
    std::byte* part = scratch_.data() + used_ + static_cast<int64_t>(-address & 63u);
    used_ = part - scratch_.data() + bytes;
    if (used_ > static_cast<int64_t>(scratch_.size()))
      stop();
    return part;
  }

private:
  [[noreturn]] static void stop(); // a caller's bug: says so and aborts
  std::span<std::byte> scratch_;
  int64_t used_ = 0;
};
// Bytes that make room for `bytes` at any alignment.
[[nodiscard]] inline int64_t aligned(int64_t bytes) { return (bytes + 63 + 64) / 64 * 64; }

// What one thread holds of the naive form: a head's keys and values of one block of 64, and the
// running softmax of every query row of the longest run in the step.
struct NaiveScratch {
  std::byte* keys = nullptr;   // A [d_qk/2][64][2] or F32 [d_qk][64]
  std::byte* values = nullptr; // [ceil(v/64)] panels of 64 keys, laid out alike
  float* out = nullptr;        // [rows][ceil(v/64)·64]
  float* max = nullptr;        // [rows]
  float* sum = nullptr;        // [rows]
  NaiveScratch(ScratchCursor& cursor, const MlaShape& shape, DType a, int64_t rows);
  static int64_t bytes(const MlaShape& shape, DType a, int64_t rows);
};

// Rows of the absorbed form that are in work together.
inline constexpr int64_t kAbsorbedRows = 64;
inline constexpr int64_t kAbsorbedHeads = 16; // heads that share one pass over a row's keys
// Absorbed queries and keys are padded with zeros to whole dot steps.
[[nodiscard]] inline int64_t absorbed_dim(const MlaShape& shape) {
  return ceil_div(shape.kv_lora_rank + shape.qk_rope_head_dim, 32) * 32;
}
struct AbsorbedScratch {       // of the call
  std::byte* query = nullptr;  // A [kAbsorbedRows][heads][absorbed_dim]
  std::byte* latent = nullptr; // A [kAbsorbedRows][heads][d_c]
  AbsorbedScratch(ScratchCursor& cursor, const MlaShape& shape, DType a);
  static int64_t bytes(const MlaShape& shape, DType a);
};
struct AbsorbedThread {        // of one thread
  std::byte* keys = nullptr;   // A [64][absorbed_dim]
  std::byte* values = nullptr; // [ceil(d_c/64)] panels of 64 keys
  float* out = nullptr;        // [kAbsorbedHeads][ceil(d_c/64)·64]
  AbsorbedThread(ScratchCursor& cursor, const MlaShape& shape, DType a);
  static int64_t bytes(const MlaShape& shape, DType a);
};

// The SwiGLU product of all rows of a grouped call, and its quantized form.
struct FfnScratch {
  std::byte* product = nullptr; // A [rows][width]
  uint8_t* codes = nullptr;     // [rows][width]
  float* scales = nullptr;      // [rows][ceil(width/128)]
  FfnScratch(ScratchCursor& cursor, int64_t width, int64_t rows, DType a, bool quantized);
};

} // namespace troupe
