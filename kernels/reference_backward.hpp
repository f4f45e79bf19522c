// The backward formulas of training (specification §5.1) as templates over the number type: float
// is the arithmetic, double meets finite differences and the specification's vectors.
//
// Matrices are plain row-major memory, not packed: weights change with every step. A `Grid` or any
// callable `x(row, column)` reads an operand, so that BF16 operands need no copy: sums are in T.
//
// Order of sums. An element of a weight's gradient is ONE chain of fused multiply-adds over
// ascending rows that goes on from the value it finds. So gradients do not depend on how the rows
// were cut into calls, nor on threads that share out its columns. Everything else is a function of
// one row. Zero rows do nothing. Outputs may not alias inputs unless said.
#pragma once

#include "kernels/reference_math.hpp"

#include <type_traits>

namespace troupe::reference {

// A row-major matrix, lent.
template <class T>
struct Grid {
  T* data = nullptr;
  int64_t stride = 0; // elements from one row to the next
  T& operator()(int64_t row, int64_t column) const { return data[row * stride + column]; }
  operator Grid<const T>() const requires(!std::is_const_v<T>) { return {data, stride}; }
};

[[nodiscard]] inline double log(double x) { return log_f64(x); }
[[nodiscard]] inline float log(float x) { return static_cast<float>(log_f64(x)); }

// ---- linear: y = W x, W [n, k] ------------------------------------------------------------------

// y[m, n] = Σ_k x(m, k) · w(n, k), ascending k.
template <class T, class X, class W>
void linear_fprop(int64_t rows, int64_t n, int64_t k, X x, W w, Grid<T> y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      y(r, i) = chain<T>(
          0, k, [&](int64_t c) { return static_cast<T>(x(r, c)); },
          [&](int64_t c) { return static_cast<T>(w(i, c)); });
}

// dx[m, k] = Σ_n dy(m, n) · w(n, k), ascending n.
template <class T, class DY, class W>
void linear_dgrad(int64_t rows, int64_t n, int64_t k, DY dy, W w, Grid<T> dx) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < k; ++c)
      dx(r, c) = chain<T>(
          0, n, [&](int64_t i) { return static_cast<T>(dy(r, i)); },
          [&](int64_t i) { return static_cast<T>(w(i, c)); });
}

// dw[n, k] += Σ_m dy(m, n) · x(m, k), ascending m, going on from dw.
template <class T, class DY, class X>
void linear_wgrad(int64_t rows, int64_t n, int64_t k, DY dy, X x, Grid<T> dw) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < k; ++c) {
      T sum = dw(i, c);
      for (int64_t r = 0; r < rows; ++r)
        sum = std::fma(static_cast<T>(dy(r, i)), static_cast<T>(x(r, c)), sum);
      dw(i, c) = sum;
    }
}

// ---- rows ---------------------------------------------------------------------------------------

// Backward of y = w ⊙ x·r, r = 1 / sqrt(mean(x²) + eps). dx is overwritten and may alias dy;
// dw [n] is added to.
template <class T>
void rms_norm_backward(int64_t rows, int64_t n, T eps, Grid<const T> x, const T* w,
                       Grid<const T> dy, Grid<T> dx, T* dw) {
  for (int64_t row = 0; row < rows; ++row) {
    const auto at = [&](int64_t i) { return x(row, i); };
    const T r = T{1} / std::sqrt(lanes<T>(n, at, at) / static_cast<T>(n) + eps);
    const T dot = lanes<T>(
        n, [&](int64_t i) { return w[i] * dy(row, i); }, at);
    const T along = r * r * r / static_cast<T>(n) * dot;
    for (int64_t i = 0; i < n; ++i) {
      const T g = dy(row, i);
      dw[i] = std::fma(g, x(row, i) * r, dw[i]);
      dx(row, i) = std::fma(-x(row, i), along, r * (w[i] * g));
    }
  }
}

// Backward of z = silu(a) ⊙ b. da may alias a or dz, db may alias b or dz.
template <class T>
void swiglu_backward(int64_t rows, int64_t n, Grid<const T> a, Grid<const T> b, Grid<const T> dz,
                     Grid<T> da, Grid<T> db) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) {
      const T g = dz(row, i), gate = a(row, i), up = b(row, i);
      const T s = sigmoid(gate);
      da(row, i) = g * up * (s * (T{1} + gate * (T{1} - s)));
      db(row, i) = g * (gate * s);
    }
}

