// The numbers that `troupe inspect` prints: a pure function of a config and, where given, a layout.
#pragma once

#include "config/errors.hpp"
#include "config/layout.hpp"
#include "config/model_config.hpp"
#include "config/parameters.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

// Tensors that differ only in layer or expert.
struct ShapeRow {
  std::string name;           // "model.layers.{3-60}.mlp.experts.{0-255}.up_proj.weight"
  std::vector<int64_t> shape; // of each
  TensorRole role = TensorRole::norm;
  int64_t count = 0;
};

// Parameters of one of a kind.
struct PartSizes {
  int64_t embedding = 0; // the head is as large
  int64_t attention = 0; // one layer's, with its latent norms, without the block's two norms
  int64_t dense_ffn = 0; // one layer's
  int64_t routed_expert = 0;
  int64_t shared_experts = 0; // one layer's, all of them fused
  int64_t router = 0;         // one layer's, with its selection bias
  int64_t num_dense_layers = 0;
  int64_t num_moe_layers = 0; // without MTP layers
};

struct Inspection {
  std::vector<ShapeRow> shapes; // main model, then MTP layers
  PartSizes parts;
  ParameterCounts parameters;
  int64_t bytes_f32 = 0, bytes_bf16 = 0, bytes_fp8 = 0; // stored, MTP layers and copies included
  int64_t kv_bytes_per_token = 0;                       // BF16, main layers
  int64_t kv_bytes_per_token_with_mtp = 0;              // BF16
  WeightFormat format = WeightFormat::bf16;             // what the layout's bytes are counted in
  std::optional<ClusterLayout> layout;
  std::vector<RankClass> ranks; // empty without layout; MTP layers included
};

// How the config's own checkpoint is stored: fp8 where it is quantized, else by torch_dtype.
[[nodiscard]] WeightFormat format_of(const ModelConfig& config);

// Errc::invalid_argument where the model does not fit the layout.
[[nodiscard]] caf::expected<Inspection> inspect_model(const ModelConfig& config,
                                                      const std::optional<ClusterLayout>& layout,
                                                      WeightFormat format);

} // namespace troupe
