#include "config/train_data.hpp"

#include "config/dataset.hpp"
#include "config/permutation.hpp"
#include "config/tokenizer.hpp"
#include "config/train_chat.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

namespace troupe {

namespace fs = std::filesystem;

namespace {

uint64_t mix(uint64_t a, uint64_t b) {
  const uint64_t both[] = {a, b};
  return XXH3_64bits(both, sizeof both);
}

// Which row of the data is the `index`-th to be trained on.
class RowOrder {
public:
  // Without a seed, as they stand.
  RowOrder(int64_t num_rows, std::optional<uint64_t> seed) : num_rows_(num_rows), seed_(seed) {}
  [[nodiscard]] int64_t operator()(int64_t index) const {
    if (!seed_)
      return index % num_rows_;
    const auto round = static_cast<uint64_t>(index / num_rows_);
    const KeyedPermutation order{static_cast<uint64_t>(num_rows_), mix(*seed_, round)};
    return static_cast<int64_t>(order(static_cast<uint64_t>(index % num_rows_)));
  }
  [[nodiscard]] uint64_t digest() const { return seed_ ? mix(1, *seed_) : 0; }

private:
  int64_t num_rows_;
  std::optional<uint64_t> seed_;
};

// ---- packed text, or rows as they are ---------------------------------------------------------

class PackedRows final : public TrainData {
public:
  PackedRows(TokenRows rows, std::optional<uint64_t> seed)
      : rows_(std::move(rows)), order_(rows_.num_rows(), seed) {}
  [[nodiscard]] int64_t sequence_length() const override { return rows_.row_tokens(); }
  [[nodiscard]] int64_t num_rows() const override { return rows_.num_rows(); }
  [[nodiscard]] caf::expected<TrainRow> row(int64_t index) const override {
    const auto n = static_cast<size_t>(rows_.row_tokens()) + 1;
    TrainRow row;
    row.ids.resize(n);
    if (auto error = rows_.read(order_(index), row.ids))
      return error;
    row.has_loss.assign(n, 1);
    row.first_key.assign(n, 0);
    row.positions.resize(n);
    for (size_t i = 0; i < n; ++i)
      row.positions[i] = static_cast<int32_t>(i);
    return row;
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t /*index*/) const override {
    return rows_.row_tokens();
  }
  [[nodiscard]] uint64_t digest() const override {
    constexpr int64_t kSamples = 64;
    uint64_t sum = mix(static_cast<uint64_t>(num_rows()), order_.digest());
    sum = mix(sum, static_cast<uint64_t>(rows_.num_tokens()));
    sum = mix(sum, static_cast<uint64_t>(rows_.row_tokens()));
    std::vector<int32_t> ids(static_cast<size_t>(rows_.row_tokens()) + 1);
    for (int64_t s = 0; s < kSamples; ++s)
      // What can't be read is an error where it is trained on.
      if (!rows_.read(s * num_rows() / kSamples, ids))
        sum = mix(sum, XXH3_64bits(ids.data(), ids.size() * sizeof(int32_t)));
    return sum;
  }

private:
  TokenRows rows_;
  RowOrder order_;
};

// A file of rows comes from anywhere, so that a wrong token is better found now than after an hour;
// beyond this many tokens looking would take longer than a moment.
caf::error check_tokens(const TokenRows& rows) {
  constexpr int64_t kMost = int64_t{1} << 26;
  if (rows.num_tokens() > kMost)
    return {};
  std::vector<int32_t> ids(static_cast<size_t>(rows.row_tokens()) + 1);
  for (int64_t i = 0; i < rows.num_rows(); ++i)
    if (auto error = rows.read(i, ids))
      return error;
  return {};
}

caf::error check_vocabulary(const fs::path& folder, const Tokenizer* tokenizer) {
  std::error_code ignored; // what is no folder has no dataset.json
  if (tokenizer == nullptr || !fs::is_directory(folder, ignored))
    return {};
  const auto info = read_dataset_info(folder);
  if (!info)
    return info.error();
  if (!info->vocabulary.empty() && info->vocabulary != vocabulary_digest(*tokenizer))
    return make_error(
        Errc::mismatch,
        fmt::format("{}: was made with another tokenizer than the model's", folder.string()));
  return {};
}

caf::expected<std::shared_ptr<const TrainData>>
open_packed(const fs::path& path, std::optional<int64_t> length, int64_t vocab_size,
            const Tokenizer* tokenizer, std::optional<uint64_t> seed) {
  auto rows = TokenRows::open(path, length, vocab_size);
  if (!rows)
    return rows.error();
  if (auto error = check_vocabulary(path, tokenizer))
    return error;
  std::error_code ignored; // what was opened is there
  if (!fs::is_directory(path, ignored))
    if (auto error = check_tokens(*rows))
      return error;
  return std::shared_ptr<const TrainData>{std::make_shared<PackedRows>(std::move(*rows), seed)};
}

caf::expected<std::shared_ptr<const TrainData>> open_tokens(const TrainConfig& config,
                                                            int64_t vocab_size) {
  std::error_code ignored; // opening says what is wrong
  if (fs::is_directory(config.tokens, ignored))
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: a folder, expected a file of rows; a folder of shards is "
                                  "given as data",
                                  config.tokens.string()));
  auto rows = TokenRows::open(config.tokens, config.sequence_length, vocab_size);
  if (!rows)
    return rows.error();
  if (auto error = check_tokens(*rows))
    return error;
  return std::shared_ptr<const TrainData>{
      std::make_shared<PackedRows>(std::move(*rows), std::nullopt)};
}

// ---- conversations ----------------------------------------------------------------------------

