#include "config/inspect.hpp"

#include <fmt/format.h>

#include <map>
#include <utility>

namespace troupe {

namespace {

// A tensor's name cut at the numbers of its layer and expert.
struct Family {
  std::string before_expert, after_expert; // behind the layer's number
  std::vector<int64_t> shape;
  bool mtp = false;
  auto operator<=>(const Family&) const = default;
};

struct Members {
  int64_t first_layer = 0, last_layer = 0, last_expert = 0, count = 0;
};

Family family_of(const ModelConfig& config, const TensorSpec& spec) {
  if (spec.layer < 0)
    return {spec.name, "", spec.shape, false};
  auto rest = spec.name.substr(fmt::format("model.layers.{}", spec.layer).size());
  Family family{std::move(rest), "", spec.shape, spec.layer >= config.num_hidden_layers};
  if (spec.expert >= 0) {
    const std::string experts = ".mlp.experts.";
    const auto number = std::to_string(spec.expert).size();
    family.after_expert = family.before_expert.substr(experts.size() + number);
    family.before_expert = experts;
  }
  return family;
}

std::string range(int64_t first, int64_t last) {
  return first == last ? std::to_string(first) : fmt::format("{{{}-{}}}", first, last);
}

std::vector<ShapeRow> shape_rows(const ModelConfig& config) {
  std::map<Family, size_t> rows; // index into what follows, which keeps file order
  std::vector<std::pair<ShapeRow, Members>> found;
  for_each_tensor(config, config.num_nextn_predict_layers, [&](const TensorSpec& spec) {
    const auto [at, fresh] = rows.emplace(family_of(config, spec), found.size());
    if (fresh) {
      const auto& family = at->first;
      found.push_back(
          {{family.before_expert + "\n" + family.after_expert, spec.shape, spec.role, 0},
           {spec.layer, spec.layer, spec.expert, 0}});
    }
    auto& members = found[at->second].second;
    members.last_layer = spec.layer;
    members.last_expert = spec.expert;
    ++members.count;
  });
  std::vector<ShapeRow> result;
  for (auto& [row, members] : found) {
    const auto gap = row.name.find('\n');
    const auto expert = members.last_expert < 0 ? std::string{} : range(0, members.last_expert);
    auto name = row.name.substr(0, gap) + expert + row.name.substr(gap + 1);
    if (members.first_layer >= 0)
      name = "model.layers." + range(members.first_layer, members.last_layer) + name;
    row.name = std::move(name);
    row.count = members.count;
    result.push_back(std::move(row));
  }
  return result;
}

// Sizes of the first layer of each kind; MTP layers are like other MoE layers.
PartSizes part_sizes(const ModelConfig& config) {
  PartSizes parts;
  int64_t dense_layer = -1, moe_layer = -1;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    const bool moe = config.is_moe(layer);
    ++(moe ? parts.num_moe_layers : parts.num_dense_layers);
    auto& first = moe ? moe_layer : dense_layer;
    first = first < 0 ? layer : first;
  }
  for_each_tensor(config, 0, [&](const TensorSpec& spec) {
    const int64_t n = spec.num_elements();
    if (spec.role == TensorRole::embedding)
      parts.embedding = n;
    else if (spec.layer == 0 &&
             (spec.role == TensorRole::attention || spec.role == TensorRole::latent_norm))
      parts.attention += n;
    else if (spec.layer == dense_layer && spec.role == TensorRole::dense_ffn)
      parts.dense_ffn += n;
    else if (spec.layer == moe_layer && spec.expert == 0)
      parts.routed_expert += n;
    else if (spec.layer == moe_layer && spec.role == TensorRole::shared_expert)
      parts.shared_experts += n;
    else if (spec.layer == moe_layer &&
             (spec.role == TensorRole::router || spec.role == TensorRole::router_bias))
      parts.router += n;
  });
  return parts;
}

} // namespace

WeightFormat format_of(const ModelConfig& config) {
  if (config.quantization)
    return WeightFormat::fp8;
  return config.torch_dtype == "float32" ? WeightFormat::f32 : WeightFormat::bf16;
}

caf::expected<Inspection> inspect_model(const ModelConfig& config,
                                        const std::optional<ClusterLayout>& layout,
                                        WeightFormat format) {
  if (layout)
    if (auto error = check_layout(config, *layout))
      return error;
  Inspection result;
  result.shapes = shape_rows(config);
  result.parts = part_sizes(config);
  result.parameters = count_parameters(config);
  const auto quantization = config.quantization.value_or(QuantizationConfig{});
  for_each_tensor(config, config.num_nextn_predict_layers, [&](const TensorSpec& spec) {
    result.bytes_f32 += stored_bytes(spec, WeightFormat::f32, quantization);
    result.bytes_bf16 += stored_bytes(spec, WeightFormat::bf16, quantization);
    result.bytes_fp8 += stored_bytes(spec, WeightFormat::fp8, quantization);
  });
  const int64_t row_bytes = config.latent_dim() * size_of(DType::bf16);
  result.kv_bytes_per_token = config.num_hidden_layers * row_bytes;
  result.kv_bytes_per_token_with_mtp =
      (config.num_hidden_layers + config.num_nextn_predict_layers) * row_bytes;
  result.format = format;
  result.layout = layout;
  if (layout)
    result.ranks = rank_classes(config, *layout, format, config.num_nextn_predict_layers);
  return result;
}

} // namespace troupe
