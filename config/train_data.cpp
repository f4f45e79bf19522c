#include "config/train_data.hpp"

#include "config/chat_template.hpp"
#include "config/dataset.hpp"
#include "config/json.hpp"
#include "config/random.hpp"
#include "config/tokenizer.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <utility>

namespace troupe {

namespace fs = std::filesystem;

namespace {

// A permutation of [0, n) without a table: four Feistel rounds over the next even power of two,
// walked until the result is below n.
class Permutation {
public:
  Permutation(uint64_t n, uint64_t key)
      : n_(n), half_bits_((static_cast<int>(std::bit_width(n > 1 ? n - 1 : uint64_t{1})) + 1) / 2),
        key_(key) {}
  [[nodiscard]] uint64_t operator()(uint64_t i) const {
    do
      i = once(i);
    while (i >= n_);
    return i;
  }

private:
  [[nodiscard]] uint64_t once(uint64_t i) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = i >> half_bits_, right = i & mask;
    for (uint32_t round = 0; round < 4; ++round) {
      const auto block = philox4x32(
          {static_cast<uint32_t>(right), static_cast<uint32_t>(right >> 32), round, 0x524F5753u},
          {static_cast<uint32_t>(key_), static_cast<uint32_t>(key_ >> 32)});
      left = std::exchange(right, (left ^ block[0] ^ (uint64_t{block[1]} << 32)) & mask);
    }
    return left << half_bits_ | right;
  }

  uint64_t n_;
  int half_bits_;
  uint64_t key_;
};

uint64_t mix(uint64_t seed, uint64_t value) {
  const uint64_t both[] = {seed, value};
  return XXH3_64bits(both, sizeof both);
}

// Packed text, or rows as they are.
class PackedRows final : public TrainData {
public:
  PackedRows(TokenRows rows, bool shuffled, uint64_t seed)
      : rows_(std::move(rows)), shuffled_(shuffled), seed_(seed) {}
  [[nodiscard]] int64_t sequence_length() const override { return rows_.row_tokens(); }
  [[nodiscard]] int64_t num_rows() const override { return rows_.num_rows(); }
  [[nodiscard]] caf::expected<TrainRow> row(int64_t index) const override {
    const auto n = static_cast<size_t>(rows_.row_tokens()) + 1;
    TrainRow row;
    row.ids.resize(n);
    if (auto error = rows_.read(place_of(index), row.ids))
      return error;
    row.has_loss.assign(n, 1);
    row.first_key.assign(n, 0);
    row.positions.resize(n);
    for (size_t i = 0; i < n; ++i)
      row.positions[i] = static_cast<int32_t>(i);
    return row;
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t) const override {
    return rows_.row_tokens();
  }
  [[nodiscard]] uint64_t digest() const override {
    uint64_t sum =
        mix(static_cast<uint64_t>(num_rows()), static_cast<uint64_t>(rows_.num_tokens()));
    sum = mix(sum, static_cast<uint64_t>(rows_.row_tokens()) * 2 + (shuffled_ ? 1 : 0));
    constexpr int64_t kSamples = 64;
    std::vector<int32_t> ids(static_cast<size_t>(rows_.row_tokens()) + 1);
    for (int64_t s = 0; s < kSamples; ++s)
      if (!rows_.read(s * num_rows() / kSamples, ids)) // what can't be read fails when it is used
        sum = mix(sum, XXH3_64bits(ids.data(), ids.size() * sizeof(int32_t)));
    return sum;
  }

private:
  [[nodiscard]] int64_t place_of(int64_t index) const {
    if (!shuffled_)
      return index;
    const auto n = num_rows();
    const Permutation order{static_cast<uint64_t>(n), mix(seed_, static_cast<uint64_t>(index / n))};
    return static_cast<int64_t>(order(static_cast<uint64_t>(index % n)));
  }

