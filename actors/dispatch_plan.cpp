#include "actors/dispatch_plan.hpp"

#include "transport/rows.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>

namespace troupe {

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian");

namespace {

constexpr size_t align16(size_t n) { return (n + 15) & ~size_t{15}; }

caf::error malformed(std::string text) {
  return make_error(Errc::malformed, "dispatch: " + std::move(text));
}

// The entries of one token, by (group, place).
caf::error entries_of_row(const View& view, const LayerPlacement& placement,
                          const GateChoice& choice, int32_t row,
                          std::vector<DispatchEntry>& entries) {
  entries.clear();
  for (int32_t k = 0; k < choice.top_k; ++k) {
    const auto at =
        static_cast<size_t>(row) * static_cast<size_t>(choice.top_k) + static_cast<size_t>(k);
    const ExpertId expert{choice.topk_idx[at]};
    const int32_t slot = choose_slot(view, placement, expert, row);
    if (slot < 0)
      return make_error(Errc::peer_lost, fmt::format("layer {}: expert {} has no live slot",
                                                     placement.layer, expert.value));
    DispatchEntry e;
    e.slot = slot;
    e.expert = expert.value;
    e.version = placement.slots[static_cast<size_t>(slot)].version;
    e.weight = choice.topk_weight[at];
    e.group = static_cast<int16_t>(expert.value / choice.experts_per_group);
    e.place = static_cast<int16_t>(k);
    entries.push_back(e);
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const auto& a, const auto& b) { return a.group < b.group; });
  return {};
}

// Appends to each destination's table its share of one row's entries; marks the groups that are
// whole at one destination. `destination(entry)` names it; `may_complete(entry)` says whether the
// group was whole before.
template <class Destination, class MayComplete>
void deal_row(std::span<const DispatchEntry> entries, int32_t row,
              std::map<RankId, DispatchTable>& tables, Destination destination,
              MayComplete may_complete) {
  for (size_t begin = 0; begin < entries.size();) {
    size_t end = begin;
    while (end < entries.size() && entries[end].group == entries[begin].group)
      ++end;
    const RankId first = destination(entries[begin]);
    bool complete = true;
    for (size_t i = begin; i < end; ++i)
      complete = complete && may_complete(entries[i]) && destination(entries[i]) == first;
    for (size_t i = begin; i < end; ++i) {
      const RankId to = destination(entries[i]);
      auto& table = tables[to];
      table.destination = to;
      if (table.rows.empty() || table.rows.back().row != row)
        table.rows.push_back(DispatchRow{row, 0});
      ++table.rows.back().num_entries;
      auto e = entries[i];
      e.complete = complete ? 1 : 0;
      table.entries.push_back(e);
    }
    begin = end;
  }
}

std::vector<DispatchTable> values(std::map<RankId, DispatchTable>&& tables) {
  std::vector<DispatchTable> list;
  list.reserve(tables.size());
  for (auto& [rank, table] : tables)
    list.push_back(std::move(table));
  return list;
}

// Index of a rank among the ranks of its node.
int32_t local_index(const View& view, RankId rank) {
  int32_t index = 0;
  for (const auto& m : view.members) {
    if (m.rank == rank)
      return index;
    if (m.node == view.member(rank).node)
      ++index;
  }
  return index;
}

} // namespace

RankId forwarder_of(const View& view, RankId source, NodeId node) {
  const auto ranks = view.expert_ranks(node);
  if (ranks.empty())
    return RankId{};
  return ranks[static_cast<size_t>(local_index(view, source)) % ranks.size()];
}

