#include "config/dataset.hpp"

#include "config/random.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace troupe {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kDescription = "dataset.json";

caf::error bad(const fs::path& path, std::string_view text) {
  return make_error(Errc::malformed, fmt::format("{}: {}", path.string(), text));
}

bool is_shard(const fs::path& path) {
  const auto name = path.filename().string();
  return name.starts_with("shard-") && name.ends_with(".safetensors");
}

caf::expected<std::vector<fs::path>> shards_of(const fs::path& folder) {
  std::vector<fs::path> paths;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator{folder, error})
    if (is_shard(entry.path()))
      paths.push_back(entry.path());
  if (error)
    return make_error(Errc::io_error, fmt::format("{}: {}", folder.string(), error.message()));
  if (paths.empty())
    return make_error(
        Errc::not_found,
        fmt::format("{}: no shard-*.safetensors in it; `troupe data` makes them", folder.string()));
  std::ranges::sort(paths);
  return paths;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

bool continues_character(char byte) { return (static_cast<uint8_t>(byte) & 0xC0u) == 0x80u; }

} // namespace

// ---- reading ----------------------------------------------------------------------------------

caf::expected<DatasetInfo> read_dataset_info(const fs::path& folder) {
  const auto path = folder / kDescription;
  const auto text = read_text_file(path, size_t{1} << 20);
  if (!text && code_of(text.error()) == Errc::not_found)
    return make_error(Errc::not_found,
                      fmt::format("{}: no {}, so `troupe data` has not finished it",
                                  folder.string(), kDescription));
  if (!text)
    return text.error();
  const auto object = parse_json_object(*text, path.string());
  if (!object)
    return object.error();
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  JsonFields fields{*object, path.string()};
  DatasetInfo info;
  info.num_tokens = fields.integer("num_tokens", 0, kMost);
  info.num_shards = fields.integer("num_shards", 0, kMost);
  info.largest_token = fields.integer_or("largest_token", 0, kMost, 0);
  info.vocabulary = fields.string_or("vocabulary", "");
  if (!fields.ok())
    return fields.error();
  return info;
}

caf::error TokenRows::agrees(const fs::path& folder, const DatasetInfo& info) const {
  if (info.num_tokens != num_tokens_ || info.num_shards != static_cast<int64_t>(shards_.size()))
    return make_error(Errc::mismatch,
                      fmt::format("{}: {} tokens in {} shards, but {} counts {} in {}",
                                  folder.string(), num_tokens_, shards_.size(), kDescription,
                                  info.num_tokens, info.num_shards));
  if (info.largest_token >= vocab_size_)
    return make_error(Errc::mismatch,
                      fmt::format("{}: holds token {}, and the model's vocabulary {} ids; it was "
                                  "made with another tokenizer",
                                  folder.string(), info.largest_token, vocab_size_));
  return {};
}

caf::error TokenRows::add(const fs::path& path, std::optional<int64_t> row_tokens) {
  auto file = SafetensorsFile::open(path);
  if (!file)
    return file.error();
  const auto& entries = (*file)->header().entries;
  const auto tokens = std::ranges::find(entries, "tokens", &SafetensorsEntry::name);
  if (tokens == entries.end())
    return bad(path, "no tensor \"tokens\"");
  const auto& shape = tokens->shape;
  if (tokens->dtype != DType::i32 || shape.empty() || shape.size() > 2)
    return bad(path, fmt::format("tokens: {} {}, expected I32 [n] or [rows, T + 1]",
                                 name_of(tokens->dtype), shape_text(shape)));
  if (shape.size() == 2) {
    if (!shards_.empty())
      return bad(path, "tokens: rows among shards, expected I32 [n]");
    if (shape[0] < 1 || shape[1] < 2)
      return bad(path, fmt::format("tokens: {}, expected at least one row of two tokens",
                                   shape_text(shape)));
    if (row_tokens && *row_tokens != shape[1] - 1)
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: tokens: {} are rows of {} tokens and a target, not of {}",
                                    path.string(), shape_text(shape), shape[1] - 1, *row_tokens));
    row_tokens_ = shape[1] - 1;
    stride_ = shape[1];
    num_rows_ = shape[0];
  }
  const auto bytes = (*file)->bytes(*tokens);
  shards_.push_back({std::move(*file), bytes, num_tokens_});
  num_tokens_ += static_cast<int64_t>(bytes.size() / sizeof(int32_t));
  return {};
}

