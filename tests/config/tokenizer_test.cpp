#include "config/tokenizer.hpp"

#include "config/tokenizer_bpe.hpp"
#include "config/tokenizer_split.hpp"
#include "config/tokenizer_text.hpp"

#include <doctest/doctest.h>

#include <boost/json.hpp>
#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

namespace json = boost::json;
using namespace troupe;

namespace {

using Pieces = std::vector<std::string>;

std::string data_folder(const char* name) {
  return std::string{TROUPE_SOURCE_DIR} + "/tests/reference/data/tokenizer/" + name;
}

std::string read_file(const std::string& path) {
  std::ifstream file{path, std::ios::binary};
  REQUIRE_MESSAGE(file, path);
  std::ostringstream out;
  out << file.rdbuf();
  return out.str();
}

std::shared_ptr<const Tokenizer> load(const std::string& folder) {
  auto tokenizer = Tokenizer::load(folder);
  REQUIRE_MESSAGE(tokenizer, text_of(tokenizer.error()));
  return *tokenizer;
}

std::vector<int32_t> ids_of(const json::value& list) {
  std::vector<int32_t> ids;
  for (const auto& id : list.as_array())
    ids.push_back(static_cast<int32_t>(id.as_int64()));
  return ids;
}

std::string detokenize(const std::shared_ptr<const Tokenizer>& tokenizer,
                       const std::vector<int32_t>& ids, bool skip) {
  Detokenizer detokenizer{tokenizer, skip};
  std::string text;
  for (const int32_t id : ids) {
    const auto part = detokenizer.push(id);
    REQUIRE(!text::first_invalid_utf8(part));
    text += part;
  }
  return text + detokenizer.flush();
}

struct Tally {
  int encoded = 0, decoded = 0, wrong = 0;
};

// Runs a file of cases that tests/reference/tokenizer_check.py recorded.
Tally run_cases(const std::string& folder, const std::string& cases) {
  const auto tokenizer = load(folder);
  std::ifstream file{cases};
  REQUIRE_MESSAGE(file, cases);
  Tally tally;
  for (std::string line; std::getline(file, line);) {
    const auto item = json::parse(line).as_object();
    const std::string text{item.at("text").as_string()};
    bool right = false;
    if (const auto* list = item.if_contains("ids")) {
      const auto ids = tokenizer->encode(text, item.at("special").as_bool());
      right = ids && *ids == ids_of(*list);
      ++tally.encoded;
    } else {
      const auto ids = ids_of(item.at("decode"));
      const bool skip = item.at("skip_special").as_bool();
      const auto decoded = tokenizer->decode(ids, skip);
      right = decoded && *decoded == text && detokenize(tokenizer, ids, skip) == text;
      ++tally.decoded;
    }
    if (!right && ++tally.wrong <= 5)
      MESSAGE("differs: " << line.substr(0, 400));
  }
  return tally;
}

// A byte-level tokenizer.json with a small vocabulary, to be spoilt in one place.
struct Draft {
  std::string vocab = R"("a":0,"b":1,"c":2,"ab":3,"abc":4,"bc":5)";
  std::string merges = R"("a b","ab c")";
  std::string model_more;
  std::string added;
  std::string pre = R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false})";
  std::string decoder = R"({"type":"ByteLevel"})";
  std::string normalizer = "null";

  [[nodiscard]] std::string json() const {
    return fmt::format(R"({{"version":"1.0","added_tokens":[{}],"normalizer":{},)"
                       R"("pre_tokenizer":{},"decoder":{},"model":{{"type":"BPE",{}"vocab":{{{}}},)"
                       R"("merges":[{}]}}}})",
                       added, normalizer, pre, decoder, model_more, vocab, merges);
  }
  [[nodiscard]] auto load() const {
    return load_tokenizer_json({json(), "", "", "tokenizer.json"});
  }
};

std::string error_of(const Draft& draft) {
  const auto tokenizer = draft.load();
  REQUIRE(!tokenizer);
  return text_of(tokenizer.error());
}

