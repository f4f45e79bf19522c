// The determinism contract on the whole runtime: the bits of logits at every position, prompt and
// answer, do not depend on how the cluster is laid out, batched, chunked or scheduled.
#include "actors/in_process_cluster.hpp"
#include "config/tokenizer.hpp"
#include "tests/actors/small_models.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using namespace troupe;
using namespace troupe::test;

namespace {

constexpr size_t kPromptTokens = 70; // more than a page of the cache
constexpr int32_t kAnswerTokens = 16;
constexpr size_t kTakeEveryPair = 8; // of the CI tier; the long one takes all

// A cluster, a request to answer, and how many others run beside it.
struct Run {
  ClusterOptions options;
  RequestSpec answer;
  int others = 0;
};

struct Outcome {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> answer_rows, prompt_rows; // logits
  std::vector<double> prompt_logprobs;
  std::string finish_reason;
  friend bool operator==(const Outcome&, const Outcome&) = default;
};

// How drafts fared: the only thing that may differ.
struct Drafting {
  int64_t drafted = 0, accepted = 0;
};

RequestSpec answer_spec(int64_t vocab) {
  RequestSpec spec;
  spec.prompt = random_prompt(kPromptTokens, 1, vocab);
  spec.max_tokens = kAnswerTokens;
  spec.ignore_eos = true;
  spec.logits = true;
  return spec;
}

// Greedy among a few ids: of all ids, a random model's drafts would never be the right ones.
SamplingParams greedy_among_few() {
  SamplingParams s;
  for (const int32_t id : {3, 50, 101, 200})
    s.logit_bias[id] = 1000;
  return s;
}

// What a run gives for its request, and for one that scores the same prompt. Adds to `drafting`.
Outcome outcome_of(const Run& run, Drafting& drafting) {
  auto cluster = InProcessCluster::start(run.options);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  auto& client = (*cluster)->client();
  RequestSpec score;
  score.prompt = run.answer.prompt;
  score.logits = true;
  score.prompt_logprobs = true;
  const auto first = client.submit(run.answer);
  const auto second = client.submit(score);
  REQUIRE(first);
  REQUIRE(second);
  for (int i = 0; i < run.others; ++i) {
    auto other = run.answer;
    other.logits = false;
    other.prompt =
        random_prompt(5 + static_cast<size_t>(i) * 3, 100 + static_cast<uint64_t>(i), 200);
    REQUIRE(client.submit(other));
  }
  Outcome outcome;
  RequestHandlers handlers;
  handlers.on_tokens = [&](const TokensReady& news) {
    if (news.id == *first)
      outcome.tokens.insert(outcome.tokens.end(), news.tokens.begin(), news.tokens.end());
    if (news.id == *second)
      outcome.prompt_logprobs.insert(outcome.prompt_logprobs.end(), news.prompt_logprobs.begin(),
                                     news.prompt_logprobs.end());
  };
  handlers.on_rows = [&](const RowsReady& rows) {
    auto& to = rows.id == *first ? outcome.answer_rows : outcome.prompt_rows;
    to.insert(to.end(), rows.bytes.begin(), rows.bytes.end());
  };
  for (int i = 0; i < 2 + run.others; ++i) {
    const auto done = client.wait(handlers);
    REQUIRE(done);
    REQUIRE(done->error == "");
    if (done->id != *first)
      continue;
    outcome.finish_reason = done->finish_reason;
    drafting.drafted += done->drafted;
    drafting.accepted += done->accepted;
  }
  return outcome;
}

// ---- what may differ without changing a bit -----------------------------------------------------

// Factors of one axis exclude each other; those of different axes combine.
struct Factor {
  std::string_view axis, name;
  std::function<void(Run&)> change;
};

Factor layout(const char* name, int32_t ranks, bool joint, int32_t attention, int32_t tp) {
  return {"layout", name, [=](Run& r) { set_shape(r.options, ranks, joint, attention, tp); }};
}

// On four ranks, unless a layout was chosen.
Factor on_ranks(const char* axis, const char* name, std::function<void(ClusterOptions&)> change) {
  return {axis, name, [change = std::move(change)](Run& r) {
            if (r.options.shape.num_ranks == 1)
              set_shape(r.options, 4, true, 0, 1);
            change(r.options);
          }};
}

Factor two_hop(const char* name, int32_t nodes) {
  return on_ranks("placement", name, [nodes](ClusterOptions& o) {
    o.shape.nodes = nodes;
    o.shape.two_hop = true;
    o.shape.placement_seed = 3;
  });
}

Factor placed(const char* name, uint64_t seed) {
  return on_ranks("placement", name, [seed](ClusterOptions& o) { o.shape.placement_seed = seed; });
}

Factor overlap(const char* name, int64_t rows) {
  return on_ranks("micro-batches", name,
                  [rows](ClusterOptions& o) { o.limits.overlap_rows = rows; });
}

Factor chunk(const char* name, int64_t rows) {
  return {"chunk", name, [rows](Run& r) { r.options.limits.prefill_chunk = rows; }};
}

Factor drafts(const char* name, int32_t depth) {
  return {"speculation", name, [depth](Run& r) { r.answer.speculate = depth; }};
}

// Layouts come first: what needs several ranks sees which were chosen.
std::vector<Factor> factors() {
  return {
      layout("2 ranks", 2, true, 0, 1),
      layout("4 ranks", 4, true, 0, 1),
      layout("8 ranks", 8, true, 0, 1),
      layout("2+2", 4, false, 2, 1),
      layout("1+3", 4, false, 1, 1),
      layout("tp 2", 2, true, 0, 2),
      layout("tp 4", 4, true, 0, 4),
      layout("tp 2, 4+2", 6, false, 4, 2),
      layout("tp 2, 4 ranks", 4, true, 0, 2),
      two_hop("two-hop, 2 nodes", 2),
      two_hop("two-hop, 4 nodes", 4),
      placed("placement 1", 1),
      placed("placement 2", 2),
      placed("placement 3", 3),
      on_ranks("placement", "replicas", [](auto& o) { o.shape.redundant_experts = 8; }),
      overlap("one step in flight", 0),
      overlap("two steps in flight", 1),
      chunk("chunk 1", 1),
      chunk("chunk 7", 7),
      chunk("chunk 64", 64),
      {"threads", "2 threads", [](Run& r) { r.options.num_threads = 2; }},
      {"speculation", "no MTP", [](Run& r) { r.options.limits.max_speculate = 0; }},
      drafts("speculate 1", 1),
      drafts("speculate 2", 2),
      {"company", "16 others", [](Run& r) { r.others = 16; }},
  };
}

class Matrix {
public:
  Matrix(Run base, const ModelConfig& config) : base_(std::move(base)), config_(config) {
    expected_ = outcome_of(base_, drafting_);
  }
  [[nodiscard]] const Outcome& expected() const { return expected_; }

