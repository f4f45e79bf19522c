// The first view: which rank does what and hosts which experts. Pure.
#pragma once

#include "actors/view.hpp"

#include <string>
#include <vector>

namespace troupe {

struct ClusterShape {
  int32_t num_ranks = 1;
  // joint: every rank does attention and experts. Otherwise the first `attention_ranks` ranks do
  // attention and the rest host experts ("A+E").
  bool joint = true;
  int32_t attention_ranks = 0; // ignored when joint
  int32_t tp = 1;
  int32_t nodes = 1; // ranks are cut into nodes of equal size, in order
  bool two_hop = false;
  uint64_t placement_seed = 0;   // 0: contiguous by gate group; else a random placement
  int32_t redundant_experts = 0; // further slots per layer, replicas of experts in order
};

// Parses `joint` or `A+E` into a shape for `num_ranks` ranks (0: as many as the layout names).
[[nodiscard]] caf::expected<ClusterShape> parse_shape(const std::string& layout, int32_t num_ranks,
                                                      int32_t tp, int32_t nodes);

// Epoch 1. Errc::invalid_argument where the shape does not fit the model: more expert ranks than
// experts, TP that divides neither ranks nor heads, nodes that do not divide ranks.
// `num_mtp_layers`: MTP layers that take part (their experts are placed too).
[[nodiscard]] caf::expected<View> first_view(const ModelConfig& config, const ClusterShape& shape,
                                             int64_t num_mtp_layers);

} // namespace troupe
