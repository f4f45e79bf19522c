// The formulas of the reference backend as templates over the number type: float is the
// arithmetic (kernels/backend.hpp has the order of every sum), double checks the formulas against
// the specification's vectors. Operands come through callables, so that a formula doesn't know how
// they are stored: `x(i)` reads element i.
#pragma once

#include "config/model_config.hpp"
#include "kernels/math.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace troupe::reference {

template <class T>
inline constexpr T kMinusInf = -std::numeric_limits<T>::infinity();

[[nodiscard]] inline float exp(float x) { return exp_f32(x); }
[[nodiscard]] inline double exp(double x) { return exp_f64(x); }

template <class T>
[[nodiscard]] T sigmoid(T x) {
  return T{1} / (T{1} + exp(-x));
}
template <class T>
[[nodiscard]] T silu(T x) {
  return x * (T{1} / (T{1} + exp(-x)));
}

// ---- sums -------------------------------------------------------------------------------------

// Σ x(i)·w(i), one chain of fused multiply-adds over ascending i from +0.
template <class T, class X, class W>
[[nodiscard]] T chain(int64_t begin, int64_t end, X x, W w) {
  T sum = 0;
  for (int64_t i = begin; i < end; ++i)
    sum = std::fma(x(i), w(i), sum);
  return sum;
}

// How a product of two rows is summed: the default of what takes a Sum.
template <class T>
struct ChainSum {
  template <class X, class W>
  [[nodiscard]] T operator()(int64_t n, X x, W w) const {
    return chain<T>(0, n, x, w);
  }
};

// A binary tree over adjacent pairs; the number of parts is a power of two. Destroys the parts.
template <class T>
[[nodiscard]] T tree(std::span<T> parts) {
  for (size_t n = parts.size(); n > 1; n /= 2)
    for (size_t i = 0; i < n / 2; ++i)
      parts[i] = parts[2 * i] + parts[2 * i + 1];
  return parts.empty() ? T{0} : parts[0];
}

// Σ x(i)·w(i) over 16 lanes, which are then added in halves.
template <class T, class X, class W>
[[nodiscard]] T lanes(int64_t n, X x, W w) {
  std::array<T, 16> lane{};
  for (int64_t i = 0; i < n; ++i) {
    T& sum = lane[static_cast<size_t>(i % 16)];
    sum = std::fma(x(i), w(i), sum);
  }
  for (size_t half = 8; half > 0; half /= 2)
    for (size_t l = 0; l < half; ++l)
      lane[l] += lane[l + half];
  return lane[0];
}

// ---- rows -------------------------------------------------------------------------------------

// put(i, w_i · (x_i · r)), r = 1 / sqrt(sum(x²)/n + eps).
template <class T, class X, class W, class Put>
void rms_norm(int64_t n, T eps, X x, W w, Put put) {
  const T sum = lanes<T>(n, x, x);
  const T r = T{1} / std::sqrt(sum / static_cast<T>(n) + eps);
  for (int64_t i = 0; i < n; ++i)
    put(i, w(i) * (x(i) * r));
}

// A rotation pair (§2.4).
template <class T>
[[nodiscard]] std::pair<T, T> rotate(T x, T y, T cos, T sin) {
  return {std::fma(x, cos, -(y * sin)), std::fma(x, sin, y * cos)};
}

// ---- attention --------------------------------------------------------------------------------

// The largest score of a softmax (times tau), and Σ exp(score - max).
template <class T>
struct SoftmaxSums {
  T max, sum;
};

// One query's softmax over keys 0 … num_keys - 1, online in blocks of `block` keys: score(j) is
// q·k_j, value(j, i) element i of its value; `round` rounds a weight before it meets the values,
// `add` sums a block's products.
template <class T, class Score, class Value, class Round, class Sum = ChainSum<T>>
SoftmaxSums<T> attend(int64_t num_keys, int64_t block, T tau, Score score, Value value, Round round,
                      std::span<T> out, Sum add = {}) {
  std::fill(out.begin(), out.end(), T{0});
  std::vector<T> p(static_cast<size_t>(block));
  T max = kMinusInf<T>, sum = 0;
  for (int64_t first = 0; first < num_keys; first += block) {
    const auto n = static_cast<size_t>(std::min(block, num_keys - first));
    T new_max = max;
    for (size_t j = 0; j < n; ++j) {
      p[j] = tau * score(first + static_cast<int64_t>(j));
      new_max = std::max(new_max, p[j]);
    }
    const T rescale = exp(max - new_max);
    max = new_max;
    T block_sum = 0;
    for (size_t j = 0; j < n; ++j) {
      p[j] = exp(p[j] - max);
      block_sum += p[j];
    }
    sum = sum * rescale + block_sum;
    for (size_t i = 0; i < out.size(); ++i) {
      const T part = add(
          static_cast<int64_t>(n), [&](int64_t j) { return round(p[static_cast<size_t>(j)]); },
          [&](int64_t j) { return value(first + j, static_cast<int64_t>(i)); });
      out[i] = out[i] * rescale + part;
    }
  }
  const T inverse = T{1} / sum;
  for (T& o : out)
    o *= inverse;
  return {max, sum};
}