  // Every factor alone, and pairs of them: all in the long tier, some in the CI tier. A FP8 matrix
  // can't be cut inside its tiles, so `tp` may be left out.
  void compare(bool with_tp = true) {
    const auto all = factors();
    size_t singles = 0, pairs = 0, number = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      singles += compare_one(with_tp, {&all[i]});
      for (size_t j = i + 1; j < all.size(); ++j)
        if (all[i].axis != all[j].axis && (long_tier() || ++number % kTakeEveryPair == 0))
          pairs += compare_one(with_tp, {&all[i], &all[j]});
    }
    CHECK(singles >= all.size() - 4); // tp alone may be missing
    CHECK(pairs >= (long_tier() ? 160 : 20));
    CHECK(drafting_.accepted > 0);
    CHECK(drafting_.accepted < drafting_.drafted);
  }

private:
  // False when there is no such cluster: four nodes of two ranks.
  bool compare_one(bool with_tp, const std::vector<const Factor*>& changes) {
    auto run = base_;
    std::string names;
    for (const auto* factor : changes) {
      factor->change(run);
      names += (names.empty() ? "" : " × ") + std::string{factor->name};
    }
    if (run.answer.speculate > run.options.limits.max_speculate ||
        (!with_tp && run.options.shape.tp > 1) || !first_view(config_, run.options.shape, 0))
      return false;
    CAPTURE(names);
    const auto outcome = outcome_of(run, drafting_);
    CHECK(outcome.tokens == expected_.tokens);
    CHECK(outcome.finish_reason == expected_.finish_reason);
    CHECK((outcome == expected_)); // rows are too long to print
    return true;
  }

