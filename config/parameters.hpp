// Every tensor that a ModelConfig calls for: name, shape and what it is (specification §1.3).
// The one list that checkpoint validation, random initialization and `inspect` go by.
#pragma once

#include "config/model_config.hpp"

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

enum class TensorRole : uint8_t {
  embedding,     // [vocab_size, hidden]; inside an MTP layer a stored copy of the main one
  head,          // [vocab_size, hidden]; likewise
  norm,          // input, post-attention, final, enorm, hnorm, shared_head.norm
  latent_norm,   // q_a_layernorm, kv_a_layernorm
  attention,     // Linear weights of MLA
  dense_ffn,     // Linear weights of a dense SwiGLU
  shared_expert, // Linear weights of the one fused shared SwiGLU
  routed_expert,
  router,      // [n_routed_experts, hidden]
  router_bias, // [n_routed_experts], stored in F32
  eh_proj,     // [hidden, 2·hidden], never FP8
};

// FP8 checkpoints store these in E4M3 with a scale per block; all others stay as they are.
[[nodiscard]] constexpr bool is_quantizable(TensorRole role) {
  return role == TensorRole::attention || role == TensorRole::dense_ffn ||
         role == TensorRole::shared_expert || role == TensorRole::routed_expert;
}

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape; // [out, in] or [n]
  TensorRole role = TensorRole::norm;
  int64_t layer = -1;    // -1: outside the layers. MTP layers count on from num_hidden_layers
  int64_t expert = -1;   // -1: not of a routed expert
  bool mtp_copy = false; // an MTP layer's copy of embedding or head; a checkpoint may omit it

  [[nodiscard]] int64_t num_elements() const;
};

// File order: embedding, layers, final norm, head, MTP layers [0, num_mtp_layers). The spec is
// the callee's for the duration of the call.
void for_each_tensor(const ModelConfig& config, int64_t num_mtp_layers,
                     const std::function<void(const TensorSpec&)>& visit);
[[nodiscard]] std::vector<TensorSpec> enumerate_tensors(const ModelConfig& config,
                                                        int64_t num_mtp_layers);

// "X.weight" → "X.weight_scale_inv".
[[nodiscard]] std::string scale_name(std::string_view weight);
// ⌈out / block_rows⌉ × ⌈in / block_cols⌉
[[nodiscard]] std::vector<int64_t> scale_shape(const std::vector<int64_t>& weight,
                                               const QuantizationConfig& quantization);

// How weights are stored: `fp8` is E4M3 with F32 scales where quantizable and BF16 elsewhere.
enum class WeightFormat : uint8_t { f32, bf16, fp8 };
[[nodiscard]] std::string_view name_of(WeightFormat format); // "f32", "bf16", "fp8"
[[nodiscard]] std::optional<WeightFormat> weight_format_from_name(std::string_view name);
// Selection biases are F32 in every format.
[[nodiscard]] DType stored_dtype(TensorRole role, WeightFormat format);
// Bytes of a tensor with its scales.
[[nodiscard]] int64_t stored_bytes(const TensorSpec& spec, WeightFormat format,
                                   const QuantizationConfig& quantization);

struct ParameterCounts { // §12.10; selection biases counted, scales not
  int64_t total = 0;     // main model, without MTP layers
  // What one token passes through: all but the routed experts it did not choose.
  int64_t active = 0;
  int64_t active_without_embedding = 0;
  int64_t active_without_embedding_and_head = 0;
  int64_t mtp_unique = 0; // of the MTP layers, without their copies of embedding and head
  int64_t mtp_stored = 0;
  int64_t scales = 0; // entries of all scale tensors, MTP's included, if stored in FP8
};
[[nodiscard]] ParameterCounts count_parameters(const ModelConfig& config);

} // namespace troupe
