// The view: the one piece of shared truth. Who is alive, who does what, who hosts which expert.
//
// Views are values. A rank acts on the view it holds and stamps its epoch on every message; a
// change of view is decided by agreement (actors/agreement.hpp) and applied by the pure function
// `next_view`. Ids inside are dense: member r is rank r.
#pragma once

#include "config/errors.hpp"
#include "config/ids.hpp"
#include "config/model_config.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace troupe {

struct Member {
  RankId rank;
  uint32_t incarnation = 0;
  bool alive = true;
  NodeId node;
  int32_t attention_group = -1; // -1: no attention here; ranks of a group share its heads (TP)
  int32_t tp_rank = 0;
  bool hosts_experts = false;
  std::string address; // of its fabric; opaque
};

// A physical slot: where one copy of a logical expert of one layer lives. The version fences
// dispatches: a shard answers for the slot version it holds, whatever the epoch.
struct Slot {
  SlotId slot;     // dense per layer
  ExpertId expert; // n_routed_experts stands for the layer's shared experts
  RankId rank;
  uint32_t version = 1;
};

// The slots of one MoE layer and, for each logical expert, which of them host it.
struct LayerPlacement {
  int32_t layer = 0; // MTP layers count on from num_hidden_layers
  std::vector<Slot> slots;
  std::vector<std::vector<int32_t>> slots_of; // [n_routed_experts] indices into slots, ascending
};

struct View {
  uint64_t epoch = 0;
  int32_t tp = 1;
  int32_t num_attention_groups = 0;
  bool two_hop = false;
  std::vector<Member> members;
  std::vector<LayerPlacement> placement;   // MoE layers in ascending order
  std::vector<int32_t> placement_of_layer; // [layers] index into placement or -1

  [[nodiscard]] const Member& member(RankId r) const {
    return members.at(static_cast<size_t>(r.value));
  }
  [[nodiscard]] const LayerPlacement& layer(int64_t l) const {
    return placement.at(static_cast<size_t>(placement_of_layer.at(static_cast<size_t>(l))));
  }
  // The rank of a group's TP member.
  [[nodiscard]] RankId attention_rank(int32_t group, int32_t tp_rank) const;
  // Expert ranks of a node, ascending.
  [[nodiscard]] std::vector<RankId> expert_ranks(NodeId node) const;
};

// Which physical slot serves a row's choice of a logical expert. Deterministic and free to differ
// between rows: every replica computes the same bits. -1 when no live rank hosts it.
[[nodiscard]] int32_t choose_slot(const View& view, const LayerPlacement& placement,
                                  ExpertId expert, int64_t row);

// What can happen to a view.
struct MemberLost {
  RankId rank;
  uint32_t incarnation = 0;
};
struct MemberReturned { // a new incarnation of a known rank
  RankId rank;
  uint32_t incarnation = 0;
  std::string address;
};
struct SlotMoved { // a slot was loaded at `to`, with a new version
  int32_t layer = 0;
  SlotId slot;
  RankId to;
};

// The view after an event, under the next epoch. An event that changes nothing (an incarnation
// that is not the present one, a slot that does not exist) leaves the view as it is, epoch
// included.
[[nodiscard]] View next_view(View view, const MemberLost& event);
[[nodiscard]] View next_view(View view, const MemberReturned& event);
[[nodiscard]] View next_view(View view, const SlotMoved& event);

// A text table of members and slots, for logs and tests.
[[nodiscard]] std::string to_table(const View& view);

template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, Member& x) {
  return f(x.rank, x.incarnation, x.alive, x.node, x.attention_group, x.tp_rank, x.hosts_experts,
           x.address);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, Slot& x) {
  return f(x.slot, x.expert, x.rank, x.version);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, LayerPlacement& x) {
  return f(x.layer, x.slots, x.slots_of);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, View& x) {
  return f(x.epoch, x.tp, x.num_attention_groups, x.two_hop, x.members, x.placement,
           x.placement_of_layer);
}

} // namespace troupe
