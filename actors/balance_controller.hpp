// Loss-free balance (DeepSeek-V3 report §2.1.2; specification §5.7): after each step the bias of an
// expert that had more than the mean load goes down by γ, of one that had less up by γ.
#pragma once

#include "actors/train_messages.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <cstdint>
#include <map>
#include <span>
#include <vector>

namespace troupe {

// b ← b + γ·sign(mean(c) − c), decided in integers: no rounding of a mean.
[[nodiscard]] std::vector<float> updated_bias(std::span<const float> bias,
                                              std::span<const int64_t> counts, double gamma);
// Largest load over the mean, less one; 0 without any load.
[[nodiscard]] double max_vio(std::span<const int64_t> counts);

using BalanceController = caf::typed_actor<caf::replies_to<LoadReport>::with<BiasUpdate>>;

// On rank 0; knows the biases of all layers.
struct BalanceControllerState {
  static inline const char* name = "balance_controller";
  std::map<int64_t, std::vector<float>> biases; // by layer; none where the gate has no bias
};

BalanceController::behavior_type
balance_controller(BalanceController::stateful_pointer<BalanceControllerState> self,
                   std::vector<LayerBias> biases);

} // namespace troupe
