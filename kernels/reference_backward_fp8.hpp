// The three products of a linear layer in the FP8 recipe of training (specification §5.5), with
// exact E4M3 numerics: each block of 128 along the contraction is one chain of fused multiply-adds
// in FP32 from +0, in pairs like BF16 (kernels/reference_backward_bf16.hpp: codes are BF16 values,
// and nothing is small enough to be flushed); acc = fma(scale_a · scale_b, block_sum, acc).
//
//   fprop  x 1×128 along k,        w 128×128
//   dgrad  dy 1×128 along n,       w 128×128, the same codes
//   wgrad  dy and x 128×1 along m: the 1×128 codes of x, dequantized and quantized again
//
// Wgrad goes on from the dw it finds, so calls whose rows are multiples of 128 (the last one may be
// short) give the bits of one call.
#pragma once

#include "config/dtype.hpp"
#include "kernels/reference_backward.hpp"
#include "kernels/reference_backward_bf16.hpp"

namespace troupe::reference {

inline constexpr int64_t kFp8Block = 128;
enum class Fp8Scale : uint8_t { exact, power_of_two };

// amax/448, or the next power of two from there on.
[[nodiscard]] inline float fp8_scale(float amax, Fp8Scale kind) {
  const float scale = amax / 448.0f;
  if (kind == Fp8Scale::exact)
    return scale;
  int exponent = 0;
  const float fraction = std::frexp(scale, &exponent);
  return std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
}

// A matrix in E4M3 with one scale per tile; last tiles may be ragged.
struct Fp8Matrix {
  int64_t tile_rows = 1, tile_columns = 1;
  int64_t columns = 0;
  std::vector<uint8_t> codes; // [rows, columns]
  std::vector<float> scales;  // [ceil(rows / tile_rows), ceil(columns / tile_columns)]

  [[nodiscard]] float code(int64_t row, int64_t column) const {
    return e4m3_to_float(codes[static_cast<size_t>(row * columns + column)]);
  }
  [[nodiscard]] float& scale(int64_t row, int64_t column) {
    return scales[scale_index(row, column)];
  }
  [[nodiscard]] float scale(int64_t row, int64_t column) const {
    return scales[scale_index(row, column)];
  }
  [[nodiscard]] float operator()(int64_t row, int64_t column) const {
    return code(row, column) * scale(row, column);
  }

private:
  [[nodiscard]] size_t scale_index(int64_t row, int64_t column) const {
    const int64_t tiles = (columns + tile_columns - 1) / tile_columns;
    return static_cast<size_t>(row / tile_rows * tiles + column / tile_columns);
  }
};

// Quantizes x(row, column). min_amax is 1e-4 for activations and their gradients; with 0, as for
// weights, a tile of zeros has scale 1.
template <class X>
[[nodiscard]] Fp8Matrix quantize_fp8(int64_t rows, int64_t columns, X x, int64_t tile_rows,
                                     int64_t tile_columns, float min_amax, Fp8Scale kind) {
  Fp8Matrix q{tile_rows, tile_columns, columns, {}, {}};
  q.codes.resize(static_cast<size_t>(rows * columns));
  q.scales.assign(static_cast<size_t>((rows + tile_rows - 1) / tile_rows *
                                      ((columns + tile_columns - 1) / tile_columns)),
                  min_amax);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      q.scale(r, c) = std::max(q.scale(r, c), std::abs(static_cast<float>(x(r, c))));
  for (float& s : q.scales)
    s = s == 0 ? 1.0f : fp8_scale(s, kind);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      q.codes[static_cast<size_t>(r * columns + c)] =
          float_to_e4m3(static_cast<float>(x(r, c)) / q.scale(r, c));
  return q;
}

template <class X>
[[nodiscard]] Fp8Matrix quantize_activations(int64_t rows, int64_t columns, X x,
                                             Fp8Scale kind = Fp8Scale::exact) {
  return quantize_fp8(rows, columns, x, 1, kFp8Block, 1e-4f, kind);
}
// For wgrad; x may be an Fp8Matrix, which is then dequantized.
template <class X>
[[nodiscard]] Fp8Matrix quantize_along_tokens(int64_t rows, int64_t columns, X x,
                                              Fp8Scale kind = Fp8Scale::exact) {
  return quantize_fp8(rows, columns, x, kFp8Block, 1, 1e-4f, kind);
}
template <class X>
[[nodiscard]] Fp8Matrix quantize_weight(int64_t rows, int64_t columns, X x) {
  return quantize_fp8(rows, columns, x, kFp8Block, kFp8Block, 0, Fp8Scale::exact);
}

// acc + Σ over n elements of the contraction: code_a(i) · code_b(i), a block at a time;
// scales(i) is the product of the scales of the block that i begins.
template <class A, class B, class Scales>
[[nodiscard]] float fp8_chain(float acc, int64_t n, A code_a, B code_b, Scales scales) {
  for (int64_t first = 0; first < n; first += kFp8Block) {
    const float sum = bf16_chain(
        0.0f, std::min(n - first, kFp8Block), [&](int64_t i) { return code_a(first + i); },
        [&](int64_t i) { return code_b(first + i); });
    acc = std::fma(scales(first), sum, acc);
  }
  return acc;
}

inline void fp8_fprop(int64_t rows, int64_t n, int64_t k, const Fp8Matrix& x, const Fp8Matrix& w,
                      Grid<float> y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      y(r, i) = fp8_chain(
          0, k, [&](int64_t c) { return x.code(r, c); }, [&](int64_t c) { return w.code(i, c); },
          [&](int64_t c) { return x.scale(r, c) * w.scale(i, c); });
}

// Goes on from dx.
inline void fp8_dgrad(int64_t rows, int64_t n, int64_t k, const Fp8Matrix& dy, const Fp8Matrix& w,
                      Grid<float> dx) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < k; ++c)
      dx(r, c) = fp8_chain(
          dx(r, c), n, [&](int64_t i) { return dy.code(r, i); },
          [&](int64_t i) { return w.code(i, c); },
          [&](int64_t i) { return dy.scale(r, i) * w.scale(i, c); });
}

inline void fp8_wgrad(int64_t rows, int64_t n, int64_t k, const Fp8Matrix& dy, const Fp8Matrix& x,
                      Grid<float> dw) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < k; ++c)
      dw(i, c) = fp8_chain(
          dw(i, c), rows, [&](int64_t r) { return dy.code(r, i); },
          [&](int64_t r) { return x.code(r, c); },
          [&](int64_t r) { return dy.scale(r, i) * x.scale(r, c); });
}

} // namespace troupe::reference
