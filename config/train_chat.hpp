// Conversations to learn from (supervised fine-tuning): a file of JSON lines
//
//   {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
//
// rendered as the model's chat template shows them, and packed into rows of T + 1 tokens. What the
// assistant says has loss, its ending token included; everything else is only read. Samples of a
// row do not see each other (TrainRow::first_key).
#pragma once

#include "config/errors.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <span>
#include <string>
#include <vector>

namespace troupe {

class Tokenizer;

// Samples one after the other; a row names those it holds. 5 bytes per token are kept in memory.
class ChatRows {
public:
  // `row_tokens` is T. Errors name FILE:LINE and field.
  [[nodiscard]] static caf::expected<ChatRows> read(const std::filesystem::path& path,
                                                    int64_t row_tokens, int64_t vocab_size,
                                                    const Tokenizer& tokenizer);
  // The same of lines from anywhere; `source` names them in errors.
  [[nodiscard]] static caf::expected<ChatRows> read(std::istream& lines, const std::string& source,
                                                    int64_t row_tokens, int64_t vocab_size,
                                                    const Tokenizer& tokenizer);

  [[nodiscard]] size_t num_rows() const { return rows_.size(); }
  [[nodiscard]] size_t num_samples() const { return samples_.size(); }
  [[nodiscard]] int64_t num_truncated() const { return num_truncated_; } // longer than a row
  [[nodiscard]] int64_t num_without_answer() const { return num_without_answer_; } // left out

  struct Sample {
    std::span<const int32_t> ids;
    std::span<const uint8_t> has_loss; // [ids]; never the first
  };
  [[nodiscard]] size_t samples_of_row(size_t row) const { return rows_[row].samples.size(); }
  [[nodiscard]] Sample sample(size_t row, size_t i) const;
  // Tokens of the row that have loss; at least one.
  [[nodiscard]] int64_t num_loss_tokens(size_t row) const { return rows_[row].loss_tokens; }
  [[nodiscard]] uint64_t digest() const;

private:
  explicit ChatRows(size_t room) : room_(room) {}
  void add(std::vector<int32_t> ids, std::vector<uint8_t> has_loss);
  size_t row_for(size_t num_tokens);

  struct Place {
    size_t begin = 0, size = 0; // of ids_
  };
  struct Row {
    std::vector<size_t> samples;
    size_t room = 0;
    int64_t loss_tokens = 0;
  };
  size_t room_; // T + 1
  std::vector<int32_t> ids_;
  std::vector<uint8_t> has_loss_;
  std::vector<Place> samples_;
  std::vector<Row> rows_;
  std::vector<size_t> open_rows_; // that samples may still go to, ascending
  int64_t num_truncated_ = 0, num_without_answer_ = 0;
};

} // namespace troupe
