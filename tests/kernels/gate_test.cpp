// The gate against §12.3, in F64 and in the arithmetic itself.
#include "kernels/backend.hpp"
#include "kernels/reference_math.hpp"

#include "config/random.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace troupe;
using reference::GateShape;

namespace {

struct Chosen {
  std::vector<int32_t> experts;
  std::vector<double> weights;
};

Chosen run_f64(const GateShape& shape, const std::vector<double>& logits,
               const std::vector<double>& bias, double scale) {
  Chosen c{std::vector<int32_t>(static_cast<size_t>(shape.top_k)),
           std::vector<double>(static_cast<size_t>(shape.top_k))};
  reference::Gate<double> gate(shape);
  gate.run(logits, bias.empty() ? nullptr : bias.data(), scale, c.experts, c.weights.data());
  return c;
}

Chosen run_f32(const GateShape& shape, const std::vector<double>& logits,
               const std::vector<double>& bias, double scale) {
  const std::vector<float> l(logits.begin(), logits.end()), b(bias.begin(), bias.end());
  std::vector<float> w(static_cast<size_t>(shape.top_k));
  Chosen c{std::vector<int32_t>(w.size()), {}};
  InlineWorkers workers;
  reference_backend().gate({.num_rows = 1,
                            .n_experts = shape.n_experts,
                            .n_group = shape.n_group,
                            .topk_group = shape.topk_group,
                            .top_k = shape.top_k,
                            .scoring = shape.scoring,
                            .method = shape.method,
                            .norm_topk_prob = shape.norm_topk_prob,
                            .routed_scaling_factor = static_cast<float>(scale),
                            .logits = l.data(),
                            .bias = b.empty() ? nullptr : b.data(),
                            .topk_idx = c.experts.data(),
                            .topk_weight = w.data()},
                           workers);
  c.weights.assign(w.begin(), w.end());
  return c;
}

void check(const GateShape& shape, const std::vector<double>& logits,
           const std::vector<double>& bias, double scale, const std::vector<int32_t>& experts,
           const std::vector<double>& weights) {
  const Chosen f64 = run_f64(shape, logits, bias, scale), f32 = run_f32(shape, logits, bias, scale);
  CHECK(f64.experts == experts);
  CHECK(f32.experts == experts);
  for (size_t k = 0; k < weights.size(); ++k) {
    CHECK(std::fabs(f64.weights[k] - weights[k]) <= 1e-8);
    CHECK(std::fabs(f32.weights[k] - weights[k]) <= 1e-6 * weights[k]);
  }
}

const std::vector<double> kLogits{0.5, -1, 2, 1, 1.5, -0.5, 0, 0.25, -2, 3, -3, -2.5};
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

GateShape softmax_shape(TopkMethod method, int64_t n_group, int64_t topk_group) {
  return {12, n_group, topk_group, 3, ScoringFunc::softmax, method, false};
}

} // namespace

TEST_CASE("the best expert of all is not chosen when its group is dropped") {
  check({12, 4, 2, 3}, kLogits, {}, 2.5, {2, 4, 3}, {0.906382392, 0.841323306, 0.752294302});
}

TEST_CASE("a bias steers the choice and its order, but never the weights") {
  check({12, 4, 2, 3}, kLogits, {0, 0, -0.2, 0, 0, 0, 0.15, 0.15, 0, -0.3, 0, 0}, 2.5, {4, 3, 7},
        {0.968318617, 0.865850944, 0.665830439});
}

TEST_CASE("ties go to the lower group and the lower expert") {
  check({8, 4, 2, 3}, std::vector<double>(8, 1.0), {}, 2.5, {0, 1, 2},
        {0.8333333333, 0.8333333333, 0.8333333333});
}

TEST_CASE("dropped groups are masked with minus infinity, not with zero") {
  const auto got = run_f64({4, 2, 1, 2}, {1, -2, 0, 0}, {-0.2, -0.6, -0.9, -0.9}, 1);
  CHECK(got.experts == std::vector<int32_t>{0, 1}); // both below 0, which a zero mask would beat
  CHECK(run_f32({4, 2, 1, 2}, {1, -2, 0, 0}, {-0.2, -0.6, -0.9, -0.9}, 1).experts == got.experts);
}

TEST_CASE("softmax gates: greedy, and group-limited by the best of each group") {
  check(softmax_shape(TopkMethod::greedy, 1, 1), kLogits, {}, 1, {9, 2, 4},
        {0.504042088, 0.185426722, 0.112466992});
  check(softmax_shape(TopkMethod::group_limited_greedy, 4, 2), kLogits, {}, 1, {9, 2, 0},
        {0.504042088, 0.185426722, 0.041374294});
  check(softmax_shape(TopkMethod::group_limited_greedy, 4, 2), kLogits, {}, 16, {9, 2, 0},
        {8.064673416, 2.966827549, 0.661988706});
}

TEST_CASE("greedy looks at no groups even where the model has some") {
  check(softmax_shape(TopkMethod::greedy, 4, 2), kLogits, {}, 1, {9, 2, 4},
        {0.504042088, 0.185426722, 0.112466992});
}

