#include "actors/train_plan.hpp"

#include "config/presets.hpp"

#include <doctest/doctest.h>

using namespace troupe;

TEST_CASE("a batch that gives columns different numbers of micro-batches is refused") {
  TrainPlan plan;
  plan.schedule = ScheduleKind::one_f_one_b;
  plan.lanes = 4;
  plan.groups = 2;
  plan.config = *preset("tiny-v3");
  size_t refused = 0;
  for (const auto& [ep, dp] : {std::pair{1, 1}, std::pair{2, 1}, std::pair{1, 2}, std::pair{2, 2}})
    for (int64_t batch = 1; batch <= 24; ++batch) {
      CAPTURE(ep);
      CAPTURE(dp);
      CAPTURE(batch);
      plan.ep = ep;
      plan.dp = dp;
      bool alike = true;
      for (int32_t r = 0; r < plan.num_ranks(); ++r)
        alike = alike && plan.micro_batches(RankId{r}, 0, batch).size() * plan.num_ranks() ==
                             static_cast<size_t>(batch);
      const auto error = check(plan, batch, 1);
      CHECK(!error == alike); // every rank's program names that many
      refused += error ? 1 : 0;
    }
  CHECK(refused > 0);
  plan.ep = 2;
  plan.dp = 1;
  CHECK(text_of(check(plan, 6, 1)) ==
        "batch: 6 micro-batches can't be dealt to ep · dp = 2 columns alike; with 4 lanes expected "
        "a multiple of 4");
}
