#include "config/bpe_trainer.hpp"
#include "config/tokenizer.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace troupe;

namespace {

TrainedBpe train(const std::vector<std::string>& texts, int32_t vocab_size, int64_t min_frequency) {
  auto trainer = BpeTrainer::make({vocab_size, min_frequency, {"<s>", "</s>"}});
  REQUIRE(trainer);
  for (const auto& text : texts)
    REQUIRE(!trainer->add_text(text));
  return trainer->train();
}

std::vector<std::string> learned(const TrainedBpe& bpe) {
  return {bpe.tokens.begin() + 256, bpe.tokens.end()};
}

} // namespace

TEST_CASE("the most frequent pair merges first, of equals the one with the lower ids") {
  // Pieces: "ab" 1, " ab" 2, " abc" 1, " xy" 2. Pairs: (a,b) 4, (space,a) 3, (x,y) 2, …
  const auto bpe = train({"ab ab ab abc xy xy"}, 258 + 5, 1);
  CHECK(learned(bpe) == std::vector<std::string>{"ab", " ab", "xy", " xy", " abc"});
}

// [aa aa a]: of (aa, aa) and (aa, a), once each, the second has the lower ids.
TEST_CASE("runs of one character merge from the left") {
  const auto bpe = train({"aaaaa"}, 258 + 3, 1);
  CHECK(learned(bpe) == std::vector<std::string>{"aa", "aaa", "aaaaa"});
}

// Some merges of a megabyte each: minutes where one takes time quadratic in the word.
TEST_CASE("a word may be as long as a file") {
  const auto bpe = train({std::string(size_t{1} << 20, 'a')}, 258 + 6, 1);
  CHECK(learned(bpe).back() == std::string(64, 'a'));
}

TEST_CASE("rare pairs and small texts end the training early") {
  CHECK(learned(train({"abc abc"}, 300, 2)) == std::vector<std::string>{"ab", "abc"});
  CHECK(learned(train({"abc"}, 300, 2)).empty());
  CHECK(learned(train({""}, 300, 2)).empty());
}

TEST_CASE("a trained tokenizer loads, and text survives it") {
  std::string text;
  for (int i = 0; i < 50; ++i)
    text += "The quick brown fox, 1234 times; naïve „quotes“\n\n\t漢字 and\x01 control. ";
  const auto bpe = train({text}, 300, 2);
  TokenizerFiles files;
  files.vocabulary = bpe.tokenizer_json();
  files.tokenizer_config = bpe.tokenizer_config();
  const auto tokenizer = load_tokenizer_json(files);
  REQUIRE(tokenizer);
  CHECK((*tokenizer)->num_ids() == 300);
  CHECK((*tokenizer)->bos_token_id() == 0);
  CHECK((*tokenizer)->eos_token_id() == 1);
  CHECK((*tokenizer)->add_bos_token());
  const auto ids = (*tokenizer)->encode(text, false);
  REQUIRE(ids);
  CHECK(ids->size() < text.size() / 2);
  const auto back = (*tokenizer)->decode(*ids, false);
  REQUIRE(back);
  CHECK(*back == text);
}

TEST_CASE("vocabularies that cannot be, and text that is none, are refused") {
  const auto error = [](int32_t size, std::vector<std::string> special) {
    return text_of(BpeTrainer::make({size, 2, std::move(special)}).error());
  };
  CHECK(error(257, {"<s>", "</s>"}).find("257 tokens asked for") != std::string::npos);
  CHECK(error(400, {"<s>"}).find("start and an end") != std::string::npos);
  CHECK(error(400, {"<s>", "<s>"}).find("given twice") != std::string::npos);
  auto trainer = BpeTrainer::make({300, 2, {"<s>", "</s>"}});
  REQUIRE(trainer);
  CHECK(text_of(trainer->add_text("ab\xff")).find("byte 2") != std::string::npos);
}
