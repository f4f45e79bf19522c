// The hash by which ranks tell whether they opened the same checkpoint: its config, what its
// tensors are called, their dtypes and shapes, and samples of their data. How tensors are spread
// over files, where the folder lies and what the headers' metadata say does not enter.
//
// Hashing 700 GB would take longer than loading a rank's share, so data is sampled. Line the
// tensors up by name. Then
//
//   * kEvenSamples blocks of kSampleBytes, evenly spaced from the first byte to the last, and
//   * one block from the middle of every tensor that belongs to no routed expert
//
// are read: some 10,000 blocks and 40 MB of DeepSeek-V3 (32 MB and less is read whole). A file's
// samples are asked for together before any is waited for, so a disk sees a queue of them. 162
// sparse files with V3's 91,991 tensors take 80 ms on two busy cores.
//
// Always caught: another config, tensor, shape or dtype; other data anywhere in a checkpoint of up
// to 32 MB; a tensor outside the routed experts with other data throughout; a run of changed bytes
// longer than the distance of two samples (84 MB of V3). So any training, fine-tuning, merging or
// requantization of a model is, since all of them touch every layer's norms or attention.
// Not caught: a change of single bytes, rows or experts that falls between the samples. This is no
// checksum; a corrupted download is for the downloader's to find.
#pragma once

#include "config/checkpoint.hpp"

#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

namespace troupe {

inline constexpr int64_t kSampleBytes = 4096;
inline constexpr int64_t kEvenSamples = 8192;

// What the sampler knows of a tensor.
struct TensorExtent {
  std::string_view name;
  int64_t num_bytes = 0;
};
struct DataSample {
  size_t tensor = 0;
  int64_t offset = 0, size = 0; // in the tensor's data
};
// The samples of tensors that are sorted by name.
[[nodiscard]] std::vector<DataSample> plan_samples(std::span<const TensorExtent> tensors);

// `tensors` in any order; `files` as their `file` counts them. Fails where a file can't be read.
[[nodiscard]] caf::expected<uint64_t>
digest_checkpoint(std::string_view config, std::vector<const TensorView*> tensors,
                  std::span<const std::filesystem::path> files);

} // namespace troupe
