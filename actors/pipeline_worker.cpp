#include "actors/pipeline_worker.hpp"

#include "actors/timeline.hpp"
#include "config/train_schedule.hpp"
#include "kernels/reference_backward.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace troupe {

namespace {

template <class T>
T value_of(caf::expected<T> result) {
  if (!result)
    throw std::runtime_error{text_of(result.error())};
  return std::move(*result);
}

bool all_finite(const float* x, int64_t n) {
  float sum = 0; // NaN and ±∞ times zero are NaN, which stays
  for (int64_t i = 0; i < n; ++i)
    sum += x[i] * 0.0f;
  return sum == 0.0f;
}

void require(const caf::error& error) {
  if (error)
    throw std::runtime_error{text_of(error)};
}

} // namespace

PipelineWorker::PipelineWorker(std::shared_ptr<const TrainContext> context,
                               std::function<void(uint64_t)> job_done)
    : context_(std::move(context)), job_done_(std::move(job_done)) {}

// ---- waiting ------------------------------------------------------------------------------------

void PipelineWorker::JobAwaiter::await_suspend(std::coroutine_handle<> waiting) {
  const uint64_t ticket = worker.next_ticket_++;
  worker.jobs_.emplace(ticket, waiting);
  auto self = worker.shared_from_this();
  worker.context_->rank->stream->start(
      name,
      [self, run = work](Workers& workers) {
        try {
          run(workers);
        } catch (const std::exception& error) {
          self->fail(error.what());
        }
      },
      [self, ticket, what = name, about = layer](const JobTiming& timing) {
        self->context_->busy_ns += (timing.finished - timing.started).count();
        if (auto* trace = self->context_->rank->trace)
          trace->add({what, "compute", timing.started, timing.finished, about});
        self->job_done_(ticket);
      });
}

PipelineWorker::MessageAwaiter PipelineWorker::message(WireKind kind, int64_t micro_batch,
                                                       int64_t place, TrainPass pass,
                                                       RankId source) {
  return {*this,
          TrainMessageKey{kind, run_, static_cast<uint64_t>(micro_batch),
                          static_cast<uint32_t>(place), static_cast<uint32_t>(pass), source}};
}

bool PipelineWorker::MessageAwaiter::await_ready() {
  const auto found = worker.inbox_.find(key);
  if (found == worker.inbox_.end())
    return false;
  message = std::move(found->second);
  worker.inbox_.erase(found);
  return worker.taken_.take(key);
}

void PipelineWorker::MessageAwaiter::await_suspend(std::coroutine_handle<> waiting) {
  since = worker.now();
  worker.receivers_.emplace(key, std::pair{waiting, this});
}

Envelope PipelineWorker::MessageAwaiter::await_resume() {
  if (since.count() != 0)
    worker.trace(std::get<0>(key) == WireKind::combine ? "combine" : "stage rows", "wire", since,
                 std::get<3>(key));
  return std::move(message);
}

void PipelineWorker::resume(std::coroutine_handle<> coroutine) {
  coroutine.resume();
  task_.check();
  throw_failure();
}

void PipelineWorker::on_job(uint64_t ticket) {
  throw_failure();
  const auto found = jobs_.find(ticket);
  if (found == jobs_.end())
    return;
  const auto coroutine = found->second;
  jobs_.erase(found);
  resume(coroutine);
}

void PipelineWorker::on_message(Envelope&& message) {
  const auto key = key_of(message.header);
  if (taken_.contains(key))
    return; // of a pass that is over, or a second copy
  const auto receiver = receivers_.find(key);
  if (receiver == receivers_.end()) {
    inbox_.emplace(key, std::move(message));
    return;
  }
  const auto [coroutine, awaiter] = receiver->second;
  receivers_.erase(receiver);
  static_cast<void>(taken_.take(key)); // it is new: nobody waits for what came
  awaiter->message = std::move(message);
  resume(coroutine);
}

