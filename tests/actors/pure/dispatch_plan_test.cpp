#include "actors/dispatch_plan.hpp"

#include "actors/placement.hpp"
#include "config/random.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

using namespace troupe;

namespace {

ModelConfig small_model(int64_t experts, int64_t groups, int64_t top_k) {
  ModelConfig c;
  c.num_hidden_layers = 1;
  c.num_attention_heads = 8;
  c.n_routed_experts = experts;
  c.n_group = groups;
  c.topk_group = groups;
  c.num_experts_per_tok = top_k;
  c.hidden_size = 16;
  return c;
}

struct Choices {
  std::vector<int32_t> idx;
  std::vector<float> weight;
  GateChoice choice;
};

Choices random_choices(KeyedStream& random, const ModelConfig& c, int32_t rows) {
  Choices out;
  for (int32_t r = 0; r < rows; ++r) {
    std::vector<int32_t> experts;
    for (int32_t e = 0; e < c.n_routed_experts; ++e)
      experts.push_back(e);
    for (int64_t k = 0; k < c.num_experts_per_tok; ++k) {
      const auto pick =
          static_cast<size_t>(k) + random.below(experts.size() - static_cast<size_t>(k));
      std::swap(experts[static_cast<size_t>(k)], experts[pick]);
      out.idx.push_back(experts[static_cast<size_t>(k)]);
      out.weight.push_back(static_cast<float>(random.below(1000)) / 1000.0f);
    }
  }
  out.choice = {out.idx, out.weight, static_cast<int32_t>(c.num_experts_per_tok),
                static_cast<int32_t>(c.experts_per_group())};
  return out;
}

View make_view(const ModelConfig& c, int32_t ranks, int32_t nodes, bool two_hop, uint64_t seed) {
  ClusterShape shape;
  shape.num_ranks = ranks;
  shape.nodes = nodes;
  shape.two_hop = two_hop;
  shape.placement_seed = seed;
  auto view = first_view(c, shape, 0);
  REQUIRE(view);
  return *view;
}

} // namespace

TEST_CASE("every choice of every row is dispatched exactly once, to where its slot lives") {
  KeyedStream random{7};
  for (int round = 0; round < 300; ++round) {
    CAPTURE(round);
    const auto c = small_model(16, 4, 1 + static_cast<int64_t>(random.below(8)));
    const auto ranks = static_cast<int32_t>(1 + random.below(8));
    const auto view = make_view(c, ranks, 1, false, random.below(3));
    const auto rows = static_cast<int32_t>(random.below(9));
    const auto choices = random_choices(random, c, rows);
    const auto& placement = view.layer(0);
    const auto tables = plan_dispatch(view, placement, RankId{0}, choices.choice, 0, rows);
    REQUIRE(tables);
    std::map<std::pair<int32_t, int32_t>, int> seen;
    for (const auto& table : *tables) {
      size_t e = 0;
      for (const auto& row : table.rows)
        for (int32_t i = 0; i < row.num_entries; ++i, ++e) {
          const auto& entry = table.entries[e];
          CHECK(placement.slots[static_cast<size_t>(entry.slot)].rank == table.destination);
          CHECK(placement.slots[static_cast<size_t>(entry.slot)].expert.value == entry.expert);
          const auto at = static_cast<size_t>(row.row * c.num_experts_per_tok + entry.place);
          CHECK(choices.idx[at] == entry.expert);
          CHECK(choices.weight[at] == entry.weight);
          ++seen[{row.row, entry.place}];
        }
      CHECK(e == table.entries.size());
    }
    CHECK(seen.size() == static_cast<size_t>(rows * c.num_experts_per_tok));
    CHECK(std::all_of(seen.begin(), seen.end(), [](const auto& s) { return s.second == 1; }));
  }
}