caf::expected<std::vector<DispatchTable>> plan_dispatch(const View& view,
                                                        const LayerPlacement& placement,
                                                        RankId source, const GateChoice& choice,
                                                        int32_t row_begin, int32_t row_end) {
  std::map<RankId, DispatchTable> tables;
  std::map<NodeId, RankId> forwarders;
  if (view.two_hop)
    for (const auto& m : view.members)
      if (m.alive && m.hosts_experts && !forwarders.contains(m.node))
        forwarders[m.node] = forwarder_of(view, source, m.node);
  const auto destination = [&](const DispatchEntry& e) {
    const RankId host = placement.slots[static_cast<size_t>(e.slot)].rank;
    return view.two_hop ? forwarders.at(view.member(host).node) : host;
  };
  std::vector<DispatchEntry> entries;
  for (int32_t row = row_begin; row < row_end; ++row) {
    if (auto error = entries_of_row(view, placement, choice, row, entries))
      return error;
    deal_row(entries, row, tables, destination, [](const DispatchEntry&) { return true; });
  }
  return values(std::move(tables));
}

std::vector<DispatchTable> plan_forward(const LayerPlacement& placement,
                                        const DispatchTable& table) {
  std::map<RankId, DispatchTable> tables;
  size_t entry = 0;
  for (size_t r = 0; r < table.rows.size(); ++r) {
    const auto count = static_cast<size_t>(table.rows[r].num_entries);
    deal_row(
        std::span{table.entries}.subspan(entry, count), static_cast<int32_t>(r), tables,
        [&](const DispatchEntry& e) { return placement.slots[static_cast<size_t>(e.slot)].rank; },
        [](const DispatchEntry& e) { return e.complete != 0; });
    entry += count;
  }
  return values(std::move(tables));
}

std::vector<AnswerRow> answer_rows(std::span<const DispatchRow> rows,
                                   std::span<const DispatchEntry> entries) {
  std::vector<AnswerRow> answers;
  answers.reserve(entries.size());
  int32_t e = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int32_t end = e + rows[r].num_entries;
    while (e < end) {
      AnswerRow a{static_cast<int32_t>(r), e, 1, false};
      const auto& first = entries[static_cast<size_t>(e)];
      if (first.complete) {
        a.complete = true;
        while (a.first_entry + a.num_entries < end &&
               entries[static_cast<size_t>(a.first_entry + a.num_entries)].group == first.group)
          ++a.num_entries;
      }
      answers.push_back(a);
      e += a.num_entries;
    }
  }
  return answers;
}

namespace {

// hidden was checked when the model was opened.
RowLayout layout_of(RowFormat format, int64_t hidden) {
  switch (format) {
  case RowFormat::f32:
    return *row_layout(DType::f32, hidden);
  case RowFormat::bf16:
    return *row_layout(DType::bf16, hidden);
  case RowFormat::fp8:
    return *row_layout(DType::f8_e4m3, hidden);
  }
  return {};
}

} // namespace

size_t fp8_scales_offset(int64_t hidden) { return layout_of(RowFormat::fp8, hidden).scales_offset; }

size_t row_bytes(RowFormat format, int64_t hidden) { return layout_of(format, hidden).row_bytes; }

RowFormat dispatch_format(DType activations, bool fp8_activations) {
  if (fp8_activations)
    return RowFormat::fp8;
  return activations == DType::bf16 ? RowFormat::bf16 : RowFormat::f32;
}

size_t answer_row_bytes(DType combine, int64_t hidden) {
  return row_bytes(dispatch_format(combine, false), hidden);
}

DispatchLayout dispatch_layout(const DispatchHead& head) {
  DispatchLayout layout;
  layout.rows_offset = sizeof(DispatchHead);
  layout.entries_offset = align16(layout.rows_offset + size_t{head.num_rows} * sizeof(DispatchRow));
  layout.data_offset =
      align16(layout.entries_offset + size_t{head.num_entries} * sizeof(DispatchEntry));
  layout.total_bytes = layout.data_offset + size_t{head.num_rows} * head.row_bytes;
  return layout;
}

