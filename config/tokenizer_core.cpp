#include "config/tokenizer_core.hpp"

#include "config/json.hpp"
#include "config/tokenizer_text.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <set>

namespace troupe {

namespace json = boost::json;

namespace {

class BpeTokenizer final : public Tokenizer {
public:
  BpeTokenizer(TokenizerParts parts, bool add_bos, std::string chat_template)
      : parts_(std::move(parts)), add_bos_(add_bos), chat_template_(std::move(chat_template)) {}

  // While loading only: finding the two needs the tokenizer itself.
  caf::error find_ends(const TokenizerConfig& config, std::string_view source) {
    if (auto error = find_end("bos_token", config.bos_token, source, bos_))
      return error;
    return find_end("eos_token", config.eos_token, source, eos_);
  }

  caf::expected<std::vector<int32_t>> encode(std::string_view text,
                                             bool match_special) const override {
    if (const auto offset = text::first_invalid_utf8(text))
      return make_error(Errc::invalid_argument,
                        fmt::format("the text is not valid UTF-8 at byte {}", *offset));
    std::vector<int32_t> ids;
    if (!match_special) {
      if (auto error = encode_ordinary(text, ids))
        return error;
      return ids;
    }
    for (const auto& stretch : parts_.added.split(text)) {
      if (stretch.id >= 0)
        ids.push_back(stretch.id);
      else if (auto error = encode_ordinary(stretch.text, ids))
        return error;
    }
    return ids;
  }

  std::optional<std::string> token_bytes(int32_t id) const override {
    const TokenEntry* entry = find(id);
    return entry ? std::optional{entry->bytes} : std::nullopt;
  }

  bool is_special(int32_t id) const override {
    const TokenEntry* entry = find(id);
    return entry && entry->special;
  }

  caf::expected<std::string> decode(const std::vector<int32_t>& ids,
                                    bool skip_special) const override {
    std::string bytes;
    for (const int32_t id : ids) {
      const TokenEntry* entry = find(id);
      if (!entry)
        return make_error(
            Errc::invalid_argument,
            fmt::format("the tokenizer has no token with id {} (its ids are below {})", id,
                        num_ids()));
      if (!(skip_special && entry->special))
        bytes += entry->bytes;
    }
    return text::take_lossy(bytes, true);
  }

  int32_t num_ids() const override { return static_cast<int32_t>(parts_.entries.size()); }
  bool add_bos_token() const override { return add_bos_; }
  std::optional<int32_t> bos_token_id() const override { return bos_; }
  std::optional<int32_t> eos_token_id() const override { return eos_; }
  const std::string& chat_template() const override { return chat_template_; }

  std::optional<int32_t> token_id(std::string_view token) const override {
    int32_t id = parts_.added.find(token);
    if (id < 0)
      id = parts_.by_bytes.find(token);
    if (id < 0 && parts_.mapped_names)
      if (const auto bytes = text::unmap_bytes(token))
        id = parts_.by_bytes.find(*bytes);
    return id < 0 ? std::nullopt : std::optional{id};
  }

private:
  [[nodiscard]] const TokenEntry* find(int32_t id) const {
    if (id < 0 || id >= num_ids() || !parts_.entries[static_cast<size_t>(id)].present)
      return nullptr;
    return &parts_.entries[static_cast<size_t>(id)];
  }

  caf::error find_end(std::string_view field, const std::string& token, std::string_view source,
                      std::optional<int32_t>& id) {
    if (token.empty())
      return {};
    id = token_id(token);
    if (id)
      return {};
    return make_error(Errc::malformed,
                      fmt::format("{}: tokenizer_config.json: {}: {} is not in the vocabulary",
                                  source, field, text::quoted(token)));
  }

  caf::error encode_ordinary(std::string_view text, std::vector<int32_t>& ids) const {
    const auto pieces = split_all(parts_.splits, text);
    if (!pieces)
      return pieces.error();
    for (const Piece& p : *pieces)
      if (auto error = parts_.encoder->encode(text.substr(p.begin, p.end - p.begin), ids))
        return error;
    return {};
  }

