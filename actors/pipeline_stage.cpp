#include "actors/pipeline_stage.hpp"

#include "actors/exceptions.hpp"
#include "actors/pipeline_worker.hpp"

#include <caf/actor_cast.hpp>
#include <caf/send.hpp>

#include <utility>

namespace troupe {

PipelineStage::behavior_type
pipeline_stage(PipelineStage::stateful_pointer<PipelineStageState> self,
               std::shared_ptr<const TrainContext> context) {
  end_by_exceptions(self);
  auto handle = caf::actor_cast<caf::weak_actor_ptr>(self);
  self->state.worker =
      std::make_shared<PipelineWorker>(std::move(context), [handle](uint64_t ticket) {
        if (auto alive = caf::actor_cast<caf::actor>(handle))
          caf::anon_send(alive, JobDone{ticket});
      });
  return {
      [=](const BeginStep& command) { self->state.worker->begin(command); },
      [=](Envelope& message) { self->state.worker->on_message(std::move(message)); },
      [=](const JobDone& job) { self->state.worker->on_job(job.ticket); },
      [=](const ExpertsDone& done) { self->state.worker->on_experts_done(done.run); },
  };
}

} // namespace troupe
