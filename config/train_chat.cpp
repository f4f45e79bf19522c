#include "config/train_chat.hpp"

#include "config/chat_template.hpp"
#include "config/json.hpp"
#include "config/tokenizer.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>

namespace troupe {

namespace fs = std::filesystem;
namespace json = boost::json;

namespace {

// ---- a line -----------------------------------------------------------------------------------

caf::expected<ToolCall> read_tool_call(const json::object& object, const std::string& source,
                                       const std::string& prefix) {
  ToolCall call;
  JsonFields fields{object, source, prefix};
  call.id = fields.string_or("id", "");
  if (const auto* function = fields.object_or_null("function")) {
    JsonFields inner{*function, source, prefix + "function."};
    call.name = inner.string("name");
    const auto* arguments = inner.find("arguments"); // as text, or spelt out
    call.arguments = arguments && arguments->is_object() ? json::serialize(*arguments)
                                                         : inner.string("arguments");
    fields.adopt(inner);
  } else {
    fields.fail(Errc::malformed, "function", "expected an object with name and arguments");
  }
  if (!fields.ok())
    return fields.error();
  return call;
}

// The objects of a list.
caf::expected<std::vector<const json::object*>> objects_of(const json::object& parent,
                                                           const char* field,
                                                           const std::string& source,
                                                           const std::string& prefix) {
  const auto* value = parent.if_contains(field);
  if (!value || !value->is_array())
    return make_error(Errc::malformed,
                      fmt::format("{}: {}{}: expected a list", source, prefix, field));
  std::vector<const json::object*> objects;
  for (const auto& item : value->get_array()) {
    objects.push_back(item.if_object());
    if (objects.back() == nullptr)
      return make_error(Errc::malformed,
                        fmt::format("{}: {}{}[{}]: expected an object, got {}", source, prefix,
                                    field, objects.size() - 1, shown(item)));
  }
  return objects;
}

caf::expected<ChatMessage> read_message(const json::object& object, const std::string& source,
                                        const std::string& prefix) {
  JsonFields fields{object, source, prefix};
  ChatMessage message;
  const auto role = fields.string("role");
  const bool calls = fields.find("tool_calls") != nullptr;
  message.content = calls ? fields.string_or("content", "") : fields.string("content");
  message.tool_call_id = fields.string_or("tool_call_id", "");
  message.reasoning = fields.string_or("reasoning_content", "");
  if (!fields.ok())
    return fields.error();
  const auto known = chat_role_from_name(role);
  if (!known)
    return with_context(fmt::format("{}: {}role", source, prefix), known.error());
  message.role = *known;
  if (!calls)
    return message;
  const auto objects = objects_of(object, "tool_calls", source, prefix);
  if (!objects)
    return objects.error();
  for (size_t i = 0; i < objects->size(); ++i) {
    auto call = read_tool_call(*(*objects)[i], source, fmt::format("{}tool_calls[{}].", prefix, i));
    if (!call)
      return call.error();
    message.tool_calls.push_back(std::move(*call));
  }
  return message;
}

caf::expected<std::vector<ChatMessage>> read_messages(const std::string& line,
                                                      const std::string& source) {
  const auto object = parse_json_object(line, source);
  if (!object)
    return object.error();
  const auto objects = objects_of(*object, "messages", source, "");
  if (!objects)
    return objects.error();
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i < objects->size(); ++i) {
    auto message = read_message(*(*objects)[i], source, fmt::format("messages[{}].", i));
    if (!message)
      return message.error();
    messages.push_back(std::move(*message));
  }
  return messages;
}

caf::expected<ChatSample> read_sample(const std::string& line, const std::string& source,
                                      int64_t vocab_size, const Tokenizer& tokenizer,
                                      const ChatFormat& format) {
  const auto messages = read_messages(line, source);
  if (!messages)
    return messages.error();
  auto sample = encode_sample(tokenizer, format, *messages);
  if (!sample)
    return with_context(source, sample.error());
  for (const int32_t id : sample->ids)
    if (id >= vocab_size)
      return make_error(Errc::mismatch,
                        fmt::format("{}: token {} is not in the model's vocabulary of {} ids; is "
                                    "it another model's tokenizer?",
                                    source, id, vocab_size));
  return sample;
}

} // namespace

