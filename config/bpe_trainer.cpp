#include "config/bpe_trainer.hpp"

#include "config/json.hpp"
#include "config/tokenizer_bpe.hpp"
#include "config/tokenizer_text.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <queue>
#include <set>

namespace troupe {

namespace json = boost::json;

namespace {

// Oniguruma's notation, as DeepSeek-V3's tokenizer.json has them.
constexpr std::array<std::string_view, 3> kSplits = {
    R"(\p{N}{1,3})",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]"
    "+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
};

using Pair = std::pair<int32_t, int32_t>;

uint64_t key_of(Pair p) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(p.first)) << 32) |
         static_cast<uint32_t>(p.second);
}

// A pair waiting to be merged in some words. Its count may be out of date.
struct Candidate {
  Pair pair;
  int64_t count = 0;
  std::vector<int32_t> words;

  friend bool operator<(const Candidate& a, const Candidate& b) {
    return a.count != b.count ? a.count < b.count : a.pair > b.pair;
  }
};

// The state of a training run: words as tokens, how often pairs stand side by side, and what comes
// next.
class Merging {
public:
  Merging(std::vector<std::pair<std::string, int64_t>> words, const std::array<int32_t, 256>& ids)
      : words_(std::move(words)) {
    std::unordered_map<uint64_t, std::vector<int32_t>> where;
    for (size_t w = 0; w < words_.size(); ++w) {
      auto& tokens = tokens_.emplace_back();
      for (const char byte : words_[w].first)
        tokens.push_back(ids[static_cast<uint8_t>(byte)]);
      for (size_t i = 1; i < tokens.size(); ++i)
        note({tokens[i - 1], tokens[i]}, static_cast<int32_t>(w), 1, where);
    }
    push(where);
  }

  // The most frequent pair; nothing when none is left.
  std::optional<Candidate> next(int64_t min_frequency) {
    while (!queue_.empty()) {
      auto top = queue_.top();
      queue_.pop();
      const int64_t now = counts_[key_of(top.pair)];
      if (top.count != now) {
        top.count = now;
        queue_.push(std::move(top));
        continue;
      }
      if (top.count < std::max<int64_t>(min_frequency, 1))
        return std::nullopt;
      return top;
    }
    return std::nullopt;
  }

  void merge(const Candidate& candidate, int32_t id) {
    std::unordered_map<uint64_t, std::vector<int32_t>> where;
    for (const int32_t w : candidate.words)
      merge_word(w, candidate.pair, id, where);
    push(where);
  }

private:
  using Where = std::unordered_map<uint64_t, std::vector<int32_t>>;

  void note(Pair pair, int32_t word, int64_t times, Where& where) {
    counts_[key_of(pair)] += times * words_[static_cast<size_t>(word)].second;
    if (times < 0)
      return;
    auto& words = where[key_of(pair)];
    if (words.empty() || words.back() != word)
      words.push_back(word);
  }

  void merge_word(int32_t word, Pair pair, int32_t id, Where& where) {
    auto& tokens = tokens_[static_cast<size_t>(word)];
    size_t kept = 0; // tokens before it are merged; a word may be megabytes long
    for (size_t i = 0; i < tokens.size();) {
      if (i + 1 == tokens.size() || tokens[i] != pair.first || tokens[i + 1] != pair.second) {
        tokens[kept++] = tokens[i++];
        continue;
      }
      if (kept > 0) {
        note({tokens[kept - 1], pair.first}, word, -1, where);
        note({tokens[kept - 1], id}, word, 1, where);
      }
      i += 2;
      if (i < tokens.size()) {
        note({pair.second, tokens[i]}, word, -1, where);
        note({id, tokens[i]}, word, 1, where);
      }
      tokens[kept++] = id;
    }
    tokens.resize(kept);
  }

  void push(Where& where) {
    for (auto& [key, words] : where) {
      const int64_t count = counts_[key];
      if (count > 0)
        queue_.push({{static_cast<int32_t>(key >> 32), static_cast<int32_t>(key & 0xffffffffu)},
                     count,
                     std::move(words)});
    }
  }

  std::vector<std::pair<std::string, int64_t>> words_;
  std::vector<std::vector<int32_t>> tokens_; // by word
  std::unordered_map<uint64_t, int64_t> counts_;
  std::priority_queue<Candidate> queue_;
};

std::string mapped(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes)
    text::append_utf8(text, text::char_of_byte(static_cast<uint8_t>(byte)));
  return text;
}