void PipelineWorker::on_experts_done(uint64_t run) {
  if (run != run_)
    return;
  experts_done_ = true;
  if (auto waiter = std::exchange(experts_waiter_, nullptr))
    resume(waiter);
}

void PipelineWorker::fail(std::string text) {
  const std::lock_guard lock{failure_mutex_};
  if (failure_.empty())
    failure_ = std::move(text);
}

void PipelineWorker::throw_failure() {
  const std::lock_guard lock{failure_mutex_};
  if (!failure_.empty())
    throw std::runtime_error{failure_};
}

void PipelineWorker::trace(std::string name, const char* track, Nanoseconds since,
                           int64_t layer) const {
  if (auto* trace = context_->rank->trace)
    trace->add({std::move(name), track, since, now(), layer, step_.step});
}

// ---- a step -------------------------------------------------------------------------------------

void PipelineWorker::begin(const BeginStep& command) {
  const auto& c = *context_;
  if (!task_.done())
    throw std::logic_error{"a step begins before the one before has ended"};
  if (command.evaluate && !c.held_out)
    throw std::logic_error{"an evaluation without held-out data"};
  step_ = command;
  ++run_;
  taken_.begin(run_);
  std::erase_if(inbox_, [&](const auto& m) { return std::get<1>(m.first) < run_; });
  const int64_t batch = batch_size(c.config, command.step);
  num_micro_batches_ = batch / c.config.micro_batch;
  first_row_ = command.evaluate ? command.pass * batch : first_row(c.config, command.step);
  int64_t targets = 0;
  for (int64_t r = 0; r < batch; ++r)
    if (!is_beyond(first_row_ + r))
      targets += value_of(data().num_loss_tokens(first_row_ + r));
  loss_weight_ = targets > 0 ? 1.0 / static_cast<double>(targets) : 0.0;
  const auto depth = static_cast<double>(std::max<int64_t>(c.plan.num_mtp_layers, 1));
  mtp_weight_ = mtp_lambda(c.config, command.step) / depth;
  const int32_t chunks = static_cast<int32_t>(num_micro_batches_ / c.plan.columns());
  program_ = make_program(c.plan.kind(), c.plan.pp_rank(c.self()), c.plan.pp, chunks);
  runs_ = std::vector<PhaseRun>(c.phases.size());
  for (size_t p = 0; p < runs_.size(); ++p)
    runs_[p].micro_batches =
        c.plan.micro_batches(c.self(), static_cast<int32_t>(p), num_micro_batches_);
  report_ = {};
  report_.step = command.step;
  report_.rank = c.self();
  loads_.clear();
  began_ = now();
  busy_before_ = c.busy_ns;
  experts_done_ = command.evaluate;
  task_ = run_step();
  task_.start();
  task_.check();
  throw_failure();
}

Task PipelineWorker::run_step() {
  if (!step_.evaluate) {
    const auto zero = [this](Workers& workers) { zero_gradients(workers); };
    co_await job("zero gradients", -1, zero);
    // From here on experts may add to gradients.
    context_->rank->postman->tell(context_->self(), Route::expert_shard,
                                  ExpertsBegin{run_, num_micro_batches_});
  }
  for (const auto& op : program_) {
    const auto since = now();
    Task task = run_op(op);
    co_await task;
    trace(to_string(op), "op", since, -1);
  }
  if (!step_.evaluate)
    co_await ExpertsAwaiter{*this};
  report();
}

Task PipelineWorker::run_op(const ScheduleOp& op) {
  Task f, b;
  if (op.kind == OpKind::forward || op.kind == OpKind::overlapped)
    f = forward(op.f.phase, op.f.index);
  if (!step_.evaluate) {
    if (op.kind == OpKind::weight)
      b = weights(op.b.phase);
    else if (op.kind != OpKind::forward)
      b = backward(op.b.phase, op.b.index, op.kind == OpKind::backward_input);
  }
  // The backward sends first; its wait is the forward's time to compute (specification §6.2).
  bool failed = false;
  try {
    b.start();
    f.start();
    co_await b;
    co_await f;
  } catch (const std::exception& error) {
    fail(error.what());
    failed = true;
  }
  // The other one may have a job in flight that works on its frame: both stay until the end.
  if (failed)
    co_await std::suspend_always{};
}

