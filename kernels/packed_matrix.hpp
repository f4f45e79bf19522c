// Weight matrices in the layout the CPU backends share, inside memory somebody else owns.
//
// A Linear weight W is [N, K] (out, in), y = W x. Packed, rows are grouped in panels of 64 and
// the last panel is padded with zero rows; a panel walks K upward once:
//
//   F32       [panel][K][64]                       float
//   BF16      [panel][K/2][64][2]                  BF16, pairs of K side by side (vdpbf16ps)
//   F8_E4M3   [panel][K/2][64][2]                  E4M3 codes, and scales
//             [panel][num_scale_blocks][64]        float, one per row and K-block
//
// K is cut into `segments` (contract, Canonical sums): contiguous ranges, each accumulated by
// itself in ascending K and then added in a binary tree of adjacent pairs. Each segment is padded
// with zeros to an even length. Inside a segment, F8 weights accumulate per scale block (blocks
// lie at multiples of block_k of the *global* column index) in FP32, each block's sum times its
// scale added in ascending order: acc = fma(scale, block_sum, acc).
#pragma once

#include "config/dtype.hpp"
#include "config/errors.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace troupe {

inline constexpr int64_t kPanelRows = 64;
inline constexpr int kMaxSegments = 8;

// The canonical K-segments of a matrix: `begin[s] … begin[s + 1]` in columns of the whole matrix.
struct KSegments {
  int count = 1;
  int64_t begin[kMaxSegments + 1] = {};
};
[[nodiscard]] KSegments whole_k(int64_t k);                               // one segment
[[nodiscard]] KSegments head_segments(int64_t heads, int64_t v_head_dim); // o_proj
[[nodiscard]] KSegments width_segments(int64_t width); // down_proj of dense and shared FFNs
// Segments [rank·S/tp, (rank+1)·S/tp) of `all`, still in global columns; tp divides all.count.
[[nodiscard]] KSegments slice(const KSegments& all, int tp_rank, int tp);

// Part of a tensor of the checkpoint: rows [row0, row0 + rows), columns [col0, col0 + cols) of a
// row-major [total_rows, total_cols] matrix.
struct WeightSource {
  std::string_view name;           // the tensor's, for errors; outlives the source
  const std::byte* data = nullptr; // the whole tensor's first byte; any alignment
  DType dtype = DType::f32;        // f32, bf16, f16, f8_e4m3
  int64_t total_rows = 0, total_cols = 0;
  int64_t row0 = 0, rows = 0, col0 = 0, cols = 0;
  // F8: F32 [ceil(total_rows/block_rows), ceil(total_cols/block_cols)], any alignment; null: ones.
  // Each is a finite number above 0, which `pack` checks.
  const std::byte* scales = nullptr;
  int64_t block_rows = 128, block_cols = 128;
};

struct PackedMatrix {
  int64_t n = 0, k = 0;     // logical rows and columns of this (part of a) matrix
  DType dtype = DType::f32; // f32, bf16 or f8_e4m3 as stored here
  KSegments segments;       // relative to this part: begin[0] == 0, begin[count] == k
  int64_t k0 = 0;           // global column of its first column: where scale blocks lie
  int64_t block_k = 128;    // scale block length along K (F8 only)
  const std::byte* data = nullptr;
  const float* scales = nullptr; // F8 only
  [[nodiscard]] int64_t panels() const { return (n + kPanelRows - 1) / kPanelRows; }
};

// Bytes of data plus scales; the two lie one behind the other, each 64-byte aligned.
[[nodiscard]] int64_t packed_bytes(const PackedMatrix& shape);
// Converts and packs `sources` (stacked along N; equal cols and, for F8, equal col0 and
// block_cols) into `memory` (packed_bytes long, 64-byte aligned) and points `matrix` at it.
// `matrix` arrives with n, k, dtype, segments, k0 and block_k set. dtype conversions: any source
// to F32 (F8 dequantized, code · scale in F32); F32/F16/F8 to BF16 through that F32 value; F8 stays
// F8. F32/F16/BF16 -> F8 quantizes per 128×128 block as §1.4 (--fp8 weights on an unquantized
// checkpoint): scale = amax/448 over the whole global block, read beyond the slice where the slice
// cuts it; a block of zeros has scale 1.
// Packs panels [panel_begin, panel_end) so that callers can cut the work. Errc::malformed names the
// tensor and the block where a stored scale is zero, negative or not finite (every weight of that
// block would be wrong without a trace), or where a block to be quantized holds an infinity or NaN.
[[nodiscard]] caf::error pack(PackedMatrix& matrix, std::span<const WeightSource> sources,
                              std::byte* memory, int64_t panel_begin, int64_t panel_end);
// Points an already packed matrix at its bytes (a block that was moved or received).
void attach(PackedMatrix& matrix, const std::byte* memory);

} // namespace troupe