TEST_CASE("a group is complete exactly when all its chosen experts are at one destination") {
  KeyedStream random{11};
  for (int round = 0; round < 200; ++round) {
    CAPTURE(round);
    const auto c = small_model(16, 4, 6);
    const bool two_hop = random.below(2) == 1;
    const auto view = make_view(c, 8, two_hop ? 4 : 1, two_hop, 1 + random.below(3));
    const auto choices = random_choices(random, c, 5);
    const auto tables = plan_dispatch(view, view.layer(0), RankId{0}, choices.choice, 0, 5);
    REQUIRE(tables);
    std::map<std::pair<int32_t, int>, std::set<int32_t>> destinations; // (row, group)
    std::map<std::pair<int32_t, int>, std::set<int>> marks;
    for (const auto& table : *tables) {
      size_t e = 0;
      for (const auto& row : table.rows)
        for (int32_t i = 0; i < row.num_entries; ++i, ++e) {
          const std::pair key{row.row, int{table.entries[e].group}};
          destinations[key].insert(table.destination.value);
          marks[key].insert(table.entries[e].complete);
        }
    }
    for (const auto& [key, where] : destinations)
      CHECK(marks[key] == std::set<int>{where.size() == 1 ? 1 : 0});
  }
}

TEST_CASE("a node is crossed to once per source, and its forwarder reaches every slot") {
  KeyedStream random{13};
  const auto c = small_model(16, 4, 6);
  const auto view = make_view(c, 8, 4, true, 2);
  const auto choices = random_choices(random, c, 12);
  for (int32_t source = 0; source < 8; ++source) {
    const auto tables = plan_dispatch(view, view.layer(0), RankId{source}, choices.choice, 0, 12);
    REQUIRE(tables);
    std::set<int32_t> nodes;
    for (const auto& table : *tables) {
      CHECK(table.destination ==
            forwarder_of(view, RankId{source}, view.member(table.destination).node));
      CHECK(nodes.insert(view.member(table.destination).node.value).second);
      size_t forwarded = 0;
      for (const auto& part : plan_forward(view.layer(0), table)) {
        CHECK(view.member(part.destination).node == view.member(table.destination).node);
        forwarded += part.entries.size();
      }
      CHECK(forwarded == table.entries.size());
    }
  }
}

TEST_CASE("a written table reads back, and no byte of it can lie") {
  KeyedStream random{17};
  const auto c = small_model(16, 4, 4);
  const auto view = make_view(c, 2, 1, false, 0);
  const auto choices = random_choices(random, c, 6);
  const auto tables = plan_dispatch(view, view.layer(0), RankId{0}, choices.choice, 0, 6);
  REQUIRE(tables);
  const auto& table = tables->back();
  const DispatchHead head{static_cast<uint32_t>(table.rows.size()),
                          static_cast<uint32_t>(table.entries.size()),
                          static_cast<uint32_t>(row_bytes(RowFormat::f32, c.hidden_size)), 0};
  std::vector<std::byte> payload(dispatch_layout(head).total_bytes);
  write_table(payload, table, RowFormat::f32, c.hidden_size);
  const auto read = [&](const std::vector<std::byte>& bytes) {
    return read_dispatch(bytes, view.layer(0), table.destination, RowFormat::f32, c.hidden_size);
  };
  const auto back = read(payload);
  REQUIRE(back);
  CHECK(std::memcmp(back->entries.data(), table.entries.data(),
                    table.entries.size() * sizeof(DispatchEntry)) == 0);
  // Any damage is either refused or harmless: what is accepted stays within the table's bounds.
  for (int i = 0; i < 20000; ++i) {
    auto damaged = payload;
    const auto at = random.below(dispatch_layout(head).data_offset);
    damaged[at] = static_cast<std::byte>(random.next());
    if (random.below(4) == 0)
      damaged.resize(random.below(damaged.size() + 1));
    const auto result = read(damaged);
    if (!result)
      continue;
    size_t entries = 0;
    for (const auto& row : result->rows)
      entries += static_cast<size_t>(row.num_entries);
    CHECK(entries == result->entries.size());
    for (const auto& e : result->entries)
      CHECK(static_cast<size_t>(e.slot) < view.layer(0).slots.size());
  }
}

TEST_CASE("an expert without a live slot is said, not sent nowhere") {
  const auto c = small_model(4, 1, 4);
  auto view = make_view(c, 2, 1, false, 0);
  view = next_view(view, MemberLost{RankId{1}, 1});
  KeyedStream random{1};
  const auto choices = random_choices(random, c, 1);
  const auto tables = plan_dispatch(view, view.layer(0), RankId{0}, choices.choice, 0, 1);
  REQUIRE(!tables);
  CHECK(code_of(tables.error()) == Errc::peer_lost);
}
