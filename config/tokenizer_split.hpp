// Pre-tokenizing: cutting text into the pieces that BPE then works on, one split after the other,
// each on every piece that the one before produced (specification §11.1).
//
// Patterns are written for Oniguruma (what `tokenizers` runs); they run here on PCRE2 with UTF and
// UCP. `to_pcre` passes only constructs that mean the same in both and names the one it refuses.
// Internal to the tokenizer.
#pragma once

#include "config/errors.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

// [begin, end) of the text in bytes.
struct Piece {
  size_t begin = 0;
  size_t end = 0;
  [[nodiscard]] bool empty() const { return begin == end; }
  friend bool operator==(const Piece&, const Piece&) = default;
};

// What becomes of a match, by the names of tokenizer.json.
enum class SplitBehavior : uint8_t {
  isolated,             // a piece of its own
  removed,              // dropped
  merged_with_previous, // the end of the piece before it
  merged_with_next,     // the start of the piece after it
  contiguous,           // neighbouring matches are one piece
};

// An Oniguruma pattern as PCRE2 writes it.
[[nodiscard]] caf::expected<std::string> to_pcre(std::string_view onig_pattern);

// One compiled split. Immutable; any number of threads may use it.
class Split {
public:
  // `pattern` is an Oniguruma pattern, or PCRE2's own when `is_pcre`.
  [[nodiscard]] static caf::expected<Split> regex(std::string_view pattern, SplitBehavior behavior,
                                                  bool invert, bool is_pcre = false);
  // Every occurrence of `text`.
  [[nodiscard]] static caf::expected<Split> literal(std::string_view text, SplitBehavior behavior,
                                                    bool invert);

  Split(Split&&) noexcept;
  Split& operator=(Split&&) noexcept;
  ~Split();

private:
  friend class SplitRun;
  struct Impl;
  explicit Split(std::unique_ptr<const Impl> impl);
  static caf::expected<Split> compile(const std::string& pattern, uint32_t options,
                                      SplitBehavior behavior, bool invert, bool counted);
  std::unique_ptr<const Impl> impl_;
};

// The pieces of `text` (well-formed UTF-8) after all splits; empty ones are left out. A pattern
// that needs too many steps on this text is an error: the work is bounded by the text's length,
// whatever pattern and text are.
[[nodiscard]] caf::expected<std::vector<Piece>> split_all(const std::vector<Split>& splits,
                                                          std::string_view text);

// The GPT-2 pattern, which ByteLevel applies when its use_regex is set.
extern const std::string_view kByteLevelPattern;
// Moonlight's and Kimi-K2's pattern, in PCRE2's notation.
extern const std::string_view kKimiPattern;

} // namespace troupe
