#include "config/parameters.hpp"

#include <fmt/format.h>

#include <functional>
#include <numeric>

namespace troupe {

namespace {

using Visit = std::function<void(const TensorSpec&)>;

class LayerVisitor {
public:
  LayerVisitor(const ModelConfig& config, int64_t layer, const Visit& visit)
      : c_(config), layer_(layer), prefix_(fmt::format("model.layers.{}.", layer)), visit_(visit) {}

  void block() {
    add("input_layernorm.weight", {c_.hidden_size}, TensorRole::norm);
    attention();
    add("post_attention_layernorm.weight", {c_.hidden_size}, TensorRole::norm);
    if (c_.is_moe(layer_))
      moe();
    else
      ffn("mlp.", c_.intermediate_size, TensorRole::dense_ffn);
  }

  void mtp_head() {
    add("embed_tokens.weight", {c_.vocab_size, c_.hidden_size}, TensorRole::embedding);
    add("enorm.weight", {c_.hidden_size}, TensorRole::norm);
    add("hnorm.weight", {c_.hidden_size}, TensorRole::norm);
    add("eh_proj.weight", {c_.hidden_size, 2 * c_.hidden_size}, TensorRole::eh_proj);
    add("shared_head.norm.weight", {c_.hidden_size}, TensorRole::norm);
    add("shared_head.head.weight", {c_.vocab_size, c_.hidden_size}, TensorRole::head);
  }

private:
  void add(std::string_view suffix, std::vector<int64_t> shape, TensorRole role,
           int64_t expert = -1) {
    const bool copy = role == TensorRole::embedding || role == TensorRole::head;
    visit_({prefix_ + std::string{suffix}, std::move(shape), role, layer_, expert, copy});
  }

  void attention() {
    const int64_t heads = c_.num_attention_heads;
    const auto linear = [&](std::string_view name, int64_t out, int64_t in) {
      add(fmt::format("self_attn.{}.weight", name), {out, in}, TensorRole::attention);
    };
    if (c_.q_lora_rank > 0) {
      linear("q_a_proj", c_.q_lora_rank, c_.hidden_size);
      add("self_attn.q_a_layernorm.weight", {c_.q_lora_rank}, TensorRole::latent_norm);
      linear("q_b_proj", heads * c_.qk_head_dim(), c_.q_lora_rank);
    } else {
      linear("q_proj", heads * c_.qk_head_dim(), c_.hidden_size);
    }
    linear("kv_a_proj_with_mqa", c_.latent_dim(), c_.hidden_size);
    add("self_attn.kv_a_layernorm.weight", {c_.kv_lora_rank}, TensorRole::latent_norm);
    linear("kv_b_proj", heads * (c_.qk_nope_head_dim + c_.v_head_dim), c_.kv_lora_rank);
    linear("o_proj", c_.hidden_size, heads * c_.v_head_dim);
  }

  void ffn(const std::string& prefix, int64_t width, TensorRole role, int64_t expert = -1) {
    add(prefix + "gate_proj.weight", {width, c_.hidden_size}, role, expert);
    add(prefix + "up_proj.weight", {width, c_.hidden_size}, role, expert);
    add(prefix + "down_proj.weight", {c_.hidden_size, width}, role, expert);
  }

  void moe() {
    add("mlp.gate.weight", {c_.n_routed_experts, c_.hidden_size}, TensorRole::router);
    if (c_.topk_method == TopkMethod::noaux_tc)
      add("mlp.gate.e_score_correction_bias", {c_.n_routed_experts}, TensorRole::router_bias);
    for (int64_t e = 0; e < c_.n_routed_experts; ++e)
      ffn(fmt::format("mlp.experts.{}.", e), c_.moe_intermediate_size, TensorRole::routed_expert,
          e);
    if (c_.n_shared_experts > 0)
      ffn("mlp.shared_experts.", c_.shared_intermediate_size(), TensorRole::shared_expert);
  }

