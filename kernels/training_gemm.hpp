// The F32 matrix product of training, on plain memory: the three products of a linear layer are
// strides of one. Weights change with every step, so nothing is packed ahead of a call.
#pragma once

#include "kernels/stream.hpp"

#include <cstdint>

namespace troupe {

// c(i, j) = Σ_s a(i, s) · b(s, j), i < m, j < n, s < k; `accumulate` goes on from the c it finds.
// Each element is one chain of fused multiply-adds over ascending s: the bits of
// kernels/reference_backward.hpp on every CPU, for any number of threads and, when accumulating,
// for any cut of k into calls. c may not alias a or b. Strides are in elements.
struct GemmF32 {
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t a_row = 0, a_sum = 0; // a(i, s) = a[i · a_row + s · a_sum]
  const float* b = nullptr;
  int64_t b_sum = 0, b_column = 0; // b(s, j) = b[s · b_sum + j · b_column]
  float* c = nullptr;
  int64_t c_row = 0; // c(i, j) = c[i · c_row + j]
  bool accumulate = false;
};
void gemm_f32(const GemmF32& g, Workers& workers);

// Row-major x [rows, k], dy and y [rows, n], w [n, k], without padding.
[[nodiscard]] inline GemmF32 fprop_gemm(int64_t rows, int64_t n, int64_t k, const float* x,
                                        const float* w, float* y) {
  return {rows, n, k, x, k, 1, w, 1, k, y, n, false};
}
[[nodiscard]] inline GemmF32 dgrad_gemm(int64_t rows, int64_t n, int64_t k, const float* dy,
                                        const float* w, float* dx) {
  return {rows, k, n, dy, n, 1, w, k, 1, dx, k, false};
}
// dw += dyᵀ x, rows ascending.
[[nodiscard]] inline GemmF32 wgrad_gemm(int64_t rows, int64_t n, int64_t k, const float* dy,
                                        const float* x, float* dw) {
  return {n, k, rows, dy, 1, n, x, k, 1, dw, k, true};
}

} // namespace troupe
