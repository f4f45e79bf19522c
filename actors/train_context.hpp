// What the training actors of a rank share: settings, plan, weights and gradients of its stages.
//
// Jobs of one compute stream run one at a time, so weights and gradients need no lock: whoever
// touches them does so in a job. The rest never changes after the rank has started.
#pragma once

#include "actors/dispatch_plan.hpp"
#include "actors/rank_context.hpp"
#include "actors/train_plan.hpp"
#include "config/train_config.hpp"
#include "config/train_data.hpp"
#include "kernels/train_compute.hpp"

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace troupe {

// A stage that a rank runs, with an accumulator per cell of the gradient grid it works on.
struct TrainPhase {
  std::shared_ptr<StageWeights> weights;
  std::map<std::pair<int32_t, int32_t>, MemoryBlock> dense;   // (direction, lane)
  std::map<std::pair<int32_t, int32_t>, MemoryBlock> experts; // (direction, group)

  [[nodiscard]] float* dense_of(const GridCell& cell) const {
    return reinterpret_cast<float*>(dense.at({cell.direction, cell.lane}).data());
  }
  [[nodiscard]] float* experts_of(int32_t direction, int32_t group) const {
    return reinterpret_cast<float*>(experts.at({direction, group}).data());
  }
};

struct TrainContext {
  const RankContext* rank = nullptr; // not owned; outlives the actors
  TrainConfig config;
  TrainPlan plan;
  TrainPrecision precision = TrainPrecision::f32;
  std::shared_ptr<const TrainData> data;
  std::shared_ptr<const TrainData> held_out; // null: none
  std::vector<PlannedTensor> tensors;        // plan_tensors
  std::shared_ptr<TrainCompute> compute;
  std::vector<TrainPhase> phases;
  View experts_view; // members, and where this rank's layers have their experts
  // For work that no step waits for (averages, files). Not owned; outlives the actors.
  ComputeStream* background = nullptr;
  mutable std::atomic<int64_t> busy_ns{0}; // of the compute stream, in training jobs

  [[nodiscard]] RankId self() const { return rank->self; }
  // How rows travel between stages, and to experts.
  [[nodiscard]] RowFormat stage_format() const {
    return precision == TrainPrecision::f32 ? RowFormat::f32 : RowFormat::bf16;
  }
  [[nodiscard]] RowFormat dispatch_format() const {
    return precision == TrainPrecision::fp8 ? RowFormat::fp8 : stage_format();
  }
  // The phase that holds a layer (MTP layers included); -1: none here.
  [[nodiscard]] int32_t phase_of_layer(int64_t layer) const;
};

// Everything but tensors' contents, which load_values fills. Errors name what is missing.
[[nodiscard]] caf::expected<std::shared_ptr<TrainContext>>
make_train_context(const RankContext* rank, const TrainConfig& config, const ModelConfig& model,
                   std::shared_ptr<const TrainData> data,
                   std::shared_ptr<const TrainData> held_out);
[[nodiscard]] caf::expected<TrainPlan> plan_of(const TrainConfig& config, const ModelConfig& model);

// Rows [n, width] of F32 memory to and from the wire (transport/rows.hpp). FP8 rows are quantized
// with power-of-two scales (specification §5.5).
void encode_rows(RowFormat format, int64_t n, int64_t width, const float* from, std::byte* to);
void encode_row(RowFormat format, int64_t width, const float* from, std::byte* to);
void decode_row(RowFormat format, int64_t width, const std::byte* from, float* to);

} // namespace troupe
