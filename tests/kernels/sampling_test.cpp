// Sampling: the cuts by their definitions, the noise by its distribution, and no crash on anything.
#include "kernels/sampling.hpp"

#include "config/random.hpp"
#include "kernels/math.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

using namespace troupe;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_logits(uint64_t seed, size_t n, float spread) {
  KeyedStream random(seed);
  std::vector<float> x(n);
  for (float& v : x)
    v = spread * uniform_open(static_cast<uint32_t>(random.next()));
  return x;
}

int32_t pick(const std::vector<float>& logits, const SamplingParams& p, uint32_t position = 0,
             const TokenCounts& counts = {}, int32_t num_ids = 1 << 30) {
  std::vector<float> scratch;
  return sample(logits, p, counts, position, num_ids, scratch).token;
}

SamplingParams hot(float temperature = 1) {
  SamplingParams p;
  p.temperature = temperature;
  return p;
}

// Which ids turn up in many draws.
std::set<int32_t> support(const std::vector<float>& logits, const SamplingParams& p, int draws) {
  std::set<int32_t> seen;
  for (int i = 0; i < draws; ++i)
    seen.insert(pick(logits, p, static_cast<uint32_t>(i)));
  return seen;
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> p;
  for (const float l : logits)
    p.push_back(std::exp(static_cast<double>(l) / temperature));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& v : p)
    v /= sum;
  return p;
}

// The sampler's sentence, without any shortcut: every id gets its noise.
int32_t plain_sample(const std::vector<float>& logits, const SamplingParams& p, uint32_t position) {
  const float max = *std::max_element(logits.begin(), logits.end());
  int32_t best = 0;
  float top = -kInf;
  for (size_t id = 0; id < logits.size(); ++id) {
    const float u = uniform_open(noise_bits(p.seed, p.choice, position, static_cast<uint32_t>(id)));
    const float x = (logits[id] - max) / p.temperature +
                    static_cast<float>(-log_f64(-log_f64(static_cast<double>(u))));
    if (x > top) {
      top = x;
      best = static_cast<int32_t>(id);
    }
  }
  return best;
}

} // namespace

TEST_CASE("temperature zero takes the largest logit, the lower id among equals") {
  CHECK(pick({1, 3, 2, 3}, {}) == 1);
  CHECK(pick({-5, -5, -5}, {}) == 0);
  CHECK(pick({0, 1, 2}, hot(-1)) == 2);
}

TEST_CASE("the shortcuts around the noise never change the winner") {
  for (const float spread : {0.0f, 0.5f, 8.0f, 60.0f})
    for (const size_t n : {1, 3, 50, 3000}) {
      const auto logits = random_logits(n, n, spread);
      for (uint32_t position = 0; position < 60; ++position) {
        auto p = hot(position % 2 ? 0.7f : 1.9f);
        p.seed = position / 7;
        p.choice = position % 3;
        CHECK(pick(logits, p, position) == plain_sample(logits, p, position));
      }
    }
}

TEST_CASE("tokens come up as often as their probability says") {
  const std::vector<float> logits{0.0f, 1.0f, -1.0f, 2.0f, 0.5f, -3.0f};
  for (const float temperature : {1.0f, 0.5f, 2.0f}) {
    const auto want = softmax(logits, static_cast<double>(temperature));
    std::vector<int> counts(logits.size());
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) {
      auto p = hot(temperature);
      p.seed = static_cast<uint64_t>(i); // seeds and positions both make fresh noise
      ++counts[static_cast<size_t>(pick(logits, p, static_cast<uint32_t>(i % 7)))];
    }
    double chi2 = 0;
    for (size_t t = 0; t < want.size(); ++t) {
      const double expected = kDraws * want[t];
      chi2 += (counts[t] - expected) * (counts[t] - expected) / expected;
    }
    CHECK(chi2 < 20.5); // five degrees of freedom: exceeded once in a thousand
  }
}

TEST_CASE("a draw is a pure function of seed, choice, position and logits") {
  const auto logits = random_logits(3, 1000, 3);
  std::set<int32_t> by_seed, by_choice, by_position;
  for (uint32_t i = 0; i < 20; ++i) {
    auto p = hot();
    const int32_t first = pick(logits, p, i);
    CHECK(pick(logits, p, i) == first);
    by_position.insert(first);
    p.seed = i;
    by_seed.insert(pick(logits, p));
    p.seed = 0;
    p.choice = i;
    by_choice.insert(pick(logits, p));
  }
  CHECK(by_position.size() > 10);
  CHECK(by_seed.size() > 10);
  CHECK(by_choice.size() > 10);
}