std::string error_of(const caf::expected<std::shared_ptr<const Tokenizer>>& tokenizer) {
  REQUIRE(!tokenizer);
  return text_of(tokenizer.error());
}

bool has(const std::string& text, std::string_view part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found)
    MESSAGE("in the error: " << text);
  return found;
}

Pieces cut(std::string_view text, const std::vector<Piece>& pieces) {
  Pieces out;
  for (const auto& p : pieces)
    out.emplace_back(text.substr(p.begin, p.end - p.begin));
  return out;
}

Pieces split_by(std::string_view pattern, SplitBehavior behavior, bool invert,
                std::string_view text) {
  auto split = Split::regex(pattern, behavior, invert);
  REQUIRE_MESSAGE(split, text_of(split.error()));
  std::vector<Split> splits;
  splits.push_back(std::move(*split));
  const auto pieces = split_all(splits, text);
  REQUIRE(pieces);
  return cut(text, *pieces);
}

std::vector<Split> deepseek_splits() {
  const auto root = json::parse(read_file(data_folder("deepseek") + "/tokenizer.json"));
  std::vector<Split> splits;
  for (const auto& item : root.at("pre_tokenizer").at("pretokenizers").as_array())
    if (item.at("type").as_string() == "Split") {
      auto split = Split::regex(std::string{item.at("pattern").at("Regex").as_string()},
                                SplitBehavior::isolated, false);
      REQUIRE(split);
      splits.push_back(std::move(*split));
    }
  REQUIRE(splits.size() == 3);
  return splits;
}

} // namespace

TEST_CASE("the pre-tokenizer cuts the specification's examples as written there (12.14)") {
  const std::vector<std::pair<std::string, Pieces>> examples = {
      {"Hello, world!", {"Hello", ",", " world", "!"}},
      {"x=1234567+89", {"x", "=", "123", "456", "7", "+", "89"}},
      {"I've got 3 cats.\n\nOK", {"I", "'ve", " got", " ", "3", " cats", ".\n\n", "OK"}},
      {"你好，世界abc123", {"你好", "，", "世界", "abc", "123"}},
      {"  leading  spaces ", {" ", " leading", " ", " spaces", " "}},
      {"foo_bar(baz)", {"foo", "_bar", "(baz", ")"}},
      {"a\r\n\tb", {"a", "\r\n", "\tb"}},
      {"C++20 is .NET", {"C", "++", "20", " is", " .", "NET"}},
      {"price: $12.50", {"price", ":", " $", "12", ".", "50"}},
      {"한국어 текст", {"한국어", " текст"}},
      {"カタカナとひらがな", {"カタカナとひらがな"}}};
  const auto splits = deepseek_splits();
  for (const auto& [text, expected] : examples) {
    CAPTURE(text);
    const auto pieces = split_all(splits, text);
    REQUIRE(pieces);
    CHECK(cut(text, *pieces) == expected);
  }
}

TEST_CASE("ids and text of recorded cases equal those of the tokenizers library") {
  const auto tally = run_cases(data_folder("deepseek"), data_folder("deepseek") + "/cases.jsonl");
  CHECK(tally.encoded >= 150);
  CHECK(tally.decoded >= 150);
  CHECK(tally.wrong == 0);
}

TEST_CASE("ids and text of recorded cases equal those of tiktoken") {
  const auto tally = run_cases(data_folder("kimi"), data_folder("kimi") + "/cases.jsonl");
  CHECK(tally.encoded >= 150);
  CHECK(tally.decoded >= 150);
  CHECK(tally.wrong == 0);
}

TEST_CASE("cases recorded elsewhere come out equal") {
  const char* folder = std::getenv("TROUPE_TOKENIZER_DIR");
  const char* cases = std::getenv("TROUPE_TOKENIZER_CASES");
  if (!folder || !cases)
    return; // a published tokenizer is too large to be committed
  const auto tally = run_cases(folder, cases);
  MESSAGE(tally.encoded << " encoded, " << tally.decoded << " decoded, " << tally.wrong
                        << " differ");
  CHECK(tally.wrong == 0);
}

