#include "apps/answer.hpp"

#include "actors/stopping.hpp"
#include "apps/console.hpp"
#include "config/chat_template.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <iterator>

namespace troupe {

Answer::Answer(std::shared_ptr<const Tokenizer> tokenizer, std::vector<std::string> stops,
               bool stream)
    : tokenizer_(std::move(tokenizer)), stops_(std::move(stops)), stream_(stream) {
  if (tokenizer_)
    detokenizer_.emplace(tokenizer_);
}

void Answer::add(std::span<const int32_t> tokens) {
  for (const int32_t id : tokens) {
    tokens_.push_back(id);
    if (detokenizer_)
      text_ += detokenizer_->push(id);
    else if (stream_)
      fmt::print("{}{}", tokens_.size() > 1 ? "," : "", id);
  }
  show();
}

void Answer::show() {
  const auto end = before_stop(text_, stops_).size();
  const auto safe = end < text_.size() ? end : safe_length(text_, stops_);
  if (stream_ && safe > shown_) {
    fmt::print("{}", std::string_view{text_}.substr(shown_, safe - shown_));
    shown_ = safe;
  }
  if (stream_)
    std::fflush(stdout);
}

void Answer::finish(bool stopped) {
  if (detokenizer_)
    text_ += detokenizer_->flush();
  if (stopped)
    text_ = std::string{before_stop(text_, stops_)};
  if (!stream_)
    return;
  if (text_.size() > shown_)
    fmt::print("{}", std::string_view{text_}.substr(shown_));
  fmt::print("\n");
  std::fflush(stdout);
}

caf::expected<std::vector<int32_t>> chat_prompt(const Tokenizer& tokenizer,
                                                const std::string& text) {
  auto format = chat_format_of(tokenizer);
  if (!format)
    return with_context("chat", format.error());
  ChatMessage message;
  message.content = text;
  return encode_chat(tokenizer, *format, {message});
}

double decode_rate(const RequestDone& done) {
  return done.decode_s > 0 && done.answer_tokens > 1
             ? static_cast<double>(done.answer_tokens - 1) / done.decode_s
             : 0;
}

std::string summary(const RequestDone& done, const ClusterStats& stats, const ClusterInfo& info) {
  std::string text = fmt::format(
      "\n{} prompt tokens in {:.2f} s, {} answer tokens at {:.1f} tokens/s ({}), {}, {}\n",
      done.prompt_tokens, done.prefill_s, done.answer_tokens, decode_rate(done), done.finish_reason,
      info.arithmetic, info.backend);
  if (done.drafted > 0)
    fmt::format_to(std::back_inserter(text), "drafts: {} of {} accepted ({:.0f} %)\n",
                   done.accepted, done.drafted,
                   100.0 * static_cast<double>(done.accepted) / static_cast<double>(done.drafted));
  fmt::format_to(std::back_inserter(text), "{:>4}  {:>12}  {:>12}  {:>10}  {:>10}  {:>10}\n",
                 "rank", "sent", "received", "weights", "KV cache", "resident");
  for (const auto& r : stats.ranks)
    fmt::format_to(std::back_inserter(text), "{:>4}  {:>12}  {:>12}  {:>10}  {:>10}  {:>10}\n",
                   r.rank.value, bytes_text(static_cast<int64_t>(r.bytes_sent)),
                   bytes_text(static_cast<int64_t>(r.bytes_received)), bytes_text(r.weight_bytes),
                   bytes_text(r.kv_bytes), bytes_text(r.resident_bytes));
  return text;
}

boost::json::array ranks_json(const ClusterStats& stats) {
  boost::json::array ranks;
  for (const auto& r : stats.ranks)
    ranks.push_back(boost::json::object{{"rank", r.rank.value},
                                        {"bytes_sent", r.bytes_sent},
                                        {"bytes_received", r.bytes_received},
                                        {"messages_sent", r.messages_sent},
                                        {"messages_received", r.messages_received},
                                        {"weight_bytes", r.weight_bytes},
                                        {"kv_bytes", r.kv_bytes},
                                        {"resident_bytes", r.resident_bytes}});
  return ranks;
}

} // namespace troupe