// ---- rows -------------------------------------------------------------------------------------

// First fit, in the order of the file: the oldest row with room. Looking at every row would take
// quadratic time, so only so many are kept open; where one more is needed, the fullest closes.
size_t ChatRows::row_for(size_t num_tokens) {
  constexpr size_t kOpenRows = 64;
  const auto fits = [&](size_t row) { return rows_[row].room >= num_tokens; };
  if (const auto at = std::ranges::find_if(open_rows_, fits); at != open_rows_.end())
    return *at;
  if (open_rows_.size() == kOpenRows)
    open_rows_.erase(
        std::ranges::min_element(open_rows_, {}, [&](size_t row) { return rows_[row].room; }));
  open_rows_.push_back(rows_.size());
  rows_.push_back({{}, room_, 0});
  return rows_.size() - 1;
}

void ChatRows::add(std::vector<int32_t> ids, std::vector<uint8_t> has_loss) {
  if (ids.size() > room_) {
    ids.resize(room_);
    has_loss.resize(room_);
    ++num_truncated_;
  }
  if (!has_loss.empty())
    has_loss[0] = 0; // nothing stands before it to predict it from
  const auto loss_tokens = std::ranges::count(has_loss, 1);
  if (loss_tokens == 0) {
    ++num_without_answer_;
    return;
  }
  auto& row = rows_[row_for(ids.size())];
  row.samples.push_back(samples_.size());
  row.room -= ids.size();
  row.loss_tokens += loss_tokens;
  samples_.push_back({ids_.size(), ids.size()});
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  has_loss_.insert(has_loss_.end(), has_loss.begin(), has_loss.end());
}

caf::expected<ChatRows> ChatRows::read(const fs::path& path, int64_t row_tokens, int64_t vocab_size,
                                       const Tokenizer& tokenizer) {
  std::error_code error;
  if (!fs::is_regular_file(path, error))
    return make_error(Errc::not_found,
                      fmt::format("{}: {}", path.string(), error ? error.message() : "not a file"));
  std::ifstream file{path};
  if (!file)
    return make_error(Errc::io_error, fmt::format("{}: can't be opened", path.string()));
  return read(file, path.string(), row_tokens, vocab_size, tokenizer);
}

caf::expected<ChatRows> ChatRows::read(std::istream& lines, const std::string& source,
                                       int64_t row_tokens, int64_t vocab_size,
                                       const Tokenizer& tokenizer) {
  const auto format = chat_format_of(tokenizer);
  if (!format)
    return with_context(source, format.error());
  ChatRows rows{static_cast<size_t>(row_tokens) + 1};
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos)
      continue;
    auto sample =
        read_sample(line, fmt::format("{}:{}", source, number), vocab_size, tokenizer, *format);
    if (!sample)
      return sample.error();
    rows.add(std::move(sample->ids), std::move(sample->answer));
  }
  if (lines.bad() || !lines.eof())
    return make_error(Errc::io_error,
                      fmt::format("{}: can't be read after line {}", source, number));
  if (rows.rows_.empty())
    return make_error(Errc::malformed,
                      fmt::format("{}: no answer (a message of role assistant) to learn from in {} "
                                  "samples",
                                  source, rows.num_without_answer_));
  return rows;
}

ChatRows::Sample ChatRows::sample(size_t row, size_t i) const {
  const auto& place = samples_[rows_[row].samples[i]];
  return {std::span{ids_}.subspan(place.begin, place.size),
          std::span{has_loss_}.subspan(place.begin, place.size)};
}

uint64_t ChatRows::digest() const {
  const uint64_t parts[] = {
      XXH3_64bits(ids_.data(), ids_.size() * sizeof(int32_t)),
      XXH3_64bits(has_loss_.data(), has_loss_.size()),
      XXH3_64bits(samples_.data(), samples_.size() * sizeof(Place)),
      room_,
  };
  return XXH3_64bits(parts, sizeof parts);
}

} // namespace troupe
