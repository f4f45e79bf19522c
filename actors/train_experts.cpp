#include "actors/train_experts.hpp"

#include "actors/exceptions.hpp"
#include "actors/expert_route.hpp"
#include "actors/job_done.hpp"
#include "actors/taken_messages.hpp"
#include "actors/weight_queue.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <utility>

namespace troupe {

namespace {

// Which layers of a phase have routed experts, MTP's last.
std::vector<int64_t> expert_layers(const StageWeights& weights) {
  std::vector<int64_t> layers;
  for (const auto& block : weights.blocks())
    if (block.moe)
      layers.push_back(block.layer);
  for (const auto& mtp : weights.mtp())
    if (mtp.block.moe)
      layers.push_back(mtp.block.layer);
  return layers;
}

const TrainBlock& block_of(const StageWeights& weights, int64_t layer) {
  for (const auto& mtp : weights.mtp())
    if (mtp.block.layer == layer)
      return mtp.block;
  return weights.blocks()[static_cast<size_t>(layer - weights.layout().share().first_layer)];
}

std::vector<std::vector<int64_t>> layers_of_phases(const TrainContext& c) {
  std::vector<std::vector<int64_t>> layers;
  for (const auto& phase : c.phases)
    layers.push_back(expert_layers(*phase.weights));
  return layers;
}

} // namespace

// Belongs to the actor; the job in flight shares it, and then alone touches `job_`.
class ExpertWorker : public std::enable_shared_from_this<ExpertWorker> {
public:
  ExpertWorker(std::shared_ptr<const TrainContext> context, std::function<void(uint64_t)> job_done)
      : context_(std::move(context)), job_done_(std::move(job_done)),
        queue_(context_->plan, context_->self(), layers_of_phases(*context_)) {}

  void begin(const ExpertsBegin& command) {
    taken_.begin(command.run);
    queue_.begin(command.num_micro_batches);
    start();
  }
  void release(const RunWeights& command) {
    queue_.release(command.phase, command.micro_batch);
    start();
  }
  void on_dispatch(Envelope&& dispatch);
  void on_job();

private:
  // Rows of a dispatch by expert: what lies where in the job's matrices.
  struct Grouping {
    std::vector<FfnGroup> groups;
    std::vector<int64_t> row_of_entry; // per entry of the table
    std::vector<int64_t> table_row;    // per row of the matrices
    friend bool operator==(const Grouping&, const Grouping&) = default;
  };
  struct Saved {
    Grouping grouping;
    FfnSaved ffn;
  };
  struct DispatchJob {
    Envelope dispatch;
    BufferRef answer;
    WeightWork work; // of a backward pass
  };

  void start();
  void run(const char* name, int64_t layer, std::function<void(Workers&)> work);
  void compute_dispatch(Workers& workers);
  [[nodiscard]] Grouping group(const DispatchView& view, int64_t layer) const;
  [[nodiscard]] Floats rows_of(const DispatchView& view, const Grouping& grouping,
                               Workers& workers) const;
  void write_answer(const DispatchView& view, const Grouping& grouping, const Floats& y,
                    bool backward, const float* dweight, Workers& workers);
  void reply();
  [[nodiscard]] int64_t hidden() const { return context_->plan.config.hidden_size; }

