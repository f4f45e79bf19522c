#include "config/presets.hpp"

#include <array>
#include <utility>

namespace troupe {

namespace {

RopeScaling yarn(double factor, int64_t original, double beta_fast, double mscale) {
  return {factor, original, beta_fast, 1, mscale, mscale};
}

// ---- The published models, column by column of the specification's table ------------------------

ModelConfig v3() {
  ModelConfig c;
  c.model_type = "deepseek_v3";
  c.architectures = {"DeepseekV3ForCausalLM"};
  c.vocab_size = 129280;
  c.hidden_size = 7168;
  c.intermediate_size = 18432;
  c.moe_intermediate_size = 2048;
  c.num_hidden_layers = 61;
  c.num_attention_heads = 128;
  c.q_lora_rank = 1536;
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.v_head_dim = 128;
  c.first_k_dense_replace = 3;
  c.n_routed_experts = 256;
  c.n_shared_experts = 1;
  c.num_experts_per_tok = 8;
  c.n_group = 8;
  c.topk_group = 4;
  c.routed_scaling_factor = 2.5;
  c.num_nextn_predict_layers = 1;
  c.rope_scaling = yarn(40, 4096, 32, 1);
  c.max_position_embeddings = 163840;
  c.torch_dtype = "bfloat16";
  c.quantization = QuantizationConfig{};
  c.bos_token_id = 0;
  c.eos_token_ids = {1};
  return c;
}

ModelConfig v2() {
  ModelConfig c = v3();
  c.model_type = "deepseek_v2";
  c.architectures = {"DeepseekV2ForCausalLM"};
  c.vocab_size = 102400;
  c.hidden_size = 5120;
  c.intermediate_size = 12288;
  c.moe_intermediate_size = 1536;
  c.num_hidden_layers = 60;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 160;
  c.n_shared_experts = 2;
  c.num_experts_per_tok = 6;
  c.topk_group = 3;
  c.scoring_func = ScoringFunc::softmax;
  c.topk_method = TopkMethod::group_limited_greedy;
  c.norm_topk_prob = false;
  c.routed_scaling_factor = 16;
  c.num_nextn_predict_layers = 0;
  c.rope_scaling = yarn(40, 4096, 32, 0.707);
  c.quantization.reset();
  c.bos_token_id = 100000;
  c.eos_token_ids = {100001};
  return c;
}

ModelConfig v2_lite() {
  ModelConfig c = v2();
  c.hidden_size = 2048;
  c.intermediate_size = 10944;
  c.moe_intermediate_size = 1408;
  c.num_hidden_layers = 27;
  c.num_attention_heads = 16;
  c.q_lora_rank = 0;
  c.n_routed_experts = 64;
  c.n_group = 1;
  c.topk_group = 1;
  c.topk_method = TopkMethod::greedy;
  c.routed_scaling_factor = 1;
  return c;
}

ModelConfig moonlight() {
  ModelConfig c = v2_lite();
  c.model_type = "deepseek_v3";
  c.architectures = {"DeepseekV3ForCausalLM"};
  c.vocab_size = 163840;
  c.intermediate_size = 11264;
  c.scoring_func = ScoringFunc::sigmoid;
  c.topk_method = TopkMethod::noaux_tc;
  c.norm_topk_prob = true;
  c.routed_scaling_factor = 2.446;
  c.rms_norm_eps = 1e-5;
  c.rope_theta = 50000;
  c.rope_scaling.reset();
  c.max_position_embeddings = 8192;
  c.bos_token_id = 163584;
  c.eos_token_ids = {163586};
  return c;
}

ModelConfig kimi_k2() {
  ModelConfig c = v3();
  c.model_type = "kimi_k2";
  c.vocab_size = 163840;
  c.num_attention_heads = 64;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 384;
  c.n_group = 1;
  c.topk_group = 1;
  c.routed_scaling_factor = 2.827;
  c.num_nextn_predict_layers = 0;
  c.rope_theta = 50000;
  c.rope_scaling = yarn(32, 4096, 1, 1);
  c.max_position_embeddings = 131072;
  c.bos_token_id = 163584;
  c.eos_token_ids = {163585};
  return c;
}

// ---- Tiny models: 8 heads, so that tensor parallelism of 1, 2, 4 and 8 is possible --------------

ModelConfig shrink(ModelConfig c) {
  c.vocab_size = 320;
  c.hidden_size = 64;
  c.intermediate_size = 384;
  c.moe_intermediate_size = 32;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 8;
  c.q_lora_rank = c.q_lora_rank > 0 ? 48 : 0;
  c.kv_lora_rank = 32;
  c.qk_nope_head_dim = 16;
  c.qk_rope_head_dim = 8;
  c.v_head_dim = 16;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 16;
  c.num_experts_per_tok = 4;
  c.max_position_embeddings = 4096;
  if (c.rope_scaling) {
    c.rope_scaling->factor = 16;
    c.rope_scaling->original_max_position_embeddings = 256;
  }
  c.quantization.reset();
  c.bos_token_id = 0;
  c.eos_token_ids = {1};
  return c;
}

ModelConfig tiny_v3() {
  ModelConfig c = shrink(v3());
  c.vocab_size = 256;
  c.n_group = 4;
  c.topk_group = 2;
  c.num_nextn_predict_layers = 2;
  return c;
}

ModelConfig tiny_v2() {
  ModelConfig c = shrink(v2());
  c.n_group = 4;
  c.topk_group = 2;
  c.num_experts_per_tok = 3;
  return c;
}

ModelConfig tiny_kimi() {
  ModelConfig c = shrink(kimi_k2());
  c.n_routed_experts = 12; // not a power of two
  return c;
}

// About 1.3 B parameters, 0.2 B of them active: 64 experts top-6, MLA as wide as V3's latents.
ModelConfig bench_1b() {
  ModelConfig c = v3();
  c.vocab_size = 32768;
  c.hidden_size = 1024;
  c.intermediate_size = 4096;
  c.moe_intermediate_size = 512;
  c.num_hidden_layers = 12;
  c.num_attention_heads = 16;
  c.q_lora_rank = 768;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 64;
  c.num_experts_per_tok = 6;
  c.rope_scaling = yarn(4, 4096, 32, 1);
  c.max_position_embeddings = 16384;
  c.quantization.reset();
  return c;
}

constexpr std::array<std::pair<std::string_view, ModelConfig (*)()>, 11> kPresets{{
    {"tiny-v3", tiny_v3},
    {"tiny-v2", tiny_v2},
    {"tiny-v2-lite", [] { return shrink(v2_lite()); }},
    {"tiny-moonlight", [] { return shrink(moonlight()); }},
    {"tiny-kimi", tiny_kimi},
    {"bench-1b", bench_1b},
    {"v3", v3},
    {"v2", v2},
    {"v2-lite", v2_lite},
    {"moonlight", moonlight},
    {"kimi-k2", kimi_k2},
}};

} // namespace

std::optional<ModelConfig> preset(std::string_view name) {
  for (const auto& [known, make] : kPresets)
    if (known == name)
      return make();
  return std::nullopt;
}

std::vector<std::string_view> preset_names() {
  std::vector<std::string_view> names;
  for (const auto& [name, make] : kPresets)
    names.push_back(name);
  return names;
}

} // namespace troupe