  TokenizerParts parts_;
  bool add_bos_;
  std::string chat_template_;
  std::optional<int32_t> bos_, eos_;
};

// A token named by a string or by an object with `content`; empty when null or absent.
std::string named_token(JsonFields& fields, std::string_view name, std::string_view source) {
  const auto* value = fields.find(name);
  if (!value)
    return {};
  if (!value->is_object())
    return fields.string(name);
  JsonFields nested{value->get_object(), std::string{source}, std::string{name} + "."};
  auto content = nested.string("content");
  fields.adopt(nested);
  return content;
}

// A string, or a list of {"name": …, "template": …} of which "default" counts.
std::string template_text(JsonFields& fields, std::string_view source) {
  const auto* value = fields.find("chat_template");
  if (!value)
    return {};
  if (!value->is_array())
    return fields.string("chat_template");
  for (const auto& item : value->get_array()) {
    if (!item.is_object()) {
      fields.fail(Errc::malformed, "chat_template", "expected a list of objects");
      return {};
    }
    JsonFields nested{item.get_object(), std::string{source}, "chat_template[]."};
    const auto name = nested.string("name");
    auto text = nested.string("template");
    fields.adopt(nested);
    if (name == "default")
      return text;
  }
  return {};
}

// A key of added_tokens_decoder: a decimal id.
std::optional<int32_t> parse_id(std::string_view s) {
  int32_t id = -1;
  const auto [end, ec] = std::from_chars(s.data(), s.data() + s.size(), id);
  if (ec != std::errc{} || end != s.data() + s.size() || id < 0 || id >= kMaxTokenIds)
    return std::nullopt;
  return id;
}

void read_added_tokens(JsonFields& fields, std::string_view source,
                       std::vector<AddedToken>& tokens) {
  const auto* decoder = fields.object_or_null("added_tokens_decoder");
  if (!decoder)
    return;
  for (const auto& [key, value] : *decoder) {
    const auto id = parse_id(key);
    if (!id || !value.is_object())
      return fields.fail(Errc::malformed, "added_tokens_decoder",
                         fmt::format("expected ids from 0 to {} with an object each, got {}",
                                     kMaxTokenIds - 1, text::quoted(key)));
    JsonFields nested{value.get_object(), std::string{source},
                      fmt::format("added_tokens_decoder[{}].", *id)};
    tokens.push_back(AddedToken{.id = *id,
                                .content = nested.string("content"),
                                .special = nested.boolean_or("special", false),
                                .lstrip = nested.boolean_or("lstrip", false),
                                .rstrip = nested.boolean_or("rstrip", false),
                                .single_word = nested.boolean_or("single_word", false)});
    fields.adopt(nested);
    if (!fields.ok())
      return;
  }
  std::ranges::sort(tokens, {}, &AddedToken::id);
}

} // namespace

caf::expected<TokenizerConfig> parse_tokenizer_config(std::string_view text,
                                                      std::string_view source) {
  TokenizerConfig config;
  if (text.empty())
    return config;
  const auto root = parse_json_object(text, source);
  if (!root)
    return root.error();
  JsonFields fields{*root, std::string{source}};
  if (fields.find("add_bos_token"))
    config.add_bos_token = fields.boolean("add_bos_token");
  config.tokenizer_class = fields.string_or("tokenizer_class", "");
  config.bos_token = named_token(fields, "bos_token", source);
  config.eos_token = named_token(fields, "eos_token", source);
  config.chat_template = template_text(fields, source);
  read_added_tokens(fields, source, config.added_tokens);
  if (!fields.ok())
    return fields.error();
  return config;
}

caf::error check_added_tokens(const std::vector<AddedToken>& tokens, std::string_view source) {
  std::set<std::string_view> contents;
  std::set<int32_t> ids;
  size_t total = 0;
  const auto bad = [&](const AddedToken& token, std::string_view what) {
    return make_error(Errc::malformed, fmt::format("{}: the added token {} with id {} {}", source,
                                                   text::quoted(token.content), token.id, what));
  };
  if (tokens.size() > kMaxAddedTokens)
    return make_error(Errc::unsupported,
                      fmt::format("{}: {} added tokens, at most {} are supported", source,
                                  tokens.size(), kMaxAddedTokens));
  for (const auto& token : tokens) {
    if (token.content.empty())
      return bad(token, "is empty");
    if (token.content.size() > kMaxAddedTokenBytes)
      return bad(token, fmt::format("is longer than {} bytes", kMaxAddedTokenBytes));
    if (text::first_invalid_utf8(token.content))
      return bad(token, "is not valid UTF-8");
    if (!ids.insert(token.id).second)
      return bad(token, "has an id that another has, too");
    if (!contents.insert(token.content).second)
      return bad(token, "appears twice");
    total += token.content.size();
  }
  if (total > kMaxAddedBytesTotal)
    return make_error(Errc::unsupported,
                      fmt::format("{}: the added tokens have {} bytes, at most {} are supported",
                                  source, total, kMaxAddedBytesTotal));
  return {};
}

caf::expected<std::shared_ptr<const Tokenizer>>
make_tokenizer(TokenizerParts parts, const TokenizerConfig& config, const TokenizerFiles& files) {
  // tokenizer_config.json of old Llama-style checkpoints leaves out what that class does anyway.
  const bool llama =
      config.tokenizer_class == "LlamaTokenizerFast" || config.tokenizer_class == "LlamaTokenizer";
  const bool add_bos = config.add_bos_token.value_or(llama);
  const auto& chat_template =
      files.chat_template.empty() ? config.chat_template : files.chat_template;
  auto tokenizer = std::make_shared<BpeTokenizer>(std::move(parts), add_bos, chat_template);
  if (auto error = tokenizer->find_ends(config, files.source))
    return error;
  return std::shared_ptr<const Tokenizer>{std::move(tokenizer)};
}

} // namespace troupe