caf::expected<TokenRows> TokenRows::open(const fs::path& path, std::optional<int64_t> row_tokens,
                                         int64_t vocab_size) {
  std::error_code ignored; // what is wrong with the path, opening it will say
  std::vector<fs::path> paths{path};
  std::optional<DatasetInfo> info;
  if (fs::is_directory(path, ignored)) {
    auto shards = shards_of(path);
    if (!shards)
      return shards.error();
    paths = std::move(*shards);
    auto read = read_dataset_info(path);
    if (!read)
      return read.error();
    info = std::move(*read);
  }
  TokenRows rows;
  rows.vocab_size_ = vocab_size;
  for (const auto& p : paths)
    if (auto error = rows.add(p, row_tokens))
      return error;
  if (info)
    if (auto error = rows.agrees(path, *info))
      return error;
  if (rows.num_rows_ > 0)
    return rows;
  if (!row_tokens || *row_tokens < 1)
    return make_error(
        Errc::invalid_argument,
        fmt::format("{}: a stream of tokens; how many make a row was not said", path.string()));
  rows.row_tokens_ = rows.stride_ = *row_tokens;
  rows.num_rows_ = (rows.num_tokens_ - 1) / *row_tokens;
  if (rows.num_rows_ < 1)
    return bad(path, fmt::format("{} tokens do not fill a row of {} and its target",
                                 rows.num_tokens_, *row_tokens));
  return rows;
}

caf::error TokenRows::read(int64_t index, std::span<int32_t> row) const {
  int64_t at = (index % num_rows_) * stride_;
  auto shard = std::ranges::upper_bound(shards_, at, {}, &Shard::begin) - 1;
  for (size_t filled = 0; filled < row.size(); ++shard) {
    const auto first = static_cast<size_t>(at - shard->begin);
    const auto n = std::min(shard->tokens.size() / sizeof(int32_t) - first, row.size() - filled);
    std::memcpy(row.data() + filled, shard->tokens.data() + first * sizeof(int32_t),
                n * sizeof(int32_t));
    for (size_t i = filled; i < filled + n; ++i)
      if (row[i] < 0 || row[i] >= vocab_size_)
        return bad(shard->file->path(),
                   fmt::format("tokens[{}]: {} is not in the vocabulary of {} ids",
                               first + i - filled, row[i], vocab_size_));
    filled += n;
    at += static_cast<int64_t>(n);
  }
  return {};
}

// ---- writing ----------------------------------------------------------------------------------

caf::expected<ShardWriter> ShardWriter::create(fs::path folder, int64_t shard_tokens) {
  if (shard_tokens < 1)
    return make_error(Errc::invalid_argument,
                      fmt::format("shards of {} tokens, expected at least 1", shard_tokens));
  std::error_code error;
  fs::create_directories(folder, error);
  if (error)
    return make_error(Errc::io_error, fmt::format("{}: {}", folder.string(), error.message()));
  for (const auto& entry : fs::directory_iterator{folder, error})
    if (is_shard(entry.path()) || entry.path().filename() == kDescription)
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: holds a dataset already ({})", folder.string(),
                                    entry.path().filename().string()));
  if (error)
    return make_error(Errc::io_error, fmt::format("{}: {}", folder.string(), error.message()));
  return ShardWriter{std::move(folder), shard_tokens};
}

caf::error ShardWriter::append(std::span<const int32_t> document) {
  if (!tokens_.empty() && static_cast<int64_t>(tokens_.size() + document.size()) > shard_tokens_)
    if (auto error = flush())
      return error;
  starts_.push_back(static_cast<int64_t>(tokens_.size()));
  tokens_.insert(tokens_.end(), document.begin(), document.end());
  num_tokens_ += static_cast<int64_t>(document.size());
  for (const int32_t id : document)
    largest_token_ = std::max(largest_token_, id);
  ++num_documents_;
  return {};
}

caf::error ShardWriter::flush() {
  const auto path = folder_ / fmt::format("shard-{:05}.safetensors", num_shards_);
  auto writer = SafetensorsWriter::create(
      path, {{"document_starts", DType::i64, {static_cast<int64_t>(starts_.size())}},
             {"tokens", DType::i32, {static_cast<int64_t>(tokens_.size())}}});
  if (!writer)
    return writer.error();
  if (auto error = (*writer)->append(std::as_bytes(std::span{starts_})))
    return error;
  if (auto error = (*writer)->append(std::as_bytes(std::span{tokens_})))
    return error;
  tokens_.clear();
  starts_.clear();
  ++num_shards_;
  return (*writer)->finish();
}

caf::error ShardWriter::finish(boost::json::object description) {
  if (num_documents_ == 0)
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: no documents to write", folder_.string()));
  if (auto error = flush())
    return error;
  description["num_tokens"] = num_tokens_;
  description["num_documents"] = num_documents_;
  description["num_shards"] = num_shards_;
  description["largest_token"] = largest_token_;
  return write_text_file(folder_ / kDescription, pretty(description) + "\n");
}

// ---- fill-in-the-middle -----------------------------------------------------------------------

std::optional<FimCut> fim_cut(std::string_view text, double rate, uint64_t seed,
                              uint64_t document) {
  KeyedStream random{seed, document};
  // 53 random bits: a uniform number in [0, 1).
  const double draw = static_cast<double>(random.next() >> 11) * 0x1p-53;
  if (draw >= rate || text.size() < 3)
    return std::nullopt;
  const auto place = [&] {
    auto at = static_cast<size_t>(random.below(text.size() + 1));
    while (at < text.size() && continues_character(text[at]))
      ++at;
    return at;
  };
  const auto one = place(), other = place();
  return FimCut{std::min(one, other), std::max(one, other)};
}

} // namespace troupe