TEST_CASE("a constant added to all logits changes no draw") {
  const auto logits = random_logits(4, 300, 4);
  auto shifted = logits;
  for (float& v : shifted) // a multiple of every unit at hand, so that the sums are exact enough
    v += 64;
  int different = 0;
  for (uint32_t i = 0; i < 200; ++i)
    different += pick(logits, hot(), i) != pick(shifted, hot(), i);
  CHECK(different <= 1); // adding 64 itself rounds
}

TEST_CASE("top-k keeps the k largest, the lower id at the edge") {
  auto p = hot(5);
  p.top_k = 3;
  CHECK(support({1, 2, 2, 2, 2, 0, 3}, p, 300) == std::set<int32_t>{1, 2, 6});
  p.top_k = 1;
  CHECK(support({1, 2, 2, 0}, p, 50) == std::set<int32_t>{1});
  p.top_k = 100;
  CHECK(support({1, 2, 2, 0}, p, 300).size() == 4);
}

TEST_CASE("top-p keeps the smallest set that reaches p, the crossing token included") {
  // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625.
  const auto log2_logits = [](std::vector<int> bits) {
    std::vector<float> x;
    for (const int b : bits)
      x.push_back(static_cast<float>(-b) * 0.6931472f);
    return x;
  };
  const auto logits = log2_logits({4, 1, 3, 2, 4});
  auto p = hot();
  p.top_p = 0.4f;
  CHECK(support(logits, p, 300) == std::set<int32_t>{1});
  p.top_p = 0.6f;
  CHECK(support(logits, p, 300) == std::set<int32_t>{1, 3});
  p.top_p = 0.8f;
  CHECK(support(logits, p, 300) == std::set<int32_t>{1, 2, 3});
  p.top_p = 0.9f; // the lower of two equals
  CHECK(support(logits, p, 500) == std::set<int32_t>{0, 1, 2, 3});
  p.top_p = 0.95f;
  CHECK(support(logits, p, 500).size() == 5);
  p.top_p = 0; // at least one
  CHECK(support(logits, p, 50) == std::set<int32_t>{1});
  p.top_p = 0.7f; // after top-k the rest counts as all: 0.5 and 0.25 become 2/3 and 1/3
  p.top_k = 2;
  CHECK(support(logits, p, 300) == std::set<int32_t>{1, 3});
  p.top_p = 0.6f;
  CHECK(support(logits, p, 300) == std::set<int32_t>{1});
}

TEST_CASE("top-p's partly sorted head holds what a full sort would") {
  const auto logits = random_logits(5, 5000, 4);
  auto p = hot();
  p.top_p = 0.6f;
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  const auto probability = softmax(logits, 1);
  double sum = 0;
  std::set<int32_t> nucleus;
  for (const int32_t id : ids) {
    nucleus.insert(id);
    if ((sum += probability[static_cast<size_t>(id)]) >= 0.6)
      break;
  }
  CHECK(nucleus.size() > 300); // more than one round of sorting
  std::set<int32_t> outside;
  for (const int32_t id : support(logits, p, 2000))
    if (!nucleus.contains(id))
      outside.insert(id);
  CHECK(outside.empty());
}

TEST_CASE("min-p drops what is less likely than its share of the likeliest") {
  auto p = hot();
  p.min_p = 0.2f;
  const std::vector<float> logits{0, std::log(0.5f), std::log(0.21f), std::log(0.19f)};
  CHECK(support(logits, p, 500) == std::set<int32_t>{0, 1, 2});
  p.min_p = 1;
  CHECK(support(logits, p, 50) == std::set<int32_t>{0});
  p.min_p = 7; // more than everything still keeps the likeliest
  CHECK(support(logits, p, 50) == std::set<int32_t>{0});
}

TEST_CASE("penalties count prompt and answer as documented, at temperature zero too") {
  SamplingParams p;
  p.repetition_penalty = 2;
  CHECK(pick({4, 3, 1}, p, 0, {{{0, 1}}, {}}) == 1);          // 4 / 2 < 3
  CHECK(pick({4, 3, 1}, p, 0, {{}, {{0, 9}}}) == 1);          // once, however often it occurred
  CHECK(pick({4, 1.9f, 1}, p, 0, {{{0, 1}}, {{0, 1}}}) == 0); // in both: still once
  CHECK(pick({-1, -1.5f}, p, 0, {{{0, 1}}, {}}) == 1);        // negative logits are multiplied
  p = {};
  p.presence_penalty = 1;
  CHECK(pick({4, 3.5f}, p, 0, {{}, {{0, 3}}}) == 1);
  CHECK(pick({4, 2.5f}, p, 0, {{}, {{0, 3}}}) == 0); // not times three
  CHECK(pick({4, 3.5f}, p, 0, {{{0, 3}}, {}}) == 0); // the prompt does not count
  p = {};
  p.frequency_penalty = 0.5f;
  CHECK(pick({4, 2.9f}, p, 0, {{}, {{0, 3}}}) == 1);
  CHECK(pick({4, 2.9f}, p, 0, {{}, {{0, 2}}}) == 0);
  p = {};
  p.logit_bias = {{0, -10.0f}, {2, 0.5f}};
  CHECK(pick({4, 3, 2.8f}, p) == 2);
}

