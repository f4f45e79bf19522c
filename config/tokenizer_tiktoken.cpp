// tiktoken.model, as Moonlight and Kimi-K2 ship it: a line per token, its bytes in base64 and its
// rank, which is its id. The ids after the ranks are special tokens, named by the
// added_tokens_decoder of tokenizer_config.json or else <|reserved_token_ID|>.
//
// Equal to tiktoken with the published pattern. (The published Python code also cuts runs of more
// than 25,000 blanks or non-blanks before tokenizing, to spare tiktoken a quadratic case; that
// changes ids at those cuts and is not done here.)
#include "config/tokenizer_core.hpp"
#include "config/tokenizer_text.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>

namespace troupe {

namespace {

constexpr int32_t kNumReserved = 256; // special ids after the ranks
constexpr size_t kMaxTokenBytes = 512;

constexpr std::array<int8_t, 256> make_base64() {
  std::array<int8_t, 256> table{};
  table.fill(-1);
  constexpr std::string_view digits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (size_t i = 0; i < digits.size(); ++i)
    table[static_cast<uint8_t>(digits[i])] = static_cast<int8_t>(i);
  return table;
}
constexpr auto kBase64 = make_base64();

// Strict: padded, no other characters, no stray bits.
std::optional<std::string> decode_base64(std::string_view s) {
  if (s.empty() || s.size() % 4 != 0)
    return std::nullopt;
  const size_t padding = s.ends_with("==") ? 2 : s.ends_with('=') ? 1 : 0;
  std::string out;
  uint32_t bits = 0;
  for (size_t i = 0; i < s.size() - padding; ++i) {
    const int digit = kBase64[static_cast<uint8_t>(s[i])];
    if (digit < 0)
      return std::nullopt;
    bits = (bits << 6) | static_cast<uint32_t>(digit);
    if (i % 4 == 1)
      out.push_back(static_cast<char>(bits >> 4));
    else if (i % 4 == 2)
      out.push_back(static_cast<char>(bits >> 2));
    else if (i % 4 == 3)
      out.push_back(static_cast<char>(bits));
  }
  const uint32_t stray = padding == 2 ? bits & 15u : padding == 1 ? bits & 3u : 0u;
  return stray == 0 ? std::optional{out} : std::nullopt;
}

class TiktokenModel {
public:
  explicit TiktokenModel(const TokenizerFiles& files) : files_(files) {}

  caf::expected<std::shared_ptr<const Tokenizer>> load() {
    auto config =
        parse_tokenizer_config(files_.tokenizer_config, files_.source + ": tokenizer_config.json");
    if (!config)
      return std::move(config.error());
    if (auto error = read_lines())
      return error;
    if (auto error = check_ranks())
      return error;
    num_ranks_ = parts_.entries.size();
    auto tokens = special_tokens(std::move(config->added_tokens));
    if (!tokens)
      return std::move(tokens.error());
    for (const auto& token : *tokens)
      parts_.entries[static_cast<size_t>(token.id)] = {token.content, true, token.special};
    parts_.added = AddedTokens{std::move(*tokens)};
    if (auto error = build_encoder())
      return error;
    auto split = Split::regex(kKimiPattern, SplitBehavior::isolated, false, true);
    if (!split)
      return std::move(split.error());
    parts_.splits.push_back(std::move(*split));
    return make_tokenizer(std::move(parts_), *config, files_);
  }

private:
  [[nodiscard]] caf::error bad(size_t line, std::string_view what) const {
    return make_error(Errc::malformed, fmt::format("{}:{}: {}", files_.source, line, what));
  }

  caf::error read_lines() {
    std::string_view rest = files_.vocabulary;
    if (rest.size() > kMaxTokenizerBytes)
      return make_error(Errc::malformed,
                        fmt::format("{}: {} bytes, at most {} are read", files_.source, rest.size(),
                                    kMaxTokenizerBytes));
    for (size_t line = 1; !rest.empty(); ++line) {
      const size_t end = std::min(rest.find('\n'), rest.size());
      auto text = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 1, rest.size()));
      if (text.ends_with('\r'))
        text.remove_suffix(1);
      if (text.empty())
        continue;
      if (auto error = read_line(text, line))
        return error;
    }
    return {};
  }