json::object special_token(int32_t id, const std::string& text) {
  return {{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

json::object byte_level(bool prefix_space, bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", prefix_space},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

} // namespace

std::vector<std::string> default_special_tokens() {
  return {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>",     "<｜User｜>",
          "<｜Assistant｜>",         "<｜fim▁hole｜>",        "<｜fim▁begin｜>", "<｜fim▁end｜>"};
}

caf::expected<BpeTrainer> BpeTrainer::make(const BpeTrainerOptions& options) {
  const auto num_special = static_cast<int64_t>(options.special_tokens.size());
  if (num_special < 2)
    return make_error(Errc::invalid_argument,
                      "special tokens: a start and an end token are needed");
  const std::set<std::string> distinct{options.special_tokens.begin(),
                                       options.special_tokens.end()};
  if (static_cast<int64_t>(distinct.size()) != num_special || distinct.contains(""))
    return make_error(Errc::invalid_argument, "special tokens: one is empty or given twice");
  if (options.vocab_size < num_special + 256 || options.vocab_size > kMaxTokenIds)
    return make_error(Errc::invalid_argument,
                      fmt::format("vocabulary: {} tokens asked for, expected {} (the bytes and {} "
                                  "special ones) to {}",
                                  options.vocab_size, num_special + 256, num_special,
                                  kMaxTokenIds));
  BpeTrainer trainer{options};
  for (const auto pattern : kSplits) {
    auto split = Split::regex(pattern, SplitBehavior::isolated, false);
    if (!split)
      return split.error();
    trainer.splits_.push_back(std::move(*split));
  }
  return trainer;
}

caf::error BpeTrainer::add_text(std::string_view text) {
  if (const auto offset = text::first_invalid_utf8(text))
    return make_error(Errc::malformed, fmt::format("invalid UTF-8 at byte {}", *offset));
  const auto stand_in = text::with_stand_ins(text); // same offsets
  const auto pieces = split_all(splits_, stand_in ? std::string_view{*stand_in} : text);
  if (!pieces)
    return pieces.error();
  for (const auto& piece : *pieces)
    ++counts_[std::string{text.substr(piece.begin, piece.end - piece.begin)}];
  return {};
}

TrainedBpe BpeTrainer::train(const std::function<void(int32_t)>& progress) const {
  TrainedBpe result;
  result.special_tokens = options_.special_tokens;
  const auto first = static_cast<int32_t>(result.special_tokens.size());
  // The bytes come in the order of their stand-in characters.
  std::array<uint8_t, 256> bytes;
  for (size_t b = 0; b < 256; ++b)
    bytes[b] = static_cast<uint8_t>(b);
  std::ranges::sort(bytes, {}, [](uint8_t b) { return text::char_of_byte(b); });
  std::array<int32_t, 256> ids{};
  std::unordered_map<std::string, int32_t> id_of;
  const auto add = [&](std::string token) {
    const auto [place, is_new] =
        id_of.try_emplace(token, first + static_cast<int32_t>(result.tokens.size()));
    if (is_new)
      result.tokens.push_back(std::move(token));
    return place->second;
  };
  for (const uint8_t b : bytes)
    ids[b] = add(std::string(1, static_cast<char>(b)));

  std::vector<std::pair<std::string, int64_t>> words{counts_.begin(), counts_.end()};
  std::ranges::sort(words); // whatever the hash table's order
  Merging merging{std::move(words), ids};
  while (first + static_cast<int32_t>(result.tokens.size()) < options_.vocab_size) {
    const auto best = merging.next(options_.min_frequency);
    if (!best)
      break;
    const auto bytes_of = [&](int32_t id) {
      return result.tokens[static_cast<size_t>(id - first)];
    };
    const int32_t id = add(bytes_of(best->pair.first) + bytes_of(best->pair.second));
    result.merges.push_back(best->pair);
    merging.merge(*best, id);
    if (progress && result.tokens.size() % 64 == 0)
      progress(first + static_cast<int32_t>(result.tokens.size()));
  }
  return result;
}

std::string TrainedBpe::tokenizer_json() const {
  json::array added;
  json::object vocabulary;
  int32_t id = 0;
  for (const auto& token : special_tokens) {
    added.push_back(special_token(id, token));
    vocabulary[token] = id++;
  }
  const auto first = id;
  for (const auto& token : tokens)
    vocabulary[mapped(token)] = id++;
  json::array list;
  for (const auto& [left, right] : merges)
    list.push_back(json::array{json::string{mapped(tokens[static_cast<size_t>(left - first)])},
                               json::string{mapped(tokens[static_cast<size_t>(right - first)])}});
  json::array splits;
  for (const auto pattern : kSplits)
    splits.push_back(json::object{{"type", "Split"},
                                  {"pattern", json::object{{"Regex", pattern}}},
                                  {"behavior", "Isolated"},
                                  {"invert", false}});
  splits.push_back(byte_level(false, false));
  json::object model{{"type", "BPE"},
                     {"dropout", nullptr},
                     {"unk_token", nullptr},
                     {"continuing_subword_prefix", nullptr},
                     {"end_of_word_suffix", nullptr},
                     {"fuse_unk", false},
                     {"byte_fallback", false},
                     {"ignore_merges", false}};
  model["vocab"] = std::move(vocabulary);
  model["merges"] = std::move(list);
  json::object root{{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}};
  root["added_tokens"] = std::move(added);
  root["normalizer"] = nullptr;
  root["pre_tokenizer"] = json::object{{"type", "Sequence"}, {"pretokenizers", std::move(splits)}};
  root["post_processor"] = nullptr;
  root["decoder"] = byte_level(true, true);
  root["model"] = std::move(model);
  return json::serialize(root) + "\n";
}

std::string TrainedBpe::tokenizer_config() const {
  json::object config{{"tokenizer_class", "LlamaTokenizerFast"},
                      {"add_bos_token", true},
                      {"add_eos_token", false},
                      {"bos_token", special_tokens.at(0)},
                      {"eos_token", special_tokens.at(1)}};
  if (special_tokens.size() > 2)
    config["pad_token"] = special_tokens[2];
  return pretty(config) + "\n";
}

} // namespace troupe