  TokenRows rows_;
  bool shuffled_;
  uint64_t seed_;
};

// ---- conversations ----------------------------------------------------------------------------

struct Sample {
  std::vector<int32_t> ids;
  std::vector<uint8_t> has_loss;
};

caf::expected<std::vector<ChatMessage>> read_messages(const boost::json::object& line,
                                                      const std::string& source) {
  const auto wrong = [&](const std::string& text) {
    return make_error(Errc::malformed, fmt::format("{}: {}", source, text));
  };
  const auto* list = line.if_contains("messages");
  if (!list || !list->is_array() || list->as_array().empty())
    return wrong("messages: expected a list of {role, content}");
  std::vector<ChatMessage> messages;
  for (const auto& item : list->as_array()) {
    const auto prefix = fmt::format("messages[{}].", messages.size());
    const auto* object = item.if_object();
    if (!object)
      return wrong(prefix + ": expected an object");
    JsonFields fields{*object, source, prefix};
    ChatMessage message;
    const auto role = fields.string("role");
    message.content = fields.string("content");
    if (fields.error())
      return fields.error();
    const auto known = chat_role_from_name(role);
    if (!known)
      return with_context(source + ": " + prefix + "role", known.error());
    message.role = *known;
    messages.push_back(std::move(message));
  }
  return messages;
}

// Ids of a conversation; those that answer count in the loss.
caf::expected<Sample> encode_sample(const ChatFormat& format, const Tokenizer& tokenizer,
                                    const std::vector<ChatMessage>& messages) {
  Sample sample;
  ChatOptions whole;
  whole.add_generation_prompt = false;
  auto ids = encode_chat(tokenizer, format, messages, whole);
  if (!ids)
    return ids.error();
  sample.ids = std::move(*ids);
  sample.has_loss.assign(sample.ids.size(), 0);
  const auto common = [&](const std::vector<int32_t>& other) {
    return static_cast<size_t>(
        std::mismatch(sample.ids.begin(), sample.ids.end(), other.begin(), other.end()).first -
        sample.ids.begin());
  };
  for (size_t m = 0; m < messages.size(); ++m) {
    if (messages[m].role != ChatRole::assistant)
      continue;
    const std::vector<ChatMessage> before{messages.begin(),
                                          messages.begin() + static_cast<int64_t>(m)};
    const std::vector<ChatMessage> with{messages.begin(),
                                        messages.begin() + static_cast<int64_t>(m) + 1};
    const auto asked = encode_chat(tokenizer, format, before, ChatOptions{});
    const auto answered = encode_chat(tokenizer, format, with, whole);
    if (!asked || !answered)
      return !asked ? asked.error() : answered.error();
    std::fill(sample.has_loss.begin() + static_cast<int64_t>(common(*asked)),
              sample.has_loss.begin() + static_cast<int64_t>(common(*answered)), uint8_t{1});
  }
  return sample;
}

// Samples side by side in rows, each blind to the others.
class ChatRows final : public TrainData {
public:
  ChatRows(int64_t length, int32_t padding) : length_(length), padding_(padding) {}
  // Into the row at hand, or a new one. Longer samples lose their end.
  void add(Sample sample) {
    const auto room = static_cast<size_t>(length_) + 1;
    if (sample.ids.size() > room) {
      sample.ids.resize(room);
      sample.has_loss.resize(room);
      ++num_truncated_;
    }
    if (rows_.empty() || rows_.back().ids.size() + sample.ids.size() > room)
      rows_.emplace_back();
    auto& row = rows_.back();
    const auto first = static_cast<int32_t>(row.ids.size());
    for (size_t i = 0; i < sample.ids.size(); ++i)
      put(row, sample.ids[i], sample.has_loss[i], first);
  }
  void finish() {
    for (auto& row : rows_) {
      const auto first = static_cast<int32_t>(row.ids.size());
      while (row.ids.size() < static_cast<size_t>(length_) + 1)
        put(row, padding_, 0, first);
      // A target counts where its input is of the same sample.
      int64_t count = 0;
      for (size_t i = 1; i < row.ids.size(); ++i)
        count += row.has_loss[i] != 0 && row.first_key[i] == row.first_key[i - 1];
      loss_tokens_.push_back(count);
    }
  }
  [[nodiscard]] int64_t num_truncated() const { return num_truncated_; }
  [[nodiscard]] int64_t all_loss_tokens() const {
    int64_t sum = 0;
    for (const int64_t n : loss_tokens_)
      sum += n;
    return sum;
  }
  [[nodiscard]] int64_t sequence_length() const override { return length_; }
  [[nodiscard]] int64_t num_rows() const override { return static_cast<int64_t>(rows_.size()); }
  [[nodiscard]] caf::expected<TrainRow> row(int64_t index) const override {
    return TrainRow{rows_[static_cast<size_t>(index % num_rows())]};
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t index) const override {
    return int64_t{loss_tokens_[static_cast<size_t>(index % num_rows())]};
  }
  [[nodiscard]] uint64_t digest() const override {
    uint64_t sum = static_cast<uint64_t>(length_);
    for (const auto& row : rows_)
      sum = mix(sum, XXH3_64bits(row.ids.data(), row.ids.size() * sizeof(int32_t)));
    return sum;
  }

private:
  static void put(TrainRow& row, int32_t id, uint8_t loss, int32_t first) {
    row.positions.push_back(static_cast<int32_t>(row.ids.size()) - first);
    row.ids.push_back(id);
    row.has_loss.push_back(loss);
    row.first_key.push_back(first);
  }