  Run base_;
  ModelConfig config_;
  Drafting drafting_; // of all runs
  Outcome expected_;
};

Matrix matrix_of(const TemporaryModel& model, const ModelConfig& config, DType compute,
                 const SamplingParams& sampling) {
  auto answer = answer_spec(config.vocab_size);
  answer.sampling = sampling;
  Matrix matrix{{one_rank(model.path(), compute), answer}, config};
  const auto row = static_cast<size_t>(config.vocab_size) * sizeof(float);
  REQUIRE(matrix.expected().tokens.size() == kAnswerTokens);
  REQUIRE(matrix.expected().answer_rows.size() == kAnswerTokens * row);
  REQUIRE(matrix.expected().prompt_rows.size() == kPromptTokens * row);
  REQUIRE(matrix.expected().prompt_logprobs.size() == kPromptTokens - 1);
  return matrix;
}

// ---- stop strings -------------------------------------------------------------------------------

// A string that ends the answer `tokens` inside a token of its middle, having begun in the one
// before.
struct StopCase {
  std::string text;
  size_t num_tokens = 0; // of the answer that ends with it
};
StopCase stop_inside(const std::string& model, const std::vector<int32_t>& tokens) {
  auto tokenizer = Tokenizer::load(model);
  REQUIRE(tokenizer);
  Detokenizer detokenizer{*tokenizer};
  std::vector<std::string> pieces;
  for (const int32_t id : tokens)
    pieces.push_back(detokenizer.push(id));
  const auto ascii = [](const std::string& s) {
    return s.size() > 1 &&
           std::ranges::all_of(s, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  };
  std::string before;
  for (size_t i = 0; i + 3 < pieces.size(); before += pieces[i++]) {
    const auto &first = pieces[i], &second = pieces[i + 1];
    if (i < 3 || !ascii(first) || !ascii(second))
      continue;
    const auto text = first.substr(1) + second.substr(0, 1);
    if ((before + first + second).find(text) == before.size() + 1)
      return {text, i + 2};
  }
  FAIL("no place for a stop string in the answer");
  return {};
}

} // namespace

TEST_CASE("F32 logits keep their bits over every layout, placement, chunk, batch and draft") {
  const auto config = *preset("tiny-v3");
  const TemporaryModel model{config};
  matrix_of(model, config, DType::f32, greedy_among_few()).compare();
}

TEST_CASE("BF16 logits and sampled tokens keep their bits, too") {
  const auto config = *preset("tiny-v3");
  const TemporaryModel model{config, WeightFormat::bf16};
  matrix_of(model, config, DType::bf16, warm_sampling()).compare();
}

TEST_CASE("an answer that a stop string ends keeps its bits and its end") {
  auto config = *preset("tiny-v3");
  config.vocab_size = 2048;
  const TemporaryModel model{config};
  model.add_tokenizer();
  Run run{one_rank(model.path(), DType::f32), answer_spec(config.vocab_size)};
  run.answer.sampling = warm_sampling();
  run.answer.sampling.temperature = 3; // more of the drafts are right
  Drafting none;
  const auto whole = outcome_of(run, none);
  const auto stop = stop_inside(model.path(), whole.tokens);
  CAPTURE(stop.text);
  run.answer.stop = {"never in the answer", stop.text};
  Matrix matrix{run, config};
  // Stopping is the end of the answer and changes nothing before it.
  const auto& ended = matrix.expected();
  CHECK(ended.finish_reason == "stop");
  REQUIRE(ended.tokens.size() == stop.num_tokens);
  CHECK(std::equal(ended.tokens.begin(), ended.tokens.end(), whole.tokens.begin()));
  REQUIRE(ended.answer_rows.size() == stop.num_tokens * 2048 * sizeof(float));
  CHECK(std::equal(ended.answer_rows.begin(), ended.answer_rows.end(), whole.answer_rows.begin()));
  matrix.compare();
}

TEST_CASE("FP8 rows on the wire keep their bits") {
  auto config = *preset("tiny-v3");
  config.quantization = QuantizationConfig{};
  const TemporaryModel model{config, WeightFormat::fp8};
  Run run{one_rank(model.path(), DType::bf16), answer_spec(config.vocab_size)};
  run.answer.sampling = greedy_among_few();
  run.options.fp8 = "activations";
  Matrix{run, config}.compare(false);
}
