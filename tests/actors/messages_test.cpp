#include "actors/control_port.hpp"
#include "actors/messages.hpp"
#include "actors/rank.hpp"
#include "actors/train_messages.hpp"

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

TEST_CASE("every message of training survives the wire") {
  RankSystemConfig config{true};
  caf::actor_system system{config};
  CHECK(round_trip(system, StartTraining{"secret", {}}).cluster_token == "secret");
  CHECK(round_trip(system, StopTraining{"secret"}).cluster_token == "secret");
  TrainRecord record;
  record.step = 7;
  record.num_steps = 9;
  record.main_loss = 1.5;
  record.mtp_loss = {2.5, 3.5};
  record.max_vio = {0.25};
  record.load = {{1, 2}, {3, 4}};
  record.wire_bytes = uint64_t{1} << 40;
  record.tokens = 11;
  record.evaluated_tokens = 13;
  const auto told = round_trip(system, record);
  CHECK(told.step == 7);
  CHECK(told.num_steps == 9);
  CHECK(told.main_loss == 1.5);
  CHECK(told.mtp_loss == record.mtp_loss);
  CHECK(told.max_vio == record.max_vio);
  CHECK(told.load == record.load);
  CHECK(told.wire_bytes == record.wire_bytes);
  CHECK(told.tokens == 11);
  CHECK(told.evaluated_tokens == 13);
  CHECK(told.evaluated());
  const auto done = round_trip(system, TrainingDone{3, "why", 5, "folder"});
  CHECK(done.error_code == 3);
  CHECK(done.error == "why");
  CHECK(done.step == 5);
  CHECK(done.checkpoint == "folder");

  const auto begin = round_trip(system, BeginStep{4, true, 2});
  CHECK(begin.step == 4);
  CHECK(begin.evaluate);
  CHECK(begin.pass == 2);
  StageReport report;
  report.step = 4;
  report.rank = RankId{3};
  report.losses = {{8, 0.5, {0.25, 0.125}}};
  report.balance = {{8, 2, 0.75}};
  report.loads = {{2, {5, 6, 7}}};
  report.not_finite = {{8, 1, RankId{3}}};
  report.busy_s = 0.1;
  report.program_s = 0.2;
  const auto heard = round_trip(system, report);
  CHECK(heard.rank == RankId{3});
  REQUIRE(heard.losses.size() == 1);
  CHECK(heard.losses[0].micro_batch == 8);
  CHECK(heard.losses[0].mtp == report.losses[0].mtp);
  CHECK(heard.balance.at(0).layer == 2);
  CHECK(heard.balance.at(0).loss == 0.75);
  CHECK(heard.loads.at(0).counts == report.loads[0].counts);
  CHECK(heard.not_finite.at(0).layer == 1);
  CHECK(heard.busy_s == 0.1);
  CHECK(heard.program_s == 0.2);

  const auto weights = round_trip(system, RunWeights{6, 12, 1});
  CHECK(weights.run == 6);
  CHECK(weights.micro_batch == 12);
  CHECK(weights.phase == 1);
  CHECK(round_trip(system, ExpertsBegin{6, 32}).num_micro_batches == 32);
  CHECK(round_trip(system, ExpertsDone{6}).run == 6);
  CHECK(round_trip(system, GradientsReady{4}).step == 4);
  const auto norms = round_trip(system, GradientNorms{4, RankId{1}, {{2, 0.5}}});
  CHECK(norms.rank == RankId{1});
  CHECK(norms.sums == std::vector<std::pair<int64_t, double>>{{2, 0.5}});
  const auto update = round_trip(system, ApplyUpdate{4, 1e-3, 0.5, {{1, {0.25f}}}});
  CHECK(update.lr == 1e-3);
  CHECK(update.clip == 0.5);
  CHECK(update.biases.at(0).bias == std::vector<float>{0.25f});
  const auto committed = round_trip(system, StepCommitted{4, RankId{2}, 99});
  CHECK(committed.rank == RankId{2});
  CHECK(committed.wire_bytes == 99);
  CHECK(round_trip(system, TensorTaken{RankId{2}, 77}).bytes == 77);
  CHECK(round_trip(system, LoadReport{4, 0.001, {{1, {2}}}}).gamma == 0.001);
  const auto moved = round_trip(system, BiasUpdate{4, {{1, {0.5f}}}, {0.25}});
  CHECK(moved.biases.at(0).layer == 1);
  CHECK(moved.max_vio == std::vector<double>{0.25});
  CHECK(round_trip(system, SaveShard{4, "folder"}).folder == "folder");
  const auto saved = round_trip(system, ShardSaved{4, RankId{1}, 2, "why", {"a"}, 5});
  CHECK(saved.error == "why");
  CHECK(saved.tensors == std::vector<std::string>{"a"});
  CHECK(saved.bytes == 5);
}