  caf::error read_line(std::string_view text, size_t line) {
    const size_t space = text.find(' ');
    if (space == std::string_view::npos)
      return bad(line, "expected a token in base64, a space and its rank");
    auto bytes = decode_base64(text.substr(0, space));
    if (!bytes)
      return bad(line, text::quoted(text.substr(0, space)) + " is not base64");
    if (bytes->size() > kMaxTokenBytes)
      return bad(line, fmt::format("a token of {} bytes, at most {} are supported", bytes->size(),
                                   kMaxTokenBytes));
    const auto number = text.substr(space + 1);
    int64_t rank = -1;
    const auto [end, ec] = std::from_chars(number.data(), number.data() + number.size(), rank);
    if (ec != std::errc{} || end != number.data() + number.size() || rank < 0 ||
        rank >= kMaxTokenIds - kNumReserved)
      return bad(line, fmt::format("expected a rank from 0 to {}, got {}",
                                   kMaxTokenIds - kNumReserved - 1, text::quoted(number)));
    const auto index = static_cast<size_t>(rank);
    if (parts_.entries.size() <= index)
      parts_.entries.resize(index + 1);
    if (parts_.entries[index].present)
      return bad(line, fmt::format("the rank {} appears twice", rank));
    parts_.entries[index] = {std::move(*bytes), true, false};
    return {};
  }

  [[nodiscard]] caf::error check_ranks() const {
    if (parts_.entries.empty())
      return make_error(Errc::malformed, files_.source + ": expected at least one token");
    for (size_t i = 0; i < parts_.entries.size(); ++i)
      if (!parts_.entries[i].present)
        return make_error(Errc::malformed,
                          fmt::format("{}: no token has rank {}, but one has rank {}",
                                      files_.source, i, parts_.entries.size() - 1));
    return {};
  }

  // Names the ids after the ranks and makes room for them.
  caf::expected<std::vector<AddedToken>> special_tokens(std::vector<AddedToken> named) {
    const auto first = static_cast<int32_t>(num_ranks_);
    if (!named.empty() && named.front().id < first)
      return make_error(
          Errc::mismatch,
          fmt::format("{}: tokenizer_config.json: added_tokens_decoder: {} has the id "
                      "{}, which is a rank of the vocabulary (they end at {})",
                      files_.source, text::quoted(named.front().content), named.front().id,
                      first - 1));
    const int32_t last = named.empty() ? 0 : named.back().id + 1;
    parts_.entries.resize(static_cast<size_t>(std::max(first + kNumReserved, last)));
    std::vector<AddedToken> tokens;
    auto next = named.begin();
    for (int32_t id = first; id < first + kNumReserved || next != named.end(); ++id) {
      if (next != named.end() && next->id == id)
        tokens.push_back(std::move(*next++));
      else if (id < first + kNumReserved)
        tokens.push_back(AddedToken{
            .id = id, .content = fmt::format("<|reserved_token_{}|>", id), .special = true});
    }
    if (auto error = check_added_tokens(tokens, files_.source + ": tokenizer_config.json"))
      return error;
    return tokens;
  }

  caf::error build_encoder() {
    ByteTable whole;
    whole.reserve(num_ranks_);
    std::array<int32_t, 256> byte_ids{};
    byte_ids.fill(-1);
    for (size_t i = 0; i < num_ranks_; ++i) {
      const auto& bytes = parts_.entries[i].bytes;
      if (!whole.put(bytes, static_cast<int32_t>(i)))
        return make_error(
            Errc::malformed,
            fmt::format("{}: the token with rank {} appears twice, first with rank {}",
                        files_.source, i, whole.find(bytes)));
      if (bytes.size() == 1)
        byte_ids[static_cast<uint8_t>(bytes[0])] = static_cast<int32_t>(i);
    }
    parts_.encoder.emplace(make_pairs(whole), byte_ids);
    parts_.by_bytes = whole;
    parts_.encoder->set_whole(std::move(whole)); // tiktoken looks whole pieces up first, too
    return {};
  }

  // Two tokens merge when their joined bytes are a token: every way to cut one in two.
  [[nodiscard]] PairTable make_pairs(const ByteTable& table) const {
    PairTable pairs;
    size_t num_pairs = 0;
    const auto for_each = [&](auto&& take) {
      for (size_t i = 0; i < num_ranks_; ++i) {
        const std::string_view bytes = parts_.entries[i].bytes;
        for (size_t cut = 1; cut < bytes.size(); ++cut) {
          const int32_t left = table.find(bytes.substr(0, cut));
          const int32_t right = left < 0 ? -1 : table.find(bytes.substr(cut));
          if (right >= 0)
            take(left, right, static_cast<int32_t>(i));
        }
      }
    };
    for_each([&](int32_t, int32_t, int32_t) { ++num_pairs; });
    pairs.reserve(num_pairs);
    for_each([&](int32_t left, int32_t right, int32_t id) {
      pairs.put(left, right, Merge{static_cast<uint32_t>(id), id});
    });
    return pairs;
  }

  const TokenizerFiles& files_;
  TokenizerParts parts_;
  size_t num_ranks_ = 0;
};

} // namespace

caf::expected<std::shared_ptr<const Tokenizer>> load_tiktoken(const TokenizerFiles& files) {
  return TiktokenModel{files}.load();
}

} // namespace troupe
