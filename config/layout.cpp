#include "config/layout.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>

namespace troupe {

namespace {

struct Published {
  std::string_view name;
  int32_t num_ranks, tp, redundant_experts, shared_slots;
};
constexpr std::array<Published, 3> kPublished{{
    {"ep32", 32, 1, 32, 0},
    {"ep144", 144, 1, 32, 0},
    {"ep320", 320, 4, 32, 32},
}};

caf::error wrong(const std::string& text) { return make_error(Errc::invalid_argument, text); }

// A decimal number from 1 to kMaxRanks and nothing else.
std::optional<int32_t> rank_count(std::string_view text) {
  int32_t n = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (ec != std::errc{} || end != text.data() + text.size() || n < 1 || n > kMaxRanks)
    return std::nullopt;
  return n;
}

caf::expected<ClusterLayout> shape_of(std::string_view text, int32_t num_ranks) {
  ClusterLayout layout;
  layout.name = text;
  for (const auto& known : kPublished)
    if (known.name == text) {
      layout.num_ranks = layout.attention_ranks = layout.expert_ranks = known.num_ranks;
      layout.tp = known.tp;
      layout.redundant_experts = known.redundant_experts;
      layout.shared_slots = known.shared_slots;
      return layout;
    }
  if (text == "joint") {
    layout.num_ranks = layout.attention_ranks = layout.expert_ranks = std::max(num_ranks, 1);
    return layout;
  }
  const auto plus = text.find('+');
  const auto attention = rank_count(text.substr(0, plus));
  const auto experts =
      plus == std::string_view::npos ? std::nullopt : rank_count(text.substr(plus + 1));
  if (!attention || !experts)
    return wrong(fmt::format("layout \"{}\": expected joint, A+E (as 2+4), ep32, ep144 or ep320",
                             text.substr(0, 60)));
  layout.joint = false;
  layout.attention_ranks = *attention;
  layout.expert_ranks = *experts;
  layout.num_ranks = *attention + *experts;
  return layout;
}

// Whether tensor parallelism gives each rank a part of this tensor.
bool is_cut(const TensorSpec& spec) {
  if (spec.role == TensorRole::dense_ffn || spec.role == TensorRole::shared_expert)
    return true;
  return spec.role == TensorRole::attention && !spec.name.ends_with("q_a_proj.weight") &&
         !spec.name.ends_with("kv_a_proj_with_mqa.weight");
}

// FFNs are cut between K-segments; one with fewer segments than ranks is computed whole by each
// (determinism contract, Canonical sums).
int64_t ffn_segments(int64_t width) {
  const int64_t granules = (width + 127) / 128;
  int64_t segments = 1;
  while (segments * 2 <= std::min<int64_t>(8, granules))
    segments *= 2;
  return segments;
}

int64_t head_segments(int64_t heads) {
  int64_t segments = 8;
  while (heads % segments != 0)
    segments /= 2;
  return segments;
}

int64_t parts_of(const ModelConfig& config, const TensorSpec& spec, int64_t tp) {
  if (!is_cut(spec))
    return 1;
  if (spec.role == TensorRole::attention)
    return tp;
  const int64_t width = spec.role == TensorRole::dense_ffn ? config.intermediate_size
                                                           : config.shared_intermediate_size();
  return ffn_segments(width) >= tp ? tp : 1;
}

// What a tensor adds to a rank with attention.
void add_trunk(const ModelConfig& config, const ClusterLayout& layout, const TensorSpec& spec,
               int64_t bytes, bool leader, RankBytes& sum) {
  const int64_t parts = parts_of(config, spec, layout.tp);
  bytes = (bytes + parts - 1) / parts;
  switch (spec.role) {
  case TensorRole::attention:
  case TensorRole::latent_norm:
    sum.attention += bytes;
    break;
  case TensorRole::norm:
    (spec.layer >= config.num_hidden_layers && !spec.name.ends_with("layernorm.weight")
         ? sum.mtp
         : sum.attention) += bytes;
    break;
  case TensorRole::dense_ffn:
    sum.dense_ffn += bytes;
    break;
  case TensorRole::router:
  case TensorRole::router_bias:
    sum.router += bytes;
    break;
  case TensorRole::shared_expert:
    sum.shared_experts += layout.shared_slots == 0 ? bytes : 0;
    break;
  case TensorRole::embedding:
    sum.embedding += bytes;
    break;
  case TensorRole::head:
    sum.head += leader ? bytes : 0;
    break;
  case TensorRole::eh_proj:
    sum.mtp += bytes;
    break;
  case TensorRole::routed_expert:
    break;
  }
}

// Number i of n parts of `total` things, dealt out in runs.
int64_t part(int64_t total, int64_t i, int64_t n) { return total * (i + 1) / n - total * i / n; }

} // namespace

caf::expected<ClusterLayout> parse_layout(std::string_view text, int32_t num_ranks, int32_t tp,
                                          int32_t nodes) {
  if (num_ranks < 0 || num_ranks > kMaxRanks)
    return wrong(fmt::format("ranks: expected 1 to {}, got {}", kMaxRanks, num_ranks));
  auto layout = shape_of(text, num_ranks);
  if (!layout)
    return layout;
  if (layout->num_ranks > kMaxRanks)
    return wrong(fmt::format("layout {}: more than {} ranks", text, kMaxRanks));
  if (num_ranks > 0 && num_ranks != layout->num_ranks)
    return wrong(
        fmt::format("layout {} has {} ranks, but ranks is {}", text, layout->num_ranks, num_ranks));
  if (tp != 0)
    layout->tp = tp;
  if (layout->tp < 1 || layout->attention_ranks % layout->tp != 0)
    return wrong(fmt::format("tp: {} does not divide the {} attention ranks", layout->tp,
                             layout->attention_ranks));
  layout->nodes = std::max(nodes, 1);
  if (nodes < 0 || layout->num_ranks % layout->nodes != 0)
    return wrong(fmt::format("nodes: {} does not divide the {} ranks", nodes, layout->num_ranks));
  return layout;
}

caf::error check_layout(const ModelConfig& config, const ClusterLayout& layout) {
  if (layout.tp > head_segments(config.num_attention_heads) ||
      config.num_attention_heads % layout.tp != 0 || (layout.tp & (layout.tp - 1)) != 0)
    return wrong(fmt::format(
        "tp: {} heads can be cut into 1, 2, 4 or 8 equal parts up to {}, not {}",
        config.num_attention_heads, head_segments(config.num_attention_heads), layout.tp));
  const int64_t slots = config.n_routed_experts + layout.redundant_experts +
                        (config.n_shared_experts > 0 ? layout.shared_slots : 0);
  if (config.has_moe() && layout.expert_ranks > slots)
    return wrong(fmt::format("layout {}: {} ranks are too many for {} experts{}", layout.name,
                             layout.expert_ranks, config.n_routed_experts,
                             slots > config.n_routed_experts ? fmt::format(" in {} slots", slots)
                                                             : std::string{}));
  return {};
}

RankRole role_of(const ClusterLayout& layout, RankId rank) {
  RankRole role;
  role.node = NodeId{rank.value / (layout.num_ranks / layout.nodes)};
  if (rank.value < layout.attention_ranks) {
    role.attention_group = rank.value / layout.tp;
    role.tp_rank = rank.value % layout.tp;
  }
  const int32_t first_expert_rank = layout.num_ranks - layout.expert_ranks;
  if (rank.value >= first_expert_rank)
    role.expert_index = rank.value - first_expert_rank;
  return role;
}

SlotShare slots_of(const ModelConfig& config, const ClusterLayout& layout, RankId rank) {
  const auto role = role_of(layout, rank);
  if (role.expert_index < 0 || !config.has_moe())
    return {};
  const int64_t routed = config.n_routed_experts + layout.redundant_experts;
  const int64_t shared = config.n_shared_experts > 0 ? layout.shared_slots : 0;
  const int64_t n = layout.expert_ranks;
  const int64_t begin = (routed + shared) * role.expert_index / n;
  const int64_t count = part(routed + shared, role.expert_index, n);
  const int64_t of_routed = std::clamp<int64_t>(routed - begin, 0, count);
  return {of_routed, count - of_routed};
}

RankBytes bytes_of(const ModelConfig& config, const ClusterLayout& layout, RankId rank,
                   WeightFormat format, int64_t num_mtp_layers) {
  const auto role = role_of(layout, rank);
  const auto slots = slots_of(config, layout, rank);
  const auto quantization = config.quantization.value_or(QuantizationConfig{});
  RankBytes sum;
  for_each_tensor(config, num_mtp_layers, [&](const TensorSpec& spec) {
    if (spec.mtp_copy || spec.expert > 0) // the experts of a layer are of one size
      return;
    const int64_t bytes = stored_bytes(spec, format, quantization);
    if (spec.expert == 0)
      sum.routed_experts += slots.routed * bytes;
    else if (spec.role == TensorRole::shared_expert && layout.shared_slots > 0)
      sum.shared_experts += slots.shared * bytes;
    else if (role.attention_group >= 0)
      add_trunk(config, layout, spec, bytes, role.tp_rank == 0, sum);
  });
  return sum;
}

std::vector<RankClass> rank_classes(const ModelConfig& config, const ClusterLayout& layout,
                                    WeightFormat format, int64_t num_mtp_layers) {
  std::vector<RankClass> classes;
  for (int32_t r = 0; r < layout.num_ranks; ++r) {
    const RankId rank{r};
    const bool attention = role_of(layout, rank).attention_group >= 0;
    const auto slots = slots_of(config, layout, rank);
    const bool leader = attention && role_of(layout, rank).tp_rank == 0;
    const auto same = std::ranges::find_if(classes, [&](const RankClass& c) {
      const auto first = role_of(layout, c.ranks.front());
      return c.attention == attention && c.slots.routed == slots.routed &&
             c.slots.shared == slots.shared &&
             (first.attention_group >= 0 && first.tp_rank == 0) == leader;
    });
    if (same != classes.end())
      same->ranks.push_back(rank);
    else
      classes.push_back(
          {{rank}, attention, slots, bytes_of(config, layout, rank, format, num_mtp_layers)});
  }
  return classes;
}

} // namespace troupe