  int64_t length_;
  int32_t padding_;
  std::vector<TrainRow> rows_;
  std::vector<int64_t> loss_tokens_;
  int64_t num_truncated_ = 0;
};

caf::expected<std::shared_ptr<const TrainData>>
open_chat(const fs::path& path, int64_t length, int64_t vocab_size, const Tokenizer* tokenizer) {
  if (tokenizer == nullptr)
    return make_error(Errc::not_found, fmt::format("chat: {} needs a tokenizer, and the model's "
                                                   "folder has none",
                                                   path.string()));
  auto format = chat_format_of(*tokenizer);
  if (!format)
    return with_context("chat", format.error());
  std::ifstream file{path};
  if (!file || !fs::is_regular_file(path))
    return make_error(Errc::not_found, fmt::format("{}: can't be read", path.string()));
  auto rows = std::make_shared<ChatRows>(length, tokenizer->eos_token_id().value_or(0));
  int64_t number = 0;
  for (std::string text; std::getline(file, text);) {
    const auto source = fmt::format("{}:{}", path.string(), ++number);
    if (text.find_first_not_of(" \t\r") == std::string::npos)
      continue;
    auto object = parse_json_object(text, source);
    if (!object)
      return object.error();
    auto messages = read_messages(*object, source);
    if (!messages)
      return messages.error();
    auto sample = encode_sample(*format, *tokenizer, *messages);
    if (!sample)
      return with_context(source, sample.error());
    for (const int32_t id : sample->ids)
      if (id >= vocab_size)
        return make_error(Errc::mismatch, fmt::format("{}: token {} is outside the model's {} "
                                                      "entries; is it another model's tokenizer?",
                                                      source, id, vocab_size));
    rows->add(std::move(*sample));
  }
  rows->finish();
  if (rows->all_loss_tokens() == 0)
    return make_error(
        Errc::malformed,
        fmt::format("{}: no answer (a message of role assistant) to learn from", path.string()));
  return std::shared_ptr<const TrainData>{std::move(rows)};
}

} // namespace

caf::expected<std::shared_ptr<const TrainData>>
TrainData::open(const TrainConfig& config, int64_t vocab_size, const Tokenizer* tokenizer) {
  if (!config.chat.empty())
    return open_chat(config.chat, *config.sequence_length, vocab_size, tokenizer);
  const bool shuffled = config.tokens.empty();
  auto rows =
      TokenRows::open(shuffled ? config.data : config.tokens, config.sequence_length, vocab_size);
  if (!rows)
    return rows.error();
  return std::shared_ptr<const TrainData>{
      std::make_shared<PackedRows>(std::move(*rows), shuffled, config.seed)};
}

caf::expected<std::shared_ptr<const TrainData>>
TrainData::open_held_out(const fs::path& path, int64_t sequence_length, int64_t vocab_size) {
  auto rows = TokenRows::open(path, sequence_length, vocab_size);
  if (!rows)
    return with_context("held_out", rows.error());
  return std::shared_ptr<const TrainData>{std::make_shared<PackedRows>(std::move(*rows), false, 0)};
}

} // namespace troupe
