#include "config/chat_template.hpp"

#include "config/tokenizer_text.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace troupe {

namespace {

constexpr std::string_view kUser = "<｜User｜>";
constexpr std::string_view kAssistant = "<｜Assistant｜>";
constexpr std::string_view kCallsBegin = "<｜tool▁calls▁begin｜>";
constexpr std::string_view kCallsEnd = "<｜tool▁calls▁end｜>";
constexpr std::string_view kCallBegin = "<｜tool▁call▁begin｜>";
constexpr std::string_view kCallEnd = "<｜tool▁call▁end｜>";
constexpr std::string_view kOutputsBegin = "<｜tool▁outputs▁begin｜>";
constexpr std::string_view kOutputsEnd = "<｜tool▁outputs▁end｜>";
constexpr std::string_view kOutputBegin = "<｜tool▁output▁begin｜>";
constexpr std::string_view kOutputEnd = "<｜tool▁output▁end｜>";
constexpr std::string_view kToolSep = "<｜tool▁sep｜>";
constexpr std::string_view kThink = "<think>";
constexpr std::string_view kThinkEnd = "</think>";
constexpr std::string_view kMiddle = "<|im_middle|>";
constexpr std::string_view kEnd = "<|im_end|>";
constexpr std::string_view kKimiSystem = "<|im_system|>";
constexpr std::string_view kKimiUser = "<|im_user|>";
constexpr std::string_view kKimiAssistant = "<|im_assistant|>";

bool contains(std::string_view s, std::string_view part) {
  return s.find(part) != std::string_view::npos;
}

// Collects segments; neighbouring ordinary texts of one voice become one.
class Writer {
public:
  Writer& token(std::string_view name) {
    segments_.push_back({SegmentKind::token, std::string{name}, answer_});
    return *this;
  }
  Writer& tag(std::string_view name) {
    segments_.push_back({SegmentKind::token_or_text, std::string{name}, answer_});
    return *this;
  }
  Writer& text(std::string_view s) {
    if (s.empty())
      return *this;
    if (segments_.empty() || segments_.back().kind != SegmentKind::text ||
        segments_.back().answer != answer_)
      segments_.push_back({SegmentKind::text, {}, answer_});
    segments_.back().text += s;
    return *this;
  }
  // From here on the assistant speaks, or no longer.
  Writer& answer(bool speaks) {
    answer_ = speaks;
    return *this;
  }
  std::vector<ChatSegment> take() { return std::move(segments_); }

private:
  std::vector<ChatSegment> segments_;
  bool answer_ = false;
};

std::string joined_system(const std::vector<ChatMessage>& messages) {
  std::string system;
  bool first = true;
  for (const auto& m : messages) {
    if (m.role != ChatRole::system)
      continue;
    system += (first ? "" : "\n\n") + m.content;
    first = false;
  }
  return system;
}

// What an answer keeps in the history.
std::string_view without_thinking(std::string_view content, bool last_mark) {
  const size_t at = last_mark ? content.rfind(kThinkEnd) : content.find(kThinkEnd);
  return at == std::string_view::npos ? content : content.substr(at + kThinkEnd.size());
}

std::vector<ChatSegment> render_v2(const ChatFormat& format,
                                   const std::vector<ChatMessage>& messages,
                                   const ChatOptions& options) {
  Writer out;
  out.token(format.bos);
  for (const auto& m : messages) {
    if (m.role == ChatRole::user)
      out.text("User: ").text(m.content).text("\n\n");
    else if (m.role == ChatRole::assistant)
      out.text("Assistant: ").answer(true).text(m.content).token(format.eos).answer(false);
    else
      out.text(m.content).text("\n\n");
  }
  if (options.add_generation_prompt)
    out.text("Assistant:");
  return out.take();
}

void write_fenced_calls(Writer& out, const std::vector<ToolCall>& calls) {
  out.token(kCallsBegin);
  for (size_t i = 0; i < calls.size(); ++i) {
    if (i > 0)
      out.text("\n");
    out.token(kCallBegin).text("function").token(kToolSep).text(calls[i].name);
    out.text("\n```json\n").text(calls[i].arguments).text("\n```").token(kCallEnd);
  }
  out.token(kCallsEnd);
}

// V3 and R1. Tool outputs open a group that the next message of another role closes; the
// assistant's text follows a closed group directly.
std::vector<ChatSegment> render_v3(const ChatFormat& format,
                                   const std::vector<ChatMessage>& messages,
                                   const ChatOptions& options) {
  Writer out;
  out.token(format.bos).text(joined_system(messages));
  bool outputs_open = false;
  const auto close_outputs = [&] {
    if (outputs_open)
      out.token(kOutputsEnd);
    return std::exchange(outputs_open, false);
  };
  for (const auto& m : messages) {
    if (m.role == ChatRole::user) {
      close_outputs();
      out.token(kUser).text(m.content);
    } else if (m.role == ChatRole::tool) {
      if (!outputs_open)
        out.token(kOutputsBegin);
      else if (format.newline_between_outputs)
        out.text("\n");
      outputs_open = true;
      out.token(kOutputBegin).text(m.content).token(kOutputEnd);
    } else if (m.role == ChatRole::assistant) {
      const bool after_outputs = close_outputs();
      if (!after_outputs)
        out.token(kAssistant);
      const bool drop = format.drop_history_thinking && !after_outputs; // as published
      out.answer(true);
      out.text(drop ? without_thinking(m.content, true) : std::string_view{m.content});
      if (!m.tool_calls.empty())
        write_fenced_calls(out, m.tool_calls);
      out.token(format.eos).answer(false);
    }
  }
  const bool after_outputs = close_outputs();
  if (!options.add_generation_prompt || after_outputs)
    return out.take();
  out.token(kAssistant);
  if (format.family == ChatFamily::deepseek_r1)
    out.tag(kThink).text("\n");
  return out.take();
}

std::vector<ChatSegment> render_v31(const ChatFormat& format,
                                    const std::vector<ChatMessage>& messages,
                                    const ChatOptions& options) {
  Writer out;
  out.token(format.bos).text(joined_system(messages));
  bool after_user = false;
  bool after_tool = false;
  for (const auto& m : messages) {
    if (m.role == ChatRole::user) {
      out.token(kUser).text(m.content);
    } else if (m.role == ChatRole::tool) {
      out.token(kOutputBegin).text(m.content).token(kOutputEnd);
    } else if (m.role == ChatRole::assistant) {
      if (after_user)
        out.token(kAssistant).tag(kThinkEnd);
      const bool keep = after_tool || !m.tool_calls.empty();
      out.answer(true);
      out.text(keep ? std::string_view{m.content} : without_thinking(m.content, false));
      if (!m.tool_calls.empty()) {
        out.token(kCallsBegin);
        for (const auto& call : m.tool_calls)
          out.token(kCallBegin)
              .text(call.name)
              .token(kToolSep)
              .text(call.arguments)
              .token(kCallEnd);
        out.token(kCallsEnd);
      }
      out.token(format.eos).answer(false);
    } else {
      continue; // a system message stands at the front, and is no turn
    }
    after_user = m.role == ChatRole::user;
    after_tool = m.role == ChatRole::tool;
  }
  if (options.add_generation_prompt && after_user)
    out.token(kAssistant).tag(options.thinking ? kThink : kThinkEnd);
  return out.take();
}

void write_kimi_calls(Writer& out, const std::vector<ToolCall>& calls) {
  out.token("<|tool_calls_section_begin|>");
  for (const auto& call : calls)
    out.token("<|tool_call_begin|>")
        .text(call.id)
        .token("<|tool_call_argument_begin|>")
        .text(call.arguments)
        .token("<|tool_call_end|>");
  out.token("<|tool_calls_section_end|>");
}

// Kimi-K2-Thinking keeps the reasoning of the turn that is under way (after the last answer
// without tool calls) and shows empty tags for older ones.
size_t first_of_turn(const std::vector<ChatMessage>& messages) {
  for (size_t i = messages.size(); i > 0; --i)
    if (messages[i - 1].role == ChatRole::assistant && messages[i - 1].tool_calls.empty())
      return i;
  return 0;
}

std::vector<ChatSegment> render_kimi(const ChatFormat& format,
                                     const std::vector<ChatMessage>& messages,
                                     const ChatOptions& options) {
  Writer out;
  const auto head = [&](std::string_view token, std::string_view name) {
    out.token(token).text(name).token(kMiddle);
  };
  if (messages.front().role != ChatRole::system && !format.default_system.empty()) {
    head(kKimiSystem, "system");
    out.text(format.default_system).token(kEnd);
  }
  const size_t turn = first_of_turn(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& m = messages[i];
    head(m.role == ChatRole::user        ? kKimiUser
         : m.role == ChatRole::assistant ? kKimiAssistant
                                         : kKimiSystem,
         name_of(m.role));
    out.answer(m.role == ChatRole::assistant);
    if (m.role == ChatRole::assistant && format.history_thinking_tags)
      out.tag(kThink).text(i >= turn ? m.reasoning : "").tag(kThinkEnd);
    if (m.role == ChatRole::tool && format.tool_calls)
      out.text("## Return of ").text(m.tool_call_id).text("\n");
    out.text(m.content);
    if (!m.tool_calls.empty())
      write_kimi_calls(out, m.tool_calls);
    out.token(kEnd).answer(false);
  }
  if (options.add_generation_prompt)
    head(kKimiAssistant, "assistant");
  return out.take();
}

caf::error check(const ChatFormat& format, const std::vector<ChatMessage>& messages) {
  if (messages.empty())
    return make_error(Errc::invalid_argument, "messages: expected at least one");
  const bool kimi = format.family == ChatFamily::kimi;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& m = messages[i];
    const auto bad = [&](Errc code, std::string_view what) {
      return make_error(code, fmt::format("messages[{}]: {}", i, what));
    };
    if (!m.tool_calls.empty() && m.role != ChatRole::assistant)
      return bad(Errc::invalid_argument, "only an assistant's message may hold tool calls");
    const bool uses_tools = !m.tool_calls.empty() || (m.role == ChatRole::tool && !kimi);
    if (uses_tools && !format.tool_calls)
      return bad(Errc::unsupported, "the model's chat template has no tool calls");
    for (const auto& call : m.tool_calls)
      if (kimi ? call.id.empty() : call.name.empty())
        return bad(Errc::invalid_argument,
                   kimi ? "a tool call without its id" : "a tool call without a name");
    if (kimi && format.tool_calls && m.role == ChatRole::tool && m.tool_call_id.empty())
      return bad(Errc::invalid_argument, "a tool's message without tool_call_id");
  }
  return {};
}

