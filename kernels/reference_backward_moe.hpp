// Backward of gate, balance loss, combine and dispatch (specification §3.2, §3.6, §5.1; contract,
// Canonical sums), as templates like kernels/reference_backward.hpp.
#pragma once

#include "kernels/reference_backward.hpp"

namespace troupe::reference {

// All n_experts affinities of a row, before any bias: what the gate's backward needs again.
template <class T>
void gate_scores(const GateShape& shape, const T* logits, T* scores) {
  if (shape.scoring == ScoringFunc::sigmoid) {
    std::transform(logits, logits + shape.n_experts, scores, sigmoid<T>);
    return;
  }
  const T max = *std::max_element(logits, logits + shape.n_experts);
  T sum = 0;
  for (int64_t e = 0; e < shape.n_experts; ++e)
    sum += scores[e] = exp(logits[e] - max);
  for (int64_t e = 0; e < shape.n_experts; ++e)
    scores[e] /= sum;
}

// dscores[e] += gradient through the weights of the chosen experts idx [top_k]; dweight [top_k] is
// ∂L/∂g. No gradient goes through the choice, nor to the bias.
template <class T>
void gate_weights_backward(const GateShape& shape, T scaling_factor, const T* scores,
                           std::span<const int32_t> idx, const T* dweight, T* dscores) {
  const bool normalized = shape.norm_topk_prob && shape.top_k > 1;
  T sum = 0, dot = 0;
  for (const int32_t e : idx)
    sum += scores[e];
  sum += T{1e-20f};
  for (size_t k = 0; k < idx.size(); ++k)
    dot = std::fma(dweight[k], scores[idx[k]] / sum, dot);
  for (size_t k = 0; k < idx.size(); ++k)
    dscores[idx[k]] +=
        normalized ? scaling_factor / sum * (dweight[k] - dot) : scaling_factor * dweight[k];
}

// dlogits [n_experts] from dscores; may alias it.
template <class T>
void gate_scores_backward(const GateShape& shape, const T* scores, const T* dscores, T* dlogits) {
  T dot = 0;
  if (shape.scoring != ScoringFunc::sigmoid)
    for (int64_t e = 0; e < shape.n_experts; ++e)
      dot = std::fma(dscores[e], scores[e], dot);
  for (int64_t e = 0; e < shape.n_experts; ++e)
    dlogits[e] = shape.scoring == ScoringFunc::sigmoid ? dscores[e] * scores[e] * (T{1} - scores[e])
                                                       : scores[e] * (dscores[e] - dot);
}

// f of the balance loss over one sequence, from the experts routed to: idx [rows, top_k].
template <class T>
void balance_fractions(const GateShape& shape, int64_t rows, const int32_t* idx, T* f) {
  std::vector<int64_t> counts(static_cast<size_t>(shape.n_experts));
  for (int64_t i = 0; i < rows * shape.top_k; ++i)
    ++counts[static_cast<size_t>(idx[i])];
  for (int64_t e = 0; e < shape.n_experts; ++e)
    f[e] = rows == 0 ? T{0}
                     : static_cast<T>(shape.n_experts * counts[static_cast<size_t>(e)]) /
                           static_cast<T>(shape.top_k * rows);
}

// Returns alpha · Σ_i f_i P_i of one sequence, and adds its gradient to dscores. scores, dscores:
// [rows, n_experts]; alpha holds the mean over sequences too.
template <class T>
[[nodiscard]] T balance_loss(const GateShape& shape, int64_t rows, T alpha, const T* f,
                             Grid<const T> scores, Grid<T> dscores) {
  T loss = 0;
  for (int64_t row = 0; row < rows; ++row) {
    T sum = 0, dot = 0;
    for (int64_t e = 0; e < shape.n_experts; ++e)
      sum += scores(row, e);
    for (int64_t e = 0; e < shape.n_experts; ++e)
      dot = std::fma(f[e], scores(row, e) / sum, dot);
    loss += dot;
    const T scale = alpha / (static_cast<T>(rows) * sum);
    for (int64_t e = 0; e < shape.n_experts; ++e)
      dscores(row, e) += scale * (f[e] - dot);
  }
  return rows == 0 ? T{0} : alpha * loss / static_cast<T>(rows);
}

// An expert's rows, backward of its weighted output: dz arrives as W_downᵀ ḡ without the gate
// weight. dweight[r] = ⟨dz, z⟩, and dz becomes weight[r] · dz. z is the SwiGLU product.
template <class T>
void expert_weight_backward(int64_t rows, int64_t n, Grid<const T> z, const T* weight, Grid<T> dz,
                            T* dweight) {
  for (int64_t row = 0; row < rows; ++row) {
    dweight[row] = lanes<T>(
        n, [&](int64_t i) { return dz(row, i); }, [&](int64_t i) { return z(row, i); });
    for (int64_t i = 0; i < n; ++i)
      dz(row, i) *= weight[row];
  }
}

// Backward of dispatch for one token: out = Σ over groups by index of round(Σ of the group's rows
// in top-k order), then shared, then router. slots(k) is the row [n] that expert idx[k] returned;
// `round` rounds to the combine dtype. shared and router: [n]. out may alias either.
template <class T, class Slots, class Round>
void dispatch_backward(const GateShape& shape, int64_t n, std::span<const int32_t> idx, Slots slots,
                       const T* shared, const T* router, Round round, T* out) {
  const int64_t group_size = shape.n_experts / shape.n_group;
  for (int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (int64_t group = 0; group < shape.n_group; ++group) {
      T part = 0;
      for (size_t k = 0; k < idx.size(); ++k)
        if (idx[k] / group_size == group)
          part += slots(k)[i];
      sum += round(part);
    }
    out[i] = sum + shared[i] + router[i];
  }
}

} // namespace troupe::reference