void PipelineWorker::report() {
  for (auto& [layer, counts] : loads_)
    report_.loads.push_back({layer, std::move(counts)});
  report_.busy_s = static_cast<double>(context_->busy_ns - busy_before_) * 1e-9;
  report_.program_s = static_cast<double>((now() - began_).count()) * 1e-9;
  auto* postman = context_->rank->postman;
  if (!step_.evaluate)
    postman->tell(context_->self(), Route::optimizer, GradientsReady{step_.step});
  postman->tell(RankId{0}, Route::trainer, std::move(report_));
}

void PipelineWorker::zero_gradients(Workers& workers) const {
  const auto zero = [&](const MemoryBlock& block) {
    constexpr int64_t kGrain = 1 << 20;
    workers.parallel_for(static_cast<int64_t>(block.size()), kGrain,
                         [&](int64_t begin, int64_t end, int) {
                           std::fill(block.data() + begin, block.data() + end, std::byte{0});
                         });
  };
  for (const auto& phase : context_->phases) {
    for (const auto& [cell, block] : phase.dense)
      zero(block);
    for (const auto& [cell, block] : phase.experts)
      zero(block);
  }
}

float* PipelineWorker::gradients(int32_t phase, int64_t micro_batch) const {
  return context_->phases[static_cast<size_t>(phase)].dense_of(
      cell_of(micro_batch, context_->plan.lanes));
}

float PipelineWorker::balance_scale() const {
  return static_cast<float>(context_->config.balance_alpha /
                            static_cast<double>(num_micro_batches_ * context_->config.micro_batch));
}

// ---- a chunk ------------------------------------------------------------------------------------

// An evaluation takes every held-out row once. What its last pass has left of the batch repeats the
// first rows, as padding.
bool PipelineWorker::is_beyond(int64_t row) const {
  return step_.evaluate && row >= data().num_rows();
}

// The micro-batch's rows; every stage reads them for itself.
void PipelineWorker::load(Chunk& chunk) const {
  const auto& c = *context_;
  const int64_t length = data().sequence_length(), count = c.config.micro_batch;
  chunk.rows.seq_rows = length;
  chunk.rows.rows = count * length;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t index = first_row_ + chunk.micro_batch * count + s;
    auto row = value_of(data().row(index));
    if (is_beyond(index)) {
      row.has_loss.assign(row.ids.size(), 0);
      row.padding = static_cast<int64_t>(row.ids.size());
    }
    for (int64_t i = 0; i < length; ++i) {
      const auto at = static_cast<size_t>(i);
      chunk.ids.push_back(row.ids[at]);
      chunk.rows.positions.push_back(row.positions[at]);
      chunk.rows.first_key.push_back(static_cast<int32_t>(s * length) + row.first_key[at]);
      const bool counts = row.has_loss[at + 1] != 0 && row.first_key[at + 1] == row.first_key[at];
      chunk.targets.push_back(counts ? row.ids[at + 1] : reference::kNoTarget);
    }
    // The last token is no input.
    chunk.rows.padding.push_back(std::max<int64_t>(row.padding - 1, 0));
    chunk.sequences.push_back(std::move(row));
  }
}

// Rows of MTP module `depth`: row i takes token i + depth in and predicts the one after.
PipelineWorker::MtpState PipelineWorker::mtp_rows(const Chunk& chunk, int64_t depth) const {
  MtpState s;
  s.rows = without_last(chunk.rows, depth);
  for (const auto& row : chunk.sequences)
    for (int64_t i = 0; i < s.rows.seq_rows; ++i) {
      const auto at = static_cast<size_t>(i), in = static_cast<size_t>(i + depth);
      s.ids.push_back(row.ids[in]);
      const bool counts = row.has_loss[in + 1] != 0 && row.first_key[in + 1] == row.first_key[at];
      s.targets.push_back(counts ? row.ids[in + 1] : reference::kNoTarget);
    }
  return s;
}

