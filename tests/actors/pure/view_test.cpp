#include "actors/view.hpp"

#include "actors/placement.hpp"
#include "config/random.hpp"

#include <doctest/doctest.h>

#include <set>

using namespace troupe;

namespace {

ModelConfig model() {
  ModelConfig c;
  c.num_hidden_layers = 3;
  c.first_k_dense_replace = 1;
  c.num_attention_heads = 8;
  c.n_routed_experts = 16;
  c.n_group = 4;
  c.num_experts_per_tok = 4;
  c.hidden_size = 16;
  return c;
}

caf::expected<View> view_of(int32_t ranks, const std::string& layout = "joint", int32_t tp = 1,
                            int32_t nodes = 1, int32_t redundant = 0, uint64_t seed = 0) {
  auto shape = parse_shape(layout, layout == "joint" ? ranks : 0, tp, nodes);
  if (!shape)
    return shape.error();
  shape->redundant_experts = redundant;
  shape->placement_seed = seed;
  return first_view(model(), *shape, 1);
}

} // namespace

TEST_CASE("every logical expert of every MoE layer has a slot on a live expert rank") {
  for (int32_t ranks = 1; ranks <= 16; ++ranks)
    for (const int32_t redundant : {0, 3, 16})
      for (const uint64_t seed : {0u, 1u, 2u}) {
        CAPTURE(ranks);
        const auto view = view_of(ranks, "joint", 1, 1, redundant, seed);
        REQUIRE(view);
        CHECK(view->placement.size() == 3); // two MoE layers and one MTP layer
        for (const auto& layer : view->placement) {
          CHECK(layer.slots.size() == static_cast<size_t>(16 + redundant));
          for (int32_t e = 0; e < 16; ++e) {
            const int32_t slot = choose_slot(*view, layer, ExpertId{e}, e);
            REQUIRE(slot >= 0);
            CHECK(layer.slots[static_cast<size_t>(slot)].expert == ExpertId{e});
          }
          std::set<int32_t> hosts;
          for (const auto& s : layer.slots)
            hosts.insert(s.rank.value);
          CHECK(hosts.size() == static_cast<size_t>(ranks));
        }
      }
}

TEST_CASE("roles follow the layout") {
  const auto view = view_of(0, "4+2", 2);
  REQUIRE(view);
  CHECK(view->num_attention_groups == 2);
  CHECK(view->attention_rank(1, 1) == RankId{3});
  for (int32_t r = 0; r < 6; ++r) {
    CHECK((view->members[static_cast<size_t>(r)].attention_group >= 0) == (r < 4));
    CHECK(view->members[static_cast<size_t>(r)].hosts_experts == (r >= 4));
  }
}

TEST_CASE("shapes that cannot be are refused with their reason") {
  const auto why = [](const caf::expected<View>& v) { return v ? "" : text_of(v.error()); };
  CHECK(why(view_of(17)).find("17 expert ranks") != std::string::npos);
  CHECK(why(view_of(3, "joint", 2)).find("tp: 2") != std::string::npos);
  CHECK(why(view_of(16, "joint", 16)).find("8 attention heads") != std::string::npos);
  CHECK(why(view_of(4, "joint", 1, 3)).find("nodes: 3") != std::string::npos);
  CHECK(why(view_of(0, "2+")).find("layout") != std::string::npos);
  CHECK(why(view_of(0, "0+2")).find("layout") != std::string::npos);
  CHECK(why(view_of(0, "sideways")).find("layout") != std::string::npos);
  CHECK(!parse_shape("2+2", 5, 1, 1));
}

TEST_CASE("views change by events, one epoch each, and never for old news") {
  auto view = *view_of(4);
  const auto lost = next_view(view, MemberLost{RankId{2}, 1});
  CHECK(lost.epoch == view.epoch + 1);
  CHECK(!lost.members[2].alive);
  CHECK(next_view(lost, MemberLost{RankId{2}, 1}).epoch == lost.epoch);  // twice
  CHECK(next_view(view, MemberLost{RankId{2}, 7}).epoch == view.epoch);  // another incarnation
  CHECK(next_view(view, MemberLost{RankId{99}, 1}).epoch == view.epoch); // nobody
  const auto back = next_view(lost, MemberReturned{RankId{2}, 2, "new"});
  CHECK(back.members[2].alive);
  CHECK(back.members[2].incarnation == 2);
  CHECK(next_view(back, MemberReturned{RankId{2}, 2, "again"}).epoch == back.epoch);
  const auto moved = next_view(back, SlotMoved{1, SlotId{0}, RankId{3}});
  CHECK(moved.layer(1).slots[0].rank == RankId{3});
  CHECK(moved.layer(1).slots[0].version == 2);
  CHECK(next_view(moved, SlotMoved{1, SlotId{0}, RankId{3}}).epoch == moved.epoch);
  CHECK(next_view(moved, SlotMoved{0, SlotId{0}, RankId{3}}).epoch == moved.epoch); // dense layer
}

TEST_CASE("a million random events never break a view") {
  KeyedStream random{3};
  auto view = *view_of(8, "joint", 2, 2, 8);
  uint64_t epoch = view.epoch;
  for (int i = 0; i < 1000000; ++i) {
    const RankId rank{static_cast<int32_t>(random.below(10)) - 1};
    const auto number = static_cast<uint32_t>(random.below(6));
    if (random.below(3) == 0)
      view = next_view(std::move(view), MemberLost{rank, number});
    else if (random.below(2) == 0)
      view = next_view(std::move(view), MemberReturned{rank, number, ""});
    else
      view = next_view(std::move(view),
                       SlotMoved{static_cast<int32_t>(random.below(6)) - 1,
                                 SlotId{static_cast<int32_t>(random.below(30)) - 2}, rank});
    if (view.epoch < epoch || view.epoch > epoch + 1)
      FAIL("an event moved the epoch by more than one");
    epoch = view.epoch;
  }
  for (const auto& layer : view.placement)
    for (size_t e = 0; e < layer.slots_of.size(); ++e)
      for (const int32_t s : layer.slots_of[e])
        CHECK(layer.slots[static_cast<size_t>(s)].expert.value == static_cast<int32_t>(e));
}