// The system message that a Kimi template writes when there is none.
std::string default_system_of(std::string_view chat_template) {
  constexpr std::string_view kHead = "<|im_system|>system<|im_middle|>";
  for (size_t at = chat_template.find(kHead); at != std::string_view::npos;
       at = chat_template.find(kHead, at + 1)) {
    const auto rest = chat_template.substr(at + kHead.size());
    const auto text = rest.substr(0, rest.find(kEnd));
    if (text.size() < rest.size() && !text.empty() &&
        text.find_first_of("{}'\"\n") == std::string_view::npos)
      return std::string{text};
  }
  return {};
}

ChatFormat kimi_format(std::string_view chat_template) {
  ChatFormat format;
  format.family = ChatFamily::kimi;
  format.default_system = default_system_of(chat_template);
  format.tool_calls = contains(chat_template, "<|tool_calls_section_begin|>");
  format.history_thinking_tags = contains(chat_template, "<think></think>");
  return format;
}

ChatFormat v2_format() {
  ChatFormat format;
  format.family = ChatFamily::deepseek_v2;
  format.tool_calls = false;
  return format;
}

ChatFormat deepseek_format(std::string_view t) {
  ChatFormat format;
  format.drop_history_thinking =
      contains(t, "split('</think>')") || contains(t, "split(\"</think>\")");
  // In the file the newline is written \n, or is one.
  format.newline_between_outputs = contains(t, "\\n<｜tool▁output▁begin｜>") ||
                                   contains(t, "\n<｜tool▁output▁begin｜>") ||
                                   !contains(t, kOutputBegin);
  format.tool_calls = contains(t, kCallsBegin);
  if (contains(t, "<｜Assistant｜><think>"))
    format.family = ChatFamily::deepseek_r1;
  else if (contains(t, kThinkEnd) && contains(t, "thinking"))
    format.family = ChatFamily::deepseek_v31;
  return format;
}

} // namespace

