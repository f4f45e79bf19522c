#include "config/tokenizer.hpp"

#include "config/json.hpp"
#include "config/tokenizer_core.hpp"
#include "config/tokenizer_text.hpp"

#include <fmt/format.h>
#include <xxhash.h>

namespace troupe {

namespace {

// The text of a file that may be absent: "" then.
caf::expected<std::string> read_optional(const std::filesystem::path& path) {
  auto text = read_text_file(path, kMaxTokenizerBytes);
  if (!text && code_of(text.error()) == Errc::not_found)
    return std::string{};
  return text;
}

} // namespace

caf::expected<std::shared_ptr<const Tokenizer>>
Tokenizer::load(const std::filesystem::path& folder) {
  TokenizerFiles files;
  const auto json = folder / "tokenizer.json";
  const auto tiktoken = folder / "tiktoken.model";
  std::error_code ec;
  const bool is_json = std::filesystem::exists(json, ec);
  if (!is_json && !std::filesystem::exists(tiktoken, ec))
    return make_error(Errc::not_found,
                      folder.string() + ": has neither tokenizer.json nor tiktoken.model");
  files.source = (is_json ? json : tiktoken).string();
  auto vocabulary = read_text_file(files.source, kMaxTokenizerBytes);
  if (!vocabulary)
    return std::move(vocabulary.error());
  auto config = read_optional(folder / "tokenizer_config.json");
  if (!config)
    return std::move(config.error());
  auto chat_template = read_optional(folder / "chat_template.jinja");
  if (!chat_template)
    return std::move(chat_template.error());
  files.vocabulary = std::move(*vocabulary);
  files.tokenizer_config = std::move(*config);
  files.chat_template = std::move(*chat_template);
  return is_json ? load_tokenizer_json(files) : load_tiktoken(files);
}

std::string vocabulary_digest(const Tokenizer& tokenizer) {
  uint64_t sum = static_cast<uint64_t>(tokenizer.num_ids());
  for (int32_t id = 0; id < tokenizer.num_ids(); ++id)
    if (const auto bytes = tokenizer.token_bytes(id)) // the sum so far, and which id this is
      sum = XXH3_64bits_withSeed(bytes->data(), bytes->size(), sum + static_cast<uint64_t>(id));
  return fmt::format("{:016x}", sum);
}

Detokenizer::Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

std::string Detokenizer::push(int32_t id) {
  if (skip_special_ && tokenizer_->is_special(id))
    return {};
  pending_ += tokenizer_->token_bytes(id).value_or("");
  return text::take_lossy(pending_, false);
}

std::string Detokenizer::flush() { return text::take_lossy(pending_, true); }

} // namespace troupe
