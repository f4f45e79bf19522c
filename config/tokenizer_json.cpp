// tokenizer.json, the format of Hugging Face's `tokenizers`: byte-level BPE and nothing else.
// What would tokenize differently if it were ignored is refused by name. Ignored on purpose:
// post_processor (encode adds nothing), truncation and padding (settings of a call, not of the
// vocabulary), and fuse_unk and trim_offsets, which change no id.
#include "config/json.hpp"
#include "config/tokenizer_core.hpp"
#include "config/tokenizer_text.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace troupe {

namespace json = boost::json;

namespace {

constexpr JsonLimits kLimits{
    .max_bytes = kMaxTokenizerBytes, .max_depth = 32, .max_values = size_t{8} << 20};

std::string_view view(const json::string& s) { return {s.data(), s.size()}; }

// The parser's state: the file's source, and what it has built.
class JsonTokenizer {
public:
  explicit JsonTokenizer(const TokenizerFiles& files) : files_(files) {}

  caf::expected<std::shared_ptr<const Tokenizer>> load() {
    const auto root = parse_json_object(files_.vocabulary, files_.source, kLimits);
    if (!root)
      return root.error();
    const auto config =
        parse_tokenizer_config(files_.tokenizer_config, files_.source + ": tokenizer_config.json");
    if (!config)
      return config.error();
    for (const auto step :
         {&JsonTokenizer::normalizer, &JsonTokenizer::pre_tokenizer, &JsonTokenizer::decoder,
          &JsonTokenizer::vocabulary, &JsonTokenizer::added_tokens, &JsonTokenizer::merges})
      if (auto error = (this->*step)(*root))
        return error;
    return make_tokenizer(std::move(parts_), *config, files_);
  }

private:
  [[nodiscard]] caf::error bad(Errc code, std::string_view field, std::string_view text) const {
    return make_error(code, fmt::format("{}: {}: {}", files_.source, field, text));
  }
  [[nodiscard]] caf::error unsupported(std::string_view field, std::string_view what) const {
    return bad(Errc::unsupported, field, fmt::format("{} is not supported", what));
  }
  // "type" of a component object; the error names the field.
  caf::expected<std::string> type_of(const json::value& value, std::string_view field) const {
    if (!value.is_object())
      return bad(Errc::malformed, field, fmt::format("expected an object, got {}", shown(value)));
    JsonFields fields{value.get_object(), files_.source, std::string{field} + "."};
    auto type = fields.string("type");
    if (!fields.ok())
      return fields.error();
    return type;
  }
  // The elements of a component's list.
  caf::expected<const json::array*> list_of(const json::object& object, std::string_view name,
                                            std::string_view field) const {
    const auto* list = object.if_contains({name.data(), name.size()});
    if (!list || !list->is_array())
      return bad(Errc::malformed, field, fmt::format("expected an array {}", name));
    return &list->get_array();
  }

  // Only what changes nothing: null, or sequences of nothing.
  caf::error normalizer(const json::object& root) {
    const auto* value = root.if_contains("normalizer");
    return value ? empty_normalizer(*value) : caf::error{};
  }
  caf::error empty_normalizer(const json::value& value) {
    if (value.is_null())
      return {};
    const auto type = type_of(value, "normalizer");
    if (!type)
      return type.error();
    if (*type != "Sequence")
      return unsupported("normalizer", "the normalizer " + text::quoted(*type));
    const auto list = list_of(value.get_object(), "normalizers", "normalizer");
    if (!list)
      return list.error();
    for (const auto& item : **list)
      if (auto error = empty_normalizer(item))
        return error;
    return {};
  }

