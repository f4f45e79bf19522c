// Trains a byte-level BPE tokenizer: the merges and the vocabulary that Hugging Face's `tokenizers`
// (models.BPE with trainers.BpeTrainer) learns from the same text, in the same order, with the
// splits of DeepSeek-V3 (specification §11.1).
//
// Text is cut into pieces; equal pieces are counted once. Then the most frequent adjacent pair of
// tokens becomes a token, again and again; of equally frequent pairs the one with the lower ids.
#pragma once

#include "config/errors.hpp"
#include "config/tokenizer_split.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace troupe {

struct BpeTrainerOptions {
  int32_t vocab_size = 0;    // special tokens and the 256 bytes included
  int64_t min_frequency = 2; // rarer pairs never merge
  // Ids 0, 1, …; the first is the start token, the second the end token.
  std::vector<std::string> special_tokens;
};

// The special tokens of DeepSeek-V3 that training needs: start, end, padding, the two roles, and
// the three of fill-in-the-middle.
[[nodiscard]] std::vector<std::string> default_special_tokens();

struct TrainedBpe {
  std::vector<std::string> special_tokens;
  std::vector<std::string> tokens;                 // by id, bytes; those after the special ones
  std::vector<std::pair<int32_t, int32_t>> merges; // ids, in order of rank

  // The texts of tokenizer.json and tokenizer_config.json.
  [[nodiscard]] std::string tokenizer_json() const;
  [[nodiscard]] std::string tokenizer_config() const;
};

class BpeTrainer {
public:
  [[nodiscard]] static caf::expected<BpeTrainer> make(const BpeTrainerOptions& options);

  // Errc::malformed, with the offset, for text that is not UTF-8.
  [[nodiscard]] caf::error add_text(std::string_view text);
  [[nodiscard]] int64_t num_pieces() const { return static_cast<int64_t>(counts_.size()); }
  // A text too small for the vocabulary gives fewer tokens than asked for. `progress` is told the
  // size of the vocabulary now and then.
  [[nodiscard]] TrainedBpe train(const std::function<void(int32_t)>& progress = {}) const;

private:
  explicit BpeTrainer(const BpeTrainerOptions& options) : options_(options) {}

  BpeTrainerOptions options_;
  std::vector<Split> splits_;
  std::unordered_map<std::string, int64_t> counts_;
};

} // namespace troupe
