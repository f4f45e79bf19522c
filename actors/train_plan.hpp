// Who does what in training: ranks, stages, lanes, and whose gradients make up a tensor's. Pure.
//
// pp · ep · dp ranks: rank = pp_rank · columns + column, column = dp_index · ep + ep_index. A
// column is a pipeline; it works on lanes [column · L / columns, …) of the gradient grid (contract,
// Gradients on a grid). The ep columns of a copy share out its experts.
#pragma once

#include "actors/schedule.hpp"
#include "config/errors.hpp"
#include "config/ids.hpp"
#include "config/model_config.hpp"
#include "kernels/train_stage.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace troupe {

// Where a micro-batch lies on the grid.
struct GridCell {
  int32_t lane = 0, direction = 0;
  int64_t time = 0;
};
[[nodiscard]] GridCell cell_of(int64_t micro_batch, int32_t lanes);

struct TrainPlan {
  ScheduleKind schedule = ScheduleKind::dualpipe;
  int32_t pp = 1, ep = 1, dp = 1, lanes = 1, groups = 1;
  ModelConfig config;
  int64_t num_mtp_layers = 0;

  [[nodiscard]] int32_t columns() const { return ep * dp; }
  [[nodiscard]] int32_t num_ranks() const { return pp * columns(); }
  [[nodiscard]] RankId rank(int32_t pp_rank, int32_t column) const {
    return RankId{pp_rank * columns() + column};
  }
  [[nodiscard]] int32_t pp_rank(RankId r) const { return r.value / columns(); }
  [[nodiscard]] int32_t column(RankId r) const { return r.value % columns(); }
  [[nodiscard]] int32_t ep_index(int32_t column) const { return column % ep; }
  [[nodiscard]] int32_t dp_index(int32_t column) const { return column / ep; }
  // DualPipe on one rank has nothing to overlap: it is 1F1B there.
  [[nodiscard]] ScheduleKind kind() const {
    return pp == 1 && schedule == ScheduleKind::dualpipe ? ScheduleKind::one_f_one_b : schedule;
  }

  [[nodiscard]] int32_t lanes_per_column() const { return lanes / columns(); }
  [[nodiscard]] int32_t first_lane(int32_t column) const { return column * lanes_per_column(); }
  [[nodiscard]] int32_t lanes_per_group() const { return lanes / groups; }
  [[nodiscard]] int32_t groups_per_copy() const { return groups / dp; }
  [[nodiscard]] int32_t group_of_lane(int32_t lane) const { return lane / lanes_per_group(); }

  // The part of the model a rank holds for a phase, with its share of the experts.
  [[nodiscard]] StageShare share(RankId rank, int32_t phase) const;
  // Grid directions whose micro-batches pass through a rank's phase.
  [[nodiscard]] std::vector<int32_t> directions(RankId rank, int32_t phase) const;
  // A column's micro-batches in the order a phase runs them, of a step with num_micro_batches.
  [[nodiscard]] std::vector<int64_t> micro_batches(RankId rank, int32_t phase,
                                                   int64_t num_micro_batches) const;
  // Where the next or previous stage of a micro-batch runs: (rank, phase).
  [[nodiscard]] std::pair<RankId, int32_t> neighbour(RankId rank, int32_t phase, int32_t by) const;
  // The ep ranks that share a rank's experts, by ep index.
  [[nodiscard]] std::vector<RankId> expert_peers(RankId rank) const;
  [[nodiscard]] RankId expert_rank(RankId source, int32_t expert) const;
};

// Errc::invalid_argument naming the field: odd pp, more stages than layers, a batch that can't be
// dealt out, …
[[nodiscard]] caf::error check(const TrainPlan& plan, int64_t batch, int64_t micro_batch);

// One accumulator (or finished subtree of them) that a rank contributes to a tensor.
struct GradientPart {
  RankId rank;
  int32_t phase = 0;
  int32_t direction = 0;
  int32_t use = 0;
  int32_t first = 0, count = 1; // lanes (dense) or groups (experts) it covers
};

// A tensor of the whole model, its holders and the one that owns its master (ZeRO-1).
struct PlannedTensor {
  TensorSpec spec;
  RankId owner;
  std::vector<std::pair<RankId, int32_t>> holders; // (rank, phase), ascending
  std::vector<GradientPart> parts;                 // in the order of the canonical sum
  int32_t num_uses = 1;
};
// All tensors in file order (router biases included: they have holders and no parts).
[[nodiscard]] std::vector<PlannedTensor> plan_tensors(const TrainPlan& plan);

// Adds a tensor's parts (parallel to PlannedTensor::parts, each of n elements) in the canonical
// order; destroys them and leaves the sum in parts[0].
void add_parts(const PlannedTensor& tensor, std::span<float* const> parts, int64_t n);

} // namespace troupe
