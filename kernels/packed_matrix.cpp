#include "kernels/packed_matrix.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

namespace troupe {

namespace {

constexpr int64_t align64(int64_t n) { return (n + 63) & ~int64_t{63}; }

// Stored length of K: every segment padded to an even number of columns.
int64_t stored_k(const PackedMatrix& m) {
  int64_t length = 0;
  for (int s = 0; s < m.segments.count; ++s) {
    const int64_t k = m.segments.begin[s + 1] - m.segments.begin[s];
    length += (k + 1) / 2 * 2;
  }
  return length;
}

int64_t data_bytes(const PackedMatrix& m) {
  return m.panels() * stored_k(m) * kPanelRows * size_of(m.dtype);
}

int64_t scale_blocks(const PackedMatrix& m) {
  if (m.dtype != DType::f8_e4m3 || m.k == 0)
    return 0;
  return (m.k0 + m.k - 1) / m.block_k - m.k0 / m.block_k + 1;
}

// ---- reading a source ----

const std::byte* at(const WeightSource& s, int64_t row, int64_t column) {
  return s.data + (row * s.total_cols + column) * size_of(s.dtype);
}

// The stored multiplier of a global block of E4M3 codes; 1 for a tensor without scales.
float stored_scale(const WeightSource& s, int64_t row_block, int64_t block) {
  if (s.scales == nullptr)
    return 1.0f;
  const int64_t blocks = (s.total_cols + s.block_cols - 1) / s.block_cols;
  float scale;
  std::memcpy(&scale, s.scales + (row_block * blocks + block) * int64_t{sizeof scale},
              sizeof scale);
  return scale;
}

// e4m3_to_float without a branch, so that loops of it become vectors.
inline float value_of(uint8_t code) {
  const int32_t magnitude = code & 0x7f;
  const int32_t normal = (magnitude << 20) + (120 << 23);
  const auto small = std::bit_cast<int32_t>(static_cast<float>(magnitude) * 0x1p-9f);
  const int32_t is_small = -static_cast<int32_t>(magnitude < 8);
  const int32_t is_nan = -static_cast<int32_t>(magnitude == 0x7f);
  return std::bit_cast<float>((small & is_small) | (normal & ~is_small) | (0x7fc00000 & is_nan) |
                              static_cast<int32_t>(code & 0x80u) << 24);
}

void dequantize(const WeightSource& s, int64_t row, int64_t column, int64_t n, float* out) {
  const auto* codes = reinterpret_cast<const uint8_t*>(at(s, row, column));
  for (int64_t i = 0; i < n;) {
    const int64_t block = (column + i) / s.block_cols;
    const int64_t end = std::min(n, (block + 1) * s.block_cols - column);
    const float scale = stored_scale(s, row / s.block_rows, block);
    for (; i < end; ++i)
      out[i] = value_of(codes[i]) * scale;
  }
}

// A conversion of `n` elements from (row, column) of the whole tensor on; `n` is at most a tile.
using Convert = void (*)(const WeightSource&, int64_t row, int64_t column, int64_t n,
                         const float* scale, void* out);
constexpr int64_t kTile = 128; // columns that are converted and transposed together

void to_floats(const WeightSource& s, int64_t row, int64_t column, int64_t n, const float*,
               void* to) {
  auto* out = static_cast<float*>(to);
  const std::byte* from = at(s, row, column);
  if (s.dtype == DType::f8_e4m3)
    return dequantize(s, row, column, n, out);
  if (s.dtype == DType::f32) {
    std::memcpy(out, from, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t bits[kTile];
  std::memcpy(bits, from, static_cast<size_t>(n) * sizeof(uint16_t));
  if (s.dtype == DType::bf16)
    for (int64_t i = 0; i < n; ++i)
      out[i] = to_float(BF16{bits[i]});
  else
    for (int64_t i = 0; i < n; ++i)
      out[i] = f16_to_float(bits[i]);
}

void as_stored(const WeightSource& s, int64_t row, int64_t column, int64_t n, const float*,
               void* out) {
  std::memcpy(out, at(s, row, column), static_cast<size_t>(n * size_of(s.dtype)));
}

// to_bf16 without a branch, so that loops of it become vectors.
inline uint16_t bf16_bits(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  const int32_t is_nan = -static_cast<int32_t>((bits & 0x7fffffff) > 0x7f800000);
  const int32_t rounded = (bits >> 16) + ((bits & 0xffff) + (bits >> 16 & 1) > 0x8000);
  return static_cast<uint16_t>((rounded & ~is_nan) | ((bits >> 16 | 0x40) & is_nan));
}

void to_bf16_bits(const WeightSource& s, int64_t row, int64_t column, int64_t n, const float*,
                  void* to) {
  float values[kTile];
  to_floats(s, row, column, n, nullptr, values);
  auto* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i)
    out[i] = bf16_bits(values[i]);
}

// float_to_e4m3 of a finite number without a branch, so that loops of it become vectors. Below the
// smallest normal number adding 2^14, whose last bit is worth 2^-9, leaves the code in the low
// bits.
inline uint8_t code_of(float x) {
  constexpr int32_t kLargest = std::bit_cast<int32_t>(448.0f);
  constexpr int32_t kSmallestNormal = std::bit_cast<int32_t>(0x1p-6f);
  const auto bits = std::bit_cast<int32_t>(x);
  const int32_t magnitude = std::min(bits & 0x7fffffff, kLargest);
  const int32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  const int32_t small = std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) & 0xf;
  const int32_t is_small = -static_cast<int32_t>(magnitude < kSmallestNormal);
  return static_cast<uint8_t>((small & is_small) | (normal & ~is_small) | (bits >> 24 & 0x80));
}

// scale: one for each element.
void to_codes(const WeightSource& s, int64_t row, int64_t column, int64_t n, const float* scale,
              void* to) {
  float values[kTile];
  to_floats(s, row, column, n, nullptr, values);
  auto* out = static_cast<uint8_t*>(to);
  for (int64_t i = 0; i < n; ++i)
    out[i] = code_of(values[i] / scale[i]);
}

Convert conversion(DType from, DType to) {
  if (from == to)
    return as_stored;
  return to == DType::f32 ? to_floats : to == DType::bf16 ? to_bf16_bits : to_codes;
}

// The scales of a row of global blocks of a tensor that is to be quantized, from `first_block` on:
// from all of each block, also where only a part of it is packed here. Infinite or NaN where an
// element is. Row by row, because memory is fast only along rows.
void fresh_scales(const WeightSource& s, int64_t row_block, int64_t first_block,
                  std::span<float> scales) {
  const int64_t last_row = std::min((row_block + 1) * s.block_rows, s.total_rows);
  std::ranges::fill(scales, 0.0f); // holds each block's amax until the division below
  float values[kTile];
  for (int64_t row = row_block * s.block_rows; row < last_row; ++row)
    for (size_t b = 0; b < scales.size(); ++b) {
      const int64_t begin = (first_block + static_cast<int64_t>(b)) * s.block_cols;
      const int64_t end = std::min(begin + s.block_cols, s.total_cols);
      // As bits, which order magnitudes like numbers, infinity and NaN above all.
      auto amax = std::bit_cast<int32_t>(scales[b]);
      for (int64_t column = begin; column < end; column += kTile) {
        const int64_t n = std::min(kTile, end - column);
        to_floats(s, row, column, n, nullptr, values);
        for (int64_t i = 0; i < n; ++i)
          amax = std::max(amax, std::bit_cast<int32_t>(values[i]) & 0x7fffffff);
      }
      scales[b] = std::bit_cast<float>(amax);
    }
  for (float& scale : scales) {
    scale /= 448.0f;
    if (scale == 0) // zeros, or numbers so small that nothing is left of them
      scale = 1;
  }
}

caf::error bad_block(const WeightSource& s, std::string_view suffix, int64_t row_block,
                     int64_t block, std::string_view what) {
  return make_error(Errc::malformed, fmt::format("tensor {}{}: block [{}, {}] {}", s.name, suffix,
                                                 row_block, block, what));
}

// ---- packing one panel ----

// Where a panel's row comes from; no source: padding.
struct RowOf {
  const WeightSource* source = nullptr;
  int64_t row = 0; // of the whole tensor
};
using PanelRows = std::array<RowOf, kPanelRows>;

RowOf row_of(std::span<const WeightSource> sources, int64_t n) {
  for (const auto& s : sources) {
    if (n < s.rows)
      return {&s, s.row0 + n};
    n -= s.rows;
  }
  return {};
}

bool same_row_block(const RowOf& a, const RowOf& b) {
  return a.source == b.source && a.source != nullptr &&
         a.row / a.source->block_rows == b.row / b.source->block_rows;
}

// Reads each stored scale that the panel's part of the columns needs, once.
caf::error check_stored_scales(const PackedMatrix& m, const PanelRows& rows) {
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto [s, row] = rows[r];
    if (s == nullptr || s->dtype != DType::f8_e4m3 ||
        (r > 0 && same_row_block(rows[r - 1], rows[r])))
      continue;
    const int64_t row_block = row / s->block_rows;
    for (int64_t block = s->col0 / s->block_cols; block * s->block_cols < s->col0 + m.k; ++block)
      if (const float scale = stored_scale(*s, row_block, block);
          !(scale > 0 && std::isfinite(scale)))
        return bad_block(*s, "_scale_inv", row_block, block,
                         fmt::format("has the scale {}, expected a finite number above 0", scale));
  }
  return {};
}

// The panel's scales [num_scale_blocks][64]; neighbouring rows mostly share a block, also with the
// row above the panel, whose scales stand in lane 63 of `above` (or null).
caf::error pack_scales(const PackedMatrix& m, const RowOf& row_above, const float* above,
                       const PanelRows& rows, float* out) {
  const int64_t first_block = m.k0 / m.block_k;
  std::vector<float> scales(static_cast<size_t>(scale_blocks(m))); // of the row at hand
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto [source, row] = rows[r];
    const auto row_block = source == nullptr ? 0 : row / source->block_rows;
    if (source == nullptr) {
      std::ranges::fill(scales, 0.0f);
    } else if (r == 0 && above != nullptr && same_row_block(row_above, rows[0])) {
      for (size_t b = 0; b < scales.size(); ++b)
        scales[b] = above[b * kPanelRows + kPanelRows - 1];
    } else if (r == 0 || !same_row_block(rows[r - 1], rows[r])) {
      if (source->dtype == DType::f8_e4m3)
        for (size_t b = 0; b < scales.size(); ++b)
          scales[b] = stored_scale(*source, row_block, first_block + static_cast<int64_t>(b));
      else
        fresh_scales(*source, row_block, first_block, scales);
    }
    for (size_t b = 0; b < scales.size(); ++b)
      if (std::isfinite(scales[b]))
        out[b * kPanelRows + r] = scales[b];
      else
        return bad_block(*source, "", row_block, first_block + static_cast<int64_t>(b),
                         "of 128×128 can't be quantized: it holds an infinity or NaN");
  }
  return {};
}

