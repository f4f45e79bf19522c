// An answer as it grows: ids, text that may be shown, and the summary at its end.
#pragma once

#include "actors/messages.hpp"
#include "config/tokenizer.hpp"

#include <boost/json.hpp>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace troupe {

class Answer {
public:
  // Without a tokenizer the text stays empty and, when streaming, ids are shown instead.
  Answer(std::shared_ptr<const Tokenizer> tokenizer, std::vector<std::string> stops, bool stream);
  void add(std::span<const int32_t> tokens);
  // Shows what was held back for a stop string that did not come.
  void finish(bool stopped);
  [[nodiscard]] const std::vector<int32_t>& tokens() const { return tokens_; }
  // Without the ending token and the stop string.
  [[nodiscard]] const std::string& text() const { return text_; }

private:
  void show();
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::optional<Detokenizer> detokenizer_;
  std::vector<std::string> stops_;
  bool stream_;
  std::vector<int32_t> tokens_;
  std::string text_;
  size_t shown_ = 0;
};

// The ids of a user's message under the model's chat template, ready for the reply.
[[nodiscard]] caf::expected<std::vector<int32_t>> chat_prompt(const Tokenizer& tokenizer,
                                                              const std::string& text);

// Answer tokens per second after the first.
[[nodiscard]] double decode_rate(const RequestDone& done);
// The lines below an answer: tokens, speed, drafts, bytes on the wire and memory per rank.
[[nodiscard]] std::string summary(const RequestDone& done, const ClusterStats& stats,
                                  const ClusterInfo& info);
[[nodiscard]] boost::json::array ranks_json(const ClusterStats& stats);

} // namespace troupe
