#include "actors/forwarder.hpp"

#include "actors/dispatch_plan.hpp"
#include "actors/exceptions.hpp"
#include "kernels/trunk.hpp"

#include <caf/actor_cast.hpp>
#include <caf/send.hpp>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace troupe {

namespace {

struct Part {
  DispatchTable table; // rows are numbered as in the forwarded table
  BufferRef rows;      // the expert rank's answer
};

RowFormat format_of(const RankContext& context) {
  return dispatch_format(context.arithmetic.activations, context.arithmetic.fp8_activations);
}

} // namespace

// One forwarded dispatch under way.
struct ForwarderState::Work {
  const RankContext* context = nullptr;
  Envelope envelope;
  DispatchTable table;
  std::map<RankId, Part> parts;
  size_t missing = 0;
  BufferRef answer;

  void merge(Workers& workers);
};

// Fills the answer from the expert ranks' rows.
void ForwarderState::Work::merge(Workers& workers) {
  const DType a = context->arithmetic.activations;
  const int64_t hidden = context->config.hidden_size;
  const auto row_size = static_cast<size_t>(hidden * size_of(a));
  const auto stride = answer_row_bytes(a, hidden);
  // Where each entry's row (or its whole group's) came back, keyed by (row, group, place).
  struct Got {
    const std::byte* row;
    bool complete;
  };
  std::map<std::tuple<int32_t, int16_t, int16_t>, Got> got;
  for (const auto& [rank, part] : parts) {
    const std::byte* data = part.rows->data();
    for (const auto& a_row : answer_rows(part.table.rows, part.table.entries)) {
      const auto& entry = part.table.entries[static_cast<size_t>(a_row.first_entry)];
      got[{part.table.rows[static_cast<size_t>(a_row.row)].row, entry.group, entry.place}] = {
          data, a_row.complete};
      data += stride;
    }
  }
  const auto answers = answer_rows(table.rows, table.entries);
  workers.parallel_for(
      static_cast<int64_t>(answers.size()), 16, [&](int64_t begin, int64_t end, int) {
        std::vector<CombineTerm> terms;
        for (int64_t i = begin; i < end; ++i) {
          const auto& wanted = answers[static_cast<size_t>(i)];
          std::byte* to = answer->data() + static_cast<size_t>(i) * stride;
          terms.clear();
          bool summed = false;
          for (int32_t j = 0; j < wanted.num_entries && !summed; ++j) {
            const auto& e = table.entries[static_cast<size_t>(wanted.first_entry + j)];
            const auto& found = got.at({wanted.row, e.group, e.place});
            terms.push_back({found.row, e.weight, e.group, false});
            summed = found.complete; // one rank held the whole group and has summed it
          }
          if (wanted.complete && !summed)
            sum_group(terms, a, hidden, to);
          else
            std::memcpy(to, terms.front().row, row_size);
        }
      });
}

