#include "actors/weight_queue.hpp"

#include "config/presets.hpp"
#include "config/random.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

using namespace troupe;

namespace {

TrainPlan plan_of_layout(ScheduleKind schedule, int32_t pp, int32_t ep, int32_t dp) {
  TrainPlan plan;
  plan.schedule = schedule;
  plan.pp = pp;
  plan.ep = ep;
  plan.dp = dp;
  plan.lanes = 8;
  plan.groups = 2;
  plan.config = *preset("tiny-v3");
  return plan;
}

// Everything that a rank's experts will be given in a step: (phase, layer, micro-batch).
std::vector<std::tuple<int32_t, int64_t, int64_t>>
pieces_of(const TrainPlan& plan, RankId self, const std::vector<std::vector<int64_t>>& layers,
          int64_t num_micro_batches) {
  std::vector<std::tuple<int32_t, int64_t, int64_t>> pieces;
  for (size_t p = 0; p < layers.size(); ++p)
    for (const RankId peer : plan.expert_peers(self))
      for (const int64_t j : plan.micro_batches(peer, static_cast<int32_t>(p), num_micro_batches))
        for (const int64_t layer : layers[p])
          pieces.emplace_back(static_cast<int32_t>(p), layer, j);
  return pieces;
}

} // namespace

TEST_CASE("weight work runs in (time, lane) order, whatever order it comes in") {
  const int64_t num_micro_batches = 32;
  for (const auto& [schedule, pp, ep, dp] :
       {std::tuple{ScheduleKind::dualpipe, 2, 2, 1}, std::tuple{ScheduleKind::dualpipe, 4, 1, 2},
        std::tuple{ScheduleKind::dualpipev, 2, 2, 2}, std::tuple{ScheduleKind::zb1p, 2, 4, 1},
        std::tuple{ScheduleKind::one_f_one_b, 1, 1, 1}}) {
    const auto plan = plan_of_layout(schedule, pp, ep, dp);
    for (int32_t r = 0; r < plan.num_ranks(); ++r) {
      const RankId self{r};
      std::vector<std::vector<int64_t>> layers{{1, 2}};
      if (num_phases(plan.kind()) == 2)
        layers.push_back({3});
      auto pieces = pieces_of(plan, self, layers, num_micro_batches);
      REQUIRE(!pieces.empty());
      KeyedStream random{static_cast<uint64_t>(r) + 1};
      for (size_t i = pieces.size(); i > 1; --i)
        std::swap(pieces[i - 1], pieces[random.below(i)]);
      WeightQueue queue{plan, self, layers};
      size_t added = 0;
      const size_t early = pieces.size() / 3; // some come before the step has begun here
      const auto add = [&] {
        const auto& [phase, layer, j] = pieces[added++];
        queue.add(phase, layer, j, {}, j % 3 != 0);
        if (j % 3 == 0 && added % 2 == 0)
          queue.release(phase, j);
      };
      while (added < early)
        add();
      CHECK(!queue.next().has_value());
      CHECK(!queue.done());
      queue.begin(num_micro_batches);
      std::map<std::tuple<int64_t, int32_t, int32_t>, std::vector<std::pair<int64_t, int32_t>>> ran;
      size_t count = 0;
      const auto drain = [&] {
        while (const auto ready = queue.next()) {
          const auto cell = cell_of(ready->micro_batch, plan.lanes);
          CHECK(ready->direction == cell.direction);
          CHECK(ready->group == plan.group_of_lane(cell.lane));
          ran[{ready->layer, ready->direction, ready->group}].emplace_back(cell.time, cell.lane);
          ++count;
        }
      };
      while (added < pieces.size()) {
        add();
        drain();
      }
      for (const auto& [phase, layer, j] : pieces)
        queue.release(phase, j);
      drain();
      CHECK(count == pieces.size());
      CHECK(queue.done());
      for (const auto& [line, order] : ran)
        CHECK(std::is_sorted(order.begin(), order.end()));
    }
  }
}

TEST_CASE("what is not released waits, and holds back what comes after it") {
  const auto plan = plan_of_layout(ScheduleKind::one_f_one_b, 1, 1, 1);
  WeightQueue queue{plan, RankId{0}, {{1}}};
  queue.begin(2); // lanes 0 and 1, one group, one direction
  queue.add(0, 1, 1, {}, true);
  CHECK(!queue.next().has_value());
  queue.add(0, 1, 0, {}, false);
  CHECK(!queue.next().has_value());
  queue.release(0, 0);
  CHECK(queue.next()->micro_batch == 0);
  CHECK(!queue.done());
  CHECK(queue.next()->micro_batch == 1);
  CHECK(queue.done());
  queue.end();
  CHECK(!queue.done());
  // The next step begins without the releases of the one before.
  queue.begin(1);
  queue.add(0, 1, 0, {}, false);
  CHECK(!queue.next().has_value());
}

TEST_CASE("a step without experts is done at once") {
  const auto plan = plan_of_layout(ScheduleKind::one_f_one_b, 1, 1, 1);
  WeightQueue queue{plan, RankId{0}, {{}}};
  CHECK(!queue.done());
  queue.begin(8);
  CHECK(queue.done());
}
