#include "kernels/train_stage.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace troupe {

namespace {

constexpr int64_t kAlignment = 16; // elements: a cache line
int64_t aligned(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

} // namespace

TrainPrecision precision_of(TensorRole role, TrainPrecision compute) {
  if (role == TensorRole::router)
    return TrainPrecision::f32;
  return compute == TrainPrecision::fp8 && !is_quantizable(role) ? TrainPrecision::bf16 : compute;
}

StageShare stage_share(const ModelConfig& config, int64_t num_mtp_layers, int32_t stage,
                       int32_t num_stages) {
  const int64_t layers = config.num_hidden_layers, each = layers / num_stages,
                rest = layers % num_stages;
  StageShare share;
  share.first_layer = stage * each + std::min<int64_t>(stage, rest);
  share.last_layer = share.first_layer + each + (stage < rest ? 1 : 0);
  share.first = stage == 0;
  share.last = stage == num_stages - 1;
  share.num_mtp_layers = num_mtp_layers;
  share.last_expert = config.n_routed_experts;
  return share;
}

StageLayout::StageLayout(const ModelConfig& config, const StageShare& share) : share_(share) {
  const int64_t layers = config.num_hidden_layers;
  std::vector<int32_t> mtp_uses(static_cast<size_t>(share.num_mtp_layers)), all_uses{0};
  std::iota(mtp_uses.begin(), mtp_uses.end(), 1);
  all_uses.insert(all_uses.end(), mtp_uses.begin(), mtp_uses.end());
  const std::vector<int32_t> once{0};
  for_each_tensor(config, share.num_mtp_layers, [&](const TensorSpec& spec) {
    if (spec.mtp_copy)
      return;
    if (spec.expert >= 0 && (spec.expert < share.first_expert || spec.expert >= share.last_expert))
      return;
    if (spec.role == TensorRole::embedding) {
      if (share.first && share.last)
        add(spec, all_uses);
      else if (share.first)
        add(spec, once);
      else if (share.last && !mtp_uses.empty())
        add(spec, mtp_uses);
      return;
    }
    const bool in_trunk = spec.layer >= 0 && spec.layer < layers;
    if (in_trunk ? spec.layer >= share.first_layer && spec.layer < share.last_layer : share.last)
      add(spec, spec.role == TensorRole::head ? all_uses : once);
  });
}

void StageLayout::add(const TensorSpec& spec, std::span<const int32_t> uses) {
  const size_t index = tensors_.size();
  by_name_.emplace(spec.name, index);
  tensors_.push_back({spec, num_values_});
  num_values_ += aligned(spec.num_elements());
  if (spec.role == TensorRole::router_bias)
    return;
  const bool expert = spec.expert >= 0;
  int64_t& end = expert ? num_expert_ : num_dense_;
  for (const int32_t use : uses) {
    gradients_.push_back({index, use, expert, end});
    gradient_begin_.emplace(std::pair{spec.name, use}, end);
    end += aligned(spec.num_elements());
  }
}

const StageTensor* StageLayout::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

int64_t StageLayout::gradient_of(std::string_view name, int32_t use) const {
  const auto found = gradient_begin_.find(std::pair{std::string{name}, use});
  return found == gradient_begin_.end() ? -1 : found->second;
}

caf::expected<std::shared_ptr<StageWeights>> StageWeights::make(const ModelConfig& config,
                                                                const StageShare& share,
                                                                TrainPrecision precision,
                                                                const TrainOps& ops) {
  std::shared_ptr<StageWeights> weights{new StageWeights{config, share, precision, ops}};
  if (auto error = weights->allocate())
    return error;
  weights->bind();
  return weights;
}

caf::error StageWeights::allocate() {
  size_t prepared = 0;
  for (const auto& tensor : layout_.tensors()) {
    const auto& spec = tensor.spec;
    if (spec.shape.size() != 2 || spec.role == TensorRole::embedding)
      continue;
    const auto precision = precision_of(spec.role, precision_);
    prepared_at_.emplace(spec.name, std::pair{prepared, precision});
    prepared += (ops_.weight_bytes(precision, spec.shape[0], spec.shape[1]) + 63) / 64 * 64;
  }
  auto values = MemoryBlock::allocate(static_cast<size_t>(layout_.num_values()) * sizeof(float));
  if (!values)
    return values.error();
  auto forms = MemoryBlock::allocate(prepared);
  if (!forms)
    return forms.error();
  values_ = std::move(*values);
  prepared_ = std::move(*forms);
  return {};
}

std::span<float> StageWeights::values(const StageTensor& tensor) const {
  return {reinterpret_cast<float*>(values_.data()) + tensor.begin,
          static_cast<size_t>(tensor.size())};
}

void StageWeights::prepare(Workers& workers) {
  for (const auto& tensor : layout_.tensors()) {
    const auto at = prepared_at_.find(tensor.spec.name);
    if (at != prepared_at_.end())
      ops_.prepare_weight(at->second.second, tensor.spec.shape[0], tensor.spec.shape[1],
                          values(tensor).data(), prepared_.data() + at->second.first, workers);
  }
}

TrainNorm StageWeights::norm(const std::string& name) const {
  const auto* tensor = layout_.find(name);
  if (!tensor)
    return {};
  return {tensor->size(), values(*tensor).data(), layout_.gradient_of(name)};
}

TrainLinear StageWeights::linear(const std::string& name) const {
  const auto* tensor = layout_.find(name);
  if (!tensor)
    return {};
  const auto& [at, precision] = prepared_at_.at(name);
  return {tensor->spec.shape[0], tensor->spec.shape[1], precision, prepared_.data() + at,
          layout_.gradient_of(name)};
}

TrainFfn StageWeights::ffn(const std::string& prefix) const {
  return {linear(prefix + "gate_proj.weight"), linear(prefix + "up_proj.weight"),
          linear(prefix + "down_proj.weight")};
}

TrainBlock StageWeights::block(int64_t layer) const {
  const auto prefix = fmt::format("model.layers.{}.", layer);
  const auto attention = prefix + "self_attn.";
  TrainBlock b;
  b.layer = layer;
  b.moe = config_.is_moe(layer);
  b.input_norm = norm(prefix + "input_layernorm.weight");
  b.post_norm = norm(prefix + "post_attention_layernorm.weight");
  b.q_a_norm = norm(attention + "q_a_layernorm.weight");
  b.kv_a_norm = norm(attention + "kv_a_layernorm.weight");
  b.q_a = linear(attention + "q_a_proj.weight");
  b.q_b = linear(attention + (config_.q_lora_rank > 0 ? "q_b_proj.weight" : "q_proj.weight"));
  b.kv_a = linear(attention + "kv_a_proj_with_mqa.weight");
  b.kv_b = linear(attention + "kv_b_proj.weight");
  b.o = linear(attention + "o_proj.weight");
  b.ffn = ffn(prefix + (b.moe ? "mlp.shared_experts." : "mlp."));
  if (!b.moe)
    return b;
  b.router = linear(prefix + "mlp.gate.weight");
  if (const auto* bias = layout_.find(prefix + "mlp.gate.e_score_correction_bias"))
    b.router_bias = values(*bias).data();
  const auto& share = layout_.share();
  for (int64_t e = share.first_expert; e < share.last_expert; ++e)
    b.experts.push_back(ffn(fmt::format("{}mlp.experts.{}.", prefix, e)));
  return b;
}

void StageWeights::bind() {
  const auto& share = layout_.share();
  for (int64_t l = share.first_layer; l < share.last_layer; ++l)
    blocks_.push_back(block(l));
  if (const auto* table = layout_.find(kEmbeddingName))
    embedding_ = values(*table).data();
  if (!share.last)
    return;
  final_norm_ = norm("model.norm.weight");
  head_ = linear(std::string{kHeadName});
  for (int64_t k = 0; k < share.num_mtp_layers; ++k) {
    const int64_t layer = config_.num_hidden_layers + k;
    const auto prefix = fmt::format("model.layers.{}.", layer);
    mtp_.push_back({norm(prefix + "enorm.weight"), norm(prefix + "hnorm.weight"),
                    norm(prefix + "shared_head.norm.weight"), linear(prefix + "eh_proj.weight"),
                    block(layer)});
  }
}

} // namespace troupe