std::string_view name_of(ChatRole role) {
  switch (role) {
  case ChatRole::system:
    return "system";
  case ChatRole::user:
    return "user";
  case ChatRole::assistant:
    return "assistant";
  case ChatRole::tool:
    return "tool";
  }
  return "unknown";
}

caf::expected<ChatRole> chat_role_from_name(std::string_view name) {
  for (const auto role : {ChatRole::system, ChatRole::user, ChatRole::assistant, ChatRole::tool})
    if (name == name_of(role))
      return role;
  return make_error(
      Errc::invalid_argument,
      fmt::format("role: expected system, user, assistant or tool, got {}", text::quoted(name)));
}

caf::expected<ChatFormat> detect_chat_format(std::string_view t) {
  if (contains(t, kMiddle))
    return kimi_format(t);
  if (contains(t, kUser) && contains(t, kAssistant))
    return deepseek_format(t);
  if (contains(t, "'User: '") && contains(t, "'Assistant:'"))
    return v2_format();
  return make_error(Errc::unsupported,
                    t.empty() ? "the model has no chat template"
                              : "the model's chat template is of no known family (DeepSeek V2, V3, "
                                "R1, V3.1, Moonlight and Kimi-K2 are known)");
}

caf::expected<ChatFormat> chat_format_of(const Tokenizer& tokenizer) {
  ChatFormat format;
  if (!tokenizer.chat_template().empty()) {
    auto found = detect_chat_format(tokenizer.chat_template());
    if (!found)
      return found;
    format = std::move(*found);
  } else if (tokenizer.token_id(kMiddle)) {
    format.family = ChatFamily::kimi;
    format.tool_calls = tokenizer.token_id("<|tool_calls_section_begin|>").has_value();
  } else if (!tokenizer.token_id(kUser) || !tokenizer.token_id(kAssistant)) {
    return make_error(Errc::unsupported, "the model has no chat template");
  }
  if (const auto bos = tokenizer.bos_token_id())
    format.bos = tokenizer.token_bytes(*bos).value_or(format.bos);
  if (const auto eos = tokenizer.eos_token_id())
    format.eos = tokenizer.token_bytes(*eos).value_or(format.eos);
  return format;
}

