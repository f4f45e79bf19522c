#include "actors/balance_controller.hpp"

#include <doctest/doctest.h>

#include <vector>

using namespace troupe;

TEST_CASE("a bias moves by gamma towards the mean load, and stays where the load is the mean") {
  const std::vector<float> bias{0.5f, -0.25f, 0.0f, 1.0f};
  const std::vector<int64_t> counts{10, 2, 6, 6}; // mean 6
  const auto updated = updated_bias(bias, counts, 0.125);
  CHECK(updated == std::vector<float>{0.375f, -0.125f, 0.0f, 1.0f});
  // A mean between two integers, where a rounded one would misjudge 3.
  CHECK(updated_bias(std::vector<float>{0, 0, 0}, std::vector<int64_t>{3, 4, 3}, 1) ==
        std::vector<float>{1, -1, 1});
  // Loads of a full V3 step: 2^26 tokens, 8 each, over 256 experts.
  std::vector<int64_t> many(256, int64_t{1} << 21);
  ++many[7];
  --many[9];
  const auto large = updated_bias(std::vector<float>(256), many, 0.001);
  CHECK(large[7] == -0.001f);
  CHECK(large[9] == 0.001f);
  CHECK(large[8] == 0.0f);
}

TEST_CASE("MaxVio is the largest load over the mean, less one") {
  CHECK(max_vio(std::vector<int64_t>{4, 4, 4, 4}) == 0);
  CHECK(max_vio(std::vector<int64_t>{10, 2, 6, 6}) == doctest::Approx(10.0 / 6 - 1));
  CHECK(max_vio(std::vector<int64_t>{16, 0, 0, 0}) == 3);
  CHECK(max_vio(std::vector<int64_t>{0, 0}) == 0);
}
