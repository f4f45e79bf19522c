#include "actors/expert_route.hpp"

#include "kernels/math.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace troupe {

TrainMessageKey key_of(const WireHeader& h) {
  return {h.kind, h.step, h.aux, h.layer, h.attempt, h.source};
}

namespace {

float bf16(float x) { return to_float(to_bf16(x)); }

void add_terms(ExpertRoute& route) {
  for (size_t t = 0; t < route.tables.size(); ++t) {
    const auto& table = route.tables[t];
    for (size_t a = 0; a < route.answers[t].size(); ++a) {
      const auto& answer = route.answers[t][a];
      const auto& entry = table.entries[static_cast<size_t>(answer.first_entry)];
      route.terms.push_back({table.rows[static_cast<size_t>(answer.row)].row, entry.group,
                             entry.place, answer.complete, entry.weight, static_cast<int32_t>(t),
                             static_cast<int32_t>(a)});
    }
  }
  std::sort(route.terms.begin(), route.terms.end(), [](const auto& a, const auto& b) {
    return std::tie(a.row, a.group, a.place) < std::tie(b.row, b.group, b.place);
  });
}

} // namespace

caf::expected<ExpertRoute> plan_route(const View& view, const LayerPlacement& layer, RankId self,
                                      std::span<const RankId> peers, const GateChoice& choice,
                                      int64_t rows) {
  auto tables = plan_dispatch(view, layer, self, choice, 0, static_cast<int32_t>(rows));
  if (!tables)
    return tables.error();
  ExpertRoute route;
  for (const RankId peer : peers) {
    const auto found = std::find_if(tables->begin(), tables->end(),
                                    [&](const auto& t) { return t.destination == peer; });
    if (found != tables->end())
      route.tables.push_back(std::move(*found));
    else
      route.tables.push_back({peer, {}, {}});
    const auto& table = route.tables.back();
    route.answers.push_back(answer_rows(table.rows, table.entries));
  }
  add_terms(route);
  route.row_terms.assign(static_cast<size_t>(rows) + 1, 0);
  for (const auto& term : route.terms)
    ++route.row_terms[static_cast<size_t>(term.row) + 1];
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r)
    route.row_terms[r + 1] += route.row_terms[r];
  return route;
}

caf::expected<std::vector<BufferRef>> fill_route(const ExpertRoute& route, BufferPool& pool,
                                                 RowFormat format, int64_t width, const float* x,
                                                 Workers& workers) {
  std::vector<BufferRef> payloads;
  const auto stride = row_bytes(format, width);
  for (const auto& table : route.tables) {
    const DispatchHead head{static_cast<uint32_t>(table.rows.size()),
                            static_cast<uint32_t>(table.entries.size()),
                            static_cast<uint32_t>(stride), static_cast<uint32_t>(format)};
    const auto layout = dispatch_layout(head);
    auto payload = pool.acquire(layout.total_bytes);
    if (!payload)
      return payload.error();
    write_table((*payload)->bytes(), table, format, width);
    std::byte* data = (*payload)->data() + layout.data_offset;
    workers.parallel_for(
        static_cast<int64_t>(table.rows.size()), 16, [&](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; ++i)
            encode_row(format, width, x + table.rows[static_cast<size_t>(i)].row * width,
                       data + static_cast<size_t>(i) * stride);
        });
    payloads.push_back(std::move(*payload));
  }
  return payloads;
}

size_t answer_bytes(std::span<const AnswerRow> rows, size_t num_entries, RowFormat format,
                    int64_t width, bool backward) {
  return rows.size() * row_bytes(format, width) + (backward ? num_entries * sizeof(float) : 0);
}

caf::error check_answers(const ExpertRoute& route, int64_t width, RowFormat format, bool backward,
                         std::span<const Envelope> answers) {
  for (size_t t = 0; t < route.tables.size(); ++t) {
    const auto& table = route.tables[t];
    if (table.rows.empty())
      continue;
    const auto expected =
        answer_bytes(route.answers[t], table.entries.size(), format, width, backward);
    const auto given = answers[t].payload ? answers[t].payload->size() : 0;
    if (given != expected)
      return make_error(Errc::malformed,
                        fmt::format("answer of rank {}'s experts: {} bytes given, {} expected",
                                    table.destination.value, given, expected));
  }
  return {};
}

void sum_group_rows(size_t num_terms, FunctionRef<const float*(size_t)> row,
                    FunctionRef<float(size_t)> weight, int64_t width, bool round, float* out) {
  std::fill_n(out, width, 0.0f);
  for (size_t t = 0; t < num_terms; ++t)
    add_weighted({row(t), static_cast<size_t>(width)}, weight(t), out);
  if (round)
    std::transform(out, out + width, out, bf16);
}

void combine_route(const ExpertRoute& route, int64_t rows, int64_t width, RowFormat format,
                   bool backward, std::span<const Envelope> answers, const float* first,
                   const float* second, bool round, float* out, Workers& workers) {
  const auto stride = row_bytes(format, width);
  const auto n = static_cast<size_t>(width);
  workers.parallel_for(rows, 8, [&](int64_t begin, int64_t end, int) {
    std::vector<float> members, part(n);
    for (int64_t r = begin; r < end; ++r) {
      float* sum = out + r * width;
      // Sources may be the target: gather into part first, add to a row of our own.
      std::vector<float> total(n, 0.0f);
      const size_t last = route.row_terms[static_cast<size_t>(r) + 1];
      for (size_t t = route.row_terms[static_cast<size_t>(r)]; t < last;) {
        size_t after = t;
        while (after < last && route.terms[after].group == route.terms[t].group)
          ++after;
        members.resize((after - t) * n);
        for (size_t i = t; i < after; ++i) {
          const auto& term = route.terms[i];
          decode_row(format, width,
                     answers[static_cast<size_t>(term.table)].payload->data() +
                         static_cast<size_t>(term.answer) * stride,
                     members.data() + (i - t) * n);
        }
        const float* group = members.data();
        if (!route.terms[t].complete) {
          sum_group_rows(
              after - t, [&](size_t i) { return members.data() + i * n; },
              [&](size_t i) { return backward ? 1.0f : route.terms[t + i].weight; }, width, round,
              part.data());
          group = part.data();
        }
        for (size_t i = 0; i < n; ++i)
          total[i] += group[i];
        t = after;
      }
      for (const float* other : {first, second})
        if (other != nullptr)
          for (size_t i = 0; i < n; ++i)
            total[i] += other[static_cast<size_t>(r) * n + i];
      if (round)
        std::transform(total.begin(), total.end(), sum, bf16);
      else
        std::copy(total.begin(), total.end(), sum);
    }
  });
}

void gate_weight_gradients(const ExpertRoute& route, int64_t top_k, int64_t width, RowFormat format,
                           std::span<const Envelope> answers, std::span<float> out) {
  const auto stride = row_bytes(format, width);
  for (size_t t = 0; t < route.tables.size(); ++t) {
    const auto& table = route.tables[t];
    if (table.rows.empty())
      continue;
    const std::byte* from = answers[t].payload->data() + route.answers[t].size() * stride;
    size_t e = 0;
    for (const auto& row : table.rows)
      for (int32_t i = 0; i < row.num_entries; ++i, ++e)
        std::memcpy(&out[static_cast<size_t>(row.row * top_k + table.entries[e].place)],
                    from + e * sizeof(float), sizeof(float));
  }
}

} // namespace troupe
