// The order in which experts' weight work runs (contract, Gradients on a grid): per layer,
// direction and group of lanes in (time, lane) order, each once, after its release. Pure.
#pragma once

#include "actors/train_plan.hpp"
#include "kernels/train_compute.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

namespace troupe {

class WeightQueue {
public:
  struct Ready {
    int64_t layer = 0, micro_batch = 0;
    int32_t phase = 0, direction = 0, group = 0;
    WeightWork work;
  };
  // Layers with experts of each phase of `self`.
  WeightQueue(const TrainPlan& plan, RankId self,
              const std::vector<std::vector<int64_t>>& layers_of_phase);

  // A step begins: micro-batches of the whole batch.
  void begin(int64_t num_micro_batches);
  // The backward pass of a micro-batch left this. `released`: it may run at once.
  void add(int32_t phase, int64_t layer, int64_t micro_batch, WeightWork work, bool released);
  void release(int32_t phase, int64_t micro_batch);
  // The next piece that may run; none: wait.
  [[nodiscard]] std::optional<Ready> next();
  // Every piece of the step has been handed out.
  [[nodiscard]] bool done() const { return begun_ && handed_out_ == expected_; }
  void end() { begun_ = false; }

private:
  using Lane = std::tuple<int32_t, int64_t, int32_t, int32_t>; // phase, layer, direction, group
  TrainPlan plan_;
  RankId self_;
  std::vector<std::vector<int64_t>> layers_;
  bool begun_ = false;
  int64_t expected_ = 0, handed_out_ = 0;
  // Micro-batches still to come, in order; by (phase, direction, group).
  struct Line {
    std::vector<int64_t> micro_batches;
    size_t next = 0;
  };
  std::map<Lane, Line> lines_;
  std::map<std::pair<int64_t, int64_t>, WeightWork> waiting_; // by (layer, micro-batch)
  std::set<std::pair<int32_t, int64_t>> released_;            // (phase, micro-batch)
};

} // namespace troupe
