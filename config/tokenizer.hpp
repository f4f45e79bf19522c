// Text to token ids and back, from tokenizer.json (byte-level BPE) or tiktoken.model
// (specification §11). Immutable and thread-safe after loading.
#pragma once

#include "config/errors.hpp"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

class Tokenizer {
public:
  // A folder with tokenizer.json or tiktoken.model (and tokenizer_config.json and
  // chat_template.jinja where present). Errc::not_found when the folder has neither.
  [[nodiscard]] static caf::expected<std::shared_ptr<const Tokenizer>>
  load(const std::filesystem::path& folder);

  virtual ~Tokenizer() = default;
  // Adds no BOS. With `match_special`, added tokens are matched in the raw text first; without,
  // the text of a special token is ordinary text. Invalid UTF-8 is an error naming the offset.
  [[nodiscard]] virtual caf::expected<std::vector<int32_t>> encode(std::string_view text,
                                                                   bool match_special) const = 0;
  // The bytes of one token; special tokens give their text. Empty optional for an unknown id.
  [[nodiscard]] virtual std::optional<std::string> token_bytes(int32_t id) const = 0;
  [[nodiscard]] virtual bool is_special(int32_t id) const = 0;
  // Whole text of the ids, as the `tokenizers` library decodes it (broken UTF-8 becomes U+FFFD).
  // An id that has no token is an error that names it.
  [[nodiscard]] virtual caf::expected<std::string> decode(const std::vector<int32_t>& ids,
                                                          bool skip_special) const = 0;
  // One more than the largest id that has a token; ids from here on are never sampled. May exceed
  // the model's vocab_size; an id below it may still lack a token (see `token_bytes`).
  [[nodiscard]] virtual int32_t num_ids() const = 0;
  // As tokenizer_config.json says; where it is silent, what its tokenizer_class does.
  [[nodiscard]] virtual bool add_bos_token() const = 0;
  [[nodiscard]] virtual std::optional<int32_t> bos_token_id() const = 0;
  [[nodiscard]] virtual std::optional<int32_t> eos_token_id() const = 0;
  // An added token by its text, any other by its bytes or by its spelling in tokenizer.json ("Ġa").
  [[nodiscard]] virtual std::optional<int32_t> token_id(std::string_view token) const = 0;
  // chat_template.jinja or else the `chat_template` of tokenizer_config.json as written (of a list
  // the one named "default"); empty when absent.
  [[nodiscard]] virtual const std::string& chat_template() const = 0;
};

// Sixteen hexadecimal digits that differ between vocabularies: of every id's bytes. Two files that
// spell one vocabulary differently have the same.
[[nodiscard]] std::string vocabulary_digest(const Tokenizer& tokenizer);

// The texts of a tokenizer's files; `source` names them in errors. Absent ones are empty.
struct TokenizerFiles {
  std::string vocabulary;       // tokenizer.json or tiktoken.model
  std::string tokenizer_config; // tokenizer_config.json
  std::string chat_template;    // chat_template.jinja
  std::string source = "tokenizer";
};
[[nodiscard]] caf::expected<std::shared_ptr<const Tokenizer>>
load_tokenizer_json(const TokenizerFiles& files);
[[nodiscard]] caf::expected<std::shared_ptr<const Tokenizer>>
load_tiktoken(const TokenizerFiles& files);

// Turns a stream of ids into a stream of text; never emits half a UTF-8 character. What `push`
// and `flush` return is together what `decode` gives for the same ids; an id that has no token
// adds nothing.
class Detokenizer {
public:
  explicit Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special = true);
  // Text that became certain with this id; may be empty.
  [[nodiscard]] std::string push(int32_t id);
  // What is left at the end, incomplete characters as U+FFFD.
  [[nodiscard]] std::string flush();

private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_;
  std::string pending_;
};

} // namespace troupe