Floats PipelineWorker::decode(const Envelope& message, int64_t rows) const {
  const auto format = context_->stage_format();
  const auto stride = row_bytes(format, hidden());
  if (!message.payload || message.payload->size() != static_cast<size_t>(rows) * stride)
    throw std::runtime_error{fmt::format("rows from rank {}: {} bytes given, {} expected",
                                         message.header.source.value, message.header.payload_bytes,
                                         static_cast<size_t>(rows) * stride)};
  auto x = compute().take(rows * hidden());
  for (int64_t r = 0; r < rows; ++r)
    decode_row(format, hidden(), message.payload->data() + static_cast<size_t>(r) * stride,
               x.get() + r * hidden());
  return x;
}

Task PipelineWorker::send_rows(int32_t phase, int by, int64_t micro_batch, TrainPass pass,
                               const Floats& x, int64_t n) {
  const auto format = context_->stage_format();
  BufferRef payload;
  const auto encode = [&](Workers&) {
    payload = value_of(context_->rank->fabric->pool().acquire(static_cast<size_t>(n) *
                                                              row_bytes(format, hidden())));
    encode_rows(format, n, hidden(), x.get(), payload->data());
  };
  co_await job("encode", -1, encode);
  post_rows(phase, by, micro_batch, pass, std::move(payload));
}

void PipelineWorker::post_rows(int32_t phase, int by, int64_t micro_batch, TrainPass pass,
                               BufferRef payload) {
  const auto [to, to_phase] = context_->plan.neighbour(context_->self(), phase, by);
  WireHeader header;
  header.kind = WireKind::stage_rows;
  header.step = run_;
  header.aux = static_cast<uint64_t>(micro_batch);
  header.layer = static_cast<uint32_t>(to_phase);
  header.attempt = static_cast<uint32_t>(pass);
  context_->rank->postman->post(to, Route::pipeline_stage, header, std::move(payload));
}

// No backward pass of an evaluation holds the first stages back. So that rows don't pile up before
// a slow stage, it says which it has taken, and the one before stays no further ahead than in a
// step: programs never have more chunks alive.
Task PipelineWorker::await_room(int32_t phase, int32_t index) {
  const auto& plan = context_->plan;
  const int32_t taken = index - peak_live_formula(plan.kind(), plan.pp);
  if (taken < 0)
    co_return;
  const auto next = plan.neighbour(context_->self(), phase, 1).first;
  const int64_t j = runs_[static_cast<size_t>(phase)].micro_batches[static_cast<size_t>(taken)];
  auto wait = message(WireKind::stage_rows, j, phase, TrainPass::backward, next);
  static_cast<void>(co_await wait);
}

Task PipelineWorker::forward(int32_t phase, int32_t index) {
  auto& run = runs_[static_cast<size_t>(phase)];
  const int64_t j = run.micro_batches[static_cast<size_t>(index)];
  const auto& weights = weights_of(phase);
  const auto& share = weights.layout().share();
  auto& chunk = *(run.live[j] = std::make_unique<Chunk>());
  chunk.micro_batch = j;
  Envelope from;
  if (!share.first) {
    const auto source = context_->plan.neighbour(context_->self(), phase, -1).first;
    auto wait = message(WireKind::stage_rows, j, phase, TrainPass::forward, source);
    from = co_await wait;
  }
  Floats x;
  const auto enter = [&](Workers& workers) {
    load(chunk);
    x = share.first ? compute().embed(weights.embedding(), chunk.ids, workers)
                    : decode(from, chunk.rows.rows);
    from = {};
  };
  co_await job("enter", -1, enter);
  if (step_.evaluate && !share.first)
    post_rows(phase, -1, j, TrainPass::backward, {}); // taken
  chunk.blocks.resize(weights.blocks().size());
  for (size_t l = 0; l < chunk.blocks.size(); ++l) {
    Task block = block_forward(weights.blocks()[l], chunk.rows, j, chunk.blocks[l], x);
    co_await block;
  }
  if (share.last) {
    Task end = forward_end(phase, chunk, std::move(x));
    co_await end;
  } else {
    Task room = step_.evaluate ? await_room(phase, index) : Task{};
    co_await room;
    Task send = send_rows(phase, 1, j, TrainPass::forward, x, chunk.rows.rows);
    co_await send;
  }
  if (step_.evaluate)
    run.live.erase(j);
}

