#include "actors/train_shard.hpp"

#include "config/dtype.hpp"
#include "config/parameters.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace troupe {

namespace {

namespace fs = std::filesystem;

// Values on their way into a file, in pieces.
caf::error append_as(SafetensorsWriter& writer, DType dtype, std::span<const float> values) {
  if (dtype == DType::f32)
    return writer.append(std::as_bytes(values));
  constexpr size_t kPiece = 1 << 16;
  std::vector<BF16> piece;
  for (size_t at = 0; at < values.size(); at += kPiece) {
    const auto some = values.subspan(at, std::min(kPiece, values.size() - at));
    piece.resize(some.size());
    std::ranges::transform(some, piece.begin(), [](float x) { return to_bf16(x); });
    if (auto error = writer.append(std::as_bytes(std::span{piece})))
      return error;
  }
  return {};
}

bool fits_bf16(std::span<const float> values) {
  return std::ranges::all_of(values, [](float x) {
    uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits & 0xffffu) == 0;
  });
}

struct Item {
  TensorDeclaration declaration;
  std::span<const float> values;
};

caf::error write_items(const fs::path& path, const std::vector<Item>& items) {
  std::vector<TensorDeclaration> declarations;
  for (const auto& item : items)
    declarations.push_back(item.declaration);
  auto writer = SafetensorsWriter::create(path, declarations);
  if (!writer)
    return writer.error();
  for (const auto& item : items)
    if (auto error = append_as(**writer, item.declaration.dtype, item.values))
      return error;
  return (*writer)->finish();
}

std::span<const float> of(const TrainTensor& tensor, std::span<const float> arena) {
  return arena.subspan(static_cast<size_t>(tensor.begin), static_cast<size_t>(tensor.size));
}

// Published weights, copies inside MTP layers included.
std::vector<Item> weights_of(const ShardSource& source, std::span<const float> arena,
                             WeightFormat format, const ModelConfig& config,
                             int64_t num_mtp_layers) {
  std::vector<Item> items;
  for_each_tensor(config, num_mtp_layers, [&](const TensorSpec& spec) {
    std::string_view original = spec.name;
    if (spec.mtp_copy)
      original = spec.role == TensorRole::head ? kHeadName : kEmbeddingName;
    if (const auto* tensor = source.layout->find(original))
      items.push_back(
          {{spec.name, stored_dtype(spec.role, format), spec.shape}, of(*tensor, arena)});
  });
  return items;
}

caf::error make_folder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  return error ? make_error(Errc::io_error, fmt::format("{}: {}", folder.string(), error.message()))
               : caf::error{};
}

} // namespace

std::string shard_file_name(int32_t rank, int32_t num_ranks) {
  return fmt::format("model-{:05}-of-{:05}.safetensors", rank + 1, num_ranks);
}

std::string training_file_name(int32_t rank) { return fmt::format("rank-{:04}.safetensors", rank); }

caf::expected<WrittenShard> write_shard(const fs::path& folder, RankId rank, int32_t num_ranks,
                                        ComputePrecision compute, const ModelConfig& config,
                                        int64_t num_mtp_layers, const ShardSource& source) {
  WrittenShard written;
  if (source.layout->tensors().empty())
    return written;
  if (auto error = make_folder(folder))
    return error;
  const auto format = compute == ComputePrecision::f32 ? WeightFormat::f32 : WeightFormat::bf16;
  const auto file = shard_file_name(rank.value, num_ranks);
  const auto weights = weights_of(source, source.master, format, config, num_mtp_layers);
  if (auto error = write_items(folder / file, weights))
    return error;
  for (const auto& item : weights) {
    written.tensors.push_back(item.declaration.name);
    written.bytes += item.declaration.num_bytes();
  }
  if (!source.ema.empty()) {
    if (auto error = make_folder(folder / "ema"))
      return error;
    if (auto error = write_items(folder / "ema" / file,
                                 weights_of(source, source.ema, format, config, num_mtp_layers)))
      return error;
  }
  if (auto error = make_folder(folder / "training"))
    return error;
  std::vector<Item> items;
  for (const auto& [kind, arena] : {std::pair{"master", source.master}, std::pair{"m", source.m},
                                    std::pair{"v", source.v}, std::pair{"ema", source.ema}}) {
    if (arena.empty())
      continue;
    const std::string_view name = kind;
    for (const auto& tensor : source.layout->tensors()) {
      const auto values = of(tensor, arena);
      const bool moment = name == "m" || name == "v";
      if (moment && !tensor.is_parameter())
        continue;
      const auto dtype = moment && fits_bf16(values) ? DType::bf16 : DType::f32;
      items.push_back(
          {{fmt::format("{}/{}", name, tensor.spec.name), dtype, tensor.spec.shape}, values});
    }
  }
  if (auto error = write_items(folder / "training" / training_file_name(rank.value), items))
    return error;
  return written;
}