  const std::shared_ptr<const TrainContext> context_;
  const std::function<void(uint64_t)> job_done_;
  std::deque<Envelope> waiting_;
  TakenMessages taken_;
  WeightQueue queue_;
  bool running_ = false;
  DispatchJob job_;
  std::map<std::pair<int64_t, int64_t>, Saved> saved_; // by (layer, micro-batch)
  std::string failure_;                                // of the job
};

void ExpertWorker::on_dispatch(Envelope&& dispatch) {
  if (!taken_.take(key_of(dispatch.header)))
    return;
  waiting_.push_back(std::move(dispatch));
  start();
}

void ExpertWorker::run(const char* name, int64_t layer, std::function<void(Workers&)> work) {
  running_ = true;
  auto self = shared_from_this();
  context_->rank->stream->start(
      name,
      [self, work = std::move(work)](Workers& workers) {
        try {
          work(workers);
        } catch (const std::exception& error) {
          self->failure_ = error.what();
        }
      },
      [self, name, layer](const JobTiming& timing) {
        self->context_->busy_ns += (timing.finished - timing.started).count();
        if (auto* trace = self->context_->rank->trace)
          trace->add({name, "compute", timing.started, timing.finished, layer});
        self->job_done_(0); // there is one at a time
      });
}

void ExpertWorker::start() {
  if (running_)
    return;
  if (!waiting_.empty()) {
    job_ = {};
    job_.dispatch = std::move(waiting_.front());
    waiting_.pop_front();
    run("experts", job_.dispatch.header.layer,
        [this](Workers& workers) { compute_dispatch(workers); });
    return;
  }
  if (auto ready = queue_.next()) {
    auto piece = std::make_shared<WeightQueue::Ready>(std::move(*ready));
    run("expert weights", piece->layer, [this, piece](Workers& workers) {
      const auto& phase = context_->phases[static_cast<size_t>(piece->phase)];
      context_->compute->run(piece->work, phase.experts_of(piece->direction, piece->group),
                             workers);
    });
    return;
  }
  if (queue_.done()) {
    queue_.end();
    context_->rank->postman->tell(context_->self(), Route::pipeline_stage,
                                  ExpertsDone{taken_.run()});
  }
}

void ExpertWorker::on_job() {
  running_ = false;
  if (!failure_.empty())
    throw std::runtime_error{failure_};
  if (job_.dispatch.payload)
    reply();
  start();
}

void ExpertWorker::reply() {
  const auto& from = job_.dispatch.header;
  const auto pass = static_cast<TrainPass>(from.attempt);
  if (pass == TrainPass::backward || pass == TrainPass::backward_deferred)
    queue_.add(context_->phase_of_layer(from.layer), from.layer, static_cast<int64_t>(from.aux),
               std::move(job_.work), pass == TrainPass::backward);
  if (job_.answer) {
    WireHeader header;
    header.kind = WireKind::combine;
    header.step = from.step;
    header.layer = from.layer;
    header.attempt = from.attempt;
    header.aux = from.aux;
    context_->rank->postman->post(from.source, Route::pipeline_stage, header,
                                  std::move(job_.answer));
  }
  job_ = {};
}

// ---- inside a job -------------------------------------------------------------------------------

ExpertWorker::Grouping ExpertWorker::group(const DispatchView& view, int64_t layer) const {
  const auto& weights =
      *context_->phases[static_cast<size_t>(context_->phase_of_layer(layer))].weights;
  const auto& block = block_of(weights, layer);
  const int64_t first = weights.layout().share().first_expert;
  std::map<int32_t, std::vector<std::pair<int64_t, size_t>>> rows; // expert: (table row, entry)
  size_t e = 0;
  for (size_t r = 0; r < view.rows.size(); ++r)
    for (int32_t i = 0; i < view.rows[r].num_entries; ++i, ++e)
      rows[view.entries[e].expert].emplace_back(static_cast<int64_t>(r), e);
  Grouping grouping;
  grouping.row_of_entry.resize(view.entries.size());
  int64_t next = 0;
  for (const auto& [expert, list] : rows) {
    grouping.groups.push_back({&block.experts[static_cast<size_t>(expert - first)], next,
                               static_cast<int64_t>(list.size())});
    for (const auto& [row, entry] : list) {
      grouping.row_of_entry[entry] = next++;
      grouping.table_row.push_back(row);
    }
  }
  return grouping;
}

Floats ExpertWorker::rows_of(const DispatchView& view, const Grouping& grouping,
                             Workers& workers) const {
  const auto n = static_cast<int64_t>(grouping.table_row.size());
  auto x = context_->compute->take(n * hidden());
  workers.parallel_for(n, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      decode_row(context_->dispatch_format(), hidden(),
                 view.data + static_cast<size_t>(grouping.table_row[static_cast<size_t>(i)]) *
                                 size_t{view.head.row_bytes},
                 x.get() + i * hidden());
  });
  return x;
}