// ---- transposing a tile ----

// What lies side by side in a panel: a float, or a pair of BF16 or E4M3 columns.
template <class Unit>
constexpr int kLanes = 16 / sizeof(Unit);
template <class Unit>
using Vector __attribute__((vector_size(16))) = Unit;

inline void interleave(Vector<uint32_t> a, Vector<uint32_t> b, Vector<uint32_t>& low,
                       Vector<uint32_t>& high) {
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
inline void interleave(Vector<uint16_t> a, Vector<uint16_t> b, Vector<uint16_t>& low,
                       Vector<uint16_t>& high) {
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// `rows` of 64 rows to out[unit][64]. Each row is readable up to whole vectors of units. Small
// squares in registers, so that a store is 16 bytes and not one unit: three times the speed.
template <class Unit>
void transpose(const std::array<const std::byte*, kPanelRows>& rows, int64_t units, Unit* out) {
  constexpr int kL = kLanes<Unit>;
  for (int64_t u = 0; u < units; u += kL)
    for (int64_t r = 0; r < kPanelRows; r += kL) {
      Vector<Unit> v[kL], w[kL];
      for (int i = 0; i < kL; ++i)
        std::memcpy(&v[i], rows[static_cast<size_t>(r + i)] + u * int64_t{sizeof(Unit)}, 16);
      // Interleaving vector i with vector i + L/2, log2 L times, is a transposition.
      for (int round = 1; round < kL; round *= 2) {
        for (int i = 0; i < kL / 2; ++i)
          interleave(v[i], v[i + kL / 2], w[2 * i], w[2 * i + 1]);
        std::copy_n(w, kL, v);
      }
      for (int i = 0; i < std::min<int64_t>(kL, units - u); ++i)
        std::memcpy(out + (u + i) * kPanelRows + r, &v[i], 16);
    }
}

// The multipliers of the panel's row r for `n` columns from `column` of the matrix on.
void spread_scales(const PackedMatrix& m, const float* scales, size_t r, int64_t column, int64_t n,
                   float* out) {
  const int64_t first_block = m.k0 / m.block_k, first = m.k0 + column;
  for (int64_t i = 0; i < n;) {
    const int64_t block = (first + i) / m.block_k;
    const int64_t end = std::min(n, (block + 1) * m.block_k - first);
    std::fill(out + i, out + end,
              scales[(block - first_block) * kPanelRows + static_cast<int64_t>(r)]);
    i = end;
  }
}

// Columns [begin, begin + k) of the matrix into a panel; `scales` is the panel's, for E4M3.
template <class Unit>
void pack_segment(const PackedMatrix& m, const PanelRows& rows, int64_t begin, int64_t k,
                  const float* scales, std::byte* to) {
  const int64_t per_unit = int64_t{sizeof(Unit)} / size_of(m.dtype);
  // A line more than the columns, so that rows don't meet in the same sets of the cache.
  constexpr int64_t kLine = 64;
  const int64_t tile_bytes = kTile * size_of(m.dtype);
  alignas(kLine) std::byte tiles[kPanelRows * (kTile * sizeof(float) + kLine)];
  std::array<const std::byte*, kPanelRows> from;
  auto* out = reinterpret_cast<Unit*>(to);
  for (int64_t i = 0; i < k; i += kTile) {
    const int64_t n = std::min(kTile, k - i);
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto* s = rows[r].source;
      if (s != nullptr && s->dtype == m.dtype && n == kTile) {
        from[r] = at(*s, rows[r].row, s->col0 + begin + i);
        continue;
      }
      std::byte* const tile = tiles + static_cast<int64_t>(r) * (tile_bytes + kLine);
      from[r] = tile;
      if (n < kTile || s == nullptr) // padding, also of an odd K
        std::memset(tile, 0, static_cast<size_t>(tile_bytes));
      if (s == nullptr)
        continue;
      const auto convert = conversion(s->dtype, m.dtype);
      float scale[kTile];
      if (convert == to_codes)
        spread_scales(m, scales, r, begin + i, n, scale);
      convert(*s, rows[r].row, s->col0 + begin + i, n, scale, tile);
    }
    const int64_t units = (n + n % 2) / per_unit;
    transpose(from, units, out);
    out += units * kPanelRows;
  }
}

} // namespace

