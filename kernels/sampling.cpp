#include "kernels/sampling.hpp"

#include "config/random.hpp"
#include "kernels/math.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace troupe {

namespace {

constexpr float kRuledOut = -std::numeric_limits<float>::infinity();

using Scores = std::span<float>;

bool in_range(Scores x, int32_t id) { return id >= 0 && static_cast<size_t>(id) < x.size(); }

void penalize_repetition(Scores x, float penalty, const TokenCounts& counts) {
  const auto repeated = [&](int32_t id) {
    if (!in_range(x, id))
      return;
    float& v = x[static_cast<size_t>(id)];
    v = v > 0 ? v / penalty : v * penalty;
  };
  for (const auto& [id, count] : counts.prompt)
    repeated(id);
  for (const auto& [id, count] : counts.answer)
    if (!counts.prompt.contains(id))
      repeated(id);
}

void penalize(Scores x, const SamplingParams& p, const TokenCounts& counts) {
  if (p.repetition_penalty != 1)
    penalize_repetition(x, p.repetition_penalty, counts);
  if (p.presence_penalty != 0 || p.frequency_penalty != 0)
    for (const auto& [id, count] : counts.answer)
      if (in_range(x, id))
        x[static_cast<size_t>(id)] -=
            p.presence_penalty + p.frequency_penalty * static_cast<float>(count);
  for (const auto& [id, bias] : p.logit_bias)
    if (in_range(x, id))
      x[static_cast<size_t>(id)] += bias;
}

// Numbers that can be compared and subtracted.
void tame(Scores x) {
  for (float& v : x) {
    if (v != v)
      v = kRuledOut;
    v = std::min(v, std::numeric_limits<float>::max());
  }
}

int32_t argmax(Scores x) { // the first of the largest
  return static_cast<int32_t>(std::max_element(x.begin(), x.end()) - x.begin());
}

// ---- cuts: x has its maximum at 0 ---------------------------------------------------------------

std::vector<int32_t> ids_left(Scores x) {
  std::vector<int32_t> ids;
  ids.reserve(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i] > kRuledOut)
      ids.push_back(static_cast<int32_t>(i));
  return ids;
}

// Likelier, or as likely and lower.
struct Likelier {
  Scores x;
  bool operator()(int32_t a, int32_t b) const {
    const float va = x[static_cast<size_t>(a)], vb = x[static_cast<size_t>(b)];
    return va > vb || (va == vb && a < b);
  }
};

void rule_out(Scores x, std::span<const int32_t> ids) {
  for (const int32_t id : ids)
    x[static_cast<size_t>(id)] = kRuledOut;
}

void cut_top_k(Scores x, size_t k) {
  auto ids = ids_left(x);
  if (k >= ids.size())
    return;
  std::nth_element(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(k), ids.end(),
                   Likelier{x});
  rule_out(x, std::span{ids}.subspan(k));
}

// Sorts only as many of the likeliest as it takes to reach p.
void cut_top_p(Scores x, float top_p) {
  auto ids = ids_left(x);
  const double wanted = static_cast<double>(top_p) * sum_of_exp(x, 0);
  double sum = 0;
  size_t kept = 0, sorted = 0;
  const auto at = [&](size_t i) { return ids.begin() + static_cast<std::ptrdiff_t>(i); };
  while (kept < ids.size() && (kept == 0 || sum < wanted)) {
    if (kept == sorted) {
      sorted = std::min(ids.size(), std::max<size_t>(64, 4 * sorted));
      std::nth_element(at(kept), at(sorted), ids.end(), Likelier{x});
      std::sort(at(kept), at(sorted), Likelier{x});
    }
    sum += exp_f64(static_cast<double>(x[static_cast<size_t>(ids[kept++])]));
  }
  rule_out(x, std::span{ids}.subspan(kept));
}

void cut_min_p(Scores x, float min_p) {
  const double least = log_f64(static_cast<double>(std::min(min_p, 1.0f)));
  for (float& v : x)
    if (static_cast<double>(v) < least)
      v = kRuledOut;
}

// ---- noise --------------------------------------------------------------------------------------

float gumbel(uint32_t bits) {
  const double u = static_cast<double>(uniform_open(bits));
  return static_cast<float>(-log_f64(-log_f64(u)));
}

// Not below gumbel(bits), and far cheaper: -log u >= 1 - u, so the noise is at most -log(1 - u),
// and 1 - u is at least the power of two below it.
float gumbel_bound(uint32_t bits) {
  const int width = std::bit_width((~bits) >> 8);
  return static_cast<float>(25 - width) * 0.6932f; // a little more than ln 2
}
constexpr float kLargestNoise = 25 * 0.6932f;

// The argmax of x + noise. Most ids can't win whatever their noise, or with the bits they drew; a
// logarithm is computed only for the others. Rounding keeps order, so the bounds exclude no winner.
int32_t noisy_argmax(Scores x, const SamplingParams& p, uint32_t position) {
  const auto bits_of = [&](size_t id) {
    return noise_bits(p.seed, p.choice, position, static_cast<uint32_t>(id));
  };
  auto best = static_cast<size_t>(argmax(x));
  float top = x[best] + gumbel(bits_of(best));
  for (size_t id = 0; id < x.size(); ++id) {
    if (x[id] + kLargestNoise < top || !(x[id] > kRuledOut))
      continue;
    const uint32_t bits = bits_of(id);
    if (x[id] + gumbel_bound(bits) < top)
      continue;
    const float noisy = x[id] + gumbel(bits);
    if (noisy > top || (noisy == top && id < best)) {
      top = noisy;
      best = id;
    }
  }
  return static_cast<int32_t>(best);
}

int32_t choose(Scores x, const SamplingParams& p, uint32_t position) {
  const float max = x[static_cast<size_t>(argmax(x))];
  if (!(p.temperature > 0) || max == kRuledOut)
    return argmax(x);
  const float temperature = std::min(p.temperature, std::numeric_limits<float>::max());
  for (float& v : x)
    v = (v - max) / temperature;
  if (p.top_k > 0)
    cut_top_k(x, static_cast<size_t>(p.top_k));
  if (p.top_p < 1)
    cut_top_p(x, p.top_p);
  if (p.min_p > 0)
    cut_min_p(x, p.min_p);
  return noisy_argmax(x, p, position);
}

} // namespace

double log_probability(std::span<const float> logits, int32_t token) {
  if (token < 0 || token >= std::ssize(logits))
    return -std::numeric_limits<double>::infinity();
  float max = kRuledOut;
  for (const float v : logits)
    max = v > max ? v : max;
  return static_cast<double>(logits[static_cast<size_t>(token)]) - static_cast<double>(max) -
         log_f64(sum_of_exp(logits, static_cast<double>(max)));
}

Sampled sample(std::span<const float> logits, const SamplingParams& params,
               const TokenCounts& counts, uint32_t position, int32_t num_ids,
               std::vector<float>& scratch) {
  const auto n = std::clamp<std::ptrdiff_t>(num_ids, 0, std::ssize(logits));
  scratch.assign(logits.begin(), logits.begin() + n);
  Sampled result{0, 0};
  if (n > 0) {
    penalize(scratch, params, counts);
    tame(scratch);
    result.token = choose(scratch, params, position);
  }
  result.logprob = static_cast<float>(log_probability(logits, result.token));
  return result;
}

} // namespace troupe
