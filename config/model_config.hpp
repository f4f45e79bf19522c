// What is being run: the shape of a DeepSeek-V3-class model, straight from Hugging Face's
// config.json (specification §1.1). Field names are the published ones.
#pragma once

#include "config/dtype.hpp"
#include "config/errors.hpp"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

enum class ScoringFunc : uint8_t { sigmoid, softmax };
// noaux_tc: V3's biased group-limited top-k. group_limited_greedy and greedy: V2's.
enum class TopkMethod : uint8_t { noaux_tc, group_limited_greedy, greedy };

struct RopeScaling { // YaRN, §2.5
  double factor = 1;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 1;
  double mscale_all_dim = 0;
};

struct QuantizationConfig { // FP8 block-scaled weights, §1.4; blocks of any size
  int64_t block_rows = 128;
  int64_t block_cols = 128;
  std::string scale_fmt; // "" or "ue8m0"
};

struct ModelConfig {
  std::string model_type; // deepseek_v2, deepseek_v3, kimi_k2
  std::vector<std::string> architectures;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t moe_intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t q_lora_rank = 0; // 0: the query path is the single matrix q_proj
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t first_k_dense_replace = 0;
  int64_t moe_layer_freq = 1;
  int64_t n_routed_experts = 0;
  int64_t n_shared_experts = 0; // 0: no shared branch
  int64_t num_experts_per_tok = 0;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::sigmoid;
  TopkMethod topk_method = TopkMethod::noaux_tc;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1;
  int64_t num_nextn_predict_layers = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  bool rope_interleave = true;
  std::optional<RopeScaling> rope_scaling;
  int64_t max_position_embeddings = 0;
  bool tie_word_embeddings = false;
  std::string torch_dtype; // as written; "" when absent
  std::optional<QuantizationConfig> quantization;
  int64_t bos_token_id = -1;
  std::vector<int64_t> eos_token_ids; // one or several; empty when absent

  // Dense iff layer < first_k_dense_replace or layer % moe_layer_freq != 0. MTP layers
  // (num_hidden_layers + k) are always MoE.
  [[nodiscard]] bool is_moe(int64_t layer) const;
  [[nodiscard]] int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  // Width of one cached row: the latent and the rope key.
  [[nodiscard]] int64_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }
  [[nodiscard]] int64_t shared_intermediate_size() const {
    return n_shared_experts * moe_intermediate_size;
  }
  [[nodiscard]] int64_t experts_per_group() const { return n_routed_experts / n_group; }
  [[nodiscard]] bool has_moe() const { return n_routed_experts > 0; }
};

// The latent norms use this epsilon whatever rms_norm_eps says (§1.2).
inline constexpr double kLatentNormEps = 1e-6;

// `source` names the text in errors ("DIR/config.json"). Errors name the field and what was
// expected; unknown model types and settings Troupe can't compute are refused by name.
[[nodiscard]] caf::expected<ModelConfig> parse_model_config(std::string_view json,
                                                            std::string_view source);
// `path` is a config.json or a folder that holds one.
[[nodiscard]] caf::expected<ModelConfig> load_model_config(const std::filesystem::path& path);
// A config.json that parse_model_config reads back equal and transformers opens.
[[nodiscard]] std::string to_json(const ModelConfig& config);

} // namespace troupe
