// The rows that training reads, whatever they come from: packed shards, a file of rows, or
// conversations. Pure but for the reading.
#pragma once

#include "config/errors.hpp"
#include "config/train_config.hpp"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace troupe {

class Tokenizer;

// A sequence: T input tokens and the target of the last.
struct TrainRow {
  std::vector<int32_t> ids;       // [T + 1]
  std::vector<uint8_t> has_loss;  // [T + 1]: this token counts where it is a target
  std::vector<int32_t> first_key; // [T + 1]: row (of the sequence) where this token's sample
                                  // begins: it sees nothing before; 0 for packed text
  std::vector<int32_t> positions; // [T + 1]: for rotation; counted from first_key
  int64_t padding = 0;            // so many tokens at the end only fill the row
};

// Immutable and thread-safe.
class TrainData {
public:
  // What config.data, config.tokens or config.chat names; chat needs the tokenizer (null: none) and
  // its template, and shards of another tokenizer are refused. Errors name file and line or place.
  [[nodiscard]] static caf::expected<std::shared_ptr<const TrainData>>
  open(const TrainConfig& config, int64_t vocab_size, const Tokenizer* tokenizer);
  // A folder of shards or a file of rows, in order: held-out text.
  [[nodiscard]] static caf::expected<std::shared_ptr<const TrainData>>
  open_held_out(const std::filesystem::path& path, int64_t sequence_length, int64_t vocab_size,
                const Tokenizer* tokenizer = nullptr);
  virtual ~TrainData() = default;

  [[nodiscard]] virtual int64_t sequence_length() const = 0; // T
  [[nodiscard]] virtual int64_t num_rows() const = 0;
  // Row `index` modulo num_rows. Shards and conversations come in an order keyed by the seed,
  // another in each round through the data; a file of rows in its own.
  [[nodiscard]] virtual caf::expected<TrainRow> row(int64_t index) const = 0;
  // Targets of that row that count in the loss of the main model.
  [[nodiscard]] virtual caf::expected<int64_t> num_loss_tokens(int64_t index) const = 0;
  // Differs between data of different contents (of packed text and rows: counts, and a sample of
  // rows), lengths of a sequence, or order.
  [[nodiscard]] virtual uint64_t digest() const = 0;
  // One line on what of the data is not used as it stands; empty: nothing.
  [[nodiscard]] virtual std::string warning() const { return {}; }
};

} // namespace troupe
