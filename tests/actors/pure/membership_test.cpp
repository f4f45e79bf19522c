#include "actors/membership.hpp"
#include "actors/placement.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

using namespace troupe;

namespace {

View three_ranks() {
  ModelConfig c;
  c.num_hidden_layers = 1;
  c.num_attention_heads = 8;
  c.n_routed_experts = 8;
  c.num_experts_per_tok = 2;
  ClusterShape shape;
  shape.num_ranks = 3;
  return *first_view(c, shape, 0);
}

JoinRequest request(int32_t rank) {
  JoinRequest r;
  r.version = "1";
  r.rank = RankId{rank};
  r.model_digest = 5;
  r.settings_digest = 6;
  r.arithmetic = "bf16";
  r.backend = "avx2";
  r.fingerprint = 7;
  r.host = fmt::format("h{}", rank);
  r.address = fmt::format("a{}", rank);
  return r;
}

} // namespace

TEST_CASE("a group forms when all have joined and runs when all are ready") {
  auto group = start_forming(three_ranks());
  for (const int32_t r : {2, 0, 0, 1}) // in any order, a repetition changes nothing
    group = advance(group, request(r));
  REQUIRE(group.phase == FormingPhase::loading);
  CHECK(group.view.members[2].address == "a2");
  for (const int32_t r : {1, 2, 1, 0})
    group = advance(group, RankReady{RankId{r}, 0, ""});
  CHECK(group.phase == FormingPhase::running);
}

TEST_CASE("ranks that disagree fail the group, and the reason names both") {
  const auto joined_with = [](auto change) {
    auto group = advance(start_forming(three_ranks()), request(0));
    auto other = request(1);
    change(other);
    return advance(group, other);
  };
  const auto check = [&](auto change, const char* word) {
    const auto group = joined_with(change);
    CHECK(group.phase == FormingPhase::failed);
    CHECK(group.why.find(word) != std::string::npos);
    CHECK(group.why.find("rank 0") != std::string::npos);
    CHECK(group.why.find("rank 1") != std::string::npos);
  };
  check([](JoinRequest& r) { r.version = "2"; }, "version");
  check([](JoinRequest& r) { r.model_digest = 1; }, "model");
  check([](JoinRequest& r) { r.settings_digest = 1; }, "layout");
  check([](JoinRequest& r) { r.arithmetic = "f32"; }, "arithmetic");
  check([](JoinRequest& r) { r.fingerprint = 1; }, "--backend");
}

TEST_CASE("a stranger's rank, a second claimant and a rank that cannot load fail the group") {
  CHECK(advance(start_forming(three_ranks()), request(3)).phase == FormingPhase::failed);
  auto twice = request(0);
  twice.address = "elsewhere";
  const auto group = advance(advance(start_forming(three_ranks()), request(0)), twice);
  CHECK(group.phase == FormingPhase::failed);
  CHECK(group.why.find("two processes") != std::string::npos);
  auto loading = start_forming(three_ranks());
  for (const int32_t r : {0, 1, 2})
    loading = advance(loading, request(r));
  const auto failed = advance(loading, RankReady{RankId{1}, 6, "no room"});
  CHECK(failed.phase == FormingPhase::failed);
  CHECK(failed.why == "rank 1: no room");
}

TEST_CASE("a rank that gets nowhere with loading fails the group and is named") {
  using namespace std::chrono_literals;
  auto group = start_forming(three_ranks());
  CHECK(check_loading(group, 1h, 60s).phase == FormingPhase::forming); // that is give_up's business
  for (const int32_t r : {0, 1, 2})
    group = advance(group, request(r), 100s);
  CHECK(check_loading(group, 159s, 60s).phase == FormingPhase::loading);
  group = advance(group, RankReady{RankId{0}, 0, ""});
  group = advance(group, RankLoading{RankId{1}, 1000}, 140s);
  group = advance(group, RankLoading{RankId{2}, 1000}, 120s);
  group = advance(group, RankLoading{RankId{2}, 1000}, 150s); // says so again, but did nothing
  CHECK(check_loading(group, 179s, 60s).phase == FormingPhase::loading);
  const auto failed = check_loading(group, 180s, 60s);
  CHECK(failed.phase == FormingPhase::failed);
  CHECK(failed.why == "rank 2 on h2 does not get on with loading");
  group = advance(group, RankReady{RankId{2}, 0, ""});
  CHECK(check_loading(group, 180s, 60s).phase == FormingPhase::loading);
  CHECK(advance(group, RankLoading{RankId{7}, 5}, 0s).phase == FormingPhase::loading);
}

TEST_CASE("who is missing when time is up is named") {
  const auto group = give_up(advance(start_forming(three_ranks()), request(1)));
  CHECK(group.phase == FormingPhase::failed);
  CHECK(group.why.find("missing: 0, 2") != std::string::npos);
}