caf::expected<std::vector<ChatSegment>> render_chat(const ChatFormat& format,
                                                    const std::vector<ChatMessage>& messages,
                                                    const ChatOptions& options) {
  if (auto error = check(format, messages))
    return error;
  switch (format.family) {
  case ChatFamily::deepseek_v2:
    return render_v2(format, messages, options);
  case ChatFamily::deepseek_v3:
  case ChatFamily::deepseek_r1:
    return render_v3(format, messages, options);
  case ChatFamily::deepseek_v31:
    return render_v31(format, messages, options);
  case ChatFamily::kimi:
    return render_kimi(format, messages, options);
  }
  return make_error(Errc::internal, "a chat family without a template");
}

std::string to_text(const std::vector<ChatSegment>& segments) {
  std::string text;
  for (const auto& segment : segments)
    text += segment.text;
  return text;
}

namespace {

// Encodes segments one after the other: ordinary text in one go, and which of it is an answer is
// found again by the lengths of the tokens.
class SegmentEncoder {
public:
  explicit SegmentEncoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  caf::error add(const ChatSegment& segment) {
    const auto id =
        segment.kind == SegmentKind::text ? std::nullopt : tokenizer_.token_id(segment.text);
    if (!id && segment.kind == SegmentKind::token)
      return make_error(Errc::mismatch,
                        fmt::format("the chat template needs the token {}, which the tokenizer "
                                    "does not have",
                                    text::quoted(segment.text)));
    if (!id) {
      text_ += segment.text;
      text_answer_.resize(text_.size(), segment.answer ? 1 : 0);
      return {};
    }
    if (auto error = flush())
      return error;
    put(*id, segment.answer);
    return {};
  }

  caf::error flush() {
    const auto part = tokenizer_.encode(text_, false);
    if (!part)
      return part.error();
    auto at = text_answer_.begin();
    for (const int32_t id : *part) {
      const auto left = static_cast<size_t>(text_answer_.end() - at);
      const auto end = at + static_cast<std::ptrdiff_t>(
                                std::min(tokenizer_.token_bytes(id).value_or("").size(), left));
      put(id, std::find(at, end, 1) != end);
      at = end;
    }
    text_.clear();
    text_answer_.clear();
    return {};
  }

  ChatSample take() { return std::move(sample_); }

private:
  void put(int32_t id, bool answer) {
    sample_.ids.push_back(id);
    sample_.answer.push_back(answer ? 1 : 0);
  }

  const Tokenizer& tokenizer_;
  std::string text_; // not yet encoded
  std::vector<uint8_t> text_answer_;
  ChatSample sample_;
};

caf::expected<ChatSample> encode(const Tokenizer& tokenizer, const ChatFormat& format,
                                 const std::vector<ChatMessage>& messages,
                                 const ChatOptions& options) {
  const auto segments = render_chat(format, messages, options);
  if (!segments)
    return segments.error();
  SegmentEncoder encoder{tokenizer};
  for (const auto& segment : *segments)
    if (auto error = encoder.add(segment))
      return error;
  if (auto error = encoder.flush())
    return error;
  return encoder.take();
}

} // namespace

caf::expected<std::vector<int32_t>> encode_chat(const Tokenizer& tokenizer,
                                                const ChatFormat& format,
                                                const std::vector<ChatMessage>& messages,
                                                const ChatOptions& options) {
  auto sample = encode(tokenizer, format, messages, options);
  if (!sample)
    return sample.error();
  return std::move(sample->ids);
}

caf::expected<ChatSample> encode_sample(const Tokenizer& tokenizer, const ChatFormat& format,
                                        const std::vector<ChatMessage>& messages) {
  ChatOptions whole;
  whole.add_generation_prompt = false;
  return encode(tokenizer, format, messages, whole);
}

} // namespace troupe
