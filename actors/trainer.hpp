// The head of a training run, on rank 0: begins steps, adds up what ranks report, decides clipping,
// has biases moved and checkpoints written, and tells the client.
//
//   waiting ─StartTraining▶ [ step ▶ update ▶ (save) ▶ (evaluate) ]* ▶ done
//
// One step at a time: the next begins when every rank has committed the one before. A checkpoint is
// copied between two steps and written while the next ones run.
#pragma once

#include "actors/balance_controller.hpp"
#include "actors/train_context.hpp"
#include "actors/train_messages.hpp"
#include "actors/train_setup.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

// ---- pure ---------------------------------------------------------------------------------------

// What all ranks reported of a step, added up in an order of its own: losses by micro-batch,
// balance losses by (micro-batch, layer), loads by layer.
struct StepSums {
  double main = 0, balance = 0;
  std::vector<double> mtp; // per depth; main and these not yet divided
  std::vector<LayerLoad> loads;
  double bubble = 0;
  std::optional<NotFinite> not_finite; // the first layer that gave no finite numbers
};
[[nodiscard]] StepSums add_reports(const std::vector<StageReport>& reports);

// √Σ over tensors by name; `tensors` names the sums.
[[nodiscard]] double gradient_norm(const std::vector<PlannedTensor>& tensors,
                                   const std::vector<GradientNorms>& norms);
// min(1, clip / norm); 1 where clip is 0.
[[nodiscard]] double clip_factor(double clip, double norm);

// ---- actor --------------------------------------------------------------------------------------

using Trainer = caf::typed_actor<caf::replies_to<StartTraining>::with<caf::unit_t>,
                                 caf::reacts_to<StopTraining>, caf::reacts_to<StageReport>,
                                 caf::reacts_to<GradientNorms>, caf::reacts_to<StepCommitted>,
                                 caf::reacts_to<ShardSaved>, caf::reacts_to<JobDone>,
                                 caf::replies_to<GetClusterInfo>::with<ClusterInfo>>;

struct TrainerState {
  static inline const char* name = "trainer";
  std::shared_ptr<const TrainContext> context;
  std::shared_ptr<const TrainSetup> setup;
  BalanceController balance;
  caf::actor client;
  bool stop = false, done = false;
  std::string checkpoint; // the newest

  // ---- the step at hand ----
  int64_t step = 0;
  int64_t committed = 0; // the last step that all ranks committed
  Nanoseconds began{0};
  std::vector<StageReport> reports;
  std::vector<GradientNorms> norms;
  TrainRecord record;
  size_t num_committed = 0;
  uint64_t wire_bytes = 0;      // sent since the run began by the ranks that committed the step
  uint64_t wire_bytes_then = 0; // the same of all ranks and the step before

  // ---- evaluation ----
  int64_t pass = 0, num_passes = 0; // num_passes 0: none at hand
  std::vector<StageReport> eval_reports;
  bool evaluate_due = false;

  // ---- saving ----
  int64_t saving_step = 0; // 0: none under way
  bool save_due = false;
  int64_t saved_step = 0; // the newest
  std::vector<ShardSaved> shards;
  struct Commit;
  std::shared_ptr<Commit> commit; // shared with its job
};

Trainer::behavior_type trainer(Trainer::stateful_pointer<TrainerState> self,
                               std::shared_ptr<const TrainContext> context,
                               std::shared_ptr<const TrainSetup> setup, BalanceController balance);

} // namespace troupe