Task PipelineWorker::backward(int32_t phase, int32_t index, bool defer) {
  auto& run = runs_[static_cast<size_t>(phase)];
  const int64_t j = run.micro_batches[static_cast<size_t>(index)];
  const auto& weights = weights_of(phase);
  const auto& share = weights.layout().share();
  auto& chunk = *run.live.at(j);
  Floats dx;
  if (share.last) {
    Task end = backward_end(phase, chunk, dx, defer);
    co_await end;
  } else {
    const auto source = context_->plan.neighbour(context_->self(), phase, 1).first;
    auto wait = message(WireKind::stage_rows, j, phase, TrainPass::backward, source);
    auto from = co_await wait;
    const auto enter = [&](Workers&) { dx = decode(from, chunk.rows.rows); };
    co_await job("enter", -1, enter);
  }
  for (size_t l = chunk.blocks.size(); l-- > 0;) {
    Task block =
        block_backward(phase, weights.blocks()[l], chunk.rows, chunk, chunk.blocks[l], dx, defer);
    co_await block;
  }
  if (share.first) {
    const auto embed = [&](Workers& workers) {
      const auto gradient = weights.layout().gradient_of(kEmbeddingName);
      compute().embed_backward(chunk.ids, dx.get(), gradients(phase, j) + gradient, workers);
    };
    co_await job("embedding", -1, embed);
  } else {
    Task send = send_rows(phase, -1, j, TrainPass::backward, dx, chunk.rows.rows);
    co_await send;
  }
  if (defer) {
    run.deferred.push_back({j, std::move(chunk.work)});
  } else {
    const auto rest = [&](Workers& workers) {
      compute().run(chunk.work, gradients(phase, j), workers);
      chunk.work.clear();
    };
    co_await job("weights", -1, rest);
  }
  run.live.erase(j);
}

Task PipelineWorker::weights(int32_t phase) {
  auto& run = runs_[static_cast<size_t>(phase)];
  auto deferred = std::move(run.deferred.front());
  run.deferred.pop_front();
  for (const RankId peer : context_->plan.expert_peers(context_->self()))
    context_->rank->postman->tell(peer, Route::expert_shard,
                                  RunWeights{run_, deferred.micro_batch, phase});
  const auto work = [&](Workers& workers) {
    compute().run(deferred.work, gradients(phase, deferred.micro_batch), workers);
    deferred.work.clear();
  };
  co_await job("weights", -1, work);
}

// ---- the end of the model ---------------------------------------------------------------------

double PipelineWorker::end_forward(int32_t phase, const TrainNorm& norm, int64_t rows,
                                   std::span<const int32_t> targets, double weight, Floats x,
                                   HeadState& s, Workers& workers) const {
  s.h = compute().norm_forward(norm, rows, x.get(), workers);
  s.pre_norm = std::move(x);
  return compute().head_forward(weights_of(phase).head(), rows, s.h.get(), targets,
                                static_cast<float>(weight), s.dlogits, workers);
}

