// The composition of the kernels against itself: bits, not tolerances. (Against transformers:
// fixtures_test.cpp.)
#include "config/random.hpp"
#include "tests/kernels/checkpoints.hpp"
#include "tests/kernels/forward.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace troupe;
using namespace troupe::test;

namespace {

using Part = Forward::Part;

struct Arithmetics {
  const char* name;
  WeightFormat format;
  Arithmetic arithmetic;
};
const std::vector<Arithmetics>& arithmetics() {
  static const std::vector<Arithmetics> all = {
      {"f32", WeightFormat::f32, {DType::f32, false, false, false}},
      {"bf16", WeightFormat::bf16, {DType::bf16, false, false, false}},
      {"fp8 weights", WeightFormat::fp8, {DType::bf16, true, false, false}},
      {"fp8 activations", WeightFormat::fp8, {DType::bf16, true, true, false}},
  };
  return all;
}

std::vector<int32_t> some_tokens(int64_t n, int64_t vocab, uint64_t seed) {
  KeyedStream random{seed};
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < n; ++i)
    tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
  return tokens;
}

std::vector<int32_t> range(const std::vector<int32_t>& tokens, size_t begin, size_t end) {
  return {tokens.begin() + static_cast<std::ptrdiff_t>(begin),
          tokens.begin() + static_cast<std::ptrdiff_t>(end)};
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
}

// How a sequence of tokens is fed: `prompt` of them in chunks, the rest as answer rows.
struct Feeding {
  size_t prompt = 0, chunk = 1000, answer_rows = 1;
  int sequence = 0;
  std::vector<Part> others = {}; // further sequences in every step, behind this one
};

// Logits of every position, and of MTP's first module where the model has it: its row i takes
// position i's state and token i + 1, in the form of position i.
struct Logits {
  std::vector<float> main, mtp;
};
void append(std::vector<float>& to, const std::vector<float>& from, size_t count) {
  to.insert(to.end(), from.begin(), from.begin() + static_cast<std::ptrdiff_t>(count));
}

Logits feed(Forward& model, const std::vector<int32_t>& tokens, const Feeding& how, bool mtp) {
  Logits logits;
  const auto vocab = static_cast<size_t>(model.config().vocab_size);
  for (size_t at = 0; at < tokens.size();) {
    const bool answer = at >= how.prompt;
    const size_t end = answer ? std::min(at + how.answer_rows, tokens.size())
                              : std::min(at + how.chunk, how.prompt);
    std::vector<Part> parts = {
        {how.sequence, static_cast<int32_t>(at), range(tokens, at, end), answer}};
    parts.insert(parts.end(), how.others.begin(), how.others.end());
    const auto result = model.step(parts);
    append(logits.main, result.logits, (end - at) * vocab);
    if (mtp) {
      auto next = parts;
      for (size_t i = at; i < end; ++i)
        next.front().tokens[i - at] = tokens[std::min(i + 1, tokens.size() - 1)];
      append(logits.mtp, model.mtp_step(0, next, result.hidden.back()).logits, (end - at) * vocab);
    }
    at = end;
  }
  // Equal bits of a model that computes nothing would prove nothing.
  for (const auto* values : {&logits.main, &logits.mtp})
    CHECK(std::all_of(values->begin(), values->end(), [](float v) { return std::isfinite(v); }));
  const auto* const last = logits.main.data() + logits.main.size() - vocab;
  CHECK(*std::max_element(last, last + vocab) > *std::min_element(last, last + vocab) + 0.1f);
  CHECK(std::memcmp(logits.main.data(), last, vocab * 4) != 0);
  return logits;
}

bool same_bits(const Logits& a, const Logits& b) {
  return same_bits(a.main, b.main) && same_bits(a.mtp, b.mtp);
}

constexpr size_t kTokens = 100, kPrompt = 90;

} // namespace

TEST_CASE("chunks, neighbours and draft rows change no bit of any logit") {
  for (const auto& a : arithmetics()) {
    CAPTURE(a.name);
    const RandomCheckpoint checkpoint{"tiny-v3", a.format};
    Forward::Options options;
    options.arithmetic = a.arithmetic;
    options.backend = &best_backend();
    options.num_mtp_layers = 1;
    Forward model{checkpoint.get(), options};
    const auto tokens = some_tokens(kTokens, model.config().vocab_size, 3);
    const auto whole = feed(model, tokens, {kPrompt}, true);
    REQUIRE(whole.main.size() == kTokens * static_cast<size_t>(model.config().vocab_size));

    for (const size_t chunk : {1, 7, 64}) {
      CAPTURE(chunk);
      Forward again{checkpoint.get(), options};
      CHECK(same_bits(feed(again, tokens, {kPrompt, chunk}, true), whole));
    }
    // Several answer rows in one step, as speculation verifies them.
    for (const size_t rows : {2, 3, 10}) {
      CAPTURE(rows);
      Forward again{checkpoint.get(), options};
      CHECK(same_bits(feed(again, tokens, {kPrompt, 1000, rows}, true), whole));
    }
    // Beside other requests, in their prompts and answers, in another place of the cache.
    Forward again{checkpoint.get(), options};
    const auto other = some_tokens(70, model.config().vocab_size, 4);
    Feeding beside{kPrompt, 40};
    beside.sequence = 2;
    beside.others = {{0, 0, range(other, 0, 70), false}, {3, 5, range(other, 5, 6), true}};
    CHECK(same_bits(feed(again, tokens, beside, true), whole));
  }
}

