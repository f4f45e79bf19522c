#include "kernels/sampling.hpp"

#include "config/random.hpp"
#include "kernels/math.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace troupe {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void penalize(std::vector<float>& x, const SamplingParams& p, const TokenCounts& counts) {
  const auto valid = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < x.size(); };
  if (p.repetition_penalty != 1) {
    const auto repeat = [&](int32_t id) {
      auto& v = x[static_cast<size_t>(id)];
      v = v > 0 ? v / p.repetition_penalty : v * p.repetition_penalty;
    };
    for (const auto& [id, n] : counts.prompt)
      if (valid(id))
        repeat(id);
    for (const auto& [id, n] : counts.answer)
      if (valid(id) && !counts.prompt.contains(id))
        repeat(id);
  }
  for (const auto& [id, n] : counts.answer)
    if (valid(id))
      x[static_cast<size_t>(id)] -=
        p.presence_penalty + p.frequency_penalty * static_cast<float>(n);
  for (const auto& [id, bias] : p.logit_bias)
    if (valid(id))
      x[static_cast<size_t>(id)] += bias;
}

// The best id, ties to the lower one; NaN never wins.
int32_t argmax(const std::vector<float>& x) {
  int32_t best = 0;
  float top = kNever;
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i] > top) {
      top = x[i];
      best = static_cast<int32_t>(i);
    }
  return best;
}

// Ids that can still be chosen, likeliest first, ties by id.
std::vector<int32_t> by_likelihood(const std::vector<float>& x) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i] > kNever)
      ids.push_back(static_cast<int32_t>(i));
  std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    const float va = x[static_cast<size_t>(a)], vb = x[static_cast<size_t>(b)];
    return va > vb || (va == vb && a < b);
  });
  return ids;
}

void keep_first(std::vector<float>& x, const std::vector<int32_t>& ids, size_t n) {
  for (size_t i = n; i < ids.size(); ++i)
    x[static_cast<size_t>(ids[i])] = kNever;
}

void cut_top_k(std::vector<float>& x, int32_t k) {
  const auto ids = by_likelihood(x);
  keep_first(x, ids, std::min(ids.size(), static_cast<size_t>(k)));
}

// Keeps the smallest set of likeliest ids whose probability reaches p.
void cut_top_p(std::vector<float>& x, float top_p) {
  const auto ids = by_likelihood(x);
  if (ids.empty())
    return;
  const float top = x[static_cast<size_t>(ids.front())];
  double total = 0;
  for (const int32_t id : ids)
    total += static_cast<double>(exp_f32(x[static_cast<size_t>(id)] - top));
  double sum = 0;
  size_t n = 0;
  while (n < ids.size() && (n == 0 || sum < static_cast<double>(top_p) * total)) {
    sum += static_cast<double>(exp_f32(x[static_cast<size_t>(ids[n])] - top));
    ++n;
  }
  keep_first(x, ids, n);
}

// Drops what is less likely than min_p times the likeliest.
void cut_min_p(std::vector<float>& x, float min_p) {
  const float top = *std::max_element(x.begin(), x.end());
  if (!(top > kNever))
    return;
  for (auto& v : x)
    if (exp_f32(v - top) < min_p)
      v = kNever;
}

// -log(-log u) of the keyed noise.
float gumbel(const SamplingParams& p, uint32_t position, size_t token) {
  const float u =
    uniform_open(noise_bits(p.seed, p.choice, position, static_cast<uint32_t>(token)));
  return static_cast<float>(-log_f64(-log_f64(static_cast<double>(u))));
}

} // namespace

double log_probability(std::span<const float> logits, int32_t token) {
  float top = kNever;
  for (const float v : logits)
    top = v > top ? v : top;
  double sum = 0;
  for (const float v : logits)
    sum += exp_f64(static_cast<double>(v) - static_cast<double>(top));
  return static_cast<double>(logits[static_cast<size_t>(token)]) - static_cast<double>(top) -
         log_f64(sum);
}

Sampled sample(std::span<const float> logits, const SamplingParams& params,
               const TokenCounts& counts, uint32_t position, int32_t num_ids,
               std::vector<float>& scratch) {
  auto& x = scratch;
  x.assign(logits.begin(),
           logits.begin() + std::min<std::ptrdiff_t>(std::ssize(logits), std::max(num_ids, 1)));
  for (auto& v : x)
    if (v != v)
      v = kNever; // a NaN is never chosen
  penalize(x, params, counts);
  if (params.temperature > 0) {
    for (auto& v : x)
      v /= params.temperature;
    if (params.top_k > 0 && static_cast<size_t>(params.top_k) < x.size())
      cut_top_k(x, params.top_k);
    if (params.top_p < 1)
      cut_top_p(x, params.top_p);
    if (params.min_p > 0)
      cut_min_p(x, params.min_p);
    for (size_t i = 0; i < x.size(); ++i)
      if (x[i] > kNever)
        x[i] += gumbel(params, position, i);
  }
  Sampled result;
  result.token = argmax(x);
  result.logprob = static_cast<float>(log_probability(logits, result.token));
  return result;
}

} // namespace troupe
