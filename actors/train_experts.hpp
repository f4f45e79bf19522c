// Routed experts of a rank's stages in training: forward, backward, and weight gradients in the
// order of the contract.
//
// A dispatch is one job; its answer leaves when the job has ended. What the backward pass needs is
// kept per (layer, micro-batch). Weight work joins a queue per (layer, direction, gate group) and
// runs in (time, lane) order, whatever order the backward passes came in (weight_queue), when
// no dispatch waits for an answer.
#pragma once

#include "actors/train_context.hpp"
#include "actors/train_messages.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <memory>

namespace troupe {

using TrainExperts = caf::typed_actor<caf::reacts_to<Envelope>, caf::reacts_to<ExpertsBegin>,
                                      caf::reacts_to<RunWeights>, caf::reacts_to<JobDone>>;

class ExpertWorker;

struct TrainExpertsState {
  static inline const char* name = "train_experts";
  std::shared_ptr<ExpertWorker> worker; // shared with the job in flight
};

TrainExperts::behavior_type train_experts(TrainExperts::stateful_pointer<TrainExpertsState> self,
                                          std::shared_ptr<const TrainContext> context);

} // namespace troupe
