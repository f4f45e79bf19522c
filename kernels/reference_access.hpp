// How the reference backend reads and writes what it is lent: element by element, as floats.
#pragma once

#include "kernels/backend.hpp"
#include "kernels/reference_math.hpp"

namespace troupe::reference {

[[nodiscard]] inline float get(const Rows& x, int64_t row, int64_t i) {
  if (x.dtype == DType::f32)
    return static_cast<const float*>(x.data)[row * x.stride + i];
  return to_float(static_cast<const BF16*>(x.data)[row * x.stride + i]);
}

inline void put(const MutableRows& x, int64_t row, int64_t i, float value) {
  if (x.dtype == DType::f32)
    static_cast<float*>(x.data)[row * x.stride + i] = value;
  else
    static_cast<BF16*>(x.data)[row * x.stride + i] = to_bf16(value);
}

[[nodiscard]] inline float rounded(DType a, float value) {
  return a == DType::bf16 ? to_float(to_bf16(value)) : value;
}

// Reads a packed matrix (kernels/packed_matrix.hpp has the layout).
class PackedReader {
public:
  explicit PackedReader(const PackedMatrix& m) : m_(m), first_block_(m.k0 / m.block_k) {
    for (int s = 0; s < m.segments.count; ++s) {
      start_[s] = stored_;
      stored_ += (m.segments.begin[s + 1] - m.segments.begin[s] + 1) / 2 * 2;
    }
    if (m.dtype == DType::f8_e4m3 && m.k > 0)
      blocks_ = (m.k0 + m.k - 1) / m.block_k - first_block_ + 1;
  }
  [[nodiscard]] const PackedMatrix& matrix() const { return m_; }

  // Element (row, column) of segment s; codes of E4M3 unscaled.
  [[nodiscard]] float at(int64_t row, int s, int64_t column) const {
    const int64_t panel = row / kPanelRows, lane = row % kPanelRows;
    const int64_t k = start_[s] + column - m_.segments.begin[s];
    if (m_.dtype == DType::f32)
      return reinterpret_cast<const float*>(m_.data)[(panel * stored_ + k) * kPanelRows + lane];
    const int64_t i = (panel * stored_ + k / 2 * 2) * kPanelRows + lane * 2 + k % 2;
    if (m_.dtype == DType::bf16)
      return to_float(reinterpret_cast<const BF16*>(m_.data)[i]);
    return e4m3_to_float(static_cast<uint8_t>(m_.data[i]));
  }
  // The scale of a row in the block that holds a column, and where that block ends.
  [[nodiscard]] float scale(int64_t row, int64_t column) const {
    const int64_t block = (m_.k0 + column) / m_.block_k - first_block_;
    return m_.scales[(row / kPanelRows * blocks_ + block) * kPanelRows + row % kPanelRows];
  }
  [[nodiscard]] int64_t block_end(int64_t column) const {
    return ((m_.k0 + column) / m_.block_k + 1) * m_.block_k - m_.k0;
  }

private:
  const PackedMatrix& m_;
  int64_t first_block_, blocks_ = 0;
  int64_t start_[kMaxSegments] = {};
  int64_t stored_ = 0; // columns of all segments with their padding
};

// One row of weights times x: x(k) is column k of the part, x_scale(k) the activation scale there.
template <class X, class XScale>
[[nodiscard]] float product(const PackedReader& w, int64_t row, X x, XScale x_scale) {
  const KSegments& segments = w.matrix().segments;
  std::array<float, kMaxSegments> parts{};
  for (int s = 0; s < segments.count; ++s) {
    const auto weight = [&](int64_t k) { return w.at(row, s, k); };
    const int64_t end = segments.begin[s + 1];
    if (w.matrix().dtype != DType::f8_e4m3) {
      parts[static_cast<size_t>(s)] = chain<float>(segments.begin[s], end, x, weight);
      continue;
    }
    float sum = 0;
    for (int64_t k = segments.begin[s], last; k < end; k = last) {
      last = std::min(end, w.block_end(k));
      sum = std::fma(x_scale(k) * w.scale(row, k), chain<float>(k, last, x, weight), sum);
    }
    parts[static_cast<size_t>(s)] = sum;
  }
  return tree<float>({parts.data(), static_cast<size_t>(segments.count)});
}
template <class X>
[[nodiscard]] float product(const PackedReader& w, int64_t row, X x) {
  return product(w, row, x, [](int64_t) { return 1.0f; });
}

void rope(const RopeArgs& args, Workers& workers);
void gate(const GateArgs& args, Workers& workers);
void mla_naive(const MlaNaiveArgs& args, Workers& workers);
void mla_absorbed(const MlaAbsorbedArgs& args, Workers& workers);

} // namespace troupe::reference