caf::expected<TrainShards> TrainShards::open(const fs::path& folder) {
  TrainShards shards;
  shards.folder_ = folder;
  std::error_code error;
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator{folder, error})
    if (entry.path().extension() == ".safetensors")
      paths.push_back(entry.path());
  if (error || paths.empty())
    return make_error(Errc::not_found,
                      fmt::format("{}: no training state to resume from", folder.string()));
  std::ranges::sort(paths);
  for (const auto& path : paths) {
    auto file = SafetensorsFile::open(path);
    if (!file)
      return file.error();
    shards.files_.push_back(*file);
    for (const auto& entry : (*file)->header().entries)
      shards.entries_.insert_or_assign(entry.name, std::pair{file->get(), &entry});
  }
  return shards;
}

bool TrainShards::has(std::string_view kind, std::string_view name) const {
  return entries_.contains(fmt::format("{}/{}", kind, name));
}

caf::error TrainShards::read(std::string_view kind, const TensorSpec& spec,
                             std::span<float> to) const {
  const auto found = entries_.find(fmt::format("{}/{}", kind, spec.name));
  if (found == entries_.end())
    return make_error(Errc::not_found, fmt::format("{}: no {} of {}; is it the checkpoint of "
                                                   "another model?",
                                                   folder_.string(), kind, spec.name));
  const auto& [file, entry] = found->second;
  if (entry->shape != spec.shape || (entry->dtype != DType::f32 && entry->dtype != DType::bf16))
    return make_error(Errc::mismatch,
                      fmt::format("{}: {} is {} [{}], expected F32 or BF16 [{}]",
                                  file->path().string(), entry->name, name_of(entry->dtype),
                                  fmt::join(entry->shape, ", "), fmt::join(spec.shape, ", ")));
  const auto bytes = file->bytes(*entry);
  if (entry->dtype == DType::f32) {
    std::memcpy(to.data(), bytes.data(), bytes.size());
    return {};
  }
  for (size_t i = 0; i < to.size(); ++i) {
    BF16 x;
    std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
    to[i] = to_float(x);
  }
  return {};
}

ValueSource resume_source(std::shared_ptr<const TrainShards> shards) {
  ValueSource source;
  source.master = [shards](const TensorSpec& spec, std::span<float> to) {
    return shards->read("master", spec, to);
  };
  source.moments = [shards](const TrainTensor& tensor, const OptimizerState& state) -> caf::error {
    if (tensor.is_parameter())
      for (const auto& [kind, arena] : {std::pair{"m", &state.m}, std::pair{"v", &state.v}})
        if (auto error = shards->read(kind, tensor.spec, arena->of(tensor)))
          return error;
    // Averaging that starts now starts from the weights.
    if (state.ema && shards->has("ema", tensor.spec.name))
      return shards->read("ema", tensor.spec, state.ema->of(tensor));
    return {};
  };
  return source;
}

} // namespace troupe