Task PipelineWorker::forward_end(int32_t phase, Chunk& chunk, Floats x) {
  const auto& weights = weights_of(phase);
  MicroBatchLoss loss;
  loss.micro_batch = chunk.micro_batch;
  const auto head = [&](Workers& workers) {
    loss.main = end_forward(phase, weights.final_norm(), chunk.rows.rows, chunk.targets,
                            loss_weight_, std::move(x), chunk.head, workers);
  };
  co_await job("head", -1, head);
  chunk.mtp.resize(weights.mtp().size());
  for (size_t k = 0; k < chunk.mtp.size(); ++k) {
    auto& s = chunk.mtp[k];
    const auto& mtp = weights.mtp()[k];
    const auto& before = k == 0 ? chunk.head : chunk.mtp[k - 1].head;
    const auto& before_rows = k == 0 ? chunk.rows : chunk.mtp[k - 1].rows;
    Floats y;
    const auto enter = [&](Workers& workers) {
      s = mtp_rows(chunk, static_cast<int64_t>(k) + 1);
      auto e = compute().embed(weights.embedding(), s.ids, workers);
      auto h = compute().take(s.rows.rows * hidden());
      for (int64_t q = 0; q < s.rows.num_sequences(); ++q)
        std::copy_n(before.h.get() + q * before_rows.seq_rows * hidden(),
                    s.rows.seq_rows * hidden(), h.get() + q * s.rows.seq_rows * hidden());
      y = compute().mtp_forward(mtp, s.rows.rows, std::move(e), std::move(h), s.input, workers);
    };
    co_await job("mtp", mtp.block.layer, enter);
    Task block = block_forward(mtp.block, s.rows, chunk.micro_batch, s.block, y);
    co_await block;
    double sum = 0;
    const auto mtp_head = [&](Workers& workers) {
      sum = end_forward(phase, mtp.head_norm, s.rows.rows, s.targets, mtp_weight_ * loss_weight_,
                        std::move(y), s.head, workers);
    };
    co_await job("head", mtp.block.layer, mtp_head);
    loss.mtp.push_back(sum);
  }
  report_.losses.push_back(std::move(loss));
}

// Gradient of the rows before norm and head. from_mtp: the next module's share of dh, whose
// sequences have a row less each; null for the last.
Floats PipelineWorker::end_backward(int32_t phase, const TrainNorm& norm, int32_t use, Chunk& chunk,
                                    const MicroBatchRows& rows, HeadState& s,
                                    const Floats& from_mtp, Workers& workers) const {
  const auto& weights = weights_of(phase);
  const auto gradient = weights.layout().gradient_of(kHeadName, use);
  auto dh = compute().head_backward(weights.head(), rows.rows, s.h, std::move(s.dlogits), gradient,
                                    chunk.work, workers);
  if (from_mtp)
    for (int64_t q = 0; q < rows.num_sequences(); ++q)
      compute().add((rows.seq_rows - 1) * hidden(), dh.get() + q * rows.seq_rows * hidden(),
                    from_mtp.get() + q * (rows.seq_rows - 1) * hidden(), workers);
  auto dx = compute().norm_backward(norm, rows.rows, s.pre_norm.get(), dh.get(), nullptr,
                                    gradients(phase, chunk.micro_batch), workers);
  s = {};
  return dx;
}

Task PipelineWorker::backward_end(int32_t phase, Chunk& chunk, Floats& dx, bool defer) {
  const auto& weights = weights_of(phase);
  const int64_t j = chunk.micro_batch;
  Floats dh; // of the module before, from this one
  for (size_t k = chunk.mtp.size(); k-- > 0;) {
    auto& s = chunk.mtp[k];
    const auto& mtp = weights.mtp()[k];
    const auto use = static_cast<int32_t>(k) + 1;
    Floats dy;
    const auto head = [&](Workers& workers) {
      dy = end_backward(phase, mtp.head_norm, use, chunk, s.rows, s.head, dh, workers);
    };
    co_await job("head", mtp.block.layer, head);
    Task block = block_backward(phase, mtp.block, s.rows, chunk, s.block, dy, defer);
    co_await block;
    const auto leave = [&](Workers& workers) {
      auto [de, dh_in] = compute().mtp_backward(mtp, s.rows.rows, s.input, std::move(dy),
                                                gradients(phase, j), chunk.work, workers);
      const auto gradient = weights.layout().gradient_of(kEmbeddingName, use);
      compute().embed_backward(s.ids, de.get(), gradients(phase, j) + gradient, workers);
      dh = std::move(dh_in);
    };
    co_await job("mtp", mtp.block.layer, leave);
  }
  const auto head = [&](Workers& workers) {
    dx = end_backward(phase, weights.final_norm(), 0, chunk, chunk.rows, chunk.head, dh, workers);
  };
  co_await job("head", -1, head);
}

