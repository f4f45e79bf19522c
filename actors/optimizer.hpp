// The optimizer of a rank (ZeRO-1): sums the gradients of the tensors it owns, makes the AdamW step
// on their masters and hands the new values to all who hold them (specification §5.2, §5.7;
// contract, Gradients on a grid).
//
// A step: GradientsReady ─ lanes and groups of this rank add up ─ parts travel to owners ─ owners
// add parts in canonical order ─ GradientNorms ─ ApplyUpdate ─ AdamW ─ values travel to holders ─
// StepCommitted. Pieces are at most kPieceBytes, and only kWindowBytes are under way at a time.
// EMA and checkpoint files are made on the background stream, from copies; the step does not wait
// for files.
#pragma once

#include "actors/optimizer_state.hpp"
#include "actors/train_messages.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <memory>

namespace troupe {

using Optimizer = caf::typed_actor<caf::reacts_to<GradientsReady>, caf::reacts_to<Envelope>,
                                   caf::reacts_to<TensorTaken>, caf::reacts_to<ApplyUpdate>,
                                   caf::reacts_to<SaveShard>, caf::reacts_to<JobDone>>;

class OptimizerWorker;

struct OptimizerActorState {
  static inline const char* name = "optimizer";
  std::shared_ptr<OptimizerWorker> worker; // shared with the jobs in flight
};

Optimizer::behavior_type optimizer(Optimizer::stateful_pointer<OptimizerActorState> self,
                                   std::shared_ptr<const TrainContext> context,
                                   std::shared_ptr<OptimizerState> state);

} // namespace troupe
