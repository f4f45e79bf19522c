// Rank processes over UCX against one rank inside one process: what a user gets is the same, to the
// last bit of every logit and hidden state.
#include "tests/apps/run_program.hpp"

#include <boost/json.hpp>
#include <doctest/doctest.h>

#include <fstream>
#include <iterator>

namespace troupe::test {

namespace {

using Arguments = std::vector<std::string>;

// 70 ids: more than a page of the cache, and several chunks of 32.
std::string prompt_ids() {
  std::string ids = "5";
  for (int i = 1; i < 70; ++i)
    ids.append(",").append(std::to_string((i * i * 7 + 3 * i) % 256));
  return ids;
}

std::string bytes_of(const std::string& path) {
  std::ifstream file{path, std::ios::binary};
  return {std::istreambuf_iterator<char>{file}, {}};
}

Arguments joined(Arguments first, const Arguments& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// The JSON that a command printed; it must have succeeded.
boost::json::object json_of(const Arguments& args) {
  const auto o = run(args);
  CAPTURE(o.err);
  CHECK(o.left_behind == 0);
  REQUIRE(o.code == 0);
  return boost::json::parse(o.out).as_object();
}

struct Result {
  boost::json::value tokens, logprobs;
  std::string score_rows, answer_rows; // whole files
  int64_t wire_bytes = 0;
};

Result result_of(const Scratch& s, const Arguments& common, const Arguments& own_answer) {
  Result result;
  const auto file = s.path("rows.safetensors");
  const auto with = [&](const Arguments& own) {
    std::filesystem::remove(file);
    return joined(own, common);
  };
  const auto score = json_of(with(
      {"score", s.model, "--json", "--tokens", prompt_ids(), "--logits", file, "--hidden-states"}));
  result.logprobs = score.at("logprobs");
  result.score_rows = bytes_of(file);
  const auto answer = json_of(joined(with({"generate", s.model, "--json", "--tokens", prompt_ids(),
                                           "--logits", file, "--max-tokens", "12", "--ignore-eos"}),
                                     own_answer));
  result.tokens = answer.at("tokens");
  result.answer_rows = bytes_of(file);
  result.wire_bytes = answer.at("wire_bytes").to_number<int64_t>();
  return result;
}

struct Layout {
  const char* name;
  Arguments arguments;
  Arguments drafting = {}; // of the answer
};

// Every layout over UCX against one rank on the loopback, undrafted and in one chunk.
void compare(const Arguments& arithmetic, const Arguments& sampling,
             const std::vector<Layout>& layouts) {
  const Scratch s;
  const auto expected = result_of(s, joined(arithmetic, {"--fabric", "loopback"}), sampling);
  // hidden.0 … hidden.3 of 64 columns, and logits of 256.
  REQUIRE(expected.score_rows.size() > 70 * (256 + 4 * 64) * sizeof(float));
  REQUIRE(expected.answer_rows.size() > 12 * 256 * sizeof(float));
  for (const auto& layout : layouts) {
    CAPTURE(layout.name);
    const auto common = joined(arithmetic, {"--fabric", "ucx", "--prefill-chunk", "32"});
    const auto got =
        result_of(s, joined(common, layout.arguments), joined(sampling, layout.drafting));
    CHECK((got.wire_bytes > 0) == !layout.arguments.empty());
    CHECK(got.tokens == expected.tokens);
    CHECK(got.logprobs == expected.logprobs);
    CHECK((got.score_rows == expected.score_rows));
    CHECK((got.answer_rows == expected.answer_rows));
  }
}

} // namespace

TEST_CASE("rank processes over UCX give the bits of one rank, in F32") {
  compare({"--compute", "f32"}, {},
          {{"1 rank", {}},
           {"4 ranks", {"--ranks", "4"}},
           {"2+2", {"--layout", "2+2"}},
           {"tp 2", {"--ranks", "2", "--tp", "2"}},
           {"two-hop", {"--ranks", "4", "--nodes", "2", "--dispatch", "two-hop"}}});
}

TEST_CASE("rank processes over UCX give the bits of one rank, in BF16, sampled and drafted") {
  compare({"--compute", "bf16"}, {"--temperature", "1", "--top-p", "0.95", "--seed", "3"},
          {{"1 rank, drafted", {}, {"--speculate", "2"}},
           {"4 ranks, drafted", {"--ranks", "4"}, {"--speculate", "2"}},
           {"tp 2, two-hop, drafted",
            {"--ranks", "4", "--tp", "2", "--nodes", "2", "--dispatch", "two-hop"},
            {"--speculate", "2"}}});
}

} // namespace troupe::test