  caf::error pre_tokenizer(const json::object& root) {
    const auto* value = root.if_contains("pre_tokenizer");
    if (!value || value->is_null())
      return bad(Errc::unsupported, "pre_tokenizer", "expected one with ByteLevel, it is null");
    if (auto error = add_splits(*value, "pre_tokenizer"))
      return error;
    return byte_level_ ? caf::error{}
                       : bad(Errc::unsupported, "pre_tokenizer",
                             "expected ByteLevel as its last element; other vocabularies than "
                             "byte-level ones are not supported");
  }
  caf::error add_splits(const json::value& value, const std::string& field) {
    const auto type = type_of(value, field);
    if (!type)
      return type.error();
    const auto& object = value.get_object();
    JsonFields fields{object, files_.source, field + "."};
    if (*type == "Sequence") {
      const auto list = list_of(object, "pretokenizers", field);
      if (!list)
        return list.error();
      for (size_t i = 0; i < (*list)->size(); ++i)
        if (auto error = add_splits((**list)[i], fmt::format("{}.pretokenizers[{}]", field, i)))
          return error;
      return {};
    }
    if (byte_level_)
      return unsupported(field, text::quoted(*type) + " after ByteLevel");
    if (*type == "Split")
      return add_split(object, field);
    if (*type == "Digits")
      return add(Split::regex(R"(\p{N})",
                              fields.boolean_or("individual_digits", false)
                                  ? SplitBehavior::isolated
                                  : SplitBehavior::contiguous,
                              false),
                 fields, field);
    if (*type == "ByteLevel")
      return add_byte_level(fields, field);
    return unsupported(field, "the pre-tokenizer " + text::quoted(*type));
  }
  caf::error add_byte_level(JsonFields& fields, const std::string& field) {
    byte_level_ = true;
    if (fields.boolean_or("add_prefix_space", true))
      return unsupported(field, "ByteLevel with add_prefix_space");
    if (!fields.boolean_or("use_regex", true))
      return fields.error();
    return add(Split::regex(kByteLevelPattern, SplitBehavior::isolated, false), fields, field);
  }
  caf::error add_split(const json::object& object, const std::string& field) {
    static constexpr std::pair<std::string_view, SplitBehavior> kBehaviors[] = {
        {"Isolated", SplitBehavior::isolated},
        {"Removed", SplitBehavior::removed},
        {"MergedWithPrevious", SplitBehavior::merged_with_previous},
        {"MergedWithNext", SplitBehavior::merged_with_next},
        {"Contiguous", SplitBehavior::contiguous}};
    JsonFields fields{object, files_.source, field + "."};
    const auto name = fields.string("behavior");
    const bool invert = fields.boolean_or("invert", false);
    const auto* pattern = fields.object_or_null("pattern");
    if (!fields.ok())
      return fields.error();
    const auto* behavior = std::ranges::find(kBehaviors, name, [](auto& b) { return b.first; });
    if (behavior == std::end(kBehaviors))
      return unsupported(field, "the behavior " + text::quoted(name));
    if (!pattern || pattern->size() != 1)
      return bad(Errc::malformed, field, R"(pattern: expected {"Regex": …} or {"String": …})");
    JsonFields which{*pattern, files_.source, field + ".pattern."};
    const bool regex = which.has("Regex");
    const auto text = which.string(regex ? "Regex" : "String");
    if (!which.ok())
      return which.error();
    return add(regex ? Split::regex(text, behavior->second, invert)
                     : Split::literal(text, behavior->second, invert),
               fields, field);
  }
  caf::error add(caf::expected<Split> split, const JsonFields& fields, const std::string& field) {
    if (!fields.ok())
      return fields.error();
    if (!split)
      return with_context(files_.source + ": " + field, split.error());
    if (parts_.splits.size() == kMaxSplits)
      return unsupported(field, fmt::format("more than {} pre-tokenizers", kMaxSplits));
    parts_.splits.push_back(std::move(*split));
    return {};
  }

  // ByteLevel; a Sequence may add Fuse, which changes nothing then.
  caf::error decoder(const json::object& root) {
    const auto* value = root.if_contains("decoder");
    if (!value || value->is_null())
      return bad(Errc::unsupported, "decoder", "expected ByteLevel, it is null");
    const auto type = type_of(*value, "decoder");
    if (!type)
      return type.error();
    if (*type == "ByteLevel")
      return {};
    if (*type != "Sequence")
      return unsupported("decoder", "the decoder " + text::quoted(*type));
    const auto list = list_of(value->get_object(), "decoders", "decoder");
    if (!list)
      return list.error();
    for (size_t i = 0; i < (*list)->size(); ++i) {
      const auto inner = type_of((**list)[i], fmt::format("decoder.decoders[{}]", i));
      if (!inner)
        return inner.error();
      if (*inner != (i == 0 ? "ByteLevel" : "Fuse"))
        return unsupported("decoder", "the decoder " + text::quoted(*inner) + " in a Sequence");
    }
    return (*list)->empty() ? bad(Errc::unsupported, "decoder", "expected ByteLevel, it is empty")
                            : caf::error{};
  }

