#include "actors/trainer.hpp"

#include "actors/exceptions.hpp"
#include "actors/job_done.hpp"
#include "actors/train_checkpoint.hpp"
#include "config/train_schedule.hpp"

#include <caf/send.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <tuple>
#include <utility>

namespace troupe {

// ---- pure ---------------------------------------------------------------------------------------

StepSums add_reports(const std::vector<StageReport>& reports) {
  StepSums sums;
  std::map<int64_t, const MicroBatchLoss*> losses;
  std::map<std::pair<int64_t, int64_t>, double> balance;
  std::map<int64_t, std::vector<int64_t>> loads;
  double busy = 0, longest = 0; // a rank that is done early idles until the last one is
  for (const auto& report : reports) {
    for (const auto& loss : report.losses)
      losses.emplace(loss.micro_batch, &loss);
    for (const auto& loss : report.balance)
      balance.emplace(std::pair{loss.micro_batch, loss.layer}, loss.loss);
    for (const auto& load : report.loads) {
      auto& counts = loads[load.layer];
      counts.resize(load.counts.size());
      for (size_t e = 0; e < counts.size(); ++e)
        counts[e] += load.counts[e];
    }
    for (const auto& bad : report.not_finite)
      if (!sums.not_finite || std::pair{bad.layer, bad.micro_batch} <
                                  std::pair{sums.not_finite->layer, sums.not_finite->micro_batch})
        sums.not_finite = bad;
    busy += report.busy_s;
    longest = std::max(longest, report.program_s);
  }
  for (const auto& [micro_batch, loss] : losses) {
    sums.main += loss->main;
    sums.mtp.resize(std::max(sums.mtp.size(), loss->mtp.size()));
    for (size_t k = 0; k < loss->mtp.size(); ++k)
      sums.mtp[k] += loss->mtp[k];
  }
  for (const auto& [place, loss] : balance)
    sums.balance += loss;
  for (auto& [layer, counts] : loads)
    sums.loads.push_back({layer, std::move(counts)});
  if (longest > 0)
    sums.bubble = std::max(0.0, 1 - busy / (longest * static_cast<double>(reports.size())));
  return sums;
}

double gradient_norm(const std::vector<PlannedTensor>& tensors,
                     const std::vector<GradientNorms>& norms) {
  std::map<std::string_view, double> by_name;
  for (const auto& rank : norms)
    for (const auto& [index, sum] : rank.sums)
      by_name[tensors[static_cast<size_t>(index)].spec.name] = sum;
  double total = 0;
  for (const auto& [name, sum] : by_name)
    total += sum;
  return std::sqrt(total);
}

double clip_factor(double clip, double norm) { return clip > 0 && norm > clip ? clip / norm : 1.0; }

// ---- actor --------------------------------------------------------------------------------------

// A checkpoint on its way to its name.
struct TrainerState::Commit {
  TrainState state;
  std::vector<ShardSaved> shards;
  caf::expected<std::filesystem::path> folder{caf::error{}};
};

namespace {

using Self = Trainer::stateful_pointer<TrainerState>;

void advance(Self self);

size_t num_ranks(Self self) { return static_cast<size_t>(self->state.context->plan.num_ranks()); }

template <class T>
void tell_all(Self self, Route route, const T& message) {
  const auto& context = *self->state.context;
  for (int32_t r = 0; r < context.plan.num_ranks(); ++r)
    context.rank->postman->tell(RankId{r}, route, T{message});
}

void end(Self self, const caf::error& why) {
  auto& state = self->state;
  if (std::exchange(state.done, true))
    return;
  caf::anon_send(state.client, TrainingDone{static_cast<uint8_t>(code_of(why)), text_of(why),
                                            state.committed, state.checkpoint});
}

std::string last_checkpoint(const TrainerState& state) {
  return state.checkpoint.empty() ? "no checkpoint was written"
                                  : fmt::format("the last good checkpoint is {}", state.checkpoint);
}

// Tokens trained on up to the end of a step.
int64_t tokens_until(const TrainSetup& setup, int64_t step) {
  return first_row(setup.config, step + 1) * setup.data->sequence_length();
}

int64_t targets_of(const TrainData& data, int64_t first, int64_t count) {
  int64_t sum = 0;
  for (int64_t r = first; r < first + count; ++r)
    if (const auto n = data.num_loss_tokens(r)) // stages have read it: it can be
      sum += *n;
  return sum;
}

// Losses of reports over `targets` tokens, and loads, into a record.
TrainRecord make_record(const TrainerState& state, const StepSums& sums, int64_t targets) {
  const auto& config = state.setup->config;
  const double divisor = targets > 0 ? static_cast<double>(targets) : 1.0;
  TrainRecord record;
  record.step = state.step;
  record.num_steps = config.steps;
  record.main_loss = sums.main / divisor;
  double mtp = 0;
  for (const double loss : sums.mtp) {
    record.mtp_loss.push_back(loss / divisor);
    mtp += record.mtp_loss.back();
  }
  record.balance_loss = sums.balance;
  const auto depth = static_cast<double>(std::max<size_t>(sums.mtp.size(), 1));
  record.total_loss =
      record.main_loss + mtp_lambda(config, state.step) / depth * mtp + record.balance_loss;
  for (const auto& load : sums.loads) {
    record.load.push_back(load.counts);
    record.max_vio.push_back(max_vio(load.counts));
  }
  record.bubble = sums.bubble;
  record.tokens = tokens_until(*state.setup, state.step);
  return record;
}

// ---- a step -------------------------------------------------------------------------------------

void begin_step(Self self) {
  auto& state = self->state;
  ++state.step;
  state.reports.clear();
  state.norms.clear();
  state.num_committed = 0;
  state.began = state.context->rank->clock->now();
  tell_all(self, Route::pipeline_stage, BeginStep{state.step, false, 0});
}

// What is wrong with a step's numbers, if anything is.
std::string not_a_number(const TrainerState& state, const StepSums& sums,
                         const TrainRecord& record) {
  if (sums.not_finite)
    return fmt::format("step {}: layer {} on rank {} gives values that are not finite (micro-batch "
                       "{}); {}",
                       state.step, sums.not_finite->layer, sums.not_finite->rank.value,
                       sums.not_finite->micro_batch, last_checkpoint(state));
  if (!std::isfinite(record.total_loss))
    return fmt::format("step {}: the loss is {}; {}", state.step, record.total_loss,
                       last_checkpoint(state));
  if (std::isfinite(record.grad_norm))
    return {};
  // The highest layer: from there gradients went down.
  const PlannedTensor* worst = nullptr;
  for (const auto& rank : state.norms)
    for (const auto& [index, sum] : rank.sums) {
      const auto& tensor = state.context->tensors[static_cast<size_t>(index)];
      if (!std::isfinite(sum) && (worst == nullptr || tensor.spec.layer > worst->spec.layer))
        worst = &tensor;
    }
  return fmt::format("step {}: the gradient of {} (layer {}, rank {}) is not finite; {}",
                     state.step, worst ? worst->spec.name : "?", worst ? worst->spec.layer : -1,
                     worst ? worst->owner.value : -1, last_checkpoint(state));
}

// All reports and norms are there: make the update.
void update(Self self) {
  auto& state = self->state;
  if (state.reports.size() < num_ranks(self) || state.norms.size() < num_ranks(self))
    return;
  const auto& config = state.setup->config;
  const int64_t batch = batch_size(config, state.step);
  const auto sums = add_reports(state.reports);
  state.record = make_record(state, sums,
                             targets_of(*state.setup->data, first_row(config, state.step), batch));
  state.record.grad_norm = gradient_norm(state.context->tensors, state.norms);
  state.record.lr = learning_rate(config, state.step);
  if (const auto wrong = not_a_number(state, sums, state.record); !wrong.empty())
    return end(self, make_error(Errc::internal, wrong));
  self->request(state.balance, caf::infinite,
                LoadReport{state.step, bias_gamma(config, state.step), sums.loads})
      .then([=](const BiasUpdate& moved) {
        const auto& s = self->state;
        tell_all(self, Route::optimizer,
                 ApplyUpdate{s.step, s.record.lr,
                             clip_factor(s.setup->config.clip, s.record.grad_norm), moved.biases});
      });
}

void on_committed(Self self, const StepCommitted& news) {
  auto& state = self->state;
  if (state.done || news.step != state.step)
    return;
  state.wire_bytes += news.wire_bytes;
  if (++state.num_committed < num_ranks(self))
    return;
  const auto& config = state.setup->config;
  state.committed = state.step;
  const auto took = state.context->rank->clock->now() - state.began;
  state.record.seconds = static_cast<double>(took.count()) * 1e-9;
  if (state.record.seconds > 0)
    state.record.tokens_per_s =
        static_cast<double>(batch_size(config, state.step) * state.setup->data->sequence_length()) /
        state.record.seconds;
  state.record.wire_bytes = state.wire_bytes - state.wire_bytes_then;
  state.wire_bytes_then = std::exchange(state.wire_bytes, 0);
  caf::anon_send(state.client, state.record);
  const bool last = state.step >= config.steps || state.stop;
  const bool every = config.save_every > 0 && state.step % config.save_every == 0;
  state.save_due = !config.out.empty() && (last || every);
  state.evaluate_due = state.setup->held_out != nullptr && !state.stop &&
                       (last || (config.eval_every > 0 && state.step % config.eval_every == 0));
  advance(self);
}

// ---- saving -------------------------------------------------------------------------------------

void begin_saving(Self self) {
  auto& state = self->state;
  state.save_due = false;
  state.saving_step = state.committed;
  state.shards.clear();
  const auto folder = temporary_checkpoint(state.setup->config.out, state.saving_step);
  tell_all(self, Route::optimizer, SaveShard{state.saving_step, folder.string()});
}

void on_shard(Self self, const ShardSaved& shard) {
  auto& state = self->state;
  if (shard.step != state.saving_step)
    return;
  state.shards.push_back(shard);
  if (state.shards.size() < num_ranks(self))
    return;
  std::ranges::sort(state.shards, {}, &ShardSaved::rank);
  for (const auto& s : state.shards)
    if (s.error_code != 0)
      return end(self, make_error(static_cast<Errc>(s.error_code),
                                  fmt::format("checkpoint of step {}, rank {}: {}; {}", s.step,
                                              s.rank.value, s.error, last_checkpoint(state))));
  auto commit = std::make_shared<TrainerState::Commit>();
  commit->state = {state.saving_step, tokens_until(*state.setup, state.saving_step),
                   state.setup->data->digest(), settings_json(state.setup->config)};
  commit->shards = state.shards;
  state.commit = commit;
  state.context->background->start(
      "commit a checkpoint",
      [commit, setup = state.setup](Workers&) {
        const auto& config = setup->config;
        commit->folder =
            commit_checkpoint(config.out, *setup, commit->state, commit->shards, config.keep);
      },
      [tell = job_done_to(self)](const JobTiming&) { tell(0); });
}

void on_commit(Self self) {
  auto& state = self->state;
  const auto commit = std::exchange(state.commit, nullptr);
  if (!commit)
    return;
  if (!commit->folder)
    return end(self, with_context(fmt::format("checkpoint of step {} ({})", state.saving_step,
                                              last_checkpoint(state)),
                                  commit->folder.error()));
  state.checkpoint = commit->folder->string();
  state.saved_step = state.saving_step;
  state.saving_step = 0;
  advance(self);
}

// ---- evaluation ---------------------------------------------------------------------------------

void begin_pass(Self self) {
  auto& state = self->state;
  state.reports.clear();
  tell_all(self, Route::pipeline_stage, BeginStep{state.step, true, state.pass});
}

void begin_evaluation(Self self) {
  auto& state = self->state;
  state.evaluate_due = false;
  state.pass = 0;
  const int64_t batch = batch_size(state.setup->config, state.step);
  state.num_passes = (state.setup->held_out->num_rows() + batch - 1) / batch;
  state.eval_reports.clear();
  begin_pass(self);
}

void end_evaluation(TrainerState& state) {
  state.num_passes = 0;
  state.eval_reports.clear();
}

void end_pass(Self self) {
  auto& state = self->state;
  const int64_t batch = batch_size(state.setup->config, state.step);
  const int64_t micro_batches = batch / state.setup->config.micro_batch;
  for (auto& report : state.reports) { // micro-batches of later passes come after
    for (auto& loss : report.losses)
      loss.micro_batch += state.pass * micro_batches;
    for (auto& loss : report.balance)
      loss.micro_batch += state.pass * micro_batches;
    state.eval_reports.push_back(std::move(report));
  }
  if (state.stop) { // whoever wants the end does not wait for this
    end_evaluation(state);
    return advance(self);
  }
  if (++state.pass < state.num_passes)
    return begin_pass(self);
  auto sums = add_reports(state.eval_reports);
  // Each sequence came with a batch's share, and the last pass was not full.
  const auto rows = state.setup->held_out->num_rows();
  sums.balance *= static_cast<double>(batch) / static_cast<double>(rows);
  const auto targets = targets_of(*state.setup->held_out, 0, rows);
  auto record = make_record(state, sums, targets);
  record.evaluated_tokens = targets;
  end_evaluation(state);
  if (const auto wrong = not_a_number(state, sums, record); !wrong.empty())
    return end(self, make_error(Errc::internal, "held-out data, " + wrong));
  caf::anon_send(state.client, std::move(record));
  advance(self);
}

// ---- what comes next ----------------------------------------------------------------------------

void advance(Self self) {
  auto& state = self->state;
  if (state.done)
    return;
  // A checkpoint is copied before the next step changes anything; one at a time is written.
  if (state.save_due) {
    if (state.saving_step != 0)
      return;
    begin_saving(self);
  }
  if (state.num_passes > 0)
    return; // an evaluation is under way
  if (state.evaluate_due && !state.stop)
    return begin_evaluation(self);
  const bool idle = state.committed == state.step; // no step under way
  if (!idle)
    return;
  const auto& config = state.setup->config;
  if (state.step < config.steps && !state.stop)
    return begin_step(self);
  if (state.saving_step != 0)
    return;
  // Told to stop between steps: what is there has to be kept.
  if (!config.out.empty() && state.saved_step != state.committed &&
      state.committed >= state.setup->first_step)
    return begin_saving(self);
  end(self, {});
}

void on_report(Self self, const StageReport& report) {
  auto& state = self->state;
  if (state.done)
    return;
  state.reports.push_back(report);
  if (state.num_passes == 0)
    return update(self);
  if (state.reports.size() == num_ranks(self))
    end_pass(self);
}

caf::result<caf::unit_t> start(Self self, const StartTraining& command) {
  auto& state = self->state;
  if (state.client)
    return make_error(Errc::invalid_argument, "the run has a client already");
  state.client = command.client;
  self->monitor(state.client);
  if (state.step < state.setup->config.steps)
    advance(self);
  else
    end(self, {}); // nothing left to do
  return caf::unit;
}

} // namespace

Trainer::behavior_type trainer(Self self, std::shared_ptr<const TrainContext> context,
                               std::shared_ptr<const TrainSetup> setup, BalanceController balance) {
  end_by_exceptions(self);
  auto& state = self->state;
  state.context = std::move(context);
  state.setup = std::move(setup);
  state.balance = std::move(balance);
  state.step = state.committed = state.setup->first_step - 1;
  state.checkpoint = state.setup->resume_from.string();
  state.saved_step = state.setup->resume_from.empty() ? -1 : state.step;
  // Nobody waits for the end any more: keep what is there.
  self->set_down_handler([=](const caf::down_msg&) {
    self->state.stop = true;
    if (self->state.committed == self->state.step && self->state.num_passes == 0)
      advance(self);
  });
  return {
      [=](const StartTraining& command) { return start(self, command); },
      [=](const StopTraining&) { self->state.stop = true; },
      [=](const StageReport& report) { on_report(self, report); },
      [=](const GradientNorms& norms) {
        if (self->state.done)
          return;
        self->state.norms.push_back(norms);
        update(self);
      },
      [=](const StepCommitted& news) { on_committed(self, news); },
      [=](const ShardSaved& shard) { on_shard(self, shard); },
      [=](const JobDone&) { on_commit(self); },
      [=](const GetClusterInfo&) {
        const auto& c = *self->state.context;
        ClusterInfo info;
        info.model = c.config.model.empty() ? c.config.init : c.config.model.string();
        info.arithmetic = to_string(c.precision);
        info.backend = c.compute->ops().name;
        info.num_ranks = c.plan.num_ranks();
        info.num_mtp_layers = c.plan.num_mtp_layers;
        info.max_context = c.data->sequence_length();
        return info;
      },
  };
}

} // namespace troupe