void write_table(std::span<std::byte> payload, const DispatchTable& table, RowFormat format,
                 int64_t hidden) {
  const DispatchHead head{
      static_cast<uint32_t>(table.rows.size()), static_cast<uint32_t>(table.entries.size()),
      static_cast<uint32_t>(row_bytes(format, hidden)), static_cast<uint32_t>(format)};
  const auto layout = dispatch_layout(head);
  std::memcpy(payload.data(), &head, sizeof head);
  // Gaps too: the memory is a pool's, and what it held before is nobody else's business.
  const auto clear = [&](size_t from, size_t to) {
    std::memset(payload.data() + from, 0, to - from);
  };
  clear(layout.rows_offset + table.rows.size() * sizeof(DispatchRow), layout.entries_offset);
  clear(layout.entries_offset + table.entries.size() * sizeof(DispatchEntry), layout.data_offset);
  if (!table.rows.empty())
    std::memcpy(payload.data() + layout.rows_offset, table.rows.data(),
                table.rows.size() * sizeof(DispatchRow));
  if (!table.entries.empty())
    std::memcpy(payload.data() + layout.entries_offset, table.entries.data(),
                table.entries.size() * sizeof(DispatchEntry));
}

caf::expected<DispatchView> read_dispatch(std::span<const std::byte> payload,
                                          const LayerPlacement& placement, RankId self,
                                          RowFormat format, int64_t hidden) {
  DispatchView view;
  if (payload.size() < sizeof(DispatchHead))
    return malformed("shorter than its head");
  std::memcpy(&view.head, payload.data(), sizeof(DispatchHead));
  if (view.head.format != static_cast<uint32_t>(format))
    return malformed(
        fmt::format("row format {}, expected {}", view.head.format, static_cast<uint32_t>(format)));
  if (view.head.row_bytes != row_bytes(format, hidden))
    return malformed(fmt::format("{} bytes per row, expected {}", view.head.row_bytes,
                                 row_bytes(format, hidden)));
  const auto layout = dispatch_layout(view.head);
  if (layout.total_bytes != payload.size())
    return malformed(
        fmt::format("{} bytes, its head calls for {}", payload.size(), layout.total_bytes));
  // Payload memory is 64-byte aligned (transport/buffer.hpp) and so are all parts by 16.
  view.rows = {reinterpret_cast<const DispatchRow*>(payload.data() + layout.rows_offset),
               view.head.num_rows};
  view.entries = {reinterpret_cast<const DispatchEntry*>(payload.data() + layout.entries_offset),
                  view.head.num_entries};
  const auto rows =
      read_rows(layout_of(format, hidden), view.head.num_rows, payload.subspan(layout.data_offset));
  if (!rows)
    return with_context("dispatch", rows.error());
  view.data = payload.data() + layout.data_offset;
  size_t e = 0;
  for (const auto& row : view.rows) {
    if (row.num_entries < 1 || static_cast<size_t>(row.num_entries) > view.entries.size() - e)
      return malformed("a row's entries do not fit the table");
    const auto end = e + static_cast<size_t>(row.num_entries);
    for (size_t i = e; i < end; ++i) {
      const auto& x = view.entries[i];
      if (x.slot < 0 || static_cast<size_t>(x.slot) >= placement.slots.size())
        return malformed(fmt::format("slot {} does not exist", x.slot));
      const auto& slot = placement.slots[static_cast<size_t>(x.slot)];
      if (slot.expert.value != x.expert)
        return malformed(
            fmt::format("slot {} hosts expert {}, not {}", x.slot, slot.expert.value, x.expert));
      if (self.valid() && slot.rank != self)
        return malformed(fmt::format("slot {} lives on rank {}", x.slot, slot.rank.value));
      if (!std::isfinite(x.weight))
        return malformed("a gate weight is not finite");
      if (i > e) {
        const auto& before = view.entries[i - 1];
        if (x.group < before.group || (x.group == before.group && x.place <= before.place))
          return malformed("entries out of order");
        if (x.group == before.group && x.complete != before.complete)
          return malformed("half a group is marked complete");
      }
    }
    e = end;
  }
  if (e != view.entries.size())
    return malformed("entries without a row");
  return view;
}

} // namespace troupe
