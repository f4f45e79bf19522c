// MLA's naive causal attention for training, forward and backward (specification §2.2, §5.1), as
// templates like kernels/reference_backward.hpp. Projections, norms and RoPE are the caller's.
//
// Flash-style: between the two only out and the log-sum-exp per (row, head) are kept; the backward
// computes the weights again.
#pragma once

#include "kernels/reference_backward.hpp"
#include "kernels/reference_backward_bf16.hpp"

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
template <class T, class Sum = ChainSum<T>>
[[nodiscard]] T score(const AttentionShape& s, const AttentionInputs<const T>& in, int64_t t,
                      int64_t j, int64_t head) {
  const int64_t d_qk = s.d_nope + s.d_rope;
  return Sum{}(
      d_qk, [&](int64_t i) { return in.q(t, head * d_qk + i); },
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
template <class T, class Sum = ChainSum<T>>
void attention_forward(const AttentionShape& s, T tau, const AttentionInputs<const T>& in,
                       Grid<T> out, Grid<T> lse) {
  std::vector<T> scores;
  for (int64_t t = 0; t < s.rows; ++t)
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t first = s.first_key[t];
      scores.clear();
      for (int64_t j = first; j <= t; ++j)
        scores.push_back(tau * attention_detail::score<T, Sum>(s, in, t, j, head));
      const auto sums = attend<T>(
          t - first + 1, s.key_block, T{1},
          [&](int64_t j) { return scores[static_cast<size_t>(j)]; },
          [&](int64_t j, int64_t i) { return in.v(first + j, head * s.d_v + i); },
          [](T p) { return p; }, std::span<T>(&out(t, head * s.d_v), static_cast<size_t>(s.d_v)),
          Sum{});
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

// The same with BF16 products: operands rounded, the weights and their gradients among them, pairs
// counted from a sample's first row. The softmax itself stays in F32.
inline void attention_backward_bf16(const AttentionShape& s, float tau,
                                    const AttentionInputs<const float>& in, Grid<const float> out,
                                    Grid<const float> lse, Grid<const float> dout,
                                    const AttentionInputs<float>& grad) {
  const int64_t d_qk = s.d_nope + s.d_rope;
  const Bf16Sum sum;
  std::vector<float> memory(static_cast<size_t>(2 * s.rows * s.rows));
  const Grid<float> p{memory.data(), s.rows}, ds{memory.data() + s.rows * s.rows, s.rows};
  const auto end_of = [&](int64_t row) { // of the sample
    int64_t end = row;
    while (end < s.rows && s.first_key[end] == s.first_key[row])
      ++end;
    return end;
  };
  for (int64_t t = 0; t < s.rows; ++t)
    std::fill_n(&grad.k_rope(t, 0), s.d_rope, 0.0f);
  for (int64_t head = 0; head < s.heads; ++head) {
    const int64_t q_at = head * d_qk, k_at = head * s.d_nope, v_at = head * s.d_v;
    std::fill(memory.begin(), memory.end(), 0.0f);
    for (int64_t t = 0; t < s.rows; ++t) {
      const float delta = lanes<float>(
          s.d_v, [&](int64_t i) { return dout(t, v_at + i); },
          [&](int64_t i) { return out(t, v_at + i); });
      for (int64_t j = s.first_key[t]; j <= t; ++j) {
        const float score = attention_detail::score<float, Bf16Sum>(s, in, t, j, head);
        const float dp = sum(
            s.d_v, [&](int64_t i) { return in.v(j, v_at + i); },
            [&](int64_t i) { return dout(t, v_at + i); });
        p(t, j) = exp(tau * score - lse(t, head));
        ds(t, j) = tau * (p(t, j) * (dp - delta));
      }
    }
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t first = s.first_key[r], keys = r - first + 1, queries = end_of(r) - first;
      for (int64_t i = 0; i < s.d_v; ++i)
        grad.v(r, v_at + i) = sum(
            queries, [&](int64_t t) { return p(first + t, r); },
            [&](int64_t t) { return dout(first + t, v_at + i); });
      for (int64_t i = 0; i < d_qk; ++i) {
        const bool nope = i < s.d_nope;
        grad.q(r, q_at + i) = sum(
            keys, [&](int64_t j) { return ds(r, first + j); },
            [&](int64_t j) {
              return nope ? in.k_nope(first + j, k_at + i) : in.k_rope(first + j, i - s.d_nope);
            });
        const float dk = sum(
            queries, [&](int64_t t) { return ds(first + t, r); },
            [&](int64_t t) { return in.q(first + t, q_at + i); });
        if (nope)
          grad.k_nope(r, k_at + i) = dk;
        else
          grad.k_rope(r, i - s.d_nope) += dk;
      }
    }
  }
}

} // namespace troupe::reference
