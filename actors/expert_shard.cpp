#include "actors/expert_shard.hpp"

#include "actors/dispatch_plan.hpp"
#include "actors/exceptions.hpp"

#include <caf/actor_cast.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <cstring>
#include <optional>

namespace troupe {

namespace {

// One dispatch inside a job.
struct Taken {
  Envelope envelope;
  DispatchView view;
  std::vector<AnswerRow> answers;
  BufferRef answer;
  int64_t first_row = 0;             // of its rows in the job's x
  std::vector<int64_t> out_of_entry; // row of `out` that holds an entry's result
};

} // namespace

// The job's memory and what it runs on.
struct ExpertShardState::Work {
  Work(const RankContext& c, std::shared_ptr<const ExpertBlocks> b)
      : context(c), blocks(std::move(b)),
        // A source's step may send every one of its rows here, for each of its choices.
        max_rows(c.limits.max_rows()),
        max_out(c.limits.max_rows() * std::max<int64_t>(c.config.num_experts_per_tok, 1)),
        compute(c.config, c.arithmetic, *c.backend, max_out, c.stream->num_threads()) {
    const auto hidden = static_cast<size_t>(c.config.hidden_size);
    const auto width = static_cast<size_t>(size_of(c.arithmetic.activations));
    if (c.arithmetic.fp8_activations) {
      codes.resize(static_cast<size_t>(max_rows) * hidden);
      scales.resize(static_cast<size_t>(max_rows) * ((hidden + 127) / 128));
    } else {
      x.resize(static_cast<size_t>(max_rows) * hidden * width);
    }
    out.resize(static_cast<size_t>(max_out) * hidden * width);
  }

  const RankContext& context;
  std::shared_ptr<const ExpertBlocks> blocks;
  int64_t max_rows, max_out;
  ExpertCompute compute;
  std::vector<std::byte> x, out;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<Taken> taken;

  [[nodiscard]] int64_t hidden() const { return context.config.hidden_size; }
  [[nodiscard]] DType a() const { return context.arithmetic.activations; }
  [[nodiscard]] RowFormat format() const {
    return dispatch_format(a(), context.arithmetic.fp8_activations);
  }