TEST_CASE("one group, or all groups kept, is plain top-k") {
  const auto plain = run_f32({12, 1, 1, 3}, kLogits, {}, 1);
  CHECK(plain.experts == std::vector<int32_t>{9, 2, 4});
  CHECK(run_f32({12, 4, 4, 3}, kLogits, {}, 1).experts == plain.experts);
  CHECK(run_f32({12, 4, 4, 3}, kLogits, {}, 1).weights == plain.weights);
}

TEST_CASE("groups of one expert score by that expert") {
  const auto got = run_f32({12, 12, 2, 2}, kLogits, {}, 1);
  CHECK(got.experts == std::vector<int32_t>{9, 2});
}

TEST_CASE("a single chosen expert keeps its score, normalized only among several") {
  check({12, 1, 1, 1}, kLogits, {}, 2, {9}, {2 * 0.952574127});
}

TEST_CASE("scores so small that they vanish give weights of zero, not NaN") {
  const auto got = run_f32({4, 1, 1, 2}, {-200, -200, -200, -200}, {}, 2.5);
  CHECK(got.experts == std::vector<int32_t>{0, 1});
  CHECK(got.weights == std::vector<double>{0, 0});
}

TEST_CASE("a NaN ranks behind every score but before masked experts, and crashes nothing") {
  for (const bool sigmoid : {true, false}) {
    GateShape shape{8,
                    4,
                    2,
                    4,
                    sigmoid ? ScoringFunc::sigmoid : ScoringFunc::softmax,
                    sigmoid ? TopkMethod::noaux_tc : TopkMethod::group_limited_greedy,
                    true};
    const auto all = run_f32(shape, std::vector<double>(8, kNan), {}, 1);
    CHECK(all.experts == std::vector<int32_t>{0, 1, 2, 3});
    CHECK(std::isnan(all.weights[0]));
  }
  // Group 3 wins by expert 6 alone; its NaN comes last, after group 0 and before masked ones.
  const auto some =
      run_f32({8, 4, 2, 4}, {1, 1, 0, 0, -1, -1, 9, kNan}, {0, 0, -5, -5, -5, -5, 0, 0}, 1);
  CHECK(some.experts == std::vector<int32_t>{0, 1, 2, 3}); // its pair's sum is lowest of all
  const auto kept = run_f32({4, 2, 1, 2}, {1, kNan, 0, 0}, {0, 0, -kInf, -kInf}, 1);
  CHECK(kept.experts == std::vector<int32_t>{0, 1});
  for (const double special : {kInf, -kInf}) {
    const auto got = run_f32({8, 4, 2, 4}, {special, 1, special, 0, 2, 1, 0, 1}, {}, 1);
    for (const int32_t e : got.experts)
      CHECK((e >= 0 && e < 8));
  }
}

TEST_CASE("every choice is distinct, in kept groups, in order, and weighs what its score says") {
  KeyedStream random(9);
  for (int round = 0; round < 300; ++round) {
    const int64_t size = 1 + static_cast<int64_t>(random.below(9));
    GateShape shape{0, 1 + static_cast<int64_t>(random.below(6)), 1, 1};
    shape.n_experts = size * shape.n_group;
    shape.topk_group = 1 + static_cast<int64_t>(random.below(static_cast<uint64_t>(shape.n_group)));
    shape.top_k =
        1 + static_cast<int64_t>(random.below(static_cast<uint64_t>(shape.topk_group * size)));
    std::vector<double> logits(static_cast<size_t>(shape.n_experts)), bias(logits.size());
    for (size_t e = 0; e < logits.size(); ++e) { // coarse, so that ties are common
      logits[e] = static_cast<double>(random.below(7)) - 3;
      bias[e] = static_cast<double>(random.below(3)) * 0.125;
    }
    const auto got = run_f32(shape, logits, bias, 2.5);
    std::vector<int64_t> groups;
    double total = 0;
    const auto rank = [&](int32_t e) {
      return sigmoid_f32(static_cast<float>(logits[static_cast<size_t>(e)])) +
             static_cast<float>(bias[static_cast<size_t>(e)]);
    };
    for (size_t k = 0; k < got.experts.size(); ++k) {
      const int32_t e = got.experts[k];
      if (std::find(groups.begin(), groups.end(), e / size) == groups.end())
        groups.push_back(e / size);
      if (k > 0) {
        const int32_t before = got.experts[k - 1];
        CHECK((rank(before) > rank(e) || (rank(before) == rank(e) && before < e)));
      }
      total += got.weights[k];
    }
    CHECK(static_cast<int64_t>(groups.size()) <= shape.topk_group);
    if (shape.top_k > 1)
      CHECK(total == doctest::Approx(2.5));
  }
}

TEST_CASE("with one expert per token its own score weighs it, normalized or not") {
  // §3.2 (7): the division is for K > 1 alone, so the gate still says how much the expert counts.
  const double sigmoid2 = 1 / (1 + std::exp(-2.0));
  for (const bool norm : {true, false}) {
    GateShape v3{12, 4, 2, 1};
    v3.norm_topk_prob = norm;
    check(v3, kLogits, {}, 2.5, {2}, {2.5 * sigmoid2});
    GateShape v2 = softmax_shape(TopkMethod::greedy, 1, 1);
    v2.top_k = 1;
    v2.norm_topk_prob = norm;
    double sum = 0;
    for (const double l : kLogits)
      sum += std::exp(l);
    check(v2, kLogits, {}, 16, {9}, {16 * std::exp(3.0) / sum});
  }
}