TEST_CASE("tensor parallelism changes no bit") {
  for (const auto& a : arithmetics()) {
    if (a.arithmetic.fp8_activations)
      continue; // tiny heads end inside a quantization tile: refused, see weights_test
    CAPTURE(a.name);
    auto config = preset("tiny-v3").value();
    config.n_shared_experts = 8; // two granules: cut at 2, whole at 4 and 8
    const RandomCheckpoint checkpoint{config, a.format};
    Forward::Options options;
    options.arithmetic = a.arithmetic;
    options.backend = &best_backend();
    options.num_mtp_layers = 1;
    const auto tokens = some_tokens(40, config.vocab_size, 5);
    Forward one{checkpoint.get(), options};
    const auto whole = feed(one, tokens, {35}, true);
    for (const int tp : {2, 4, 8}) {
      CAPTURE(tp);
      options.tp = tp;
      Forward model{checkpoint.get(), options};
      CHECK(model.weights().layers[1].ffn_is_cut == (tp == 2));
      CHECK(same_bits(feed(model, tokens, {35, 16}, true), whole));
    }
  }
}

TEST_CASE("tensor parallelism that respects the tiles of FP8 activations changes no bit") {
  auto config = preset("tiny-v3").value();
  config.v_head_dim = 64; // four heads of a rank of two are two tiles
  config.intermediate_size = 512;
  const RandomCheckpoint checkpoint{config, WeightFormat::fp8};
  Forward::Options options;
  options.arithmetic = {DType::bf16, true, true, true};
  options.backend = &best_backend();
  const auto tokens = some_tokens(40, config.vocab_size, 5);
  Forward one{checkpoint.get(), options};
  const auto whole = feed(one, tokens, {35}, false);
  for (const int tp : {2, 4}) {
    CAPTURE(tp);
    options.tp = tp;
    Forward model{checkpoint.get(), options};
    CHECK(same_bits(feed(model, tokens, {35}, false), whole));
  }
}

TEST_CASE("one row per gate group, and experts in small batches, change no bit") {
  for (const auto& a : arithmetics()) {
    CAPTURE(a.name);
    const RandomCheckpoint checkpoint{"tiny-v3", a.format};
    Forward::Options options;
    options.arithmetic = a.arithmetic;
    options.backend = &best_backend();
    const auto tokens = some_tokens(40, 256, 6);
    Forward single{checkpoint.get(), options};
    const auto whole = feed(single, tokens, {35}, false);
    options.complete_groups = true;
    options.max_expert_rows = 7;
    Forward grouped{checkpoint.get(), options};
    CHECK(same_bits(feed(grouped, tokens, {35}, false), whole));
  }
}

TEST_CASE("backends of one arithmetic give the same bits") {
  for (const auto& a : arithmetics())
    for (const char* name : {"tiny-v3", "tiny-v2-lite"}) {
      CAPTURE(a.name);
      CAPTURE(name);
      const RandomCheckpoint checkpoint{name, a.format};
      Forward::Options options;
      options.arithmetic = a.arithmetic;
      const auto tokens = some_tokens(24, checkpoint->config().vocab_size, 7);
      Forward reference{checkpoint.get(), options};
      const auto expected = feed(reference, tokens, {20}, false);
      for (const auto& backend : available_backends()) {
        // vdpbf16ps pairs products: another arithmetic wherever BF16 is multiplied.
        if (backend == "avx512_bf16" && a.arithmetic.activations == DType::bf16)
          continue;
        CAPTURE(backend);
        options.backend = find_backend(backend);
        REQUIRE(options.backend != nullptr);
        Forward model{checkpoint.get(), options};
        CHECK(same_bits(feed(model, tokens, {20, 7}, false), expected));
      }
    }
}

TEST_CASE("a replay that mixes both forms rebuilds the cache to the bit") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::bf16};
  Forward::Options options;
  options.backend = &best_backend();
  const auto tokens = some_tokens(90, 256, 8);
  Forward first{checkpoint.get(), options};
  const auto expected = feed(first, tokens, {70}, false);
  // Prompt and answer rows of one sequence in one step.
  Forward second{checkpoint.get(), options};
  auto result =
      second.step({{0, 0, range(tokens, 0, 70), false}, {0, 70, range(tokens, 70, 89), true}});
  append(result.logits, second.step({{0, 89, range(tokens, 89, 90), true}}).logits, 256);
  CHECK(same_bits(result.logits, expected.main));
}

TEST_CASE("a latent cache that no machine can hold is refused with its size") {
  const auto config = preset("v3").value();
  const auto cache = LatentCache::make(config, DType::bf16, 61, int64_t{1} << 40);
  REQUIRE_FALSE(cache);
  CHECK(code_of(cache.error()) == Errc::out_of_memory);
  CHECK(text_of(cache.error()).find("latent cache of") == 0);
  CHECK_FALSE(LatentCache::make(config, DType::bf16, 61, -1));
  CHECK_FALSE(LatentCache::make(config, DType::bf16, 61, int64_t{1} << 62));
}

TEST_CASE("pages of a latent cache tile its memory") {
  const auto config = preset("tiny-v3").value();
  const auto cache = must(LatentCache::make(config, DType::bf16, 2, 3));
  const auto page_bytes = static_cast<size_t>(kPageTokens * config.latent_dim() * 2);
  CHECK(cache->bytes() == static_cast<int64_t>(6 * page_bytes));
  for (int64_t l = 0; l < 2; ++l)
    for (int64_t p = 0; p < 3; ++p) {
      const auto page = cache->page(l, p);
      CHECK(page.size() == page_bytes);
      CHECK(page.data() == cache->layer(l).base + static_cast<size_t>(p) * page_bytes);
    }
  CHECK(cache->page(1, 0).data() == cache->page(0, 2).data() + page_bytes);
}
