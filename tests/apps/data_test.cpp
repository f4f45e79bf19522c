// `troupe data`: text files to shards and a tokenizer that the other commands take as they are.
#include "config/dataset.hpp"
#include "config/tokenizer.hpp"
#include "tests/apps/run_program.hpp"

#include <doctest/doctest.h>

#include <algorithm>

namespace troupe::test {

namespace {

class Corpus {
public:
  Corpus() {
    std::filesystem::create_directories(folder_);
    std::string text;
    for (int i = 0; i < 40; ++i)
      text += "The fox number " + std::to_string(i) + " jumps over the lazy dog.\n\n";
    put("a.txt", text);
    put("b.jsonl", "{\"text\": \"In the beginning.\"}\n\n{\"text\": \"And the end.\"}\n");
  }
  ~Corpus() { std::filesystem::remove_all(folder_); }
  void put(const std::string& name, const std::string& text) const {
    std::ofstream{folder_ / name, std::ios::binary} << text;
  }
  [[nodiscard]] std::string path(const std::string& name = "") const {
    return (name.empty() ? folder_ : folder_ / name).string();
  }

private:
  std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("troupe-corpus-" + std::to_string(getpid()));
};

} // namespace

TEST_CASE("text becomes shards with a tokenizer beside them") {
  const Corpus corpus;
  const auto out = corpus.path("out");
  const auto made =
      run({"data", corpus.path("a.txt"), corpus.path("b.jsonl"), "--out", out, "--train-tokenizer",
           "300", "--separator", "\\n\\n", "--no-shuffle", "--held-out", "0.1", "--json"});
  CAPTURE(made.err);
  REQUIRE(made.code == 0);
  CHECK(made.out.find("\"num_documents\":42") != std::string::npos);

  // Both folders name the vocabulary their ids are of.
  const auto tokenizer = Tokenizer::load(out);
  REQUIRE(tokenizer);
  for (const auto& folder : {out, out + "/held-out"}) {
    const auto info = read_dataset_info(folder);
    REQUIRE(info);
    CHECK(info->vocabulary == vocabulary_digest(**tokenizer));
    CHECK(info->largest_token < 300);
  }

  // The held-out documents are the first tenth, as they were written.
  const auto held_out = TokenRows::open(out + "/held-out", 4, 300);
  REQUIRE(held_out);
  std::vector<int32_t> ids(static_cast<size_t>(held_out->num_tokens()));
  REQUIRE(!held_out->read(0, std::span{ids}.first(5)));
  const auto begin = run({"tokenize", out, "--decode", std::to_string(ids[1])});
  CHECK(begin.code == 0);
  CHECK(begin.out.starts_with("T"));
  CHECK(ids[0] == 0); // the start token

  // The same again gives the same bytes; the folder is not overwritten.
  const auto again = run({"data", corpus.path("a.txt"), corpus.path("b.jsonl"), "--out",
                          corpus.path("again"), "--tokenizer", out, "--separator", "\\n\\n",
                          "--no-shuffle", "--held-out", "0.1", "--json"});
  CHECK(again.code == 0);
  CHECK(again.out == made.out);
  const auto refused = run({"data", corpus.path("a.txt"), "--out", out, "--tokenizer", out});
  CHECK(refused.code == 1);
  CHECK(refused.err.find("holds a dataset already") != std::string::npos);
}

TEST_CASE("a corpus that is none is refused in one line") {
  const Corpus corpus;
  corpus.put("empty.txt", " \n\n");
  corpus.put("broken.txt", "caf\xe9");
  corpus.put("no-text.jsonl", "{\"text\": \"x\"}\n{\"body\": \"y\"}\n");
  const auto folder = corpus.path("nothing");
  std::filesystem::create_directories(folder);
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
      {{"absent.txt"}, "absent.txt"},
      {{corpus.path("empty.txt")}, "hold no text"},
      {{corpus.path("broken.txt")}, "broken.txt: invalid UTF-8 at byte 3"},
      {{corpus.path("no-text.jsonl")}, "no-text.jsonl:2: text"},
      {{folder}, "no .txt or .jsonl files"},
      {{corpus.path("a.txt"), "--train-tokenizer", "100"}, "100 tokens asked for"},
      {{corpus.path("a.txt"), "--tokenizer", folder}, folder + ": has neither tokenizer.json"},
      {{"/dev/null"}, "/dev/null: is a device"},
      {{corpus.path("b.jsonl"), "--held-out", "0.01"}, "leaves one part empty"},
  };
  for (const auto& [inputs, text] : cases) {
    std::vector<std::string> args{"data", "--out", corpus.path("out")};
    args.insert(args.end(), inputs.begin(), inputs.end());
    if (std::ranges::count_if(args, [](const auto& a) {
          return a.ends_with("-tokenizer") || a == "--tokenizer";
        }) == 0)
      args.insert(args.end(), {"--train-tokenizer", "300"});
    const auto outcome = run(args);
    CAPTURE(outcome.err);
    CHECK(outcome.code == 1);
    CHECK(std::ranges::count(outcome.err, '\n') == 1);
    CHECK(outcome.err.find(text) != std::string::npos);
    std::filesystem::remove_all(corpus.path("out"));
  }
}

TEST_CASE("shares that are none are wrong usage") {
  const Corpus corpus;
  for (const char* flag : {"--held-out", "--fim-rate"})
    for (const char* share : {"nan", "-nan", "-0.1", "1.1", "inf", "x"}) {
      const auto outcome = run({"data", corpus.path("a.txt"), "--out", corpus.path("out"),
                                "--train-tokenizer", "300", flag, share});
      CAPTURE(outcome.err);
      CHECK(outcome.code == 2);
      CHECK(outcome.err.find(flag) != std::string::npos);
    }
}

} // namespace troupe::test