// ---- a block ------------------------------------------------------------------------------------

void PipelineWorker::post_dispatches(const TrainBlock& b, int64_t micro_batch, TrainPass pass,
                                     const ExpertRoute& route, std::vector<BufferRef>& payloads) {
  for (size_t t = 0; t < route.tables.size(); ++t) {
    WireHeader header;
    header.kind = WireKind::dispatch;
    header.step = run_;
    header.aux = static_cast<uint64_t>(micro_batch);
    header.layer = static_cast<uint32_t>(b.layer);
    header.attempt = static_cast<uint32_t>(pass);
    context_->rank->postman->post(route.tables[t].destination, Route::pipeline_stage, header,
                                  std::move(payloads[t]));
  }
  payloads.clear();
}

void PipelineWorker::note_finite(bool finite, int64_t micro_batch, int64_t layer) {
  if (!finite)
    report_.not_finite.push_back({micro_batch, layer, context_->self()});
}

Task PipelineWorker::block_forward(const TrainBlock& b, const MicroBatchRows& rows,
                                   int64_t micro_batch, BlockState& s, Floats& x) {
  const int64_t n = rows.rows;
  const auto& c = *context_;
  std::vector<BufferRef> payloads;
  Floats y;
  bool finite = true;
  const auto mine = [&](Workers& workers) {
    const FfnGroup all{&b.ffn, 0, n};
    y = compute().ffn_forward({&all, b.ffn.gate.n > 0 ? 1u : 0u}, n, s.u, s.ffn, false, workers);
    if (b.ffn.gate.n == 0)
      y = nullptr;
  };
  const auto attend = [&](Workers& workers) {
    s.mid = compute().attention_forward(b, rows, std::move(x), s.attention, workers);
    s.u = compute().norm_forward(b.post_norm, n, s.mid.get(), workers);
    if (!b.moe) {
      mine(workers);
      compute().add(n * hidden(), y.get(), s.mid.get(), workers);
      x = std::move(y);
      finite = all_finite(x.get(), n * hidden());
      return;
    }
    compute().gate_forward(b, rows, s.u.get(), balance_scale(), s.gate, workers);
    const GateChoice choice{s.gate.idx, s.gate.weight,
                            static_cast<int32_t>(c.plan.config.num_experts_per_tok),
                            static_cast<int32_t>(c.plan.config.n_routed_experts /
                                                 std::max<int64_t>(c.plan.config.n_group, 1))};
    s.route =
        value_of(plan_route(c.experts_view, c.experts_view.layer(static_cast<int32_t>(b.layer)),
                            c.self(), c.plan.expert_peers(c.self()), choice, n));
    payloads = value_of(fill_route(s.route, c.rank->fabric->pool(), c.dispatch_format(), hidden(),
                                   s.u.get(), workers));
  };
  co_await job("attention", b.layer, attend);
  if (!b.moe) {
    note_finite(finite, micro_batch, b.layer);
    co_return;
  }
  report_.balance.push_back({micro_batch, b.layer, s.gate.balance_loss});
  auto& load = loads_[b.layer];
  load.resize(s.gate.counts.size());
  for (size_t e = 0; e < load.size(); ++e)
    load[e] += s.gate.counts[e];
  post_dispatches(b, micro_batch, forward_pass(), s.route, payloads);
  co_await job("shared experts", b.layer, mine);
  std::vector<Envelope> answers(s.route.tables.size());
  for (size_t t = 0; t < answers.size(); ++t)
    if (!s.route.tables[t].rows.empty()) {
      auto wait = message(WireKind::combine, micro_batch, b.layer, forward_pass(),
                          s.route.tables[t].destination);
      answers[t] = co_await wait;
    }
  const auto join = [&](Workers& workers) {
    require(check_answers(s.route, hidden(), c.stage_format(), false, answers));
    x = compute().take(n * hidden());
    combine_route(s.route, n, hidden(), c.stage_format(), false, answers, y.get(), s.mid.get(),
                  compute().round(), x.get(), workers);
    y = nullptr;
    finite = all_finite(x.get(), n * hidden());
  };
  co_await job("combine", b.layer, join);
  note_finite(finite, micro_batch, b.layer);
}

