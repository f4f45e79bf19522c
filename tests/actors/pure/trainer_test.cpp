#include "actors/trainer.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace troupe;

namespace {

// Reports of two ranks whose shares of a step interleave.
std::vector<StageReport> reports() {
  StageReport first, second;
  first.losses = {{2, 1e16, {0.5}}, {0, 1, {0.25}}};
  second.losses = {{3, -1e16, {4}}, {1, 1, {2}}};
  first.balance = {{1, 4, 1}, {0, 4, 1e16}};
  second.balance = {{0, 5, -1e16}};
  first.loads = {{4, {1, 2, 3}}};
  second.loads = {{5, {7, 0, 0}}, {4, {10, 0, 1}}};
  first.busy_s = 1;
  first.program_s = 4;
  second.busy_s = 3;
  second.program_s = 4;
  return {first, second};
}

} // namespace

TEST_CASE("reports add up by micro-batch, whoever sends them first") {
  auto list = reports();
  for (int order = 0; order < 2; ++order) {
    const auto sums = add_reports(list);
    // 1 + 1 + 1e16 - 1e16, from the left: another order gives 0.
    CHECK(sums.main == ((1.0 + 1.0) + 1e16) - 1e16);
    CHECK(sums.main == 2);
    CHECK(sums.mtp == std::vector<double>{6.75});
    CHECK(sums.balance == 1); // (0, 4), (0, 5), (1, 4)
    REQUIRE(sums.loads.size() == 2);
    CHECK(sums.loads[0].layer == 4);
    CHECK(sums.loads[0].counts == std::vector<int64_t>{11, 2, 4});
    CHECK(sums.loads[1].counts == std::vector<int64_t>{7, 0, 0});
    CHECK(sums.bubble == doctest::Approx(0.5));
    CHECK_FALSE(sums.not_finite);
    std::ranges::reverse(list);
  }
  CHECK(add_reports({}).main == 0);
}

TEST_CASE("of layers without finite numbers the first is told, the one that began it") {
  auto list = reports();
  list[0].not_finite = {{1, 5, RankId{0}}, {3, 4, RankId{0}}};
  list[1].not_finite = {{2, 4, RankId{1}}};
  for (int order = 0; order < 2; ++order) {
    const auto sums = add_reports(list);
    REQUIRE(sums.not_finite);
    CHECK(sums.not_finite->layer == 4);
    CHECK(sums.not_finite->micro_batch == 2);
    CHECK(sums.not_finite->rank == RankId{1});
    std::ranges::reverse(list);
  }
}

TEST_CASE("the norm adds tensors by name, whoever owns them") {
  std::vector<PlannedTensor> tensors(3);
  for (size_t t = 0; t < tensors.size(); ++t)
    tensors[t].spec.name = std::string(1, "cab"[t]);
  std::vector<GradientNorms> norms(2);
  norms[0].sums = {{0, -1e16}, {1, 1}}; // no sums of squares, but they show the order
  norms[1].sums = {{2, 1e16}};
  const double expected = std::sqrt((1 + 1e16) - 1e16);
  CHECK(gradient_norm(tensors, norms) == expected);
  std::ranges::reverse(norms);
  CHECK(gradient_norm(tensors, norms) == expected);
  norms[0].sums = {{2, 9}};
  norms[1].sums = {{0, 3}, {1, 4}};
  CHECK(gradient_norm(tensors, norms) == 4);
  norms[0].sums[0].second = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(gradient_norm(tensors, norms)));
}

TEST_CASE("gradients are scaled down to the largest norm, never up") {
  CHECK(clip_factor(1, 4) == 0.25);
  CHECK(clip_factor(1, 1) == 1);
  CHECK(clip_factor(1, 0.5) == 1);
  CHECK(clip_factor(1, 0) == 1);
  CHECK(clip_factor(0, 1e9) == 1);
}
