// The determinism contract on the whole runtime: the bits of logits at every position, prompt and
// answer, do not depend on how the cluster is laid out, batched, chunked or scheduled.
#include "actors/in_process_cluster.hpp"
#include "actors/simulated_cluster.hpp"
#include "config/checkpoint_init.hpp"
#include "config/presets.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <unistd.h>
#include <vector>

using namespace troupe;

namespace {

// A checkpoint of random weights that is gone at the end.
class TemporaryModel {
public:
  explicit TemporaryModel(const ModelConfig& config, WeightFormat format = WeightFormat::f32)
      : folder_(std::filesystem::temp_directory_path() /
                ("troupe-test-" + std::to_string(getpid()) + "-" + std::to_string(++count_))) {
    InitOptions options;
    options.format = format;
    options.seed = 7;
    const auto error = init_checkpoint(config, folder_, options);
    if (error)
      FAIL(text_of(error));
  }
  ~TemporaryModel() { std::filesystem::remove_all(folder_); }
  [[nodiscard]] std::string path() const { return folder_.string(); }

private:
  static inline int count_ = 0;
  std::filesystem::path folder_;
};

std::vector<int32_t> prompt(size_t n, uint64_t seed, int64_t vocab) {
  KeyedStream random{seed};
  std::vector<int32_t> ids;
  for (size_t i = 0; i < n; ++i)
    ids.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
  return ids;
}

RequestSpec answer_spec(int64_t vocab) {
  RequestSpec spec;
  spec.prompt = prompt(70, 1, vocab); // more than a page of the cache
  spec.max_tokens = 16;
  spec.ignore_eos = true;
  spec.logits = true;
  return spec;
}

RequestSpec score_spec(int64_t vocab) {
  RequestSpec spec;
  spec.prompt = prompt(70, 1, vocab);
  spec.logits = true;
  spec.prompt_logprobs = true;
  return spec;
}

ClusterOptions base(const std::string& model, DType compute) {
  ClusterOptions o;
  o.model = model;
  o.compute = compute;
  o.num_threads = 1;
  o.limits.kv_tokens = 4096;
  o.limits.max_speculate = 2;
  o.cluster_token = "test";
  return o;
}

struct Outcome {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> answer_rows, prompt_rows;
  friend bool operator==(const Outcome&, const Outcome&) = default;
};

// One generating and one scoring request, on threads and the loopback; `others` more beside them.
Outcome run(const ClusterOptions& options, const RequestSpec& answer, const RequestSpec& score,
            int others = 0) {
  auto cluster = InProcessCluster::start(options);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  auto& client = (*cluster)->client();
  const auto first = client.submit(answer);
  const auto second = client.submit(score);
  REQUIRE(first);
  REQUIRE(second);
  for (int i = 0; i < others; ++i) {
    auto other = answer;
    other.logits = false;
    other.prompt = prompt(5 + static_cast<size_t>(i) * 3, 100 + static_cast<uint64_t>(i), 200);
    REQUIRE(client.submit(other));
  }
  Outcome outcome;
  RequestHandlers handlers;
  handlers.on_tokens = [&](const TokensReady& news) {
    if (news.id == *first)
      outcome.tokens.insert(outcome.tokens.end(), news.tokens.begin(), news.tokens.end());
  };
  handlers.on_rows = [&](const RowsReady& rows) {
    auto& to = rows.id == *first ? outcome.answer_rows : outcome.prompt_rows;
    to.insert(to.end(), rows.bytes.begin(), rows.bytes.end());
  };
  for (int i = 0; i < 2 + others; ++i) {
    const auto done = client.wait(handlers);
    REQUIRE(done);
    REQUIRE(done->error == "");
  }
  return outcome;
}

struct Factor {
  const char* name;
  std::function<void(ClusterOptions&, RequestSpec&)> change;
};

void shape(ClusterOptions& o, int32_t ranks, bool joint, int32_t attention, int32_t tp) {
  o.shape.num_ranks = ranks;
  o.shape.joint = joint;
  o.shape.attention_ranks = attention;
  o.shape.tp = tp;
}

std::vector<Factor> factors() {
  const auto two_hop = [](int32_t nodes) {
    return [nodes](ClusterOptions& o, RequestSpec&) {
      shape(o, 4, true, 0, 1);
      o.shape.nodes = nodes;
      o.shape.two_hop = true;
      o.shape.placement_seed = 3;
    };
  };
  const auto placed = [](uint64_t seed) {
    return [seed](ClusterOptions& o, RequestSpec&) {
      shape(o, 4, true, 0, 1);
      o.shape.placement_seed = seed;
    };
  };
  const auto overlap = [](int64_t rows, int32_t tp) {
    return [=](ClusterOptions& o, RequestSpec& s) {
      shape(o, 4, true, 0, tp);
      o.limits.overlap_rows = rows;
      s.speculate = tp - 1;
    };
  };
  const auto chunk = [](int64_t n) {
    return [n](ClusterOptions& o, RequestSpec&) { o.limits.prefill_chunk = n; };
  };
  const auto drafts = [](int32_t depth, int32_t ranks, int32_t tp) {
    return [=](ClusterOptions& o, RequestSpec& s) {
      shape(o, ranks, true, 0, tp);
      s.speculate = depth;
    };
  };
  return {
      {"2 ranks", [](auto& o, auto&) { shape(o, 2, true, 0, 1); }},
      {"4 ranks", [](auto& o, auto&) { shape(o, 4, true, 0, 1); }},
      {"8 ranks", [](auto& o, auto&) { shape(o, 8, true, 0, 1); }},
      {"2+2", [](auto& o, auto&) { shape(o, 4, false, 2, 1); }},
      {"1+3", [](auto& o, auto&) { shape(o, 4, false, 1, 1); }},
      {"tp 2", [](auto& o, auto&) { shape(o, 2, true, 0, 2); }},
      {"tp 4", [](auto& o, auto&) { shape(o, 4, true, 0, 4); }},
      {"tp 2, 4+2", [](auto& o, auto&) { shape(o, 6, false, 4, 2); }},
      {"two-hop, 2 nodes", two_hop(2)},
      {"two-hop, 4 nodes", two_hop(4)},
      {"placement 1", placed(1)},
      {"placement 2", placed(2)},
      {"placement 3", placed(3)},
      {"replicas",
       [](auto& o, auto&) {
         shape(o, 4, true, 0, 1);
         o.shape.redundant_experts = 8;
       }},
      {"one step in flight", overlap(0, 1)},
      {"two steps in flight", overlap(1, 1)},
      {"two steps in flight, tp 2", overlap(1, 2)},
      {"chunk 1", chunk(1)},
      {"chunk 7", chunk(7)},
      {"chunk 64", chunk(64)},
      {"2 threads", [](auto& o, auto&) { o.num_threads = 2; }},
      {"speculate 1", drafts(1, 1, 1)},
      {"speculate 2", drafts(2, 1, 1)},
      {"speculate 2, 4 ranks, tp 2", drafts(2, 4, 2)},
  };
}

void compare_all(DType compute, WeightFormat format, const SamplingParams& sampling) {
  const auto config = *preset("tiny-v3");
  const TemporaryModel model{config, format};
  auto answer = answer_spec(config.vocab_size);
  answer.sampling = sampling;
  const auto score = score_spec(config.vocab_size);
  const auto expected = run(base(model.path(), compute), answer, score);
  REQUIRE(expected.tokens.size() == 16);
  REQUIRE(expected.answer_rows.size() == 16 * static_cast<size_t>(config.vocab_size) * 4);
  REQUIRE(expected.prompt_rows.size() == 70 * static_cast<size_t>(config.vocab_size) * 4);
  for (const auto& factor : factors()) {
    CAPTURE(factor.name);
    auto options = base(model.path(), compute);
    auto spec = answer;
    factor.change(options, spec);
    CHECK(run(options, spec, score) == expected);
  }
  CHECK(run(base(model.path(), compute), answer, score, 16) == expected);
}

SamplingParams warm() {
  SamplingParams s;
  s.temperature = 1;
  s.top_p = 0.9f;
  s.repetition_penalty = 1.1f;
  s.presence_penalty = 0.2f;
  s.frequency_penalty = 0.1f;
  s.seed = 11;
  return s;
}

// What a simulated cluster answers, and the hash of its run.
std::pair<SimulatedAnswer, uint64_t> simulate(const ClusterOptions& options, uint64_t seed,
                                              const RequestSpec& spec,
                                              std::shared_ptr<const Checkpoint> checkpoint) {
  SimulatedClusterOptions simulation;
  simulation.cluster = options;
  simulation.seed = seed;
  simulation.links.min_delay = Nanoseconds{1'000};
  simulation.links.max_delay = Nanoseconds{400'000};
  simulation.links.duplicate_one_in = 5;
  simulation.links.reorder = true;
  auto cluster = SimulatedCluster::start(simulation, std::move(checkpoint));
  if (!cluster)
    FAIL(text_of(cluster.error()));
  (*cluster)->submit(spec);
  auto other = spec;
  other.logits = false;
  other.prompt.resize(other.prompt.size() / 2);
  (*cluster)->submit(other);
  const auto error = (*cluster)->run();
  if (error)
    FAIL(text_of(error));
  return {(*cluster)->answers().front(), (*cluster)->trace_hash()};
}

std::vector<uint64_t> seeds(uint64_t count) {
  if (const char* one = std::getenv("TROUPE_SEED"))
    return {std::strtoull(one, nullptr, 10)};
  std::vector<uint64_t> list;
  for (uint64_t s = 1; s <= count; ++s)
    list.push_back(s);
  return list;
}

} // namespace

TEST_CASE("F32 logits keep their bits over every layout, placement, chunk, batch and draft") {
  compare_all(DType::f32, WeightFormat::f32, {});
}

TEST_CASE("BF16 logits and sampled tokens keep their bits, too") {
  compare_all(DType::bf16, WeightFormat::bf16, warm());
}

TEST_CASE("a simulated cluster gives the same bits under every seed, delay and duplicate") {
  auto config = *preset("tiny-v3");
  config.num_hidden_layers = 2;
  const TemporaryModel model{config};
  auto checkpoint = Checkpoint::open(model.path());
  REQUIRE(checkpoint);
  RequestSpec spec;
  spec.prompt = prompt(12, 1, config.vocab_size);
  spec.max_tokens = 4;
  spec.ignore_eos = true;
  spec.logits = true;
  spec.sampling = warm();
  auto options = base(model.path(), DType::f32);
  options.limits.kv_tokens = 256;
  options.limits.batch = 4;
  options.limits.prefill_chunk = 8;
  const auto expected = simulate(options, 1, spec, *checkpoint).first;
  REQUIRE(expected.tokens.size() == 4);
  const char* long_tier = std::getenv("TROUPE_LONG");
  for (const uint64_t seed : seeds(long_tier ? 1000 : 100)) {
    CAPTURE(seed);
    auto o = options;
    shape(o, 4, seed % 3 != 0, 2, seed % 2 == 0 ? 2 : 1);
    if (seed % 5 == 0) {
      o.shape.nodes = 2;
      o.shape.two_hop = true;
    }
    o.shape.placement_seed = seed % 4;
    o.limits.overlap_rows = seed % 7 < 4 ? 1 : 64;
    auto s = spec;
    s.speculate = static_cast<int32_t>(seed % 3);
    const auto [answer, hash] = simulate(o, seed, s, *checkpoint);
    CHECK(answer.finished);
    CHECK(answer.done.error == "");
    CHECK(answer.tokens == expected.tokens);
    CHECK(answer.rows.at("logits") == expected.rows.at("logits"));
    if (seed % 10 == 0)
      CHECK(simulate(o, seed, s, *checkpoint).second == hash);
  }
}

TEST_CASE("320 simulated ranks run a token") {
  auto config = *preset("tiny-v3");
  config.num_hidden_layers = 2;
  config.num_nextn_predict_layers = 0;
  config.hidden_size = 32;
  config.moe_intermediate_size = 16;
  config.intermediate_size = 32;
  config.n_routed_experts = 320;
  const TemporaryModel model{config};
  auto checkpoint = Checkpoint::open(model.path());
  REQUIRE(checkpoint);
  auto options = base(model.path(), DType::f32);
  options.limits.kv_tokens = 64;
  options.limits.batch = 2;
  options.limits.prefill_chunk = 8;
  options.limits.max_speculate = 0;
  RequestSpec spec;
  spec.prompt = prompt(6, 1, config.vocab_size);
  spec.max_tokens = 1;
  spec.ignore_eos = true;
  spec.logits = true;
  const auto one = simulate(options, 1, spec, *checkpoint).first;
  shape(options, 320, true, 0, 1);
  const auto many = simulate(options, 2, spec, *checkpoint).first;
  CHECK(many.tokens == one.tokens);
  CHECK(many.rows.at("logits") == one.rows.at("logits"));
}
