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
