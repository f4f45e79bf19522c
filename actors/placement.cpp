#include "actors/placement.hpp"

#include "config/random.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <numeric>

namespace troupe {

namespace {

caf::error invalid(std::string text) { return make_error(Errc::invalid_argument, std::move(text)); }

std::optional<int32_t> parse_count(std::string_view text) {
  int32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 1)
    return std::nullopt;
  return value;
}

// Experts in the order in which they are dealt to expert ranks: by index (so that a gate group
// stays together), or shuffled by the seed.
std::vector<int32_t> dealing_order(int64_t num_experts, uint64_t seed, int64_t layer) {
  std::vector<int32_t> order(static_cast<size_t>(num_experts));
  std::iota(order.begin(), order.end(), 0);
  if (seed == 0)
    return order;
  KeyedStream random{seed, static_cast<uint64_t>(layer)};
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

LayerPlacement place_layer(const ModelConfig& config, const ClusterShape& shape,
                           const std::vector<RankId>& hosts, int64_t layer) {
  LayerPlacement placement;
  placement.layer = static_cast<int32_t>(layer);
  placement.slots_of.resize(static_cast<size_t>(config.n_routed_experts));
  const auto order = dealing_order(config.n_routed_experts, shape.placement_seed, layer);
  const auto num_slots = static_cast<int64_t>(order.size()) + shape.redundant_experts;
  const auto num_hosts = static_cast<int64_t>(hosts.size());
  for (int64_t s = 0; s < num_slots; ++s) {
    const auto expert = order[static_cast<size_t>(s) % order.size()];
    // Originals are dealt in contiguous runs; replicas from the far end, away from them.
    const bool replica = s >= static_cast<int64_t>(order.size());
    const auto host = replica ? (s + num_hosts / 2) % num_hosts
                              : s * num_hosts / static_cast<int64_t>(order.size());
    placement.slots_of[static_cast<size_t>(expert)].push_back(static_cast<int32_t>(s));
    placement.slots.push_back(Slot{SlotId{static_cast<int32_t>(s)}, ExpertId{expert},
                                   hosts[static_cast<size_t>(host)], 1});
  }
  return placement;
}

caf::error check_shape(const ModelConfig& config, const ClusterShape& shape) {
  const int32_t attention_ranks = shape.joint ? shape.num_ranks : shape.attention_ranks;
  const int32_t expert_ranks = shape.joint ? shape.num_ranks : shape.num_ranks - attention_ranks;
  if (shape.num_ranks < 1)
    return invalid(fmt::format("ranks: {} given, at least 1 expected", shape.num_ranks));
  if (shape.tp < 1 || attention_ranks % shape.tp != 0)
    return invalid(
        fmt::format("tp: {} does not divide the {} attention ranks", shape.tp, attention_ranks));
  int64_t segments = 8;
  while (config.num_attention_heads % segments != 0)
    segments /= 2;
  if (shape.tp > segments || segments % shape.tp != 0)
    return invalid(fmt::format("tp: {} asked for, but {} attention heads can be cut over 1 to {} "
                               "ranks (a power of two)",
                               shape.tp, config.num_attention_heads, segments));
  if (shape.nodes < 1 || shape.num_ranks % shape.nodes != 0)
    return invalid(
        fmt::format("nodes: {} does not divide the {} ranks", shape.nodes, shape.num_ranks));
  if (config.has_moe() && expert_ranks < 1)
    return invalid("layout: no rank hosts experts");
  if (config.has_moe() && expert_ranks > config.n_routed_experts)
    return invalid(
        fmt::format("ranks: {} expert ranks, but the model has only {} experts per layer",
                    expert_ranks, config.n_routed_experts));
  return {};
}

} // namespace

caf::expected<ClusterShape> parse_shape(const std::string& layout, int32_t num_ranks, int32_t tp,
                                        int32_t nodes) {
  ClusterShape shape;
  shape.tp = tp;
  shape.nodes = nodes;
  shape.num_ranks = num_ranks;
  if (layout.empty() || layout == "joint") {
    shape.num_ranks = std::max(num_ranks, 1);
    return shape;
  }
  const auto plus = layout.find('+');
  const auto a = plus == std::string::npos ? std::nullopt
                                           : parse_count(std::string_view{layout}.substr(0, plus));
  const auto e = plus == std::string::npos ? std::nullopt
                                           : parse_count(std::string_view{layout}.substr(plus + 1));
  if (!a || !e)
    return invalid(fmt::format(
        "layout: \"{}\" given, expected \"joint\" or \"A+E\" (attention + expert ranks, as 2+4)",
        layout));
  shape.joint = false;
  shape.attention_ranks = *a;
  if (num_ranks != 0 && num_ranks != *a + *e)
    return invalid(
        fmt::format("layout: \"{}\" has {} ranks, but ranks is {}", layout, *a + *e, num_ranks));
  shape.num_ranks = *a + *e;
  return shape;
}

caf::expected<View> first_view(const ModelConfig& config, const ClusterShape& shape,
                               int64_t num_mtp_layers) {
  if (auto error = check_shape(config, shape))
    return error;
  View view;
  view.epoch = 1;
  view.tp = shape.tp;
  view.two_hop = shape.two_hop;
  const int32_t attention_ranks = shape.joint ? shape.num_ranks : shape.attention_ranks;
  view.num_attention_groups = attention_ranks / shape.tp;
  std::vector<RankId> hosts;
  for (int32_t r = 0; r < shape.num_ranks; ++r) {
    Member m;
    m.rank = RankId{r};
    m.incarnation = 1;
    m.node = NodeId{r / (shape.num_ranks / shape.nodes)};
    if (r < attention_ranks) {
      m.attention_group = r / shape.tp;
      m.tp_rank = r % shape.tp;
    }
    m.hosts_experts = config.has_moe() && (shape.joint || r >= attention_ranks);
    if (m.hosts_experts)
      hosts.push_back(m.rank);
    view.members.push_back(std::move(m));
  }
  const int64_t num_layers = config.num_hidden_layers + num_mtp_layers;
  for (int64_t l = 0; l < num_layers; ++l) {
    const bool moe = config.has_moe() && (l >= config.num_hidden_layers || config.is_moe(l));
    view.placement_of_layer.push_back(moe ? static_cast<int32_t>(view.placement.size()) : -1);
    if (moe)
      view.placement.push_back(place_layer(config, shape, hosts, l));
  }
  return view;
}

} // namespace troupe
