// A checkpoint in Hugging Face format: config.json and one or more safetensors files, memory
// mapped. Opening reads headers and samples; a tensor's bytes are mapped in by whoever reads them.
//
// Every tensor that the config calls for is checked by `open`: present, of the right shape, of a
// dtype Troupe reads (F32, BF16, F16, F8_E4M3 with a companion `_scale_inv`). Unknown extra
// tensors are an error that names the first one, except for those the specification lists as
// ignorable (rotary `inv_freq`, MTP layers when the config has none).
//
// MTP layers may be absent, all of them or those from some module on (transformers saves none), but
// a module that is there is there completely, save for its copies of embedding and head
// (`embed_tokens`, `shared_head.head`): `find` gives nullptr for an absent copy, and the main
// model's tensor takes its place.
// Thread-safe for reading.
#pragma once

#include "config/dtype.hpp"
#include "config/errors.hpp"
#include "config/model_config.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

// A tensor of a checkpoint; valid as long as the Checkpoint.
struct TensorView {
  std::string_view name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes; // mapped, read-only, row-major; alignment not guaranteed
  int file = 0;                     // index into Checkpoint::files()
  int64_t file_offset = 0;          // of the first byte in that file
};

class Checkpoint {
public:
  // `folder` holds config.json and model.safetensors or model.safetensors.index.json.
  [[nodiscard]] static caf::expected<std::shared_ptr<const Checkpoint>>
  open(const std::filesystem::path& folder);

  virtual ~Checkpoint() = default;
  [[nodiscard]] virtual const ModelConfig& config() const = 0;
  // How many MTP modules the files hold: at most config().num_nextn_predict_layers.
  [[nodiscard]] virtual int64_t num_mtp_layers() const = 0;
  // nullptr when absent.
  [[nodiscard]] virtual const TensorView* find(std::string_view name) const = 0;
  [[nodiscard]] virtual const std::vector<std::filesystem::path>& files() const = 0;
  // Of config, tensors and samples of their data (checkpoint_digest.hpp says what that catches):
  // ranks compare it when they join, and it is the version of the weights made from these files.
  [[nodiscard]] virtual uint64_t digest() const = 0;
  // Tells the kernel that these bytes won't be needed again, so that they stop counting as
  // resident memory of this process.
  virtual void release(std::span<const std::byte> bytes) const = 0;
};

} // namespace troupe
