// Added tokens: texts that become one token before anything else looks at them. Matched as
// `tokenizers` does: leftmost, longest; first those that ignore normalization, then, in what is
// left, those that do not. Internal to the tokenizer.
#pragma once

#include "config/errors.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool special = false;     // left out when decoding with skip_special
  bool normalized = false;  // matched in the second pass
  bool lstrip = false;      // takes the white space before it along
  bool rstrip = false;      // takes the white space after it along
  bool single_word = false; // no match inside a word
};

// Bounds the time to match: a text is looked at no more often than this for each of its bytes.
inline constexpr size_t kMaxAddedTokenBytes = 1024;
inline constexpr size_t kMaxAddedTokens = 65536;
inline constexpr size_t kMaxAddedBytesTotal = size_t{1} << 20; // bounds the matcher's memory

class AddedTokens {
public:
  // A stretch of text: one added token, or (id −1) ordinary text.
  struct Stretch {
    std::string_view text;
    int32_t id = -1;
  };

  // Contents must be non-empty, well-formed UTF-8 and unlike each other.
  explicit AddedTokens(std::vector<AddedToken> tokens);
  AddedTokens(AddedTokens&&) noexcept;
  AddedTokens& operator=(AddedTokens&&) noexcept;
  ~AddedTokens();

  // `text` is well-formed UTF-8; the stretches are views into it, ordinary ones are
  // not empty.
  [[nodiscard]] std::vector<Stretch> split(std::string_view text) const;
  [[nodiscard]] const std::vector<AddedToken>& tokens() const { return tokens_; }
  // -1 when there is none.
  [[nodiscard]] int32_t find(std::string_view content) const;

private:
  class Trie;
  void split_pass(const Trie& trie, std::string_view text, std::vector<Stretch>& out) const;

  std::vector<AddedToken> tokens_;
  std::unique_ptr<const Trie> raw_;
  std::unique_ptr<const Trie> normalized_;
};

} // namespace troupe