// dx: the gradient of the block's output, then of its input.
Task PipelineWorker::block_backward(int32_t phase, const TrainBlock& b, const MicroBatchRows& rows,
                                    Chunk& chunk, BlockState& s, Floats& dx, bool defer) {
  const int64_t n = rows.rows, j = chunk.micro_batch;
  const auto& c = *context_;
  Floats du; // of the norm after attention
  const auto mine = [&](Workers& workers) {
    const FfnGroup all{&b.ffn, 0, n};
    if (b.ffn.gate.n > 0)
      du = compute().ffn_backward({&all, 1}, n, s.ffn, dx, nullptr, nullptr, false, chunk.work,
                                  workers);
    if (!defer) { // what is left of the block above, and these
      compute().run(chunk.work, gradients(phase, j), workers);
      chunk.work.clear();
    }
  };
  const auto attend = [&](Workers& workers) {
    auto dmid = compute().norm_backward(b.post_norm, n, s.mid.get(), du.get(), dx.get(),
                                        gradients(phase, j), workers);
    dx = compute().attention_backward(b, rows, s.attention, std::move(dmid), gradients(phase, j),
                                      chunk.work, workers);
    s = {};
  };
  if (!b.moe) {
    const auto all = [&](Workers& workers) {
      mine(workers);
      attend(workers);
    };
    co_await job("block backward", b.layer, all);
    co_return;
  }
  const auto pass = defer ? TrainPass::backward_deferred : TrainPass::backward;
  std::vector<BufferRef> payloads;
  const auto fill = [&](Workers& workers) {
    payloads = value_of(fill_route(s.route, c.rank->fabric->pool(), c.dispatch_format(), hidden(),
                                   dx.get(), workers));
  };
  co_await job("dispatch gradients", b.layer, fill);
  post_dispatches(b, j, pass, s.route, payloads);
  co_await job("shared experts backward", b.layer, mine);
  std::vector<Envelope> answers(s.route.tables.size());
  for (size_t t = 0; t < answers.size(); ++t)
    if (!s.route.tables[t].rows.empty()) {
      auto wait = message(WireKind::combine, j, b.layer, pass, s.route.tables[t].destination);
      answers[t] = co_await wait;
    }
  const auto join = [&](Workers& workers) {
    require(check_answers(s.route, hidden(), c.stage_format(), true, answers));
    const int64_t top_k = c.plan.config.num_experts_per_tok;
    std::vector<float> dweight(static_cast<size_t>(n * top_k));
    gate_weight_gradients(s.route, top_k, hidden(), c.stage_format(), answers, dweight);
    const auto router = compute().gate_backward(b, rows, s.u, s.gate, dweight.data(),
                                                balance_scale(), chunk.work, workers);
    auto sum = compute().take(n * hidden());
    combine_route(s.route, n, hidden(), c.stage_format(), true, answers, du.get(), router.get(),
                  compute().round(), sum.get(), workers);
    du = std::move(sum);
    attend(workers);
  };
  co_await job("attention backward", b.layer, join);
}

} // namespace troupe
