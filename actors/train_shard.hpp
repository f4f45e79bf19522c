// The files in which a rank saves what it owns, and how they are found again.
//
//   model-00001-of-00004.safetensors   weights under their published names: F32 under
//                                      --compute f32, else BF16 (router biases always F32), with
//                                      the copies of embedding and head inside MTP layers
//   ema/model-…                        the same of the averaged weights, where there are any
//   training/rank-0000.safetensors     master/NAME, m/NAME, v/NAME, ema/NAME in F32; moments that
//                                      fit BF16 are stored so
//
// Any layout can read what any other wrote: tensors are looked up by name.
#pragma once

#include "actors/optimizer_state.hpp"
#include "config/safetensors.hpp"

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe {

[[nodiscard]] std::string shard_file_name(int32_t rank, int32_t num_ranks);
[[nodiscard]] std::string training_file_name(int32_t rank);

// Arenas of one layout, as they were at the end of a step.
struct ShardSource {
  std::shared_ptr<const TrainLayout> layout;
  std::span<const float> master, m, v, ema; // ema may be empty
};

struct WrittenShard {
  std::vector<std::string> tensors; // in the weights file
  int64_t bytes = 0;                // of them
};
// Writes a rank's files into `folder` and its subfolders, made where they are missing. A rank that
// owns nothing writes none. Errors name the file.
[[nodiscard]] caf::expected<WrittenShard>
write_shard(const std::filesystem::path& folder, RankId rank, int32_t num_ranks,
            ComputePrecision compute, const ModelConfig& config, int64_t num_mtp_layers,
            const ShardSource& source);

// The training/ folder of a checkpoint.
class TrainShards {
public:
  // Errc::not_found where there is none; errors name the file.
  [[nodiscard]] static caf::expected<TrainShards> open(const std::filesystem::path& folder);
  // Reads "master", "m", "v" or "ema" of a tensor. Errors name tensor, file and what was expected.
  [[nodiscard]] caf::error read(std::string_view kind, const TensorSpec& spec,
                                std::span<float> to) const;
  [[nodiscard]] bool has(std::string_view kind, std::string_view name) const;

private:
  std::filesystem::path folder_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, std::pair<const SafetensorsFile*, const SafetensorsEntry*>, std::less<>>
      entries_;
};

// Masters, moments and averages from a training checkpoint.
[[nodiscard]] ValueSource resume_source(std::shared_ptr<const TrainShards> shards);

} // namespace troupe