KSegments whole_k(int64_t k) {
  KSegments s;
  s.begin[1] = k;
  return s;
}

KSegments head_segments(int64_t heads, int64_t v_head_dim) {
  KSegments s;
  s.count = kMaxSegments;
  while (heads % s.count != 0)
    s.count /= 2;
  for (int i = 0; i <= s.count; ++i)
    s.begin[i] = heads / s.count * i * v_head_dim;
  return s;
}

KSegments width_segments(int64_t width) {
  const int64_t granules = std::max<int64_t>((width + 127) / 128, 1);
  KSegments s;
  s.count = 1;
  while (s.count * 2 <= std::min<int64_t>(kMaxSegments, granules))
    s.count *= 2;
  for (int i = 0; i <= s.count; ++i)
    s.begin[i] = std::min(width, i * granules / s.count * 128);
  return s;
}

KSegments slice(const KSegments& all, int tp_rank, int tp) {
  KSegments part;
  part.count = all.count / tp;
  for (int i = 0; i <= part.count; ++i)
    part.begin[i] = all.begin[tp_rank * part.count + i];
  return part;
}

int64_t packed_bytes(const PackedMatrix& shape) {
  return align64(data_bytes(shape)) +
         align64(shape.panels() * scale_blocks(shape) * kPanelRows * int64_t{sizeof(float)});
}

