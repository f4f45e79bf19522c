// The conversation of training, so that it can be read in one sitting.
//
//   client ──StartTraining──▶ trainer ──TrainRecord, TrainingDone──▶ client
//   client ──StopTraining──▶ trainer
//   trainer ──BeginStep──▶ pipeline stages ──StageReport──▶ trainer
//   pipeline stage ══stage_rows══▶ pipeline stage      (activations forward, gradients backward)
//   pipeline stage ══dispatch══▶ train experts ══combine══▶ pipeline stage
//   pipeline stage ──RunWeights──▶ train experts ──ExpertsDone──▶ pipeline stage
//   pipeline stage ──GradientsReady──▶ optimizer
//   optimizer ══bulk══▶ optimizer ──TensorTaken──▶ optimizer   (gradients to owners, values back)
//   optimizer ──GradientNorms──▶ trainer ──ApplyUpdate──▶ optimizers ──StepCommitted──▶ trainer
//   trainer ──LoadReport──▶ balance controller ──BiasUpdate──▶ trainer
//   trainer ──SaveShard──▶ optimizers ──ShardSaved──▶ trainer
//
// ══ are envelopes of the fabric, ── CAF messages. A step is begun only when every rank has
// committed the one before, so messages of two steps never meet.
#pragma once

#include "actors/messages.hpp"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace troupe {

// ---- client and trainer -----------------------------------------------------------------------

// Command from a client at the control port: train as configured. Answer: unit, or an error. News
// then goes to `client`.
struct StartTraining {
  std::string cluster_token;
  caf::actor client;
};
// Command from a client: finish the step, save, end.
struct StopTraining {
  std::string cluster_token;
};
// News: one optimizer step. A line of the log.
struct TrainRecord {
  int64_t step = 0, num_steps = 0;
  double main_loss = 0, balance_loss = 0, total_loss = 0, grad_norm = 0, lr = 0;
  std::vector<double> mtp_loss;           // per depth
  std::vector<double> max_vio;            // per MoE layer, MTP's last
  std::vector<std::vector<int64_t>> load; // per MoE layer, per expert
  double tokens_per_s = 0, bubble = 0, seconds = 0;
  uint64_t wire_bytes = 0;
  int64_t tokens = 0; // trained on so far
  // Above 0: a pass over the held-out rows, with so many targets; losses and loads only.
  int64_t evaluated_tokens = 0;
  [[nodiscard]] bool evaluated() const { return evaluated_tokens > 0; }
};
// News: the end. `error_code` 0 after a clean one.
struct TrainingDone {
  uint8_t error_code = 0;
  std::string error;
  int64_t step = 0;       // the last one committed
  std::string checkpoint; // the newest, "" for none
};

// ---- a step -----------------------------------------------------------------------------------

struct BeginStep {
  int64_t step = 0; // from 1
  // A pass over held-out rows [pass · batch, (pass + 1) · batch) instead, those that there are:
  // forward only.
  bool evaluate = false;
  int64_t pass = 0;
};
// Losses of one micro-batch, not yet divided.
struct MicroBatchLoss {
  int64_t micro_batch = 0;
  double main = 0;
  std::vector<double> mtp;
};
struct BalanceLoss {
  int64_t micro_batch = 0, layer = 0;
  double loss = 0;
};
struct LayerLoad {
  int64_t layer = 0;
  std::vector<int64_t> counts;
};
// The first layer of a micro-batch whose output holds a value that is not finite.
struct NotFinite {
  int64_t micro_batch = 0, layer = 0;
  RankId rank;
};
// News pipeline stage -> trainer: this rank's share of a step.
struct StageReport {
  int64_t step = 0;
  RankId rank;
  std::vector<MicroBatchLoss> losses;
  std::vector<BalanceLoss> balance;
  std::vector<LayerLoad> loads;
  std::vector<NotFinite> not_finite;
  double busy_s = 0, program_s = 0;
};

// Command pipeline stage -> train experts: the deferred weight work of a micro-batch may run.
struct RunWeights {
  uint64_t run = 0; // as in the headers of the step's messages
  int64_t micro_batch = 0;
  int32_t phase = 0;
};
// News train experts -> pipeline stage of the same rank: all weight work of the step is done.
struct ExpertsDone {
  uint64_t run = 0;
};
// Command pipeline stage -> train experts of the same rank: the step's gradients are zero, weight
// work may begin.
struct ExpertsBegin {
  uint64_t run = 0;
  int64_t num_micro_batches = 0;
};
// News pipeline stage -> optimizer of the same rank.
struct GradientsReady {
  int64_t step = 0;
};

// News optimizer -> trainer: Σ g² of the tensors it owns.
struct GradientNorms {
  int64_t step = 0;
  RankId rank;
  std::vector<std::pair<int64_t, double>> sums; // (index in plan_tensors, sum)
};
struct LayerBias {
  int64_t layer = 0;
  std::vector<float> bias;
};
// Command trainer -> optimizers: make the step. Biases are those after it.
struct ApplyUpdate {
  int64_t step = 0;
  double lr = 0, clip = 1;
  std::vector<LayerBias> biases;
};
// News optimizer -> trainer: this rank's weights are those after the step.
struct StepCommitted {
  int64_t step = 0;
  RankId rank;
  uint64_t wire_bytes = 0; // sent since the run began
};
// Acknowledges bytes of bulk messages, so that a slow owner holds its senders up.
struct TensorTaken {
  RankId rank;
  int64_t bytes = 0;
};