  caf::error check_model(JsonFields& model) {
    const auto type = model.string_or("type", "BPE");
    if (type != "BPE")
      return unsupported("model.type", text::quoted(type));
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (!model.string_or(name, "").empty())
        return unsupported(std::string{"model."} + name, "a text here");
    if (model.number_or("dropout", 0, 1, 0) != 0)
      return unsupported("model.dropout", "dropout");
    if (model.boolean_or("byte_fallback", false))
      return unsupported("model.byte_fallback", "byte fallback");
    unk_token_ = model.string_or("unk_token", "");
    ignore_merges_ = model.boolean_or("ignore_merges", false);
    return model.error();
  }

  caf::error vocabulary(const json::object& root) {
    JsonFields fields{root, files_.source};
    const auto* model = fields.object_or_null("model");
    if (!fields.ok())
      return fields.error();
    if (!model)
      return bad(Errc::malformed, "model", "expected an object, it is absent");
    model_ = model;
    JsonFields inner{*model, files_.source, "model."};
    if (auto error = check_model(inner))
      return error;
    vocab_ = inner.object_or_null("vocab");
    if (!inner.ok())
      return inner.error();
    if (!vocab_ || vocab_->empty())
      return bad(Errc::malformed, "model.vocab", "expected at least one token");
    for (const auto& [key, value] : *vocab_)
      if (auto error = add_entry(key, value))
        return error;
    return {};
  }
  caf::error add_entry(std::string_view token, const json::value& value) {
    const auto* id = value.if_int64();
    if (!id || *id < 0 || *id >= kMaxTokenIds)
      return bad(Errc::malformed, "model.vocab",
                 fmt::format("token {}: expected an id from 0 to {}, got {}", text::quoted(token),
                             kMaxTokenIds - 1, shown(value)));
    TokenEntry& entry = entry_at(static_cast<int32_t>(*id));
    if (entry.present)
      return bad(Errc::malformed, "model.vocab",
                 fmt::format("token {} has the id {} of another token", text::quoted(token), *id));
    entry.present = true;
    entry.bytes = text::unmap_bytes(token).value_or(std::string{token});
    return {};
  }
  TokenEntry& entry_at(int32_t id) {
    if (parts_.entries.size() <= static_cast<size_t>(id))
      parts_.entries.resize(static_cast<size_t>(id) + 1);
    return parts_.entries[static_cast<size_t>(id)];
  }
  [[nodiscard]] int32_t vocab_id(std::string_view token) const {
    const auto* value = vocab_->if_contains({token.data(), token.size()});
    return value ? static_cast<int32_t>(value->get_int64()) : -1;
  }

  caf::error added_tokens(const json::object& root) {
    const auto* value = root.if_contains("added_tokens");
    if (!value || value->is_null())
      return {};
    if (!value->is_array())
      return bad(Errc::malformed, "added_tokens", "expected an array, got " + shown(*value));
    std::vector<AddedToken> tokens;
    for (size_t i = 0; i < value->get_array().size(); ++i) {
      const auto& item = value->get_array()[i];
      const auto field = fmt::format("added_tokens[{}]", i);
      if (!item.is_object())
        return bad(Errc::malformed, field, "expected an object, got " + shown(item));
      JsonFields fields{item.get_object(), files_.source, field + "."};
      AddedToken token{.id = static_cast<int32_t>(fields.integer("id", 0, kMaxTokenIds - 1)),
                       .content = fields.string("content"),
                       .special = fields.boolean_or("special", false),
                       .normalized = fields.boolean_or("normalized", true),
                       .lstrip = fields.boolean_or("lstrip", false),
                       .rstrip = fields.boolean_or("rstrip", false),
                       .single_word = fields.boolean_or("single_word", false)};
      if (!fields.ok())
        return fields.error();
      tokens.push_back(std::move(token));
    }
    if (auto error = check_added_tokens(tokens, files_.source))
      return error;
    for (const auto& token : tokens)
      if (auto error = enter_added(token))
        return error;
    parts_.added = AddedTokens{std::move(tokens)};
    return {};
  }
  caf::error enter_added(const AddedToken& token) {
    const int32_t known = vocab_id(token.content);
    TokenEntry& entry = entry_at(token.id);
    if ((known >= 0 && known != token.id) || (known < 0 && entry.present))
      return bad(Errc::mismatch, "added_tokens",
                 fmt::format("{} has the id {}, but model.vocab has {}",
                             text::quoted(token.content), token.id,
                             known >= 0 ? fmt::format("{} for it", known) : "another token there"));
    entry.present = true;
    entry.special = token.special;
    entry.bytes = text::unmap_bytes(token.content).value_or(token.content);
    return {};
  }

