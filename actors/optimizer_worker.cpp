#include "actors/optimizer_worker.hpp"

#include "actors/train_shard.hpp"
#include "config/safetensors.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <stdexcept>

namespace troupe {

namespace {

[[noreturn]] void fail_with(const std::string& text) { throw std::runtime_error{text}; }

// Adds `count` arrays that lie in `cells`, as a tree over adjacent pairs, into the first.
void add_cells(const std::vector<float*>& cells, int64_t n, Workers& workers) {
  constexpr int64_t kGrain = 1 << 15;
  workers.parallel_for(n, kGrain, [&](int64_t begin, int64_t end, int) {
    for (size_t half = 1; half < cells.size(); half *= 2)
      for (size_t i = 0; i + half < cells.size(); i += 2 * half)
        for (int64_t e = begin; e < end; ++e)
          cells[i][e] += cells[i + half][e];
  });
}

} // namespace

OptimizerWorker::OptimizerWorker(std::shared_ptr<const TrainContext> context,
                                 std::shared_ptr<OptimizerState> state,
                                 std::function<void(uint64_t)> job_done)
    : context_(std::move(context)), state_(std::move(state)), job_done_(std::move(job_done)) {}

// ---- jobs --------------------------------------------------------------------------------------

void OptimizerWorker::run_on(ComputeStream& stream, const char* name,
                             std::function<void(Workers&)> work, std::function<void()> then) {
  const uint64_t ticket = next_ticket_++;
  jobs_.emplace(ticket, std::move(then));
  auto self = shared_from_this();
  stream.start(
      name,
      [self, work = std::move(work)](Workers& workers) {
        try {
          work(workers);
        } catch (const std::exception& error) {
          const std::lock_guard lock{self->failure_mutex_};
          self->failure_ = error.what();
        }
      },
      [self, ticket, name](const JobTiming& timing) {
        if (auto* trace = self->context_->rank->trace)
          trace->add({name, "optimizer", timing.started, timing.finished, -1, -1});
        self->job_done_(ticket);
      });
}

void OptimizerWorker::run(const char* name, std::function<void(Workers&)> work,
                          std::function<void()> then) {
  run_on(*context_->rank->stream, name, std::move(work), std::move(then));
}

void OptimizerWorker::on_job(uint64_t ticket) {
  {
    const std::lock_guard lock{failure_mutex_};
    if (!failure_.empty())
      fail_with(failure_);
  }
  const auto found = jobs_.find(ticket);
  if (found == jobs_.end())
    return;
  const auto then = std::move(found->second);
  jobs_.erase(found);
  then();
}

// ---- gradients ---------------------------------------------------------------------------------

void OptimizerWorker::begin_step(int64_t step) {
  if (step <= step_)
    return;
  step_ = step;
  applied_ = preparing_ = false;
  gathers_.clear();
  norms_.clear();
  taken_.clear();
  values_missing_ = 0;
  const auto self = context_->self();
  const bool dump = !context_->config.dump_gradients.empty();
  dump_.clear();
  dump_missing_ = 0;
  dumped_ = !dump || self != RankId{0};
  for (uint32_t t = 0; t < context_->tensors.size(); ++t) {
    const auto& tensor = planned(t);
    if (tensor.parts.empty())
      continue;
    const int64_t n = tensor.spec.num_elements();
    if (!dumped_)
      dump_missing_ += n;
    if (owns(t)) {
      Gather gather;
      gather.parts.resize(tensor.parts.size());
      gather.received.resize(tensor.parts.size());
      gather.missing = n * static_cast<int64_t>(tensor.parts.size());
      gathers_.emplace(t, std::move(gather));
    } else if (std::ranges::any_of(tensor.holders,
                                   [&](const auto& h) { return h.first == self; })) {
      values_missing_ += n;
    }
  }
  unsummed_ = gathers_.size();
}

void OptimizerWorker::gradients_ready(const GradientsReady& news) {
  begin_step(news.step);
  run(
      "reduce lanes", [this](Workers& workers) { reduce_lanes(workers); },
      [this] {
        const auto self = context_->self();
        for (uint32_t t = 0; t < context_->tensors.size(); ++t) {
          const auto& tensor = planned(t);
          for (uint32_t p = 0; p < tensor.parts.size(); ++p) {
            const auto& part = tensor.parts[p];
            if (part.rank != self)
              continue;
            const auto& phase = context_->phases[static_cast<size_t>(part.phase)];
            const auto begin = phase.weights->layout().gradient_of(tensor.spec.name, part.use);
            float* memory =
                (tensor.spec.expert >= 0 ? phase.experts_of(part.direction, part.first)
                                         : phase.dense_of({part.first, part.direction, 0})) +
                begin;
            if (owns(t)) {
              auto& gather = gathers_.at(t);
              gather.parts[p] = memory;
              gather.missing -= tensor.spec.num_elements();
            } else {
              queue_pieces(tensor.owner, t, p, memory);
            }
          }
        }
        sum_ready();
        if (gathers_.empty())
          send_norms();
        pump();
      });
}

// Lanes and groups of this rank become the parts that travel.
void OptimizerWorker::reduce_lanes(Workers& workers) {
  for (const auto& tensor : context_->tensors)
    for (const auto& part : tensor.parts) {
      if (part.rank != context_->self() || part.count == 1)
        continue;
      const auto& phase = context_->phases[static_cast<size_t>(part.phase)];
      const auto begin = phase.weights->layout().gradient_of(tensor.spec.name, part.use);
      std::vector<float*> cells;
      for (int32_t i = part.first; i < part.first + part.count; ++i)
        cells.push_back((tensor.spec.expert >= 0 ? phase.experts_of(part.direction, i)
                                                 : phase.dense_of({i, part.direction, 0})) +
                        begin);
      add_cells(cells, tensor.spec.num_elements(), workers);
    }
}

void OptimizerWorker::sum_ready() {
  std::vector<uint32_t> ready;
  for (auto& [t, gather] : gathers_)
    if (gather.missing == 0 && !gather.summed) {
      gather.summed = true;
      ready.push_back(t);
    }
  if (ready.empty())
    return;
  auto sums = std::make_shared<std::vector<double>>(ready.size());
  run(
      "sum gradients",
      [this, ready, sums](Workers& workers) {
        for (size_t i = 0; i < ready.size(); ++i) {
          const auto& tensor = planned(ready[i]);
          const auto& gather = gathers_.at(ready[i]);
          const int64_t n = tensor.spec.num_elements();
          const int64_t blocks = (n + kNormBlock - 1) / kNormBlock;
          std::vector<double> of_block(static_cast<size_t>(blocks));
          workers.parallel_for(n, kNormBlock, [&](int64_t begin, int64_t end, int) {
            auto parts = gather.parts;
            for (auto& part : parts)
              part += begin;
            add_parts(tensor, parts, end - begin);
            of_block[static_cast<size_t>(begin / kNormBlock)] =
                squared_norm({parts.front(), static_cast<size_t>(end - begin)});
          });
          for (const double block : of_block)
            (*sums)[i] += block;
        }
      },
      [this, ready, sums] {
        for (size_t i = 0; i < ready.size(); ++i) {
          norms_.emplace_back(ready[i], (*sums)[i]);
          auto& gather = gathers_.at(ready[i]);
          gather.received.resize(1); // the sum may lie in it
          if (!context_->config.dump_gradients.empty())
            queue_pieces(RankId{0}, ready[i], kDump, gather.parts.front());
        }
        unsummed_ -= ready.size();
        if (unsummed_ == 0)
          send_norms();
        pump();
      });
}

void OptimizerWorker::send_norms() {
  context_->rank->postman->tell(RankId{0}, Route::trainer,
                                GradientNorms{step_, context_->self(), norms_});
}

// ---- pieces ------------------------------------------------------------------------------------

void OptimizerWorker::queue_pieces(RankId to, uint32_t tensor, uint32_t part, const float* from) {
  const int64_t n = planned(tensor).spec.num_elements();
  for (int64_t at = 0; at < n; at += kPieceElements)
    outgoing_.push_back({to, tensor, part, at, std::min(kPieceElements, n - at), from});
}

void OptimizerWorker::pump() {
  if (packing_ || outgoing_.empty() || in_flight_ >= kWindowBytes)
    return commit_if_done();
  auto pieces = std::make_shared<std::vector<Piece>>();
  auto payloads = std::make_shared<std::vector<BufferRef>>();
  while (!outgoing_.empty() && in_flight_ < kWindowBytes) {
    in_flight_ += outgoing_.front().count * static_cast<int64_t>(sizeof(float));
    pieces->push_back(outgoing_.front());
    outgoing_.pop_front();
  }
  packing_ = true;
  run(
      "pack",
      [this, pieces, payloads](Workers&) {
        for (const auto& piece : *pieces) {
          const auto bytes = static_cast<size_t>(piece.count) * sizeof(float);
          auto payload = context_->rank->fabric->pool().acquire(bytes);
          if (!payload)
            fail_with(text_of(payload.error()));
          std::memcpy((*payload)->data(), piece.from + piece.begin, bytes);
          payloads->push_back(std::move(*payload));
        }
      },
      [this, pieces, payloads] {
        packing_ = false;
        for (size_t i = 0; i < pieces->size(); ++i) {
          const auto& piece = (*pieces)[i];
          WireHeader header;
          header.kind = WireKind::bulk;
          header.step = static_cast<uint64_t>(step_);
          header.layer = piece.tensor;
          header.attempt = piece.part;
          header.aux = static_cast<uint64_t>(piece.begin);
          context_->rank->postman->post(piece.to, Route::optimizer, header,
                                        std::move((*payloads)[i]));
        }
        pump();
      });
}

void OptimizerWorker::check(const Envelope& message) const {
  const auto& h = message.header;
  const auto wrong = [&](const std::string& what) {
    fail_with(fmt::format("piece from rank {}: {}", h.source.value, what));
  };
  if (h.layer >= context_->tensors.size())
    wrong(fmt::format("tensor {} of {}", h.layer, context_->tensors.size()));
  const auto& tensor = planned(h.layer);
  const auto n = static_cast<uint64_t>(tensor.spec.num_elements());
  const uint64_t bytes = message.payload ? message.payload->size() : 0;
  if (bytes == 0 || bytes % sizeof(float) != 0 || h.aux > n || bytes / sizeof(float) > n - h.aux)
    wrong(fmt::format("{} bytes at element {} of {}, which has {}", bytes, h.aux, tensor.spec.name,
                      n));
  const bool from_owner = h.source == tensor.owner;
  const bool fits = h.attempt == kValues ? from_owner && !owns(h.layer)
                    : h.attempt == kDump ? from_owner && context_->self() == RankId{0}
                                         : owns(h.layer) && h.attempt < tensor.parts.size() &&
                                               tensor.parts[h.attempt].rank == h.source;
  if (!fits)
    wrong(fmt::format("part {} of {} is not what it has to send", h.attempt, tensor.spec.name));
}

void OptimizerWorker::on_piece(Envelope&& message) {
  const auto& h = message.header;
  const auto step = static_cast<int64_t>(h.step);
  if (step < step_)
    return;
  begin_step(step);
  check(message);
  if (!taken_.emplace(h.layer, h.attempt, static_cast<int64_t>(h.aux), h.source).second)
    return;
  arrived_.push_back(std::move(message));
  take_pieces();
}

void OptimizerWorker::copy_piece(const Envelope& message) {
  const auto& h = message.header;
  const auto& spec = planned(h.layer).spec;
  const auto at = static_cast<int64_t>(h.aux);
  const std::span<const float> values{reinterpret_cast<const float*>(message.payload->data()),
                                      message.payload->size() / sizeof(float)};
  if (h.attempt == kValues)
    return copy_to_phases(*context_, spec, values, at);
  auto& memory = h.attempt == kDump ? dump_[h.layer] : gathers_.at(h.layer).received[h.attempt];
  if (!memory)
    memory = context_->compute->take(spec.num_elements());
  std::ranges::copy(values, memory.get() + at);
}

void OptimizerWorker::take_pieces() {
  if (taking_ || arrived_.empty())
    return;
  taking_ = true;
  auto taken = std::make_shared<std::vector<Envelope>>(std::move(arrived_));
  arrived_.clear();
  run(
      "take pieces",
      [this, taken](Workers&) {
        for (const auto& message : *taken)
          copy_piece(message);
      },
      [this, taken] {
        taking_ = false;
        for (const auto& message : *taken) {
          const auto& h = message.header;
          const auto bytes = static_cast<int64_t>(message.payload->size());
          const int64_t count = bytes / static_cast<int64_t>(sizeof(float));
          context_->rank->postman->tell(h.source, Route::optimizer,
                                        TensorTaken{context_->self(), bytes});
          if (h.attempt == kValues) {
            values_missing_ -= count;
          } else if (h.attempt == kDump) {
            dump_missing_ -= count;
          } else {
            auto& gather = gathers_.at(h.layer);
            gather.parts[h.attempt] = gather.received[h.attempt].get();
            gather.missing -= count;
          }
        }
        if (!dumped_ && dump_missing_ == 0)
          write_dump();
        sum_ready();
        take_pieces();
        commit_if_done();
      });
}

void OptimizerWorker::on_taken(const TensorTaken& news) {
  in_flight_ -= news.bytes;
  pump();
}

// ---- the update --------------------------------------------------------------------------------

void OptimizerWorker::apply(const ApplyUpdate& command) {
  run(
      "adamw",
      [this, command](Workers& workers) {
        adamw(command, workers);
        set_biases(command);
      },
      [this] {
        applied_ = true;
        for (const auto& [t, gather] : gathers_) {
          const auto* owned = state_->layout->find(planned(t).spec.name);
          RankId last;
          for (const auto& [rank, phase] : planned(t).holders)
            if (rank != context_->self() && rank != last) {
              queue_pieces(rank, t, kValues, state_->master.of(*owned).data());
              last = rank;
            }
        }
        average_due_ = state_->ema.has_value();
        average();
        pump();
      });
}

void OptimizerWorker::adamw(const ApplyUpdate& command, Workers& workers) {
  const auto& config = context_->config;
  for (const auto& [t, gather] : gathers_) {
    const auto& spec = planned(t).spec;
    const auto& owned = *state_->layout->find(spec.name);
    AdamWTask task;
    task.n = owned.size;
    task.lr = static_cast<float>(command.lr);
    task.beta1 = static_cast<float>(config.beta1);
    task.beta2 = static_cast<float>(config.beta2);
    task.eps = static_cast<float>(config.eps);
    task.weight_decay = owned.is_decayed() ? static_cast<float>(config.weight_decay) : 0.0f;
    task.clip = static_cast<float>(command.clip);
    task.step = command.step;
    task.round_moments = context_->precision != TrainPrecision::f32;
    task.g = gather.parts.front();
    task.theta = state_->master.of(owned).data();
    task.m = state_->m.of(owned).data();
    task.v = state_->v.of(owned).data();
    context_->compute->ops().adamw(task, workers);
    copy_to_phases(*context_, spec, state_->master.of(owned), 0);
  }
}

void OptimizerWorker::set_biases(const ApplyUpdate& command) {
  for (const auto& tensor : context_->tensors) {
    if (tensor.spec.role != TensorRole::router_bias)
      continue;
    for (const auto& [layer, bias] : command.biases) {
      if (layer != tensor.spec.layer ||
          static_cast<int64_t>(bias.size()) != tensor.spec.num_elements())
        continue;
      copy_to_phases(*context_, tensor.spec, bias, 0);
      if (const auto* owned = state_->layout->find(tensor.spec.name))
        std::ranges::copy(bias, state_->master.of(*owned).begin());
    }
  }
}

// The average follows on its own stream, from a copy: a step waits only for the copy.
void OptimizerWorker::average() {
  if (!average_due_ || averaging_)
    return;
  average_due_ = false;
  averaging_ = true;
  run(
      "copy for the average",
      [this](Workers&) {
        const auto all = state_->master.all();
        snapshot_.assign(all.begin(), all.end());
      },
      [this] {
        commit_if_done();
        run_on(
            *context_->background, "average",
            [this](Workers& workers) {
              const auto decay = static_cast<float>(context_->config.ema);
              const auto ema = state_->ema->all();
              workers.parallel_for(
                  static_cast<int64_t>(ema.size()), 1 << 16, [&](int64_t begin, int64_t end, int) {
                    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
                      ema[i] = decay * ema[i] + (1 - decay) * snapshot_[i];
                  });
            },
            [this] {
              averaging_ = false;
              average();
            });
      });
}

void OptimizerWorker::commit_if_done() {
  if (!applied_ || preparing_ || values_missing_ != 0 || !outgoing_.empty() || packing_ ||
      !dumped_ || average_due_)
    return;
  preparing_ = true;
  run(
      "prepare weights",
      [this](Workers& workers) {
        for (const auto& phase : context_->phases)
          phase.weights->prepare(workers);
      },
      [this] {
        context_->rank->postman->tell(
            RankId{0}, Route::trainer,
            StepCommitted{step_, context_->self(), context_->rank->fabric->stats().bytes_sent});
      });
}

// ---- files -------------------------------------------------------------------------------------

void OptimizerWorker::write_dump() {
  dumped_ = true; // once; the step is held up by the job that prepares the weights
  run(
      "dump gradients",
      [this](Workers&) {
        const auto& folder = context_->config.dump_gradients;
        std::error_code error;
        std::filesystem::create_directories(folder, error);
        if (error)
          fail_with(fmt::format("{}: {}", folder.string(), error.message()));
        std::vector<TensorDeclaration> declarations;
        for (const auto& [t, values] : dump_)
          declarations.push_back({planned(t).spec.name, DType::f32, planned(t).spec.shape});
        auto writer = SafetensorsWriter::create(
            folder / fmt::format("step-{:06}.safetensors", step_), declarations);
        if (!writer)
          fail_with(text_of(writer.error()));
        for (const auto& [t, values] : dump_)
          if (auto wrong = (*writer)->append(std::as_bytes(
                  std::span{values.get(), static_cast<size_t>(planned(t).spec.num_elements())})))
            fail_with(text_of(wrong));
        if (auto wrong = (*writer)->finish())
          fail_with(text_of(wrong));
        dump_.clear();
      },
      [this] { commit_if_done(); });
}

void OptimizerWorker::save(const SaveShard& command) {
  struct Copies {
    std::vector<float> master, m, v;
  };
  auto copies = std::make_shared<Copies>();
  auto saved = std::make_shared<ShardSaved>();
  saved->step = command.step;
  saved->rank = context_->self();
  const auto write = [this, command, copies, saved](Workers&) {
    // The average belongs to this stream.
    const ShardSource source{state_->layout, copies->master, copies->m, copies->v,
                             state_->ema ? std::span<const float>{state_->ema->all()}
                                         : std::span<const float>{}};
    auto written = write_shard(command.folder, context_->self(), context_->plan.num_ranks(),
                               context_->config.compute, context_->plan.config,
                               context_->plan.num_mtp_layers, source);
    if (!written) {
      saved->error_code = static_cast<uint8_t>(code_of(written.error()));
      saved->error = text_of(written.error());
      return;
    }
    saved->tensors = std::move(written->tensors);
    saved->bytes = written->bytes;
  };
  run(
      "copy for a checkpoint",
      [this, copies](Workers&) {
        const auto copy = [](std::vector<float>& to, const TrainArena& from) {
          const auto all = from.all();
          to.assign(all.begin(), all.end());
        };
        copy(copies->master, state_->master);
        copy(copies->m, state_->m);
        copy(copies->v, state_->v);
      },
      [this, write, saved] {
        run_on(*context_->background, "write a checkpoint", write, [this, saved] {
          context_->rank->postman->tell(RankId{0}, Route::trainer, ShardSaved{*saved});
        });
      });
}

} // namespace troupe
