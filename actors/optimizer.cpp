#include "actors/optimizer.hpp"

#include "actors/exceptions.hpp"
#include "actors/job_done.hpp"
#include "actors/optimizer_worker.hpp"

#include <utility>

namespace troupe {

Optimizer::behavior_type optimizer(Optimizer::stateful_pointer<OptimizerActorState> self,
                                   std::shared_ptr<const TrainContext> context,
                                   std::shared_ptr<OptimizerState> state) {
  end_by_exceptions(self);
  self->state.worker =
      std::make_shared<OptimizerWorker>(std::move(context), std::move(state), job_done_to(self));
  return {
      [=](const GradientsReady& news) { self->state.worker->gradients_ready(news); },
      [=](Envelope& piece) { self->state.worker->on_piece(std::move(piece)); },
      [=](const TensorTaken& news) { self->state.worker->on_taken(news); },
      [=](const ApplyUpdate& command) { self->state.worker->apply(command); },
      [=](const SaveShard& command) { self->state.worker->save(command); },
      [=](const JobDone& job) { self->state.worker->on_job(job.ticket); },
  };
}

} // namespace troupe