  // The halves of one merge: "a b" or ["a", "b"].
  caf::expected<std::pair<std::string_view, std::string_view>> halves(const json::value& value,
                                                                      size_t i) const {
    if (const auto* s = value.if_string()) {
      const auto text = view(*s);
      const size_t space = text.find(' ');
      if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos)
        return std::pair{text.substr(0, space), text.substr(space + 1)};
    } else if (const auto* a = value.if_array();
               a && a->size() == 2 && (*a)[0].is_string() && (*a)[1].is_string()) {
      return std::pair{view((*a)[0].get_string()), view((*a)[1].get_string())};
    }
    return bad(Errc::malformed, fmt::format("model.merges[{}]", i),
               R"(expected "a b" or ["a", "b"], got )" + shown(value));
  }

  // Fills the pair table, the bytes and the tokens that encode to themselves.
  caf::error merges(const json::object&) {
    const auto* list = model_->if_contains("merges");
    if (!list || !list->is_array())
      return bad(Errc::malformed, "model.merges", "expected an array");
    PairTable pairs;
    pairs.reserve(list->get_array().size());
    for (size_t i = 0; i < list->get_array().size(); ++i)
      if (auto error = add_merge(list->get_array()[i], i, pairs))
        return error;
    std::array<int32_t, 256> byte_ids{};
    if (auto error = fill_bytes(byte_ids))
      return error;
    parts_.encoder.emplace(std::move(pairs), byte_ids);
    parts_.mapped_names = true;
    fill_tables();
    return {};
  }
  caf::error add_merge(const json::value& value, size_t i, PairTable& pairs) const {
    const auto both = halves(value, i);
    if (!both)
      return both.error();
    const std::string joined = std::string{both->first} + std::string{both->second};
    std::array<int32_t, 3> ids{};
    for (size_t k = 0;
         const std::string_view token : {both->first, both->second, std::string_view{joined}}) {
      ids[k] = vocab_id(token);
      if (ids[k] < 0)
        return bad(Errc::malformed, fmt::format("model.merges[{}]", i),
                   fmt::format("{} is not in model.vocab", text::quoted(token)));
      ++k;
    }
    pairs.put(ids[0], ids[1], Merge{static_cast<uint32_t>(i), ids[2]});
    return {};
  }
  caf::error fill_bytes(std::array<int32_t, 256>& byte_ids) const {
    for (size_t b = 0; b < byte_ids.size(); ++b) {
      std::string mapped;
      text::append_utf8(mapped, text::char_of_byte(static_cast<uint8_t>(b)));
      byte_ids[b] = vocab_id(mapped);
      if (byte_ids[b] < 0 && !unk_token_.empty())
        return unsupported(
            "model.unk_token",
            fmt::format("an unknown token with a vocabulary that lacks byte {:#04x}", b));
    }
    return {};
  }
  // Most pieces of real text are a token that its own merges lead to: those are looked up whole.
  void fill_tables() {
    ByteTable whole;
    whole.reserve(vocab_->size());
    parts_.by_bytes.reserve(vocab_->size());
    for (const auto& [key, value] : *vocab_) {
      const auto id = static_cast<int32_t>(value.get_int64());
      const std::string_view bytes = parts_.entries[static_cast<size_t>(id)].bytes;
      parts_.by_bytes.put(bytes, id);
      const bool mapped = text::unmap_bytes(key).has_value();
      if (mapped && (ignore_merges_ || parts_.encoder->merges_to(bytes, id)))
        whole.put(bytes, id);
    }
    parts_.encoder->set_whole(std::move(whole));
  }

  static constexpr size_t kMaxSplits = 64;

  const TokenizerFiles& files_;
  TokenizerParts parts_;
  const json::object* model_ = nullptr;
  const json::object* vocab_ = nullptr;
  std::string unk_token_;
  bool ignore_merges_ = false;
  bool byte_level_ = false;
};

} // namespace

caf::expected<std::shared_ptr<const Tokenizer>> load_tokenizer_json(const TokenizerFiles& files) {
  return JsonTokenizer{files}.load();
}

} // namespace troupe