TEST_CASE("penalties come before the cuts") {
  auto p = hot();
  p.top_k = 1;
  p.logit_bias = {{0, -100.0f}};
  CHECK(pick({9, 1, 2}, p) == 2);
}

TEST_CASE("ids without a token are never sampled") {
  std::vector<float> logits = random_logits(6, 64, 1);
  for (size_t i = 50; i < 64; ++i)
    logits[i] = 100;
  CHECK(pick(logits, {}, 0, {}, 50) < 50);
  for (uint32_t i = 0; i < 200; ++i)
    CHECK(pick(logits, hot(3), i, {}, 50) < 50);
  // Their raw logits still count in the log-probability, as in the model's softmax.
  std::vector<float> scratch;
  CHECK(sample(logits, {}, {}, 0, 50, scratch).logprob < -90);
}

TEST_CASE("ids of counts and biases that do not exist are ignored") {
  SamplingParams p;
  p.repetition_penalty = 2;
  p.presence_penalty = p.frequency_penalty = 1;
  p.logit_bias = {{-1, 5.0f}, {3, 5.0f}, {std::numeric_limits<int32_t>::max(), 5.0f}};
  CHECK(pick({1, 2, 0}, p, 0, {{{-7, 1}, {99, 1}}, {{-1, 1}, {3, 2}}}) == 1);
}

TEST_CASE("NaN and infinite logits neither crash nor win unduly") {
  for (const float temperature : {0.0f, 1.0f, 1e-30f, 1e30f, kInf}) {
    auto p = hot(temperature);
    CHECK(pick({kNan, 1, kNan}, p) == 1);
    CHECK(pick({-kInf, -kInf, 5, -kInf}, p) == 2);
    CHECK(pick({1, kInf, 2}, hot(std::min(temperature, 1.0f))) == 1);
    CHECK(pick({kNan, kNan}, p) == 0);
    CHECK(pick({-kInf, -kInf}, p) == 0);
    CHECK(pick({kNan, -kInf, -1e38f, 1e38f}, hot(std::min(temperature, 1.0f))) == 3);
    p.top_k = 2;
    p.top_p = 0.5f;
    p.min_p = 0.5f;
    CHECK(pick({kNan, kNan}, p) == 0);
    CHECK(pick({kNan, 2, -kInf}, p) == 1);
    CHECK(pick({kInf, kInf, kInf}, p) <= 1);
  }
  CHECK(pick({1, 2, 3}, hot(1e-38f)) == 2); // differences overflow, the maximum does not
}

TEST_CASE("an empty vocabulary yields id 0 of probability zero") {
  std::vector<float> scratch;
  const auto none = sample({}, hot(), {}, 0, 10, scratch);
  CHECK(none.token == 0);
  CHECK(none.logprob == -kInf);
  const std::vector<float> logits{1, 2};
  CHECK(sample(logits, hot(), {}, 0, 0, scratch).token == 0);
  CHECK(sample(logits, hot(), {}, 0, -5, scratch).token == 0);
}

TEST_CASE("log-probabilities are those of the raw logits, whatever was sampled from") {
  const auto logits = random_logits(7, 1000, 10);
  const auto probability = softmax(logits, 1);
  for (const int32_t id : {0, 17, 999})
    CHECK(log_probability(logits, id) ==
          doctest::Approx(std::log(probability[static_cast<size_t>(id)])).epsilon(1e-12));
  CHECK(log_probability(logits, 1000) == -kInf);
  CHECK(log_probability(logits, -1) == -kInf);
  CHECK(log_probability(std::vector<float>{1000, 0, -1000}, 0) == 0);
  std::vector<float> scratch;
  auto p = hot(0.3f);
  p.top_k = 5;
  p.logit_bias = {{17, 50.0f}};
  const auto sampled = sample(logits, p, {}, 3, 1000, scratch);
  CHECK(sampled.token == 17);
  CHECK(sampled.logprob == static_cast<float>(log_probability(logits, 17)));
}