  [[nodiscard]] caf::expected<Taken> take(Envelope envelope) const;
  void run(Workers& workers);
  void gather_rows(Workers& workers);
  void answer(Taken& t, Workers& workers);
};

// Checks a dispatch and prepares its answer.
caf::expected<Taken> ExpertShardState::Work::take(Envelope envelope) const {
  const auto layer = static_cast<int32_t>(envelope.header.layer);
  const auto& view = *context.view;
  if (layer < 0 || static_cast<size_t>(layer) >= view.placement_of_layer.size() ||
      view.placement_of_layer[static_cast<size_t>(layer)] < 0)
    return make_error(Errc::malformed, fmt::format("dispatch: layer {} has no experts", layer));
  if (!envelope.payload)
    return make_error(Errc::malformed, "dispatch: empty");
  Taken t;
  auto table =
      read_dispatch(envelope.payload->bytes(), view.layer(layer), context.self, format(), hidden());
  if (!table)
    return table.error();
  t.view = *table;
  for (const auto& e : t.view.entries) {
    const auto held = blocks->find({layer, e.slot});
    const auto version = view.layer(layer).slots[static_cast<size_t>(e.slot)].version;
    if (held == blocks->end() || version != e.version)
      return make_error(Errc::stale, fmt::format("dispatch: slot {} of layer {} is not held in "
                                                 "version {}",
                                                 e.slot, layer, e.version));
  }
  t.answers = answer_rows(t.view.rows, t.view.entries);
  auto answer = context.fabric->pool().acquire(t.answers.size() * answer_row_bytes(a(), hidden()));
  if (!answer)
    return answer.error();
  t.answer = std::move(*answer);
  t.envelope = std::move(envelope);
  return t;
}

// Copies the rows of all dispatches side by side, so that an expert sees them as one matrix.
void ExpertShardState::Work::gather_rows(Workers& workers) {
  const auto h = static_cast<size_t>(hidden());
  const size_t tiles = (h + 127) / 128;
  for (auto& t : taken) {
    const auto stride = size_t{t.view.head.row_bytes};
    workers.parallel_for(static_cast<int64_t>(t.view.rows.size()), 64,
                         [&](int64_t begin, int64_t end, int) {
                           for (int64_t i = begin; i < end; ++i) {
                             const std::byte* from = t.view.data + static_cast<size_t>(i) * stride;
                             const auto to = static_cast<size_t>(t.first_row + i);
                             if (codes.empty()) {
                               const auto n = h * static_cast<size_t>(size_of(a()));
                               std::memcpy(x.data() + to * n, from, n);
                             } else {
                               std::memcpy(codes.data() + to * h, from, h);
                               std::memcpy(scales.data() + to * tiles,
                                           from + fp8_scales_offset(hidden()), tiles * 4);
                             }
                           }
                         });
  }
}

void ExpertShardState::Work::run(Workers& workers) {
  gather_rows(workers);
  // Per (layer, slot): the rows of x it gets, and where in `out` they land.
  std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>> rows_of_slot;
  for (auto& t : taken) {
    size_t e = 0;
    const auto layer = static_cast<int32_t>(t.envelope.header.layer);
    for (size_t r = 0; r < t.view.rows.size(); ++r)
      for (int32_t i = 0; i < t.view.rows[r].num_entries; ++i, ++e)
        rows_of_slot[{layer, t.view.entries[e].slot}].push_back(
            static_cast<int32_t>(t.first_row + static_cast<int64_t>(r)));
  }
  std::vector<ExpertGroup> groups;
  std::map<std::pair<int32_t, int32_t>, int64_t> next_out;
  int64_t out_rows = 0;
  for (const auto& [slot, rows] : rows_of_slot) {
    groups.push_back({&blocks->at(slot).weights(), rows, out_rows});
    next_out[slot] = out_rows;
    out_rows += static_cast<int64_t>(rows.size());
  }
  for (auto& t : taken) {
    const auto layer = static_cast<int32_t>(t.envelope.header.layer);
    for (const auto& e : t.view.entries)
      t.out_of_entry.push_back(next_out[{layer, e.slot}]++);
  }
  Rows rows;
  QuantizedRows quantized;
  if (codes.empty())
    rows = Rows{x.data(), a(), hidden()};
  else
    quantized = QuantizedRows{codes.data(), scales.data(), hidden(), (hidden() + 127) / 128};
  compute.run(groups, rows, quantized, MutableRows{out.data(), a(), hidden()}, workers);
  for (auto& t : taken)
    answer(t, workers);
}

void ExpertShardState::Work::answer(Taken& t, Workers& workers) {
  const auto row = static_cast<size_t>(hidden()) * static_cast<size_t>(size_of(a()));
  const auto stride = answer_row_bytes(a(), hidden());
  workers.parallel_for(
      static_cast<int64_t>(t.answers.size()), 16, [&](int64_t begin, int64_t end, int) {
        std::vector<CombineTerm> terms;
        for (int64_t i = begin; i < end; ++i) {
          const auto& to_answer = t.answers[static_cast<size_t>(i)];
          std::byte* to = t.answer->data() + static_cast<size_t>(i) * stride;
          terms.clear();
          for (int32_t j = 0; j < to_answer.num_entries; ++j) {
            const auto e = static_cast<size_t>(to_answer.first_entry + j);
            terms.push_back({out.data() + static_cast<size_t>(t.out_of_entry[e]) * row,
                             t.view.entries[e].weight, t.view.entries[e].group, false});
          }
          if (to_answer.complete)
            sum_group(terms, a(), hidden(), to);
          else
            std::memcpy(to, terms.front().row, row);
        }
      });
}

namespace {

void start_job(ExpertShard::stateful_pointer<ExpertShardState> self);

void reply(const RankContext& context, Taken& t) {
  WireHeader header;
  header.kind = WireKind::combine;
  header.step = t.envelope.header.step;
  header.layer = t.envelope.header.layer;
  header.attempt = t.envelope.header.attempt;
  header.aux = t.envelope.header.aux;
  context.postman->post(t.envelope.header.source, static_cast<Route>(t.envelope.header.flags),
                        header, std::move(t.answer));
}

// Takes as many waiting dispatches as the job's memory holds, oldest first.
void take_waiting(ExpertShardState& state) {
  auto& work = *state.work;
  int64_t rows = 0, out = 0;
  while (!state.waiting.empty()) {
    auto taken = work.take(state.waiting.front());
    if (!taken) {
      // What a peer sent can't be computed; the supervisor ends the rank with this reason.
      state.context->postman->tell(state.context->self, Route::supervisor,
                                   PeerLost{state.waiting.front().header.source, taken.error()});
      state.waiting.pop_front();
      continue;
    }
    const auto num_rows = static_cast<int64_t>(taken->view.rows.size());
    const auto num_out = static_cast<int64_t>(taken->view.entries.size());
    if (rows + num_rows > work.max_rows || out + num_out > work.max_out) {
      if (!work.taken.empty())
        return;
      const auto error =
          make_error(Errc::malformed, fmt::format("dispatch: {} rows, at most {} expected",
                                                  num_rows, work.max_rows));
      state.context->postman->tell(state.context->self, Route::supervisor,
                                   PeerLost{state.waiting.front().header.source, error});
      state.waiting.pop_front();
      continue;
    }
    taken->first_row = rows;
    rows += num_rows;
    out += num_out;
    work.taken.push_back(std::move(*taken));
    state.waiting.pop_front();
  }
}

void start_job(ExpertShard::stateful_pointer<ExpertShardState> self) {
  auto& state = self->state;
  if (state.job_running)
    return;
  take_waiting(state);
  if (state.work->taken.empty())
    return;
  state.job_running = true;
  auto* trace = state.context->trace;
  const auto layer = static_cast<int64_t>(state.work->taken.front().envelope.header.layer);
  state.context->stream->start(
      "experts", [work = state.work](Workers& workers) { work->run(workers); },
      [handle = caf::actor_cast<ExpertShard>(self), trace, layer](const JobTiming& timing) {
        if (trace)
          trace->add({"experts", "compute", timing.started, timing.finished, layer});
        caf::anon_send(handle, JobDone{});
      });
}

} // namespace

ExpertShard::behavior_type expert_shard(ExpertShard::stateful_pointer<ExpertShardState> self,
                                        const RankContext* context,
                                        std::shared_ptr<const ExpertBlocks> blocks) {
  end_by_exceptions(self);
  self->state.context = context;
  self->state.work = std::make_shared<ExpertShardState::Work>(*context, std::move(blocks));
  return {
      [=](Envelope& dispatch) {
        self->state.waiting.push_back(std::move(dispatch));
        start_job(self);
      },
      [=](const JobDone&) {
        auto& state = self->state;
        state.job_running = false;
        for (auto& t : state.work->taken)
          reply(*state.context, t);
        state.work->taken.clear();
        start_job(self);
      },
  };
}

} // namespace troupe
