#define PCRE2_CODE_UNIT_WIDTH 8

#include "config/tokenizer_added.hpp"

#include "config/tokenizer_text.hpp"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <functional>
#include <map>
#include <new>

namespace troupe {

namespace {

// One character against a class, with the same tables as the splits.
class CharacterClass {
public:
  explicit CharacterClass(const char* pattern) {
    int error = 0;
    size_t offset = 0;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                          PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_ENDANCHORED, &error,
                          &offset, nullptr);
    data_ = pcre2_match_data_create(1, nullptr);
    if (!code_ || !data_)
      throw std::bad_alloc{};
  }
  CharacterClass(const CharacterClass&) = delete;
  CharacterClass& operator=(const CharacterClass&) = delete;
  ~CharacterClass() {
    pcre2_match_data_free(data_);
    pcre2_code_free(code_);
  }
  [[nodiscard]] bool has(std::string_view character) const {
    const auto changed = text::with_stand_ins(character);
    const std::string_view s = changed ? std::string_view{*changed} : character;
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(s.data()), s.size(), 0,
                       PCRE2_NO_UTF_CHECK, data_, nullptr) > 0;
  }

private:
  pcre2_code* code_ = nullptr;
  pcre2_match_data* data_ = nullptr;
};

std::string_view first_character(std::string_view s) {
  size_t n = 1;
  while (n < s.size() && (static_cast<uint8_t>(s[n]) & 0xC0) == 0x80)
    ++n;
  return s.substr(0, n);
}

std::string_view last_character(std::string_view s) {
  size_t n = 1;
  while (n < s.size() && (static_cast<uint8_t>(s[s.size() - n]) & 0xC0) == 0x80)
    ++n;
  return s.substr(s.size() - n);
}

// The word characters and the white space of Rust's regex crate (Unicode TS 18, annex C).
bool is_word(std::string_view character) {
  return CharacterClass{R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])"}.has(character);
}

size_t leading_space(std::string_view s) {
  const CharacterClass space{R"(\s)"};
  size_t n = 0;
  while (n < s.size() && space.has(first_character(s.substr(n))))
    n += first_character(s.substr(n)).size();
  return n;
}

size_t trailing_space(std::string_view s) {
  const CharacterClass space{R"(\s)"};
  size_t n = 0;
  while (n < s.size() && space.has(last_character(s.substr(0, s.size() - n))))
    n += last_character(s.substr(0, s.size() - n)).size();
  return n;
}

bool inside_word(std::string_view text, size_t begin, size_t end) {
  return (begin > 0 && is_word(last_character(text.substr(0, begin)))) ||
         (end < text.size() && is_word(first_character(text.substr(end))));
}

} // namespace

// A byte trie whose nodes keep their children sorted; the first level is a table.
class AddedTokens::Trie {
public:
  explicit Trie(const std::vector<AddedToken>& tokens, bool normalized) : nodes_(1) {
    for (size_t i = 0; i < tokens.size(); ++i)
      if (tokens[i].normalized == normalized)
        insert(tokens[i].content, static_cast<int32_t>(i));
  }

  // The longest token at the front of `s`: its index, or -1; `*length` is its bytes.
  [[nodiscard]] int32_t longest(std::string_view s, size_t* length) const {
    int32_t found = -1;
    size_t node = 0;
    for (size_t i = 0; i < s.size(); ++i) {
      const auto& children = nodes_[node].children;
      const auto it = children.find(static_cast<uint8_t>(s[i]));
      if (it == children.end())
        break;
      node = it->second;
      if (nodes_[node].token >= 0) {
        found = nodes_[node].token;
        *length = i + 1;
      }
    }
    return found;
  }
  [[nodiscard]] bool starts(char byte) const { return first_[static_cast<uint8_t>(byte)]; }
  [[nodiscard]] bool empty() const { return nodes_.size() == 1; }

private:
  struct Node {
    std::map<uint8_t, size_t> children;
    int32_t token = -1;
  };

  void insert(std::string_view content, int32_t token) {
    first_.set(static_cast<uint8_t>(content.front()));
    size_t node = 0;
    for (const char c : content) {
      const auto [it, added] =
          nodes_[node].children.try_emplace(static_cast<uint8_t>(c), nodes_.size());
      node = it->second;
      if (added)
        nodes_.emplace_back();
    }
    nodes_[node].token = token;
  }

  std::vector<Node> nodes_;
  std::bitset<256> first_;
};

AddedTokens::AddedTokens(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), raw_(std::make_unique<Trie>(tokens_, false)),
      normalized_(std::make_unique<Trie>(tokens_, true)) {}
AddedTokens::AddedTokens(AddedTokens&&) noexcept = default;
AddedTokens& AddedTokens::operator=(AddedTokens&&) noexcept = default;
AddedTokens::~AddedTokens() = default;

int32_t AddedTokens::find(std::string_view content) const {
  for (const Trie* trie : {raw_.get(), normalized_.get()}) {
    size_t length = 0;
    const int32_t index = trie->longest(content, &length);
    if (index >= 0 && length == content.size())
      return tokens_[static_cast<size_t>(index)].id;
  }
  return -1;
}

void AddedTokens::split_pass(const Trie& trie, std::string_view text,
                             std::vector<Stretch>& out) const {
  size_t done = 0; // everything before is in `out`
  size_t at = 0;
  while (at < text.size() && !trie.empty()) {
    size_t length = 0;
    const int32_t index = trie.starts(text[at]) ? trie.longest(text.substr(at), &length) : -1;
    if (index < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(index)];
    size_t begin = at;
    size_t end = at + length;
    at = end; // also when the match is refused: the search goes on behind it
    if (token.single_word && inside_word(text, begin, end))
      continue;
    if (token.lstrip && begin > done)
      begin -= trailing_space(text.substr(done, begin - done));
    if (token.rstrip)
      end += leading_space(text.substr(end));
    // White space that a match took along may hold the next match, which the reference still
    // reports; it has no text of its own left then.
    begin = std::max(begin, done);
    end = std::max(end, begin);
    if (done < begin)
      out.push_back({text.substr(done, begin - done), -1});
    out.push_back({text.substr(begin, end - begin), token.id});
    done = end;
  }
  if (done < text.size())
    out.push_back({text.substr(done), -1});
}

std::vector<AddedTokens::Stretch> AddedTokens::split(std::string_view text) const {
  std::vector<Stretch> first, out;
  split_pass(*raw_, text, first);
  for (const Stretch& stretch : first) {
    if (stretch.id >= 0)
      out.push_back(stretch);
    else
      split_pass(*normalized_, stretch.text, out);
  }
  return out;
}

} // namespace troupe
