// Cluster layouts as pure descriptions: which rank does what, and what it would hold.
//
//   joint      every rank does attention and hosts experts
//   A+E        A attention ranks, then E expert ranks ("2+4")
//   ep32       32 joint ranks, 32 redundant experts: the published prefill unit (§10.2)
//   ep144      144 joint ranks, 32 redundant experts: the published decode unit (§10.2)
//   ep320      320 joint ranks, attention TP4, 64 further slots for redundant and shared experts:
//   the
//              report's decode unit (§10.1). How it divides the 64 is not published; here half
//              are redundant experts and half are copies of the shared one.
#pragma once

#include "config/errors.hpp"
#include "config/ids.hpp"
#include "config/model_config.hpp"
#include "config/parameters.hpp"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

inline constexpr int32_t kMaxRanks = 4096;

struct ClusterLayout {
  std::string name; // as written
  bool joint = true;
  int32_t num_ranks = 1;
  int32_t attention_ranks = 1;   // the first so many
  int32_t expert_ranks = 1;      // the last so many; all of them when joint
  int32_t tp = 1;                // ranks [i·tp, (i+1)·tp) share one group's heads
  int32_t nodes = 1;             // ranks are cut into nodes of equal size, in order
  int32_t redundant_experts = 0; // further routed slots per MoE layer
  int32_t shared_slots = 0;      // slots per MoE layer for the shared experts; 0: with attention
};

// `num_ranks` and `tp` 0: what the layout says (joint: 1 rank; tp 1, ep320's 4). Errors name what
// contradicts what.
[[nodiscard]] caf::expected<ClusterLayout> parse_layout(std::string_view text, int32_t num_ranks,
                                                        int32_t tp, int32_t nodes);

// Whether the model can be laid out so: enough experts for the expert ranks, TP that divides heads.
[[nodiscard]] caf::error check_layout(const ModelConfig& config, const ClusterLayout& layout);

// What one rank does.
struct RankRole {
  int32_t attention_group = -1; // -1: no attention
  int32_t tp_rank = 0;
  NodeId node;
  int32_t expert_index = -1; // number among the expert ranks; -1: hosts none
};
[[nodiscard]] RankRole role_of(const ClusterLayout& layout, RankId rank);

// Slots of one MoE layer: routed experts, redundant ones, then shared ones, dealt out in runs that
// differ by at most one.
struct SlotShare {
  int64_t routed = 0; // redundant ones included
  int64_t shared = 0;
};
[[nodiscard]] SlotShare slots_of(const ModelConfig& config, const ClusterLayout& layout,
                                 RankId rank);

// Bytes of weights on one rank.
struct RankBytes {
  int64_t attention = 0; // with norms
  int64_t dense_ffn = 0;
  int64_t router = 0;
  int64_t shared_experts = 0;
  int64_t routed_experts = 0;
  int64_t embedding = 0;
  int64_t head = 0;
  int64_t mtp = 0; // eh_proj and norms of MTP modules; their blocks count above
  [[nodiscard]] int64_t total() const {
    return attention + dense_ffn + router + shared_experts + routed_experts + embedding + head +
           mtp;
  }
  friend bool operator==(const RankBytes&, const RankBytes&) = default;
};

// Tensor parallelism cuts heads and the width of dense and shared FFNs; latents, norms and router
// are on every rank of a group, the embedding too, the head on its first rank (that is how Troupe
// runs, where §1.6 would cut both by vocabulary). MTP modules share the main embedding and head.
[[nodiscard]] RankBytes bytes_of(const ModelConfig& config, const ClusterLayout& layout,
                                 RankId rank, WeightFormat format, int64_t num_mtp_layers);

// Ranks that hold the same amounts, for a table.
struct RankClass {
  std::vector<RankId> ranks; // ascending
  bool attention = false;
  SlotShare slots;
  RankBytes bytes;
};
[[nodiscard]] std::vector<RankClass> rank_classes(const ModelConfig& config,
                                                  const ClusterLayout& layout, WeightFormat format,
                                                  int64_t num_mtp_layers);

} // namespace troupe