  const ModelConfig& c_;
  int64_t layer_;
  std::string prefix_;
  const Visit& visit_;
};

} // namespace

int64_t TensorSpec::num_elements() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>{});
}

void for_each_tensor(const ModelConfig& config, int64_t num_mtp_layers, const Visit& visit) {
  const std::vector<int64_t> table{config.vocab_size, config.hidden_size};
  visit({"model.embed_tokens.weight", table, TensorRole::embedding, -1, -1, false});
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer)
    LayerVisitor{config, layer, visit}.block();
  visit({"model.norm.weight", {config.hidden_size}, TensorRole::norm, -1, -1, false});
  visit({"lm_head.weight", table, TensorRole::head, -1, -1, false});
  for (int64_t k = 0; k < num_mtp_layers; ++k) {
    LayerVisitor visitor{config, config.num_hidden_layers + k, visit};
    visitor.mtp_head();
    visitor.block();
  }
}

std::vector<TensorSpec> enumerate_tensors(const ModelConfig& config, int64_t num_mtp_layers) {
  std::vector<TensorSpec> result;
  for_each_tensor(config, num_mtp_layers, [&](const TensorSpec& t) { result.push_back(t); });
  return result;
}

std::string scale_name(std::string_view weight) { return std::string{weight} + "_scale_inv"; }

std::vector<int64_t> scale_shape(const std::vector<int64_t>& weight,
                                 const QuantizationConfig& quantization) {
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  return {blocks(weight.at(0), quantization.block_rows),
          blocks(weight.at(1), quantization.block_cols)};
}

std::string_view name_of(WeightFormat format) {
  switch (format) {
  case WeightFormat::f32:
    return "f32";
  case WeightFormat::bf16:
    return "bf16";
  case WeightFormat::fp8:
    return "fp8";
  }
  return "unknown";
}

std::optional<WeightFormat> weight_format_from_name(std::string_view name) {
  for (const auto format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::fp8})
    if (name_of(format) == name)
      return format;
  return std::nullopt;
}

DType stored_dtype(TensorRole role, WeightFormat format) {
  if (format == WeightFormat::f32 || role == TensorRole::router_bias)
    return DType::f32;
  return format == WeightFormat::fp8 && is_quantizable(role) ? DType::f8_e4m3 : DType::bf16;
}

int64_t stored_bytes(const TensorSpec& spec, WeightFormat format,
                     const QuantizationConfig& quantization) {
  const auto dtype = stored_dtype(spec.role, format);
  int64_t bytes = spec.num_elements() * size_of(dtype);
  if (dtype == DType::f8_e4m3) {
    const auto blocks = scale_shape(spec.shape, quantization);
    bytes += blocks[0] * blocks[1] * size_of(DType::f32);
  }
  return bytes;
}

ParameterCounts count_parameters(const ModelConfig& config) {
  ParameterCounts counts;
  int64_t idle_experts = 0; // routed experts that a token did not choose
  const auto quantization = config.quantization.value_or(QuantizationConfig{});
  for_each_tensor(config, config.num_nextn_predict_layers, [&](const TensorSpec& t) {
    const int64_t n = t.num_elements();
    if (is_quantizable(t.role)) {
      const auto blocks = scale_shape(t.shape, quantization);
      counts.scales += blocks[0] * blocks[1];
    }
    if (t.layer >= config.num_hidden_layers) {
      counts.mtp_stored += n;
      counts.mtp_unique += t.mtp_copy ? 0 : n;
      return;
    }
    counts.total += n;
    if (t.expert >= config.num_experts_per_tok) // experts of a layer are of one size
      idle_experts += n;
  });
  const int64_t table = config.vocab_size * config.hidden_size;
  counts.active = counts.total - idle_experts;
  counts.active_without_embedding = counts.active - table;
  counts.active_without_embedding_and_head = counts.active - 2 * table;
  return counts;
}

} // namespace troupe