class PackedChat final : public TrainData {
public:
  PackedChat(ChatRows rows, int64_t length, int32_t padding, uint64_t seed, std::string source)
      : rows_(std::move(rows)), length_(length), padding_(padding), order_(num_rows(), seed),
        source_(std::move(source)) {}
  [[nodiscard]] int64_t sequence_length() const override { return length_; }
  [[nodiscard]] int64_t num_rows() const override { return static_cast<int64_t>(rows_.num_rows()); }
  [[nodiscard]] caf::expected<TrainRow> row(int64_t index) const override {
    const auto at = static_cast<size_t>(order_(index));
    const auto n = static_cast<size_t>(length_) + 1;
    TrainRow row;
    for (size_t i = 0; i < rows_.samples_of_row(at); ++i) {
      const auto sample = rows_.sample(at, i);
      append(row, sample.ids, sample.has_loss);
    }
    const std::vector<int32_t> padding(n - row.ids.size(), padding_);
    append(row, padding, std::vector<uint8_t>(padding.size(), 0));
    row.padding = static_cast<int64_t>(padding.size());
    return row;
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t index) const override {
    return rows_.num_loss_tokens(static_cast<size_t>(order_(index)));
  }
  [[nodiscard]] uint64_t digest() const override { return mix(rows_.digest(), order_.digest()); }
  [[nodiscard]] std::string warning() const override {
    std::string text;
    if (rows_.num_truncated() > 0)
      text = fmt::format("{} of {} samples are longer than {} tokens and lose their end",
                         rows_.num_truncated(), num_samples(), length_ + 1);
    if (rows_.num_without_answer() > 0)
      text += fmt::format("{}{} of {} samples have no answer to learn from and are left out",
                          text.empty() ? "" : "; ", rows_.num_without_answer(), num_samples());
    return text.empty() ? text : source_ + ": " + text;
  }

private:
  static void append(TrainRow& row, std::span<const int32_t> ids, std::span<const uint8_t> loss) {
    const auto first = static_cast<int32_t>(row.ids.size());
    row.ids.insert(row.ids.end(), ids.begin(), ids.end());
    row.has_loss.insert(row.has_loss.end(), loss.begin(), loss.end());
    row.first_key.insert(row.first_key.end(), ids.size(), first);
    for (size_t i = 0; i < ids.size(); ++i)
      row.positions.push_back(static_cast<int32_t>(i));
  }
  [[nodiscard]] int64_t num_samples() const { // of the file
    return static_cast<int64_t>(rows_.num_samples()) + rows_.num_without_answer();
  }

  ChatRows rows_;
  int64_t length_;
  int32_t padding_;
  RowOrder order_;
  std::string source_;
};

caf::expected<std::shared_ptr<const TrainData>>
open_chat(const TrainConfig& config, int64_t vocab_size, const Tokenizer* tokenizer) {
  if (tokenizer == nullptr)
    return make_error(Errc::not_found,
                      fmt::format("{}: conversations need a tokenizer, and the model has none",
                                  config.chat.string()));
  if (!config.sequence_length)
    return make_error(Errc::invalid_argument, "sequence_length: expected the tokens of a row");
  const int64_t length = *config.sequence_length;
  auto rows = ChatRows::read(config.chat, length, vocab_size, *tokenizer);
  if (!rows)
    return rows.error();
  return std::shared_ptr<const TrainData>{
      std::make_shared<PackedChat>(std::move(*rows), length, tokenizer->eos_token_id().value_or(0),
                                   config.seed, config.chat.string())};
}

// ---- all of them ------------------------------------------------------------------------------

// Rows of a micro-batch are counted in 32 bits, tokens of a run in 64.
caf::error check_extent(const TrainConfig& config, int64_t length) {
  const auto row = static_cast<double>(length);
  if (static_cast<double>(config.micro_batch) * row > 0x1p30)
    return make_error(Errc::invalid_argument,
                      fmt::format("micro_batch: {} sequences of {} tokens given, expected at most "
                                  "2^30 tokens",
                                  config.micro_batch, length));
  double batch = config.batch.first;
  for (const auto& [step, value] : config.batch.changes)
    batch = std::max(batch, value);
  if (static_cast<double>(config.steps) * batch * row > 0x1p60)
    return make_error(Errc::invalid_argument,
                      fmt::format("steps: {} of {} sequences of {} tokens given, expected at most "
                                  "2^60 tokens",
                                  config.steps, batch, length));
  return {};
}

} // namespace

caf::expected<std::shared_ptr<const TrainData>>
TrainData::open(const TrainConfig& config, int64_t vocab_size, const Tokenizer* tokenizer) {
  const auto named = [&](const char* field, caf::expected<std::shared_ptr<const TrainData>> data) {
    if (!data)
      data = with_context(field, data.error());
    else if (auto error = check_extent(config, (*data)->sequence_length()))
      data = std::move(error);
    return data;
  };
  if (!config.chat.empty())
    return named("chat", open_chat(config, vocab_size, tokenizer));
  if (!config.tokens.empty())
    return named("tokens", open_tokens(config, vocab_size));
  return named(
      "data", open_packed(config.data, config.sequence_length, vocab_size, tokenizer, config.seed));
}

caf::expected<std::shared_ptr<const TrainData>>
TrainData::open_held_out(const fs::path& path, int64_t sequence_length, int64_t vocab_size,
                         const Tokenizer* tokenizer) {
  auto data = open_packed(path, sequence_length, vocab_size, tokenizer, std::nullopt);
  if (!data)
    return with_context("held_out", data.error());
  return data;
}

} // namespace troupe
