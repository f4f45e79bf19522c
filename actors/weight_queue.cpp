#include "actors/weight_queue.hpp"

#include <algorithm>
#include <utility>

namespace troupe {

WeightQueue::WeightQueue(const TrainPlan& plan, RankId self,
                         const std::vector<std::vector<int64_t>>& layers_of_phase)
    : plan_(plan), self_(self), layers_(layers_of_phase) {}

void WeightQueue::begin(int64_t num_micro_batches) {
  begun_ = true;
  expected_ = 0;
  handed_out_ = 0;
  lines_.clear();
  const int32_t copy = plan_.dp_index(plan_.column(self_));
  for (size_t p = 0; p < layers_.size(); ++p) {
    const auto phase = static_cast<int32_t>(p);
    const auto directions = plan_.directions(self_, phase);
    // Ascending micro-batches of a direction are in (time, lane) order.
    for (int64_t j = 0; j < num_micro_batches; ++j) {
      const auto cell = cell_of(j, plan_.lanes);
      const int32_t group = plan_.group_of_lane(cell.lane);
      if (group / plan_.groups_per_copy() != copy ||
          std::find(directions.begin(), directions.end(), cell.direction) == directions.end())
        continue;
      for (const int64_t layer : layers_[p]) {
        lines_[{phase, layer, cell.direction, group}].micro_batches.push_back(j);
        ++expected_;
      }
    }
  }
}

void WeightQueue::add(int32_t phase, int64_t layer, int64_t micro_batch, WeightWork work,
                      bool released) {
  waiting_.emplace(std::pair{layer, micro_batch}, std::move(work));
  if (released)
    release(phase, micro_batch);
}

void WeightQueue::release(int32_t phase, int64_t micro_batch) {
  released_.emplace(phase, micro_batch);
}

std::optional<WeightQueue::Ready> WeightQueue::next() {
  if (!begun_)
    return std::nullopt;
  for (auto& [lane, line] : lines_) {
    if (line.next == line.micro_batches.size())
      continue;
    const auto& [phase, layer, direction, group] = lane;
    const int64_t j = line.micro_batches[line.next];
    const auto found = waiting_.find({layer, j});
    if (found == waiting_.end() || !released_.contains({phase, j}))
      continue;
    Ready ready{layer, j, phase, direction, group, std::move(found->second)};
    waiting_.erase(found);
    ++line.next;
    if (++handed_out_ == expected_)
      released_.clear();
    return ready;
  }
  return std::nullopt;
}

} // namespace troupe