// Query trainer -> balance controller: loads of the global batch. Answer: BiasUpdate.
struct LoadReport {
  int64_t step = 0;
  double gamma = 0;
  std::vector<LayerLoad> loads;
};
struct BiasUpdate {
  int64_t step = 0;
  std::vector<LayerBias> biases;
  std::vector<double> max_vio; // per layer, in the order of the loads
};

// ---- checkpoints --------------------------------------------------------------------------------

// Command trainer -> optimizers: write what this rank owns, as it is now, to files in `folder`.
struct SaveShard {
  int64_t step = 0;
  std::string folder;
};
struct ShardSaved {
  int64_t step = 0;
  RankId rank;
  uint8_t error_code = 0;
  std::string error;
  std::vector<std::string> tensors; // in this rank's weights file
  int64_t bytes = 0;                // of them
};

// ---- inspection --------------------------------------------------------------------------------

template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StartTraining& x) {
  return f(caf::meta::type_name("StartTraining"), x.cluster_token, x.client);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StopTraining& x) {
  return f(caf::meta::type_name("StopTraining"), x.cluster_token);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, TrainRecord& x) {
  return f(caf::meta::type_name("TrainRecord"), x.step, x.num_steps, x.main_loss, x.balance_loss,
           x.total_loss, x.grad_norm, x.lr, x.mtp_loss, x.max_vio, x.load, x.tokens_per_s, x.bubble,
           x.seconds, x.wire_bytes, x.tokens, x.evaluated_tokens);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, TrainingDone& x) {
  return f(caf::meta::type_name("TrainingDone"), x.error_code, x.error, x.step, x.checkpoint);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, BeginStep& x) {
  return f(caf::meta::type_name("BeginStep"), x.step, x.evaluate, x.pass);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, MicroBatchLoss& x) {
  return f(caf::meta::type_name("MicroBatchLoss"), x.micro_batch, x.main, x.mtp);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, BalanceLoss& x) {
  return f(caf::meta::type_name("BalanceLoss"), x.micro_batch, x.layer, x.loss);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, LayerLoad& x) {
  return f(caf::meta::type_name("LayerLoad"), x.layer, x.counts);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, NotFinite& x) {
  return f(caf::meta::type_name("NotFinite"), x.micro_batch, x.layer, x.rank);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StageReport& x) {
  return f(caf::meta::type_name("StageReport"), x.step, x.rank, x.losses, x.balance, x.loads,
           x.not_finite, x.busy_s, x.program_s);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RunWeights& x) {
  return f(caf::meta::type_name("RunWeights"), x.run, x.micro_batch, x.phase);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ExpertsDone& x) {
  return f(caf::meta::type_name("ExpertsDone"), x.run);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ExpertsBegin& x) {
  return f(caf::meta::type_name("ExpertsBegin"), x.run, x.num_micro_batches);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, GradientsReady& x) {
  return f(caf::meta::type_name("GradientsReady"), x.step);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, GradientNorms& x) {
  return f(caf::meta::type_name("GradientNorms"), x.step, x.rank, x.sums);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, LayerBias& x) {
  return f(caf::meta::type_name("LayerBias"), x.layer, x.bias);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ApplyUpdate& x) {
  return f(caf::meta::type_name("ApplyUpdate"), x.step, x.lr, x.clip, x.biases);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StepCommitted& x) {
  return f(caf::meta::type_name("StepCommitted"), x.step, x.rank, x.wire_bytes);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, TensorTaken& x) {
  return f(caf::meta::type_name("TensorTaken"), x.rank, x.bytes);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, LoadReport& x) {
  return f(caf::meta::type_name("LoadReport"), x.step, x.gamma, x.loads);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, BiasUpdate& x) {
  return f(caf::meta::type_name("BiasUpdate"), x.step, x.biases, x.max_vio);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, SaveShard& x) {
  return f(caf::meta::type_name("SaveShard"), x.step, x.folder);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ShardSaved& x) {
  return f(caf::meta::type_name("ShardSaved"), x.step, x.rank, x.error_code, x.error, x.tensors,
           x.bytes);
}

} // namespace troupe

CAF_BEGIN_TYPE_ID_BLOCK(troupe_train, caf::id_block::troupe::end)
CAF_ADD_TYPE_ID(troupe_train, (troupe::StartTraining))
CAF_ADD_TYPE_ID(troupe_train, (troupe::StopTraining))
CAF_ADD_TYPE_ID(troupe_train, (troupe::TrainRecord))
CAF_ADD_TYPE_ID(troupe_train, (troupe::TrainingDone))
CAF_ADD_TYPE_ID(troupe_train, (troupe::BeginStep))
CAF_ADD_TYPE_ID(troupe_train, (troupe::StageReport))
CAF_ADD_TYPE_ID(troupe_train, (troupe::RunWeights))
CAF_ADD_TYPE_ID(troupe_train, (troupe::ExpertsDone))
CAF_ADD_TYPE_ID(troupe_train, (troupe::ExpertsBegin))
CAF_ADD_TYPE_ID(troupe_train, (troupe::GradientsReady))
CAF_ADD_TYPE_ID(troupe_train, (troupe::GradientNorms))
CAF_ADD_TYPE_ID(troupe_train, (troupe::ApplyUpdate))
CAF_ADD_TYPE_ID(troupe_train, (troupe::StepCommitted))
CAF_ADD_TYPE_ID(troupe_train, (troupe::TensorTaken))
CAF_ADD_TYPE_ID(troupe_train, (troupe::LoadReport))
CAF_ADD_TYPE_ID(troupe_train, (troupe::BiasUpdate))
CAF_ADD_TYPE_ID(troupe_train, (troupe::SaveShard))
CAF_ADD_TYPE_ID(troupe_train, (troupe::ShardSaved))
CAF_END_TYPE_ID_BLOCK(troupe_train)
