// What an optimizer keeps: master weights, moments and averaged weights of the tensors a rank owns
// (ZeRO-1). All arenas have one layout. Touched in jobs only.
#pragma once

#include "actors/train_context.hpp"
#include "kernels/train_parameters.hpp"

#include <functional>
#include <memory>
#include <optional>

namespace troupe {

struct OptimizerState {
  std::shared_ptr<const TrainLayout> layout; // owned tensors, router biases included
  TrainArena master, m, v;
  std::optional<TrainArena> ema; // where config.ema > 0
};

// Gives values tensor by tensor: a checkpoint, random numbers, a training checkpoint.
struct ValueSource {
  std::function<caf::error(const TensorSpec& spec, std::span<float> to)> master;
  // Of a tensor of state.layout. Null: moments start at zero, the average at the master.
  std::function<caf::error(const TrainTensor& tensor, const OptimizerState& state)> moments;
};

// Fills and prepares the weights of all phases of a rank, and makes its optimizer's state. Calls
// `progress`, where there is one, after every tensor.
[[nodiscard]] caf::expected<std::shared_ptr<OptimizerState>>
make_optimizer_state(const TrainContext& context, const ValueSource& source,
                     const LoadProgress& progress);

// Copies a master to the phases of this rank that hold the tensor.
void copy_to_phases(const TrainContext& context, const TensorSpec& spec,
                    std::span<const float> from, int64_t at);

} // namespace troupe
