// The tokenizer both file formats build: added tokens, splits, byte-pair encoding, and a table of
// what each id stands for. Internal to the tokenizer.
#pragma once

#include "config/tokenizer.hpp"
#include "config/tokenizer_added.hpp"
#include "config/tokenizer_bpe.hpp"
#include "config/tokenizer_split.hpp"

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

inline constexpr size_t kMaxTokenizerBytes = size_t{128} << 20; // of any tokenizer file

// One id of the vocabulary.
struct TokenEntry {
  std::string bytes;
  bool present = false;
  bool special = false;
};

// What tokenizer_config.json says (specification §11.1).
struct TokenizerConfig {
  std::optional<bool> add_bos_token;
  std::string tokenizer_class;
  std::string bos_token, eos_token;     // empty: none
  std::string chat_template;            // empty: none
  std::vector<AddedToken> added_tokens; // of added_tokens_decoder, ascending ids
};

// An empty text is a file that does not exist.
[[nodiscard]] caf::expected<TokenizerConfig> parse_tokenizer_config(std::string_view json,
                                                                    std::string_view source);

// What `added_tokens` may be: no two with one id or one text, no empty or overlong or broken one.
[[nodiscard]] caf::error check_added_tokens(const std::vector<AddedToken>& tokens,
                                            std::string_view source);

struct TokenizerParts {
  // By id. The tables below and the encoder's keep views of these strings, so they may be moved as
  // a whole but not grow once the tables are filled.
  std::vector<TokenEntry> entries;
  std::vector<Split> splits;
  std::optional<BytePairEncoder> encoder;
  AddedTokens added{{}};
  ByteTable by_bytes;        // ordinary tokens, by their bytes
  bool mapped_names = false; // token_id takes spellings with the byte map's characters, too
};

// Resolves bos, eos and template of `config`; an error names `source` and what does not fit.
[[nodiscard]] caf::expected<std::shared_ptr<const Tokenizer>>
make_tokenizer(TokenizerParts parts, const TokenizerConfig& config, const TokenizerFiles& files);

} // namespace troupe
