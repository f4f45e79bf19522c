// Requests of different kinds beside each other, wrong ones among them, and what a rank does when
// one of its own actors ends.
#include "actors/in_process_cluster.hpp"
#include "actors/simulated_cluster.hpp"
#include "tests/actors/small_models.hpp"

#include <caf/exit_reason.hpp>
#include <caf/send.hpp>

#include <doctest/doctest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

using namespace troupe;
using namespace troupe::test;

namespace {

ModelConfig two_layers() {
  auto config = *preset("tiny-v3");
  config.num_hidden_layers = 2;
  return config;
}

std::unique_ptr<SimulatedCluster> make_cluster(const ClusterOptions& options, uint64_t seed) {
  SimulatedClusterOptions simulation;
  simulation.cluster = options;
  simulation.seed = seed;
  auto checkpoint = Checkpoint::open(options.model);
  REQUIRE(checkpoint);
  auto cluster = SimulatedCluster::start(simulation, *checkpoint);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  return std::move(*cluster);
}

RequestSpec request(size_t prompt, uint64_t seed, int32_t max_tokens, int32_t speculate) {
  RequestSpec spec;
  spec.prompt = random_prompt(prompt, seed, two_layers().vocab_size);
  spec.max_tokens = max_tokens;
  spec.ignore_eos = true;
  spec.speculate = speculate;
  return spec;
}

// The answers to `specs`, all submitted at once.
std::vector<SimulatedAnswer> answers_to(const ClusterOptions& options,
                                        const std::vector<RequestSpec>& specs, uint64_t seed = 1) {
  const auto cluster = make_cluster(options, seed);
  for (const auto& spec : specs)
    cluster->submit(spec);
  if (const auto error = cluster->run())
    FAIL(text_of(error));
  return cluster->answers();
}

} // namespace

TEST_CASE("requests may draft to different depths, whenever they come and go") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 512;
  options.limits.max_speculate = 4;
  options.limits.prefill_chunk = 8; // so that they start one after another
  const std::vector<int32_t> depths{1, 3, 2, 4, 0, 1};
  std::vector<RequestSpec> plain, drafting;
  for (size_t i = 0; i < depths.size(); ++i) {
    plain.push_back(request(8, i, 4 + 3 * static_cast<int32_t>(i), 0));
    drafting.push_back(plain.back());
    drafting.back().speculate = depths[i];
  }
  const auto expected = answers_to(options, plain);
  for (const int tp : {1, 2}) {
    set_shape(options, tp, true, 0, tp);
    const auto answers = answers_to(options, drafting);
    for (size_t i = 0; i < depths.size(); ++i) {
      CAPTURE(tp);
      CAPTURE(i);
      CHECK(answers[i].done.error == "");
      CHECK(answers[i].tokens == expected[i].tokens);
    }
  }
}

TEST_CASE("a rank has room for the rows of its modules when every draft is right") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  options.limits.max_speculate = 6;
  options.limits.batch = 4;
  options.limits.prefill_chunk = 8;
  std::vector<RequestSpec> specs;
  for (uint64_t i = 0; i < 4; ++i) {
    specs.push_back(request(2, i, 40, 6));
    specs.back().sampling.logit_bias[5] = 1e6f; // whatever the model says
  }
  for (const auto& answer : answers_to(options, specs)) {
    CHECK(answer.done.error == "");
    CHECK(answer.tokens == std::vector<int32_t>(40, 5));
    CHECK(answer.done.drafted > 0);
    CHECK(answer.done.accepted == answer.done.drafted);
  }
}

TEST_CASE("a request that makes no sense is refused and harms nobody") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 256;
  auto negative_length = request(100, 1, -90, 0);
  auto negative_depth = request(8, 2, 4, -1);
  const auto answers = answers_to(options, {negative_length, request(8, 3, 4, 2), negative_depth});
  CHECK(answers[0].done.error == "max_tokens: -90 asked for, at least 0 expected");
  CHECK(answers[1].done.error == "");
  CHECK(answers[1].tokens.size() == 4);
  CHECK(answers[2].done.error == "speculate: -1 asked for, at least 0 expected");
}

TEST_CASE("a rank ends, and says why, when one of its actors does") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 256;
  for (const auto route : {Route::attention, Route::mtp, Route::expert_shard}) {
    const auto cluster = make_cluster(options, 1);
    caf::anon_send_exit(cluster->rank(0).postman().route(route), caf::exit_reason::kill);
    cluster->submit(request(8, 1, 4, 2));
    const auto error = cluster->run();
    CAPTURE(text_of(error));
    CHECK(text_of(error).find("an actor of this rank ended") != std::string::npos);
  }
}

TEST_CASE("large answers are given out as they are taken, whatever rank they come from") {
  auto config = two_layers();
  config.vocab_size = 65536;
  const TemporaryModel model{config};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  options.limits.max_speculate = 0;
  const auto spec = [&](uint64_t seed) {
    auto s = request(300, seed, 0, 0);
    s.logits = true; // 75 MiB, more than may be on its way to a peer
    s.hidden_states = true;
    return s;
  };
  const auto expected = answers_to(options, {spec(1), spec(2)});
  set_shape(options, 2, true, 0, 1);
  const auto answers = answers_to(options, {spec(1), spec(2)}); // one on each rank
  for (size_t i = 0; i < 2; ++i) {
    CHECK(answers[i].done.error == "");
    CHECK(answers[i].rows.at("logits").size() == size_t{300} * 65536 * 4);
    CHECK((answers[i].rows == expected[i].rows));
  }
}