TEST_CASE("a file named from outside is encoded and timed") {
  const char* folder = std::getenv("TROUPE_TOKENIZER_DIR");
  const char* path = std::getenv("TROUPE_TOKENIZER_TEXT");
  if (!folder || !path)
    return;
  const auto seconds_of = [](auto&& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  std::shared_ptr<const Tokenizer> tokenizer;
  const double load_s = seconds_of([&] { tokenizer = load(folder); });
  const auto text = read_file(path);
  std::vector<int32_t> ids;
  const double encode_s = seconds_of([&] { ids = *tokenizer->encode(text, true); });
  MESSAGE("loaded in " << load_s << " s; " << ids.size() << " ids, "
                       << static_cast<double>(text.size()) / encode_s / 1e6 << " MB/s");
  CHECK(*tokenizer->decode(ids, false) == text);
}

TEST_CASE("a folder's files give ids, ends and BOS policy") {
  const auto tokenizer = load(data_folder("deepseek"));
  CHECK(tokenizer->add_bos_token());
  CHECK(tokenizer->bos_token_id() == 0);
  CHECK(tokenizer->eos_token_id() == 1);
  CHECK(tokenizer->is_special(0));
  CHECK(tokenizer->token_bytes(0) == "<｜begin▁of▁sentence｜>");
  CHECK(tokenizer->token_id("Ġ") == tokenizer->token_id(" "));
  CHECK(tokenizer->token_id(" ").has_value());
  CHECK(!tokenizer->token_id("no such token"));
  CHECK(tokenizer->chat_template().empty());
  CHECK(*tokenizer->encode("", true) == std::vector<int32_t>{});
  CHECK(*tokenizer->encode("<｜end▁of▁sentence｜>", true) == std::vector<int32_t>{1});
  CHECK(tokenizer->encode("<｜end▁of▁sentence｜>", false)->size() > 5);

  const auto kimi = load(data_folder("kimi"));
  CHECK(!kimi->add_bos_token());
  CHECK(kimi->bos_token_id() == 600);
  CHECK(kimi->num_ids() == 600 + 256);
  CHECK(kimi->token_bytes(855) == "<|reserved_token_855|>");
}

TEST_CASE("an id without a token is named, not decoded") {
  const auto tokenizer = load(data_folder("kimi"));
  for (const int32_t id : {-1, 856, INT32_MAX}) {
    CAPTURE(id);
    const auto text = tokenizer->decode({65, id}, false);
    REQUIRE(!text);
    CHECK(text_of(text.error()) ==
          fmt::format("the tokenizer has no token with id {} (its ids are below 856)", id));
    CHECK(!tokenizer->token_bytes(id));
    CHECK(!tokenizer->is_special(id));
  }
}

TEST_CASE("text that is not UTF-8 is refused with the offset of the first bad byte") {
  const auto tokenizer = load(data_folder("deepseek"));
  const std::vector<std::pair<std::string, size_t>> broken = {
      {"\xff", 0},          {"ab\x80", 2},           {"é\xc3", 2},    {"\xc0\xaf", 0},
      {"x\xed\xa0\x80", 1}, {"\xf4\x90\x80\x80", 0}, {"\xe4\xbd", 0}, {"a\xf0\x9f\x98z", 1}};
  for (const auto& [text, offset] : broken)
    for (const bool special : {false, true}) {
      const auto ids = tokenizer->encode(text, special);
      REQUIRE(!ids);
      CHECK(code_of(ids.error()) == Errc::invalid_argument);
      CHECK(text_of(ids.error()) == fmt::format("the text is not valid UTF-8 at byte {}", offset));
    }
}

TEST_CASE("the detokenizer holds back unfinished characters and no others") {
  const auto tokenizer = load(data_folder("kimi")); // id = byte for the first 256
  Detokenizer detokenizer{tokenizer};
  CHECK(detokenizer.push('a') == "a");
  CHECK(detokenizer.push(0xe4).empty());
  CHECK(detokenizer.push(0xbd).empty());
  CHECK(detokenizer.push(0xa0) == "你");
  CHECK(detokenizer.push(0xe4).empty());
  CHECK(detokenizer.push('b') == "\uFFFDb");
  CHECK(detokenizer.push(0xff) == "\uFFFD");
  CHECK(detokenizer.push(602).empty()); // special
  CHECK(detokenizer.push(1 << 20).empty());
  CHECK(detokenizer.push(0xf0).empty());
  CHECK(detokenizer.push(0x9f).empty());
  CHECK(detokenizer.flush() == "\uFFFD");
  CHECK(detokenizer.flush().empty());
}

TEST_CASE("both spellings of merges and ignore_merges are understood") {
  Draft draft;
  CHECK(*(*draft.load())->encode("abcab", false) == std::vector<int32_t>{4, 3});
  CHECK(*(*draft.load())->encode("bc", false) ==
        std::vector<int32_t>{1, 2}); // no merge leads there
  draft.merges = R"(["a","b"],["ab","c"])";
  CHECK(*(*draft.load())->encode("abcab", false) == std::vector<int32_t>{4, 3});
  draft.model_more = R"("ignore_merges":true,)";
  CHECK(*(*draft.load())->encode("bc", false) == std::vector<int32_t>{5});
}

TEST_CASE("of two equal pairs the leftmost merges first") {
  Draft draft;
  draft.vocab = R"("a":0,"aa":1,"aaa":2)";
  draft.merges = R"("a a","aa a")";
  CHECK(*(*draft.load())->encode("aaaaa", false) == std::vector<int32_t>{1, 2});
}

TEST_CASE("a megabyte of one character takes no longer than any megabyte") {
  const auto tokenizer = load(data_folder("deepseek"));
  for (const char* unit : {"a", " ", "=", "0", "\n", "你", "ab"}) {
    std::string text;
    while (text.size() < 1'000'000)
      text += unit;
    const auto ids = tokenizer->encode(text, true);
    REQUIRE(ids);
    CHECK(*tokenizer->decode(*ids, false) == text);
  }
}

TEST_CASE("the short and the long merge loop agree") {
  const auto tokenizer = load(data_folder("kimi"));
  // "x" + piece stays one piece for the long loop; its ids are those of merging from the left.
  const std::string word = "thequickbrownfoxjumpsoverthelazydog";
  std::string doubled;
  for (int i = 0; i < 4; ++i)
    doubled += word;
  const auto ids = tokenizer->encode(doubled, false);
  REQUIRE(ids);
  CHECK(*tokenizer->decode(*ids, false) == doubled);
  CHECK(ids->size() <= 4 * tokenizer->encode(word, false)->size());
}

TEST_CASE("patterns that need more than a bounded number of steps fail instead of hanging") {
  const std::string blanks(200'000, ' ');
  // Each text holds what the pattern ends with, so that PCRE2 can't give up at once.
  const std::vector<std::pair<std::string, std::string>> hostile = {
      {"(a+)+b", std::string(200'000, 'a') + "cb"},
      {R"(\s*x)", blanks + "yx"},
      {R"((\s|\s\s)+x)", blanks + "yx"},
      {R"((?:\s+)+\.)", blanks + "y."}};
  for (const auto& [pattern, text] : hostile) {
    CAPTURE(pattern);
    auto split = Split::regex(pattern, SplitBehavior::isolated, false);
    REQUIRE(split);
    std::vector<Split> splits;
    splits.push_back(std::move(*split));
    const auto pieces = split_all(splits, text);
    REQUIRE(!pieces);
    CHECK(has(text_of(pieces.error()), "takes too many steps"));
  }
  // DeepSeek-V2's, quadratic as published.
  CHECK(split_by(R"(\s+$)", SplitBehavior::isolated, false, blanks + "1").size() == 1);
  CHECK(split_by(R"(\s+$)", SplitBehavior::isolated, false, "a  ") == Pieces{"a", "  "});
}

TEST_CASE("each behaviour of a split treats matches as its name says") {
  const auto split = [](SplitBehavior behavior, bool invert = false) {
    return split_by("-", behavior, invert, "the-final--countdown");
  };
  CHECK(split(SplitBehavior::removed) == Pieces{"the", "final", "countdown"});
  CHECK(split(SplitBehavior::isolated) == Pieces{"the", "-", "final", "-", "-", "countdown"});
  CHECK(split(SplitBehavior::merged_with_previous) == Pieces{"the-", "final-", "-", "countdown"});
  CHECK(split(SplitBehavior::merged_with_next) == Pieces{"the", "-final", "-", "-countdown"});
  CHECK(split(SplitBehavior::contiguous) == Pieces{"the", "-", "final", "--", "countdown"});
  CHECK(split(SplitBehavior::removed, true) == Pieces{"-", "-", "-"});
}

TEST_CASE("regex constructs that differ between engines are refused by name") {
  const std::vector<std::pair<std::string, std::string>> refused = {
      {R"(\w+)", R"(\w)"},
      {R"(\bx)", R"(\b)"},
      {R"(\h)", R"(\h)"},
      {R"([a&&b])", "intersection"},
      {R"([[:alpha:]])", "inside another"},
      {R"((?i)a)", "group of a kind"},
      {R"(\p{Greek})", "'Greek'"},
      {R"(a{,3})", "brace"},
      {R"(a{2}+)", "possessive"},
      {R"((a)\1)", R"(\1)"},
      {R"(\)", "backslash"},
      {R"([a)", "without its end"},
      {R"(\xff)", "above 0x7f"},
      {R"(\x{110000000})", "malformed"},
      {R"(\K)", R"(\K)"},
      {R"([])", "empty"},
      {R"(\pL)", "without braces"}};
  for (const auto& [pattern, what] : refused) {
    CAPTURE(pattern);
    const auto translated = to_pcre(pattern);
    REQUIRE(!translated);
    CHECK(has(text_of(translated.error()), what));
  }
  CHECK(*to_pcre(R"(\p{Han}|[\u4e2d\x41])") == R"(\p{sc:Han}|[\x{4e2d}\x{41}])");
  CHECK(!Split::regex("a)", SplitBehavior::isolated, false));
  CHECK(!Split::regex(std::string(70000, 'a'), SplitBehavior::isolated, false));
  CHECK(!Split::regex(std::string(1000, '(') + std::string(1000, ')'), SplitBehavior::isolated,
                      false));
}

TEST_CASE("a spoilt tokenizer.json is refused with the field and what was expected") {
  const auto with = [](auto member, const char* value) {
    Draft draft;
    draft.*member = value;
    return error_of(draft);
  };
  CHECK(has(with(&Draft::vocab, ""), "model.vocab: expected at least one token"));
  CHECK(has(with(&Draft::vocab, R"("a":0,"b":0)"), "has the id 0 of another token"));
  CHECK(has(with(&Draft::vocab, R"("a":-1)"), "expected an id from 0 to 1048575, got -1"));
  CHECK(has(with(&Draft::vocab, R"("a":1048576)"), "got 1048576"));
  CHECK(has(with(&Draft::vocab, R"("a":18446744073709551615)"), "got 18446744073709551615"));
  CHECK(has(with(&Draft::vocab, R"("a":"x")"), R"(got "x")"));
  CHECK(has(with(&Draft::vocab, R"("a":0,"a":1)"), "appears twice"));
  CHECK(has(with(&Draft::merges, R"("a z")"), "model.merges[0]: 'z' is not in model.vocab"));
  CHECK(has(with(&Draft::merges, R"("b a")"), "model.merges[0]: 'ba' is not in model.vocab"));
  CHECK(has(with(&Draft::merges, R"("a b","ab")"), "model.merges[1]: expected"));
  CHECK(has(with(&Draft::merges, R"("a b c")"), "model.merges[0]: expected"));
  CHECK(has(with(&Draft::merges, R"(["a"])"), "model.merges[0]: expected"));
  CHECK(has(with(&Draft::merges, "7"), "got 7"));
  CHECK(has(with(&Draft::model_more, R"("byte_fallback":true,)"), "model.byte_fallback"));
  CHECK(has(with(&Draft::model_more, R"("dropout":0.5,)"), "model.dropout"));
  CHECK(has(with(&Draft::model_more, R"("unk_token":"a",)"), "model.unk_token"));
  CHECK(has(with(&Draft::model_more, R"("end_of_word_suffix":"</w>",)"), "end_of_word_suffix"));
  CHECK(has(with(&Draft::normalizer, R"({"type":"NFC"})"), "the normalizer 'NFC'"));
  CHECK(has(with(&Draft::normalizer, R"({"type":"Sequence","normalizers":[{"type":"NFKC"}]})"),
            "'NFKC'"));
  CHECK(has(with(&Draft::normalizer, "3"), "normalizer: expected an object, got 3"));
  CHECK(has(with(&Draft::decoder, "null"), "decoder: expected ByteLevel"));
  CHECK(has(with(&Draft::decoder, R"({"type":"WordPiece"})"), "the decoder 'WordPiece'"));
  CHECK(has(with(&Draft::pre, "null"), "pre_tokenizer: expected one with ByteLevel"));
  CHECK(has(with(&Draft::pre, R"({"type":"Metaspace"})"), "the pre-tokenizer 'Metaspace'"));
  CHECK(has(with(&Draft::pre, R"({"type":"Digits"})"), "expected ByteLevel as its last element"));
  CHECK(has(with(&Draft::pre, R"({"type":"ByteLevel"})"), "add_prefix_space"));
  CHECK(has(with(&Draft::pre, R"({"type":"Sequence","pretokenizers":[{"type":"Split"}]})"),
            "pretokenizers[0].behavior"));
  CHECK(has(with(&Draft::pre, R"({"type":"Split","behavior":"Isolated","pattern":{"Regex":"("}})"),
            "does not compile"));
  CHECK(has(with(&Draft::pre, R"({"type":"Split","behavior":"Odd","pattern":{"Regex":"a"}})"),
            "the behavior 'Odd'"));
  CHECK(has(with(&Draft::pre, R"({"type":"Split","behavior":"Removed","pattern":{}})"), "pattern"));
  CHECK(has(with(&Draft::added, R"({"id":0,"content":"zz"})"), "has the id 0, but model.vocab"));
  CHECK(has(with(&Draft::added, R"({"id":9,"content":"a"})"), "has the id 9, but model.vocab"));
  CHECK(has(with(&Draft::added, R"({"id":9,"content":""})"), "is empty"));
  CHECK(has(with(&Draft::added, R"({"id":9,"content":"x"},{"id":9,"content":"y"})"), "another"));
  CHECK(has(with(&Draft::added, R"({"id":8,"content":"x"},{"id":9,"content":"x"})"), "twice"));
  CHECK(has(with(&Draft::added, R"({"id":1e9,"content":"x"})"), "added_tokens[0].id"));
  CHECK(has(with(&Draft::added, "5"), "added_tokens[0]: expected an object, got 5"));
  Draft long_token;
  long_token.added = R"({"id":9,"content":")" + std::string(2000, 'x') + "\"}";
  CHECK(has(error_of(long_token), "longer than 1024 bytes"));

  const auto text_error = [](std::string text) {
    return error_of(load_tokenizer_json({std::move(text), "", "", "T"}));
  };
  CHECK(has(text_error(""), "T:1:1: not JSON"));
  CHECK(has(text_error("{"), "not JSON"));
  CHECK(has(text_error("[]"), "expected a JSON object"));
  CHECK(has(text_error(std::string(100, '[')), "nested deeper"));
  CHECK(has(text_error("{}"), "pre_tokenizer"));
}

TEST_CASE("a byte that the vocabulary lacks is an error that names it") {
  const auto ids = (*Draft{}.load())->encode("ab\n", false);
  REQUIRE(!ids);
  CHECK(text_of(ids.error()) == "the vocabulary has no token for byte 0x0a");
}

TEST_CASE("a spoilt tokenizer_config.json is refused, its odd forms are read") {
  const auto with = [](const char* config) {
    return load_tokenizer_json({Draft{}.json(), config, "", "T"});
  };
  CHECK(has(error_of(with(R"({"bos_token":"zz"})")), "bos_token: 'zz' is not in the vocabulary"));
  CHECK(has(error_of(with(R"({"eos_token":7})")), "eos_token: expected a string, got 7"));
  CHECK(has(error_of(with(R"({"eos_token":{}})")), "eos_token.content"));
  CHECK(has(error_of(with(R"({"add_bos_token":"yes"})")), "add_bos_token: expected true or false"));
  CHECK(has(error_of(with(R"({"chat_template":[3]})")), "chat_template"));
  CHECK(has(error_of(with("{")), "not JSON"));
  const auto fine = with(R"({"bos_token":null,"eos_token":{"content":"c"},"chat_template":[
      {"name":"tool_use","template":"x"},{"name":"default","template":"y"}]})");
  REQUIRE(fine);
  CHECK(!(*fine)->bos_token_id());
  CHECK((*fine)->eos_token_id() == 2);
  CHECK((*fine)->chat_template() == "y");
  CHECK(!(*fine)->add_bos_token());
}

TEST_CASE("a spoilt tiktoken.model is refused with the line") {
  const auto with = [](std::string text, std::string config = "") {
    return error_of(load_tiktoken({std::move(text), std::move(config), "", "M"}));
  };
  CHECK(has(with(""), "expected at least one token"));
  CHECK(has(with("YQ== 0\nYg==\n"), "M:2: expected a token in base64, a space and its rank"));
  CHECK(has(with("YQ= 0"), "M:1: 'YQ=' is not base64"));
  CHECK(has(with("Y*== 0"), "is not base64"));
  CHECK(has(with("YR== 0"), "is not base64")); // stray bits
  CHECK(has(with(" 0"), "is not base64"));
  CHECK(has(with("YQ== x"), "expected a rank"));
  CHECK(has(with("YQ== -1"), "expected a rank"));
  CHECK(has(with("YQ== 99999999999999999999"), "expected a rank"));
  CHECK(has(with("YQ== 2000000"), "expected a rank"));
  CHECK(has(with("YQ== 0\nYg== 0"), "M:2: the rank 0 appears twice"));
  CHECK(has(with("YQ== 0\nYQ== 1"), "the token with rank 1 appears twice, first with rank 0"));
  CHECK(has(with("YQ== 1"), "no token has rank 0"));
  CHECK(has(with("YQ== 0", R"({"added_tokens_decoder":{"0":{"content":"x"}}})"),
            "has the id 0, which is a rank"));
  CHECK(has(with("YQ== 0", R"({"added_tokens_decoder":{"one":{"content":"x"}}})"), "got 'one'"));
  CHECK(has(with("YQ== 0", R"({"added_tokens_decoder":{"5":{"content":"x"},"6":{"content":"x"}}})"),
            "appears twice"));
}

TEST_CASE("a folder without a tokenizer is told apart from a broken one") {
  const auto missing = Tokenizer::load(std::string{TROUPE_SOURCE_DIR} + "/no such folder");
  REQUIRE(!missing);
  CHECK(code_of(missing.error()) == Errc::not_found);
  CHECK(has(text_of(missing.error()), "has neither tokenizer.json nor tiktoken.model"));
}

TEST_CASE("characters newer than PCRE2's tables are split by their own category") {
  // U+10D50 (capital letter) and U+10D40 (digit) are of Unicode 16, U+31350 (Han) of 15.
  CHECK(split_by(R"(\p{N})", SplitBehavior::isolated, false, "a\U00010D40b") ==
        Pieces{"a", "\U00010D40", "b"});
  CHECK(split_by(R"(\p{Lu}+)", SplitBehavior::isolated, false, "1\U00010D50") ==
        Pieces{"1", "\U00010D50"});
  CHECK(split_by(R"(\p{Han}+)", SplitBehavior::isolated, false, "。\U00031350x") ==
        Pieces{"。", "\U00031350", "x"});
  CHECK(split_by(R"(\s)", SplitBehavior::isolated, false, "a\u180Eb").size() == 1);
}
