// MLA's naive causal attention for training, forward and backward (specification §2.2, §5.1), as
// templates like kernels/reference_backward.hpp. Projections, norms and RoPE are the caller's.
//
// Flash-style: between the two only out and the log-sum-exp per (row, head) are kept; the backward
// computes the weights again.
#pragma once

#include "kernels/reference_backward.hpp"

namespace troupe::reference {

// One window of rows, as packed: row t sees keys first_key[t] … t, where first_key[t] is the first
// row of its sample (0 everywhere: no mask between documents). Key blocks are aligned to that row,
// so a sample has the bits it would have alone.
struct AttentionShape {
  int64_t rows = 0, heads = 0;
  int64_t d_nope = 0, d_rope = 0, d_v = 0;
  int64_t key_block = 64;
  const int32_t* first_key = nullptr; // [rows]; first_key[t] <= t
};

// q: [rows, heads · (d_nope + d_rope)], nope first, rope part rotated. k_nope: [rows, heads ·
// d_nope]. k_rope: [rows, d_rope], rotated, one for all heads. v: [rows, heads · d_v].
template <class T>
struct AttentionInputs {
  Grid<T> q, k_nope, k_rope, v;
};

namespace attention_detail {

// q_t · k_j of a head, ascending over the nope part, then the rope part.
template <class T>
[[nodiscard]] T score(const AttentionShape& s, const AttentionInputs<const T>& in, int64_t t,
                      int64_t j, int64_t head) {
  const int64_t d_qk = s.d_nope + s.d_rope;
  return chain<T>(
      0, d_qk, [&](int64_t i) { return in.q(t, head * d_qk + i); },
      [&](int64_t i) {
        return i < s.d_nope ? in.k_nope(j, head * s.d_nope + i) : in.k_rope(j, i - s.d_nope);
      });
}

// What one query adds to the gradients of its head; dq is finished by it.
template <class T>
void query_backward(const AttentionShape& s, T tau, const AttentionInputs<const T>& in, int64_t t,
                    int64_t head, const T* out, const T* dout, T lse,
                    const AttentionInputs<T>& grad, Grid<T> head_dk_rope) {
  const int64_t d_qk = s.d_nope + s.d_rope;
  const T delta = lanes<T>(
      s.d_v, [&](int64_t i) { return dout[i]; }, [&](int64_t i) { return out[i]; });
  T* dq = &grad.q(t, head * d_qk);
  std::fill_n(dq, d_qk, T{0});
  for (int64_t j = s.first_key[t]; j <= t; ++j) {
    const T p = exp(tau * score(s, in, t, j, head) - lse);
    const T dp = chain<T>(
        0, s.d_v, [&](int64_t i) { return dout[i]; },
        [&](int64_t i) { return in.v(j, head * s.d_v + i); });
    const T ds = tau * (p * (dp - delta));
    for (int64_t i = 0; i < s.d_v; ++i) {
      T& dv = grad.v(j, head * s.d_v + i);
      dv = std::fma(p, dout[i], dv);
    }
    for (int64_t i = 0; i < d_qk; ++i) {
      const bool nope = i < s.d_nope;
      const T k = nope ? in.k_nope(j, head * s.d_nope + i) : in.k_rope(j, i - s.d_nope);
      T& dk = nope ? grad.k_nope(j, head * s.d_nope + i) : head_dk_rope(j, i - s.d_nope);
      dq[i] = std::fma(ds, k, dq[i]);
      dk = std::fma(ds, in.q(t, head * d_qk + i), dk);
    }
  }
}

} // namespace attention_detail

// out: [rows, heads · d_v]; lse: [rows, heads], of the scores times tau: max + log(sum) of the
// online softmax.
template <class T>
void attention_forward(const AttentionShape& s, T tau, const AttentionInputs<const T>& in,
                       Grid<T> out, Grid<T> lse) {
  std::vector<T> scores;
  for (int64_t t = 0; t < s.rows; ++t)
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t first = s.first_key[t];
      scores.clear();
      for (int64_t j = first; j <= t; ++j)
        scores.push_back(tau * attention_detail::score(s, in, t, j, head));
      const auto sums = attend<T>(
          t - first + 1, s.key_block, T{1},
          [&](int64_t j) { return scores[static_cast<size_t>(j)]; },
          [&](int64_t j, int64_t i) { return in.v(first + j, head * s.d_v + i); },
          [](T p) { return p; }, std::span<T>(&out(t, head * s.d_v), static_cast<size_t>(s.d_v)));
      lse(t, head) = sums.max + log(sums.sum);
    }
}

// Overwrites all four gradients. Sums over queries ascend by row within a head; the shared rope
// key's gradient then adds heads in ascending order, so that heads may be computed anywhere.
template <class T>
void attention_backward(const AttentionShape& s, T tau, const AttentionInputs<const T>& in,
                        Grid<const T> out, Grid<const T> lse, Grid<const T> dout,
                        const AttentionInputs<T>& grad) {
  for (int64_t t = 0; t < s.rows; ++t) {
    std::fill_n(&grad.k_nope(t, 0), s.heads * s.d_nope, T{0});
    std::fill_n(&grad.k_rope(t, 0), s.d_rope, T{0});
    std::fill_n(&grad.v(t, 0), s.heads * s.d_v, T{0});
  }
  std::vector<T> memory(static_cast<size_t>(s.rows * s.d_rope));
  const Grid<T> head_dk_rope{memory.data(), s.d_rope};
  for (int64_t head = 0; head < s.heads; ++head) {
    std::fill(memory.begin(), memory.end(), T{0});
    for (int64_t t = 0; t < s.rows; ++t)
      attention_detail::query_backward(s, tau, in, t, head, &out(t, head * s.d_v),
                                       &dout(t, head * s.d_v), lse(t, head), grad, head_dk_rope);
    for (int64_t t = 0; t < s.rows; ++t)
      for (int64_t i = 0; i < s.d_rope; ++i)
        grad.k_rope(t, i) += head_dk_rope(t, i);
  }
}

} // namespace troupe::reference
