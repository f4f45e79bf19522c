// Runs this rank's program of the pipeline schedule: an operation starts when the messages it needs
// have arrived, and those of an overlapped pair take turns, so that one computes while the other
// waits for the wire.
//
// Invariants: operations start in program order; a chunk's weight work runs in the order of its
// micro-batches; nothing is added to a gradient in order of arrival (contract, Gradients on a
// grid). The actor only hands messages to its worker (pipeline_worker), whose coroutines follow the
// program; the worker outlives its jobs.
#pragma once

#include "actors/train_context.hpp"
#include "actors/train_messages.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <memory>

namespace troupe {

using PipelineStage = caf::typed_actor<caf::reacts_to<BeginStep>, caf::reacts_to<Envelope>,
                                       caf::reacts_to<JobDone>, caf::reacts_to<ExpertsDone>>;

class PipelineWorker;

struct PipelineStageState {
  static inline const char* name = "pipeline_stage";
  std::shared_ptr<PipelineWorker> worker; // shared with the job in flight
};

PipelineStage::behavior_type
pipeline_stage(PipelineStage::stateful_pointer<PipelineStageState> self,
               std::shared_ptr<const TrainContext> context);

} // namespace troupe
