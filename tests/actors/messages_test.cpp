#include "actors/control_port.hpp"
#include "actors/messages.hpp"
#include "actors/rank.hpp"

#include <caf/actor_system.hpp>
#include <caf/binary_deserializer.hpp>
#include <caf/binary_serializer.hpp>

#include <doctest/doctest.h>

using namespace troupe;

namespace {

// Through the wire and back, inside a message: an unregistered type would arrive empty.
template <class T>
T round_trip(caf::actor_system& system, const T& value) {
  std::vector<char> bytes;
  caf::binary_serializer sink{system, bytes};
  auto message = caf::make_message(value);
  REQUIRE(!sink(message));
  caf::binary_deserializer source{system, bytes};
  caf::message back;
  REQUIRE(!source(back));
  REQUIRE(back.match_elements<T>());
  return back.get_as<T>(0);
}

} // namespace

TEST_CASE("every message type survives the wire") {
  RankSystemConfig config{true};
  caf::actor_system system{config};
  RequestSpec spec;
  spec.prompt = {1, 2, 3};
  spec.max_tokens = 5;
  spec.stop = {"x", "yy"};
  spec.sampling.logit_bias = {{7, -1.5f}};
  spec.sampling.seed = 1234567890123ull;
  spec.speculate = 2;
  const auto run = round_trip(system, RunRequest{RequestId{9}, RankId{3}, spec});
  CHECK(run.id == RequestId{9});
  CHECK(run.reply_to == RankId{3});
  CHECK(run.spec.prompt == spec.prompt);
  CHECK(run.spec.stop == spec.stop);
  CHECK(run.spec.sampling.logit_bias == spec.sampling.logit_bias);
  CHECK(run.spec.sampling.seed == spec.sampling.seed);
  CHECK(run.spec.speculate == 2);
  CHECK(round_trip(system, SubmitRequest{"token", spec, {}}).cluster_token == "token");
  TokensReady tokens{RequestId{1}, 4, {5, 6}, {-0.5f, -1.0f}, {-2.0}, 7};
  CHECK(round_trip(system, tokens).tokens == tokens.tokens);
  CHECK(round_trip(system, tokens).prompt_logprobs == tokens.prompt_logprobs);
  RowsReady rows{RequestId{1}, "logits", 2, 1, 3, std::vector<uint8_t>(12, 9)};
  CHECK(round_trip(system, rows).bytes == rows.bytes);
  CHECK(round_trip(system, RowsTaken{RequestId{1}, 12}).bytes == 12);
  RequestDone done;
  done.id = RequestId{2};
  done.finish_reason = "stop";
  done.accepted = 3;
  CHECK(round_trip(system, done).finish_reason == "stop");
  CHECK(round_trip(system, done).accepted == 3);
  CHECK(round_trip(system, CancelRequest{RequestId{4}}).id == RequestId{4});
  CHECK(round_trip(system, StatsQuery{3, RankId{1}}).query == 3);
  RankStats stats;
  stats.rank = RankId{5};
  stats.resident_bytes = 77;
  CHECK(round_trip(system, stats).resident_bytes == 77);
  CHECK(round_trip(system, GetClusterStats{"t"}).cluster_token == "t");
  CHECK(round_trip(system, ClusterStats{{stats}}).ranks.size() == 1);
  CHECK(round_trip(system, GetClusterInfo{"t"}).cluster_token == "t");
  ClusterInfo info;
  info.model = "m";
  info.max_context = 99;
  CHECK(round_trip(system, info).max_context == 99);
  CHECK(round_trip(system, StopCluster{"t"}).cluster_token == "t");
  JoinRequest join;
  join.rank = RankId{2};
  join.fingerprint = 42;
  join.address = std::string("\0binary", 7);
  CHECK(round_trip(system, join).address == join.address);
  CHECK(round_trip(system, join).fingerprint == 42);
  Welcome welcome;
  welcome.view.epoch = 3;
  welcome.view.members.resize(2);
  welcome.view.placement.push_back({4, {Slot{SlotId{0}, ExpertId{1}, RankId{1}, 2}}, {{}, {0}}});
  const auto back = round_trip(system, welcome);
  CHECK(back.view.epoch == 3);
  CHECK(back.view.placement[0].slots[0].version == 2);
  CHECK(back.view.placement[0].slots_of[1] == std::vector<int32_t>{0});
  CHECK(round_trip(system, RankLoading{RankId{1}, 5}).bytes == 5);
  CHECK(round_trip(system, RankReady{RankId{1}, 5, "why"}).error == "why");
  round_trip(system, StopRank{});
  StepPlan plan{8, {SequencePlan{RequestId{1}, 2, 3, {4}, {5}}}};
  CHECK(round_trip(system, plan).sequences[0].pages == std::vector<int32_t>{5});
  DraftPlan draft{3, 8, 2, {DraftSequence{RequestId{1}, 0, 1, 2, 3, {4}, {5}, 3, 2}}};
  CHECK(round_trip(system, draft).sequences[0].depth == 2);
  CHECK(round_trip(system, DraftTokens{1, 0, {-1, 4}}).tokens == std::vector<int32_t>{-1, 4});
  CHECK(round_trip(system, ForgetSequence{RequestId{6}, 9}).after_pass == 9);
}
