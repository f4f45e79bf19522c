#include "kernels/packed_matrix.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

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

// Element (r, c) of the whole tensor, dequantized exactly.
float element(const WeightSource& s, int64_t r, int64_t c) {
  const auto i = static_cast<size_t>(r * s.total_cols + c);
  switch (s.dtype) {
  case DType::f32: {
    float v;
    std::memcpy(&v, s.data + i * 4, 4);
    return v;
  }
  case DType::bf16: {
    BF16 v;
    std::memcpy(&v, s.data + i * 2, 2);
    return to_float(v);
  }
  case DType::f16: {
    uint16_t v;
    std::memcpy(&v, s.data + i * 2, 2);
    return f16_to_float(v);
  }
  default: {
    const float code = e4m3_to_float(static_cast<uint8_t>(s.data[i]));
    if (s.scales == nullptr)
      return code;
    const int64_t blocks = (s.total_cols + s.block_cols - 1) / s.block_cols;
    float scale;
    std::memcpy(&scale, s.scales + static_cast<size_t>((r / s.block_rows) * blocks + c / s.block_cols) * 4, 4);
    return code * scale;
  }
  }
}

// The multiplier of a global block: stored, or of a block that is to be quantized now.
float block_scale(const WeightSource& s, int64_t row, int64_t block) {
  if (s.dtype == DType::f8_e4m3) {
    const int64_t blocks = (s.total_cols + s.block_cols - 1) / s.block_cols;
    float scale;
    std::memcpy(&scale, s.scales + static_cast<size_t>((row / s.block_rows) * blocks + block) * 4, 4);
    return scale;
  }
  const int64_t r0 = row / s.block_rows * s.block_rows;
  const int64_t r1 = std::min(r0 + s.block_rows, s.total_rows);
  const int64_t c0 = block * s.block_cols, c1 = std::min(c0 + s.block_cols, s.total_cols);
  float amax = 0;
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t c = c0; c < c1; ++c)
      amax = std::max(amax, std::fabs(element(s, r, c)));
  return amax > 0 ? amax / 448.0f : 1.0f;
}

// Where panel row `n` of the stacked sources comes from; null for padding.
struct RowOf {
  const WeightSource* source = nullptr;
  int64_t row = 0; // global
};

RowOf row_of(std::span<const WeightSource> sources, int64_t n) {
  for (const auto& s : sources) {
    if (n < s.rows)
      return {&s, s.row0 + n};
    n -= s.rows;
  }
  return {};
}

// ---- packing one panel ----

// BF16 -> BF16: pairs of columns of 64 rows side by side, a tile at a time so that both sides stay
// in the first-level cache.
void pack_bf16_rows(const std::byte* const rows[], int64_t k, uint32_t* out) {
  constexpr int64_t kTile = 32; // pairs
  const int64_t pairs = k / 2;
  for (int64_t p0 = 0; p0 < pairs; p0 += kTile) {
    const int64_t p1 = std::min(p0 + kTile, pairs);
    for (int64_t r = 0; r < kPanelRows; ++r) {
      if (rows[r] == nullptr) {
        for (int64_t p = p0; p < p1; ++p)
          out[p * kPanelRows + r] = 0;
        continue;
      }
      uint32_t pair[kTile];
      std::memcpy(pair, rows[r] + p0 * 4, static_cast<size_t>(p1 - p0) * 4);
      for (int64_t p = p0; p < p1; ++p)
        out[p * kPanelRows + r] = pair[p - p0];
    }
  }
  if (k % 2 != 0)
    for (int64_t r = 0; r < kPanelRows; ++r) {
      uint16_t last = 0;
      if (rows[r] != nullptr)
        std::memcpy(&last, rows[r] + (k - 1) * 2, 2);
      out[pairs * kPanelRows + r] = last;
    }
}

// E4M3 -> E4M3, the same with bytes.
void pack_f8_rows(const std::byte* const rows[], int64_t k, uint16_t* out) {
  constexpr int64_t kTile = 64; // pairs
  const int64_t pairs = k / 2;
  for (int64_t p0 = 0; p0 < pairs; p0 += kTile) {
    const int64_t p1 = std::min(p0 + kTile, pairs);
    for (int64_t r = 0; r < kPanelRows; ++r) {
      uint16_t pair[kTile] = {};
      if (rows[r] != nullptr)
        std::memcpy(pair, rows[r] + p0 * 2, static_cast<size_t>(p1 - p0) * 2);
      for (int64_t p = p0; p < p1; ++p)
        out[p * kPanelRows + r] = pair[p - p0];
    }
  }
  if (k % 2 != 0)
    for (int64_t r = 0; r < kPanelRows; ++r)
      out[pairs * kPanelRows + r] =
        rows[r] == nullptr ? uint16_t{0} : static_cast<uint16_t>(rows[r][k - 1]);
}