namespace {

using Self = Forwarder::stateful_pointer<ForwarderState>;

void refuse(const RankContext& context, RankId source, const caf::error& why) {
  context.postman->tell(context.self, Route::supervisor, PeerLost{source, why});
}

caf::error send_parts(const RankContext& context, ForwarderState::Work& work, uint64_t id,
                      const DispatchView& view) {
  const auto format = format_of(context);
  const int64_t hidden = context.config.hidden_size;
  const auto stride = row_bytes(format, hidden);
  const auto& placement = context.view->layer(work.envelope.header.layer);
  std::vector<std::pair<RankId, BufferRef>> messages;
  for (auto& table : plan_forward(placement, work.table)) {
    const DispatchHead head{static_cast<uint32_t>(table.rows.size()),
                            static_cast<uint32_t>(table.entries.size()),
                            static_cast<uint32_t>(stride), 0};
    auto payload = context.fabric->pool().acquire(dispatch_layout(head).total_bytes);
    if (!payload)
      return payload.error();
    write_table((*payload)->bytes(), table, format, hidden);
    std::byte* to = (*payload)->data() + dispatch_layout(head).data_offset;
    for (const auto& row : table.rows) {
      std::memcpy(to, view.data + static_cast<size_t>(row.row) * stride, stride);
      to += stride;
    }
    messages.emplace_back(table.destination, std::move(*payload));
    work.parts.emplace(table.destination, Part{std::move(table), {}});
  }
  work.missing = work.parts.size();
  for (auto& [to, payload] : messages) {
    WireHeader header;
    header.kind = WireKind::dispatch;
    header.step = work.envelope.header.step;
    header.layer = work.envelope.header.layer;
    header.aux = id;
    context.postman->post(to, Route::forwarder, header, std::move(payload));
  }
  return {};
}

void take_forward(Self self, Envelope envelope) {
  const auto& context = *self->state.context;
  const auto source = envelope.header.source;
  const auto layer = static_cast<size_t>(envelope.header.layer);
  const auto& layers = context.view->placement_of_layer;
  if (!envelope.payload || layer >= layers.size() || layers[layer] < 0)
    return refuse(context, source, make_error(Errc::malformed, "forward: no such layer"));
  auto view =
      read_dispatch(envelope.payload->bytes(), context.view->layer(static_cast<int64_t>(layer)),
                    RankId{}, format_of(context), context.config.hidden_size);
  if (!view)
    return refuse(context, source, view.error());
  auto work = std::make_shared<ForwarderState::Work>();
  work->context = &context;
  work->envelope = std::move(envelope);
  work->table.rows.assign(view->rows.begin(), view->rows.end());
  work->table.entries.assign(view->entries.begin(), view->entries.end());
  const uint64_t id = self->state.next_id++;
  self->state.open.emplace(id, work);
  if (auto error = send_parts(context, *work, id, *view))
    refuse(context, context.self, error);
}

void take_answer(Self self, Envelope envelope) {
  const auto& context = *self->state.context;
  const uint64_t id = envelope.header.aux;
  const auto open = self->state.open.find(id);
  if (open == self->state.open.end())
    return; // a duplicate of an answer that was merged already
  auto& work = *open->second;
  const auto part = work.parts.find(envelope.header.source);
  if (part == work.parts.end() || part->second.rows)
    return;
  const DType a = context.arithmetic.activations;
  const auto stride = answer_row_bytes(a, context.config.hidden_size);
  const auto expected =
      answer_rows(part->second.table.rows, part->second.table.entries).size() * stride;
  if (!envelope.payload || envelope.payload->size() != expected)
    return refuse(context, envelope.header.source,
                  make_error(Errc::malformed, "combine: not as many rows as were sent"));
  part->second.rows = std::move(envelope.payload);
  if (--work.missing > 0)
    return;
  auto answer = context.fabric->pool().acquire(
      answer_rows(work.table.rows, work.table.entries).size() * stride);
  if (!answer)
    return refuse(context, context.self, answer.error());
  work.answer = std::move(*answer);
  context.stream->start(
      "forward", [w = open->second](Workers& workers) { w->merge(workers); },
      [handle = caf::actor_cast<Forwarder>(self), id](const JobTiming&) {
        caf::anon_send(handle, JobDone{id});
      });
}

} // namespace

Forwarder::behavior_type forwarder(Self self, const RankContext* context) {
  end_by_exceptions(self);
  self->state.context = context;
  return {
      [=](Envelope& envelope) {
        if (envelope.header.kind == WireKind::forward)
          take_forward(self, std::move(envelope));
        else if (envelope.header.kind == WireKind::combine)
          take_answer(self, std::move(envelope));
      },
      [=](const JobDone& done) {
        const auto open = self->state.open.find(done.ticket);
        if (open == self->state.open.end())
          return;
        const auto work = std::move(open->second);
        self->state.open.erase(open);
        WireHeader header;
        header.kind = WireKind::combine;
        header.step = work->envelope.header.step;
        header.layer = work->envelope.header.layer;
        header.attempt = work->envelope.header.attempt;
        header.aux = work->envelope.header.aux;
        self->state.context->postman->post(work->envelope.header.source,
                                           static_cast<Route>(work->envelope.header.flags), header,
                                           std::move(work->answer));
      },
  };
}

} // namespace troupe
