// A random checkpoint in Hugging Face format: a pure function of its arguments, whatever the number
// of threads, so that two machines make the same bytes.
//
// Weights are spread as a trained model's are, not shrunk towards zero: standard deviation
// gain/√fan_in, embeddings 1, head gain 2, norms 1 ± 0.1, selection biases ± 0.1. The copies of
// embedding and head inside MTP layers equal the main ones, as in published files.
#pragma once

#include "config/errors.hpp"
#include "config/model_config.hpp"
#include "config/parameters.hpp"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string_view>

namespace troupe {

struct InitOptions {
  WeightFormat format = WeightFormat::bf16;
  uint64_t seed = 0;
  int num_threads = 1;
  int64_t max_shard_bytes = int64_t{2} << 30; // of data; a larger tensor gets a shard of its own
  // Called now and then, from any thread but never from two at once.
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress = {};
  // Asked before each piece, from any thread: true ends the work with Errc::cancelled and leaves
  // no file.
  std::function<bool()> interrupted = {};
};

// Creates `folder`; one that holds anything but a tokenizer is refused, and so is a checkpoint that
// the disk has no room for. config.json comes last, so an unfinished folder is no model.
[[nodiscard]] caf::error init_checkpoint(const ModelConfig& config,
                                         const std::filesystem::path& folder,
                                         const InitOptions& options);

// Elements [begin, begin + values.size()) of the noise named `name`: mean 0, standard deviation 1,
// within ± 3.5. Exact arithmetic up to one rounding; `begin` must be a multiple of 4.
void fill_noise(uint64_t seed, std::string_view name, int64_t begin, std::span<float> values);

// Quantizes rows [0, num_rows) of a row-major [num_rows, cols] matrix that starts at a block
// boundary: E4M3 codes, and one scale per block, `scales` [⌈num_rows/block_rows⌉,
// ⌈cols/block_cols⌉]. W ≈ code · scale; scale = amax/448, rounded up to a power of two if scale_fmt
// is ue8m0; 1 for a block of zeros.
void quantize_blocks(std::span<const float> values, int64_t cols,
                     const QuantizationConfig& quantization, std::span<uint8_t> codes,
                     std::span<float> scales);

} // namespace troupe