// Backward of RoPE, in place: rotation by the opposite angle. cos and sin (with YaRN's multiplier,
// if any) are [max_positions, dim/2]; pairs are (2i, 2i+1) when interleaved, else (i, i + dim/2).
template <class T>
void rope_backward(int64_t rows, int64_t dim, const int32_t* positions, Grid<const T> cos,
                   Grid<const T> sin, bool interleaved, Grid<T> dx) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < dim / 2; ++i) {
      const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + dim / 2;
      const auto [u, v] =
          rotate(dx(row, first), dx(row, second), cos(positions[row], i), -sin(positions[row], i));
      dx(row, first) = u;
      dx(row, second) = v;
    }
}

// table[ids[r]] += dy[r], in the order of the rows. Ids are rows of the table: the caller checked.
template <class T>
void embedding_backward(int64_t rows, int64_t n, const int32_t* ids, Grid<const T> dy,
                        Grid<T> dtable) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i)
      dtable(ids[row], i) += dy(row, i);
}

// ---- cross-entropy ------------------------------------------------------------------------------

inline constexpr int32_t kNoTarget = -1; // this row has no loss and no gradient

// Returns Σ_rows lse - logits[target] in F64, rows in order (not yet divided); lse[r] is the
// log-sum-exp of a row: exponentials in T, their sum in F64 over 16 lanes. Targets are kNoTarget or
// below vocab: the caller checked.
template <class T>
[[nodiscard]] double cross_entropy(int64_t rows, int64_t vocab, Grid<const T> logits,
                                   const int32_t* targets, T* lse) {
  double loss = 0;
  for (int64_t row = 0; row < rows; ++row) {
    T max = kMinusInf<T>;
    for (int64_t i = 0; i < vocab; ++i)
      max = std::max(max, logits(row, i));
    const double sum = lanes<double>(
        vocab, [&](int64_t i) { return static_cast<double>(exp(logits(row, i) - max)); },
        [](int64_t) { return 1.0; });
    const double whole = static_cast<double>(max) + log_f64(sum);
    lse[row] = static_cast<T>(whole);
    if (targets[row] != kNoTarget)
      loss += whole - static_cast<double>(logits(row, targets[row]));
  }
  return loss;
}

// dlogits = weight · (softmax - onehot); weight is one over the divisor of §5.7 times λ or the
// like. In place allowed.
template <class T>
void cross_entropy_backward(int64_t rows, int64_t vocab, Grid<const T> logits,
                            const int32_t* targets, const T* lse, T weight, Grid<T> dlogits) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < vocab; ++i) {
      const T p = exp(logits(row, i) - lse[row]);
      dlogits(row, i) =
          targets[row] == kNoTarget ? T{0} : weight * (i == targets[row] ? p - T{1} : p);
    }
}

// ---- optimizer ----------------------------------------------------------------------------------

template <class T>
struct AdamW {
  T lr = 0, beta1 = T(0.9), beta2 = T(0.95), eps = T(1e-8), weight_decay = 0;
  int64_t step = 1; // of this update, from 1
};

// One update of a tensor (§5.7): decay first, then the bias-corrected step, eps outside the root.
// g is scaled by `clip` on the way. `round` rounds a moment to the dtype it is kept in; the step
// itself uses the moments before that rounding.
template <class T, class Round>
void adamw(const AdamW<T>& o, int64_t n, T clip, const T* g, T* theta, T* m, T* v, Round round) {
  const auto correct_m = static_cast<T>(moment_correction(static_cast<double>(o.beta1), o.step));
  const auto correct_v = static_cast<T>(moment_correction(static_cast<double>(o.beta2), o.step));
  for (int64_t i = 0; i < n; ++i) {
    const T gradient = g[i] * clip;
    const T new_m = o.beta1 * m[i] + (T{1} - o.beta1) * gradient;
    const T new_v = o.beta2 * v[i] + (T{1} - o.beta2) * gradient * gradient;
    const T decayed = theta[i] - o.lr * o.weight_decay * theta[i];
    theta[i] = decayed - o.lr * (new_m / correct_m) / (std::sqrt(new_v / correct_v) + o.eps);
    m[i] = round(new_m);
    v[i] = round(new_v);
  }
}

// What gradients are multiplied by so that their norm is at most `max_norm` (§5.7). A norm of
// NaN stays one: the caller stops there.
[[nodiscard]] inline double clip_factor(double norm, double max_norm) {
  return norm <= max_norm ? 1.0 : max_norm / norm;
}

} // namespace troupe::reference