void attach(PackedMatrix& matrix, const std::byte* memory) {
  matrix.data = memory;
  matrix.scales = matrix.dtype == DType::f8_e4m3
                      ? reinterpret_cast<const float*>(memory + align64(data_bytes(matrix)))
                      : nullptr;
}

caf::error pack(PackedMatrix& matrix, std::span<const WeightSource> sources, std::byte* memory,
                int64_t panel_begin, int64_t panel_end) {
  attach(matrix, memory);
  const bool f8 = matrix.dtype == DType::f8_e4m3;
  const int64_t panel_size = stored_k(matrix) * kPanelRows * size_of(matrix.dtype);
  const int64_t panel_scales = scale_blocks(matrix) * kPanelRows;
  auto* all_scales = reinterpret_cast<float*>(memory + align64(data_bytes(matrix)));
  RowOf row_above;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    PanelRows rows;
    for (int64_t r = 0; r < kPanelRows && panel * kPanelRows + r < matrix.n; ++r)
      rows[static_cast<size_t>(r)] = row_of(sources, panel * kPanelRows + r);
    if (auto error = check_stored_scales(matrix, rows))
      return error;
    float* scales = all_scales + panel * panel_scales;
    if (f8)
      if (auto error =
              pack_scales(matrix, row_above, panel > panel_begin ? scales - panel_scales : nullptr,
                          rows, scales))
        return error;
    row_above = rows.back();
    std::byte* out = memory + panel * panel_size;
    for (int s = 0; s < matrix.segments.count; ++s) {
      const int64_t begin = matrix.segments.begin[s], k = matrix.segments.begin[s + 1] - begin;
      if (f8)
        pack_segment<uint16_t>(matrix, rows, begin, k, scales, out);
      else
        pack_segment<uint32_t>(matrix, rows, begin, k, scales, out);
      out += (k + k % 2) * kPanelRows * size_of(matrix.dtype);
    }
  }
  return {};
}

} // namespace troupe
