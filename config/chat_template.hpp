// Chat templates (specification §11.3): messages to the text, or the ids, that a model was trained
// on. The published templates are Jinja programs; here each family is a plain function, and which
// one applies is read off the template's text.
//
// No text of a message can become a special token. A rendered conversation is a list of segments:
// control tokens by name, and ordinary text. `encode_chat` looks the former up and encodes the
// latter with special-token matching off, neighbouring ordinary text in one go, so that for texts
// without the names of special tokens the ids are those of encoding the whole.
#pragma once

#include "config/errors.hpp"
#include "config/tokenizer.hpp"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

enum class ChatFamily : uint8_t {
  deepseek_v2,  // "User: …\n\nAssistant: …", V2, V2-Lite and deepseek-llm
  deepseek_v3,  // V2.5, V3, V3-0324, R1-0528
  deepseek_r1,  // V3's, and a reply starts with <think>
  deepseek_v31, // a reply starts with <think> or </think>; tool calls without fences
  kimi,         // Moonlight and Kimi-K2: <|im_user|>user<|im_middle|>…<|im_end|>
};

// How a family's revisions differ, as far as it shows in the text.
struct ChatFormat {
  ChatFamily family = ChatFamily::deepseek_v3;
  std::string bos = "<｜begin▁of▁sentence｜>"; // Kimi's templates write none
  std::string eos = "<｜end▁of▁sentence｜>";
  bool drop_history_thinking = false;  // of an answer only what follows </think> is kept
  bool newline_between_outputs = true; // "\n" before the second and further tool outputs
  std::string default_system;          // Kimi: in place of an absent system message
  bool tool_calls = true;              // the template knows them
  bool history_thinking_tags = false;  // Kimi-K2-Thinking: answers carry <think>…</think>
};

enum class ChatRole : uint8_t { system, user, assistant, tool };
[[nodiscard]] std::string_view name_of(ChatRole role);
[[nodiscard]] caf::expected<ChatRole> chat_role_from_name(std::string_view name);

struct ToolCall {
  std::string id; // Kimi only, "functions.NAME:INDEX"
  std::string name;
  std::string arguments; // JSON text, passed on as it is
};

struct ChatMessage {
  ChatRole role = ChatRole::user;
  std::string content;
  std::vector<ToolCall> tool_calls; // of an assistant's message
  std::string tool_call_id;         // of a tool's message; Kimi only
  std::string reasoning;            // of an assistant's message; Kimi-K2-Thinking only
};

struct ChatOptions {
  bool add_generation_prompt = true; // end where the assistant's reply begins
  bool thinking = false;             // V3.1: ask for a reply that thinks first
};

enum class SegmentKind : uint8_t {
  text,          // ordinary, whatever it holds
  token,         // exactly one special token, by its text
  token_or_text, // <think>, which is a token in some vocabularies and plain text in others
};

struct ChatSegment {
  SegmentKind kind = SegmentKind::text;
  std::string text;
  bool answer = false; // the assistant says it, its ending token included; not what leads up to it
  friend bool operator==(const ChatSegment&, const ChatSegment&) = default;
};

// From a template's text. Unsupported when no known marker occurs.
[[nodiscard]] caf::expected<ChatFormat> detect_chat_format(std::string_view chat_template);
// From the tokenizer's template, or, when it has none, from its special tokens; the names of its
// BOS and EOS included.
[[nodiscard]] caf::expected<ChatFormat> chat_format_of(const Tokenizer& tokenizer);

// Invalid when the messages are empty or one holds what the format has no place for; the error
// names the message by its index.
[[nodiscard]] caf::expected<std::vector<ChatSegment>>
render_chat(const ChatFormat& format, const std::vector<ChatMessage>& messages,
            const ChatOptions& options = {});
// The segments' texts in a row.
[[nodiscard]] std::string to_text(const std::vector<ChatSegment>& segments);

// Includes BOS where the template has it: add no other.
[[nodiscard]] caf::expected<std::vector<int32_t>>
encode_chat(const Tokenizer& tokenizer, const ChatFormat& format,
            const std::vector<ChatMessage>& messages, const ChatOptions& options = {});

// A conversation to learn from: no prompt for a reply at its end.
struct ChatSample {
  std::vector<int32_t> ids;
  std::vector<uint8_t> answer; // [ids]: this token, or a part of it, is the assistant's
};
[[nodiscard]] caf::expected<ChatSample> encode_sample(const Tokenizer& tokenizer,
                                                      const ChatFormat& format,
                                                      const std::vector<ChatMessage>& messages);

} // namespace troupe