void ExpertWorker::write_answer(const DispatchView& view, const Grouping& grouping, const Floats& y,
                                bool backward, const float* dweight, Workers& workers) {
  const auto format = context_->stage_format();
  const auto stride = row_bytes(format, hidden());
  const auto rows = answer_rows(view.rows, view.entries);
  auto answer = context_->rank->fabric->pool().acquire(
      answer_bytes(rows, view.entries.size(), format, hidden(), backward));
  if (!answer)
    throw std::runtime_error{text_of(answer.error())};
  std::byte* to = (*answer)->data();
  const bool round = context_->compute->round();
  workers.parallel_for(static_cast<int64_t>(rows.size()), 8, [&](int64_t begin, int64_t end, int) {
    std::vector<float> sum(static_cast<size_t>(hidden()));
    for (int64_t i = begin; i < end; ++i) {
      const auto& row = rows[static_cast<size_t>(i)];
      const auto entry = [&](size_t t) { return static_cast<size_t>(row.first_entry) + t; };
      const auto row_at = [&](size_t t) -> const float* {
        return y.get() + grouping.row_of_entry[entry(t)] * hidden();
      };
      const float* from = row_at(0);
      if (row.complete) {
        sum_group_rows(
            static_cast<size_t>(row.num_entries), row_at,
            [&](size_t t) { return backward ? 1.0f : view.entries[entry(t)].weight; }, hidden(),
            round, sum.data());
        from = sum.data();
      }
      encode_row(format, hidden(), from, to + static_cast<size_t>(i) * stride);
    }
  });
  if (backward)
    for (size_t e = 0; e < view.entries.size(); ++e)
      std::memcpy(to + rows.size() * stride + e * sizeof(float), dweight + grouping.row_of_entry[e],
                  sizeof(float));
  job_.answer = std::move(*answer);
}

void ExpertWorker::compute_dispatch(Workers& workers) {
  const auto& header = job_.dispatch.header;
  const auto pass = static_cast<TrainPass>(header.attempt);
  const auto layer = static_cast<int64_t>(header.layer);
  const auto& view = context_->experts_view;
  if (!job_.dispatch.payload || pass > TrainPass::evaluate)
    throw std::runtime_error{fmt::format("dispatch from rank {}: {} bytes, pass {}",
                                         header.source.value, header.payload_bytes,
                                         header.attempt)};
  if (layer >= static_cast<int64_t>(view.placement_of_layer.size()) ||
      view.placement_of_layer[static_cast<size_t>(layer)] < 0)
    throw std::runtime_error{fmt::format("dispatch: layer {} has no experts here", layer)};
  auto table =
      read_dispatch(job_.dispatch.payload->bytes(), view.layer(static_cast<int32_t>(layer)),
                    context_->self(), context_->dispatch_format(), hidden());
  if (!table)
    throw std::runtime_error{text_of(table.error())};
  const std::pair key{layer, static_cast<int64_t>(header.aux)};
  auto& compute = *context_->compute;
  const auto n = static_cast<int64_t>(table->entries.size());
  if (pass == TrainPass::forward || pass == TrainPass::evaluate) {
    Saved saved;
    saved.grouping = group(*table, layer);
    auto x = rows_of(*table, saved.grouping, workers);
    const auto y =
        compute.ffn_forward(saved.grouping.groups, n, std::move(x), saved.ffn, true, workers);
    if (n > 0)
      write_answer(*table, saved.grouping, y, false, nullptr, workers);
    if (pass == TrainPass::forward)
      saved_.insert_or_assign(key, std::move(saved));
    return;
  }
  auto found = saved_.extract(key);
  if (!found || found.mapped().grouping != group(*table, layer))
    throw std::runtime_error{fmt::format("gradients for layer {} of micro-batch {} do not fit its "
                                         "forward pass",
                                         layer, key.second)};
  auto& saved = found.mapped();
  auto dy = rows_of(*table, saved.grouping, workers);
  std::vector<float> weight(static_cast<size_t>(n)), dweight(static_cast<size_t>(n));
  for (size_t e = 0; e < table->entries.size(); ++e)
    weight[static_cast<size_t>(saved.grouping.row_of_entry[e])] = table->entries[e].weight;
  const auto dx = compute.ffn_backward(saved.grouping.groups, n, saved.ffn, std::move(dy),
                                       weight.data(), dweight.data(), true, job_.work, workers);
  if (n > 0)
    write_answer(*table, saved.grouping, dx, true, dweight.data(), workers);
}

TrainExperts::behavior_type train_experts(TrainExperts::stateful_pointer<TrainExpertsState> self,
                                          std::shared_ptr<const TrainContext> context) {
  end_by_exceptions(self);
  self->state.worker = std::make_shared<ExpertWorker>(std::move(context), job_done_to(self));
  return {
      [=](Envelope& dispatch) { self->state.worker->on_dispatch(std::move(dispatch)); },
      [=](const ExpertsBegin& command) { self->state.worker->begin(command); },
      [=](const RunWeights& command) { self->state.worker->release(command); },
      [=](const JobDone&) { self->state.worker->on_job(); },
  };
}

} // namespace troupe