TEST_CASE("a cluster can be shut down in the middle of its work") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  options.limits.overlap_rows = 1;
  set_shape(options, 4, true, 0, 2);
  KeyedStream random{1};
  for (int round = 0; round < (long_tier() ? 300 : 10); ++round) {
    auto cluster = InProcessCluster::start(options);
    if (!cluster)
      FAIL(text_of(cluster.error()));
    for (uint64_t i = 0; i < 4; ++i)
      REQUIRE((*cluster)->client().submit(request(20, i, 200, static_cast<int32_t>(i % 3))));
    std::this_thread::sleep_for(std::chrono::microseconds{random.below(20'000)});
  }
}

TEST_CASE("a rank that is lost in the middle of the work ends the others with that cause") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  options.limits.overlap_rows = 1;
  set_shape(options, 4, true, 0, 2);
  KeyedStream random{2};
  for (int round = 0; round < (long_tier() ? 300 : 10); ++round) {
    auto cluster = InProcessCluster::start(options);
    if (!cluster)
      FAIL(text_of(cluster.error()));
    for (uint64_t i = 0; i < 4; ++i)
      REQUIRE((*cluster)->client().submit(request(20, i, 200, static_cast<int32_t>(i % 3))));
    std::this_thread::sleep_for(std::chrono::microseconds{random.below(20'000)});
    (*cluster)->host(1).shut_down(false);
    for (const size_t r : {0, 2, 3}) {
      const auto error = (*cluster)->host(r).await_end();
      CHECK(text_of(error).find("rank 1 was lost") != std::string::npos);
    }
  }
}

TEST_CASE("a cluster that is told to stop in the middle of its work ends without an error") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  options.limits.overlap_rows = 1;
  set_shape(options, 4, true, 0, 2);
  KeyedStream random{3};
  for (int round = 0; round < (long_tier() ? 300 : 10); ++round) {
    auto cluster = InProcessCluster::start(options);
    if (!cluster)
      FAIL(text_of(cluster.error()));
    for (uint64_t i = 0; i < 4; ++i)
      REQUIRE((*cluster)->client().submit(request(20, i, 200, static_cast<int32_t>(i % 3))));
    std::this_thread::sleep_for(std::chrono::microseconds{random.below(20'000)});
    REQUIRE_FALSE((*cluster)->client().stop_cluster());
    std::vector<std::string> ends(4);
    std::vector<std::thread> threads;
    for (size_t r = 1; r < 4; ++r) // as its process does
      threads.emplace_back([&, r] {
        ends[r] = text_of((*cluster)->host(r).await_end());
        (*cluster)->host(r).shut_down(ends[r].empty());
      });
    ends[0] = text_of((*cluster)->host(0).await_end());
    for (auto& thread : threads)
      thread.join();
    CHECK(ends == std::vector<std::string>(4));
  }
}

TEST_CASE("two micro-batches of large chunks find room on their way") {
  auto config = two_layers();
  config.hidden_size = 4096;
  const TemporaryModel model{config};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 4096;
  options.limits.prefill_chunk = 4096;
  options.limits.max_speculate = 0;
  set_shape(options, 2, false, 1, 1);
  auto cluster = InProcessCluster::start(options);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  for (uint64_t i = 0; i < 2; ++i)
    REQUIRE((*cluster)->client().submit(request(1500, i, 1, 0)));
  for (uint64_t i = 0; i < 2; ++i) {
    const auto done = (*cluster)->client().wait({});
    REQUIRE(done);
    CHECK(done->error == "");
  }
}

TEST_CASE("the client of ranks in one process hears of a lost rank, and why") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  set_shape(options, 4, true, 0, 1);
  auto cluster = InProcessCluster::start(options);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  REQUIRE((*cluster)->client().submit(request(20, 1, 900, 0)));
  (*cluster)->host(1).shut_down(false);
  const auto done = (*cluster)->client().wait({});
  REQUIRE_FALSE(done);
  CHECK(code_of(done.error()) == Errc::peer_lost);
  const auto why = text_of((*cluster)->failure());
  CAPTURE(why);
  CHECK(why.find("rank 1 was lost") != std::string::npos);
}

TEST_CASE("nobody but its client cancels a request") {
  const TemporaryModel model{two_layers()};
  auto options = one_rank(model.path(), DType::f32);
  options.limits.kv_tokens = 1024;
  set_shape(options, 2, true, 0, 1);
  auto cluster = InProcessCluster::start(options);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  auto& client = (*cluster)->client();
  const auto id = client.submit(request(20, 1, 40, 0));
  REQUIRE(id);
  auto& host = (*cluster)->host(0);
  const auto stranger = ClusterClient::local(host.system(), client.port(), "no token");
  stranger->cancel(*id);
  const auto done = client.wait({});
  REQUIRE(done);
  CHECK(done->finish_reason == "length");
  CHECK(done->answer_tokens == 40);
}
