// Token data for training: shards on disk, and the rows that a training step reads from them.
//
// A shard is a safetensors file with `tokens` I32 [n], the documents one after the other, and
// `document_starts` I64 [documents]. A folder of shards, in the order of their names, is one long
// stream; rows of T + 1 tokens are cut from it at every T-th token, across documents and shards
// (as the report packs them: no masking between documents), so that the last token of a row is
// the first of the next: it is a target here and an input there.
//
// A single file with `tokens` I32 [rows, T + 1] gives its rows as they are.
#pragma once

#include "config/errors.hpp"
#include "config/json.hpp"
#include "config/safetensors.hpp"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace troupe {

// What dataset.json says of a folder of shards. It is written last: a folder without it is not
// finished.
struct DatasetInfo {
  int64_t num_tokens = 0, num_shards = 0;
  int64_t largest_token = 0;
  std::string vocabulary; // vocabulary_digest of the tokenizer that made it; empty: unknown
};
[[nodiscard]] caf::expected<DatasetInfo> read_dataset_info(const std::filesystem::path& folder);

// Rows of tokens, memory-mapped. Immutable and thread-safe.
class TokenRows {
public:
  // A folder of shards (needs `row_tokens`, T; all shards that dataset.json counts must be there,
  // and its largest token be one of the vocabulary), one shard, or a file of rows (T is the file's;
  // a `row_tokens` that differs is an error). Reading refuses tokens outside [0, vocab_size).
  [[nodiscard]] static caf::expected<TokenRows>
  open(const std::filesystem::path& path, std::optional<int64_t> row_tokens, int64_t vocab_size);

  [[nodiscard]] int64_t row_tokens() const { return row_tokens_; } // T
  [[nodiscard]] int64_t num_rows() const { return num_rows_; }
  [[nodiscard]] int64_t num_tokens() const { return num_tokens_; }
  // Row `index` modulo num_rows, into `row` of T + 1 tokens. Errc::malformed names file and place
  // of a token that is none.
  [[nodiscard]] caf::error read(int64_t index, std::span<int32_t> row) const;

private:
  struct Shard {
    std::shared_ptr<const SafetensorsFile> file;
    std::span<const std::byte> tokens; // I32, of any alignment
    int64_t begin = 0;                 // of the stream
  };
  caf::error add(const std::filesystem::path& path, std::optional<int64_t> row_tokens);
  caf::error agrees(const std::filesystem::path& folder, const DatasetInfo& info) const;

  std::vector<Shard> shards_;
  int64_t vocab_size_ = 0;
  int64_t row_tokens_ = 0, num_rows_ = 0, num_tokens_ = 0;
  int64_t stride_ = 0; // from row to row: T in a stream, T + 1 in a file of rows
};

// Writes a folder of shards. `finish` adds dataset.json last, so an unfinished folder has none.
class ShardWriter {
public:
  // `folder` is created; one that already holds shards is refused.
  [[nodiscard]] static caf::expected<ShardWriter> create(std::filesystem::path folder,
                                                         int64_t shard_tokens);

  // Appends a document; a shard is written as soon as it is full. Documents are never split.
  [[nodiscard]] caf::error append(std::span<const int32_t> document);
  // `description` becomes dataset.json, with the counts added to it.
  [[nodiscard]] caf::error finish(boost::json::object description);

  [[nodiscard]] int64_t num_tokens() const { return num_tokens_; }
  [[nodiscard]] int64_t num_documents() const { return num_documents_; }
  [[nodiscard]] int num_shards() const { return num_shards_; }

private:
  ShardWriter(std::filesystem::path folder, int64_t shard_tokens)
      : folder_(std::move(folder)), shard_tokens_(shard_tokens) {}
  caf::error flush();

  std::filesystem::path folder_;
  int64_t shard_tokens_ = 0, num_tokens_ = 0, num_documents_ = 0;
  int32_t largest_token_ = 0;
  int num_shards_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> starts_;
};

// A document as fill-in-the-middle data (specification §11.2): text cut at two places, keyed by
// (seed, document), and laid out prefix, suffix, middle.
struct FimCut {
  size_t prefix_end = 0, middle_end = 0; // bytes, on the borders of characters
};
// Nothing for documents that stay as they are: all but the share `rate` of them, and those too
// short to cut.
[[nodiscard]] std::optional<FimCut> fim_cut(std::string_view text, double rate, uint64_t seed,
                                            uint64_t document);

} // namespace troupe