// ---- gate (§3.2) ------------------------------------------------------------------------------

struct GateShape {
  int64_t n_experts = 0, n_group = 1, topk_group = 1, top_k = 0;
  ScoringFunc scoring = ScoringFunc::sigmoid;
  TopkMethod method = TopkMethod::noaux_tc;
  bool norm_topk_prob = true;
};

// Indices of the best.size() largest values, best first, ties to the lower index. A NaN counts as
// the lowest finite number: behind every score, before whatever is masked.
template <class T>
void top(std::span<T> values, std::span<int32_t> best) {
  size_t found = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] != values[i])
      values[i] = std::numeric_limits<T>::lowest();
    const auto value = [&](size_t b) { return values[static_cast<size_t>(best[b])]; };
    if (found == best.size() && !(found > 0 && values[i] > value(found - 1)))
      continue;
    size_t place = std::min(found, best.size() - 1);
    for (; place > 0 && values[i] > value(place - 1); --place)
      best[place] = best[place - 1];
    best[place] = static_cast<int32_t>(i);
    found = std::min(found + 1, best.size());
  }
}

// One row through the gate; keeps its buffers between rows.
template <class T>
class Gate {
public:
  explicit Gate(const GateShape& shape)
      : shape_(shape), scores_(static_cast<size_t>(shape.n_experts)), selection_(scores_.size()),
        groups_(static_cast<size_t>(shape.n_group)), kept_(static_cast<size_t>(shape.topk_group)) {}

  // bias may be null. idx and weight have top_k elements.
  void run(std::span<const T> logits, const T* bias, T scaling_factor, std::span<int32_t> idx,
           T* weight) {
    score(logits);
    selection_ = scores_;
    if (bias != nullptr)
      for (size_t e = 0; e < selection_.size(); ++e)
        selection_[e] += bias[e];
    if (shape_.method != TopkMethod::greedy && shape_.n_group > 1)
      keep_groups();
    top<T>(selection_, idx);
    T sum = 0;
    for (const int32_t e : idx)
      sum += scores_[static_cast<size_t>(e)];
    for (size_t k = 0; k < idx.size(); ++k) {
      T w = scores_[static_cast<size_t>(idx[k])];
      if (shape_.norm_topk_prob && shape_.top_k > 1)
        w /= sum + T{1e-20f};
      weight[k] = w * scaling_factor;
    }
  }

private:
  void score(std::span<const T> logits) {
    if (shape_.scoring == ScoringFunc::sigmoid)
      return sigmoid_all(logits);
    T max = kMinusInf<T>, sum = 0;
    for (const T l : logits)
      max = l > max ? l : max;
    for (size_t e = 0; e < logits.size(); ++e)
      sum += scores_[e] = exp(logits[e] - max);
    for (T& s : scores_)
      s /= sum;
  }
  void sigmoid_all(std::span<const T> logits) {
    if constexpr (sizeof(T) == sizeof(float))
      sigmoid_f32(logits, scores_.data());
    else
      std::transform(logits.begin(), logits.end(), scores_.begin(), sigmoid<T>);
  }

  // Masks all but the best groups: by the sum of their two best experts (noaux_tc), or by the best.
  void keep_groups() {
    const size_t size = selection_.size() / groups_.size();
    for (size_t g = 0; g < groups_.size(); ++g) {
      T first = kMinusInf<T>, second = kMinusInf<T>;
      for (size_t e = g * size; e < (g + 1) * size; ++e) {
        const T v = selection_[e];
        if (v > first)
          second = std::exchange(first, v);
        else if (v > second)
          second = v;
      }
      groups_[g] = shape_.method == TopkMethod::noaux_tc && size > 1 ? first + second : first;
    }
    top<T>(groups_, kept_);
    for (size_t g = 0; g < groups_.size(); ++g)
      if (std::find(kept_.begin(), kept_.end(), static_cast<int32_t>(g)) == kept_.end())
        std::fill_n(selection_.begin() + static_cast<std::ptrdiff_t>(g * size), size, kMinusInf<T>);
  }

  GateShape shape_;
  std::vector<T> scores_, selection_, groups_;
  std::vector<int32_t> kept_;
};

} // namespace troupe::reference
