#include "actors/pipeline_stage.hpp"

#include "actors/exceptions.hpp"
#include "actors/job_done.hpp"
#include "actors/pipeline_worker.hpp"

#include <utility>

namespace troupe {

PipelineStage::behavior_type
pipeline_stage(PipelineStage::stateful_pointer<PipelineStageState> self,
               std::shared_ptr<const TrainContext> context) {
  end_by_exceptions(self);
  self->state.worker = std::make_shared<PipelineWorker>(std::move(context), job_done_to(self));
  return {
      [=](const BeginStep& command) { self->state.worker->begin(command); },
      [=](Envelope& message) { self->state.worker->on_message(std::move(message)); },
      [=](const JobDone& job) { self->state.worker->on_job(job.ticket); },
      [=](const ExpertsDone& done) { self->state.worker->on_experts_done(done.run); },
  };
}

} // namespace troupe
