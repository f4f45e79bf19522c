#include "config/train_schedule.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>

using namespace troupe;

namespace {

// Ten steps to the peak of 1, a hundred in all, down to 0.1.
TrainConfig warm_config(LrSchedule schedule) {
  TrainConfig c;
  c.lr = 1;
  c.min_lr = 0.1;
  c.warmup_steps = 10;
  c.steps = 110;
  c.lr_schedule = schedule;
  return c;
}

} // namespace

TEST_CASE("every schedule warms up along a line from 0 and reaches the peak at its last step") {
  for (const auto schedule : {LrSchedule::constant, LrSchedule::wsd, LrSchedule::cosine}) {
    auto c = warm_config(schedule);
    c.decay_steps = 20;
    CAPTURE(name_of(schedule));
    CHECK(learning_rate(c, 1) == doctest::Approx(0.1).epsilon(1e-15));
    CHECK(learning_rate(c, 5) == doctest::Approx(0.5).epsilon(1e-15));
    CHECK(learning_rate(c, 10) == 1);
    CHECK(learning_rate(c, 11) <= 1);
  }
}

TEST_CASE("without a warm-up the first step has the whole learning rate") {
  auto c = warm_config(LrSchedule::constant);
  c.warmup_steps = 0;
  for (const int64_t step : {1, 2, 110, 1000})
    CHECK(learning_rate(c, step) == 1);
}

TEST_CASE("wsd stays at the peak and falls along a line to its end at the last step") {
  auto c = warm_config(LrSchedule::wsd);
  c.decay_steps = 20;
  CHECK(learning_rate(c, 50) == 1);
  CHECK(learning_rate(c, 90) == 1);
  CHECK(learning_rate(c, 91) == doctest::Approx(0.955).epsilon(1e-14));
  CHECK(learning_rate(c, 100) == doctest::Approx(0.55).epsilon(1e-14));
  CHECK(learning_rate(c, 110) == doctest::Approx(0.1).epsilon(1e-14));
  CHECK(learning_rate(c, 500) == doctest::Approx(0.1).epsilon(1e-14)); // never below
  c.decay_steps = 0;
  CHECK(learning_rate(c, 110) == 1);
}

TEST_CASE("cosine is half way down in the middle and down at the last step") {
  const auto c = warm_config(LrSchedule::cosine);
  CHECK(learning_rate(c, 35) == doctest::Approx(0.1 + 0.45 * (1 + std::sqrt(0.5))).epsilon(1e-14));
  CHECK(learning_rate(c, 60) == doctest::Approx(0.55).epsilon(1e-14));
  CHECK(learning_rate(c, 110) == doctest::Approx(0.1).epsilon(1e-14));
  CHECK(learning_rate(c, 500) == doctest::Approx(0.1).epsilon(1e-14));
  // The report's numbers for fine-tuning: 5e-6 to 1e-6.
  auto sft = c;
  sft.lr = 5e-6;
  sft.min_lr = 1e-6;
  sft.warmup_steps = 0;
  sft.steps = 4;
  CHECK(learning_rate(sft, 2) == doctest::Approx(3e-6).epsilon(1e-14));
  CHECK(learning_rate(sft, 4) == doctest::Approx(1e-6).epsilon(1e-14));
}

TEST_CASE("a run that is all warm-up has finite learning rates") {
  for (const auto schedule : {LrSchedule::constant, LrSchedule::wsd, LrSchedule::cosine}) {
    auto c = warm_config(schedule);
    c.warmup_steps = c.steps = 4;
    for (int64_t step = 1; step < 8; ++step)
      CHECK(std::isfinite(learning_rate(c, step)));
  }
}

TEST_CASE("a step begins with the row after those of all steps before") {
  TrainConfig c;
  c.batch = {4, {{3, 8}, {10, 16}}};
  CHECK(first_row(c, 1) == 0);
  int64_t row = 0;
  for (int64_t step = 1; step < 30; ++step) {
    CAPTURE(step);
    CHECK(first_row(c, step) == row);
    row += batch_size(c, step);
  }
  CHECK(batch_size(c, 2) == 4);
  CHECK(batch_size(c, 3) == 8);
  CHECK(batch_size(c, 10) == 16);
  CHECK(first_row(c, int64_t{1} << 40) == 8 + 7 * 8 + ((int64_t{1} << 40) - 10) * 16);
}

TEST_CASE("lambda and gamma change at the steps they name") {
  TrainConfig c;
  c.mtp_lambda = {0.3, {{100, 0.1}}};
  c.bias_gamma = {0.001, {{200, 0}}};
  CHECK(mtp_lambda(c, 99) == 0.3);
  CHECK(mtp_lambda(c, 100) == 0.1);
  CHECK(bias_gamma(c, 199) == 0.001);
  CHECK(bias_gamma(c, 200) == 0);
}