// Everything else, element by element.
void pack_elements(const PackedMatrix& m, const RowOf rows[], int64_t begin, int64_t k,
                   std::byte* out) {
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const auto& row = rows[r];
    float scale = 1;
    int64_t scale_of = -1;
    for (int64_t i = 0; i < (k + 1) / 2 * 2; ++i) {
      float value = 0;
      if (row.source != nullptr && i < k)
        value = element(*row.source, row.row, row.source->col0 + begin + i);
      const auto at = m.dtype == DType::f32
                        ? static_cast<size_t>(i * kPanelRows + r)
                        : static_cast<size_t>((i / 2 * kPanelRows + r) * 2 + i % 2);
      if (m.dtype == DType::f32) {
        std::memcpy(out + at * 4, &value, 4);
      } else if (m.dtype == DType::bf16) {
        const BF16 b = to_bf16(value);
        std::memcpy(out + at * 2, &b, 2);
      } else {
        const int64_t block = (m.k0 + begin + i) / m.block_k;
        if (row.source != nullptr && i < k && block != scale_of) {
          scale = block_scale(*row.source, row.row, block);
          scale_of = block;
        }
        out[at] = static_cast<std::byte>(float_to_e4m3(value / scale));
      }
    }
  }
}

void pack_segment(const PackedMatrix& m, const RowOf rows[], int64_t begin, int64_t k,
                  std::byte* out) {
  bool plain = true; // every row in the stored dtype already
  const std::byte* pointers[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const auto* s = rows[r].source;
    pointers[r] = nullptr;
    if (s == nullptr)
      continue;
    plain = plain && s->dtype == m.dtype;
    pointers[r] =
      s->data + static_cast<size_t>((rows[r].row * s->total_cols + s->col0 + begin) * size_of(s->dtype));
  }
  if (plain && m.dtype == DType::bf16)
    pack_bf16_rows(pointers, k, reinterpret_cast<uint32_t*>(out));
  else if (plain && m.dtype == DType::f8_e4m3)
    pack_f8_rows(pointers, k, reinterpret_cast<uint16_t*>(out));
  else
    pack_elements(m, rows, begin, k, out);
}

void pack_scales(const PackedMatrix& m, const RowOf rows[], float* out) {
  const int64_t first = m.k0 / m.block_k;
  const int64_t blocks = scale_blocks(m);
  for (int64_t r = 0; r < kPanelRows; ++r)
    for (int64_t b = 0; b < blocks; ++b)
      out[b * kPanelRows + r] =
        rows[r].source == nullptr ? 0.0f : block_scale(*rows[r].source, rows[r].row, first + b);
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

void bind(PackedMatrix& matrix, const std::byte* memory) {
  matrix.data = memory;
  matrix.scales = matrix.dtype == DType::f8_e4m3
                    ? reinterpret_cast<const float*>(memory + align64(data_bytes(matrix)))
                    : nullptr;
}

void pack(PackedMatrix& matrix, std::span<const WeightSource> sources, std::byte* memory,
          int64_t panel_begin, int64_t panel_end) {
  troupe::bind(matrix, memory); // in full: std::bind would match a std::byte* better
  const int64_t panel_size = stored_k(matrix) * kPanelRows * size_of(matrix.dtype);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    RowOf rows[kPanelRows];
    for (int64_t r = 0; r < kPanelRows && panel * kPanelRows + r < matrix.n; ++r)
      rows[r] = row_of(sources, panel * kPanelRows + r);
    std::byte* out = memory + panel * panel_size;
    for (int s = 0; s < matrix.segments.count; ++s) {
      const int64_t begin = matrix.segments.begin[s];
      const int64_t k = matrix.segments.begin[s + 1] - begin;
      pack_segment(matrix, rows, begin, k, out);
      out += (k + 1) / 2 * 2 * kPanelRows * size_of(matrix.dtype);
    }
    if (matrix.dtype == DType::f8_e4m3)
      pack_scales(matrix, rows,
                  reinterpret_cast<float*>(memory + align64(data_bytes(matrix))) +
                    panel * scale_blocks(matrix) * kPanelRows);
  }
}

} // namespace troupe
