#include "actors/view.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

namespace troupe {

RankId View::attention_rank(int32_t group, int32_t tp_rank) const {
  for (const auto& m : members)
    if (m.attention_group == group && m.tp_rank == tp_rank)
      return m.rank;
  return RankId{};
}

std::vector<RankId> View::expert_ranks(NodeId node) const {
  std::vector<RankId> ranks;
  for (const auto& m : members)
    if (m.alive && m.hosts_experts && m.node == node)
      ranks.push_back(m.rank);
  return ranks;
}

int32_t choose_slot(const View& view, const LayerPlacement& placement, ExpertId expert,
                    int64_t row) {
  if (expert.value < 0 || static_cast<size_t>(expert.value) >= placement.slots_of.size())
    return -1;
  const auto& replicas = placement.slots_of[static_cast<size_t>(expert.value)];
  const auto count = static_cast<int64_t>(replicas.size());
  for (int64_t i = 0; i < count; ++i) {
    const int32_t slot = replicas[static_cast<size_t>((row + i) % count)];
    if (view.member(placement.slots[static_cast<size_t>(slot)].rank).alive)
      return slot;
  }
  return -1;
}

View next_view(View view, const MemberLost& event) {
  const auto r = static_cast<size_t>(event.rank.value);
  if (!event.rank.valid() || r >= view.members.size() || !view.members[r].alive ||
      view.members[r].incarnation != event.incarnation)
    return view;
  view.members[r].alive = false;
  ++view.epoch;
  return view;
}

View next_view(View view, const MemberReturned& event) {
  const auto r = static_cast<size_t>(event.rank.value);
  if (!event.rank.valid() || r >= view.members.size() ||
      view.members[r].incarnation >= event.incarnation)
    return view;
  auto& member = view.members[r];
  member.alive = true;
  member.incarnation = event.incarnation;
  member.address = event.address;
  ++view.epoch;
  return view;
}

View next_view(View view, const SlotMoved& event) {
  if (event.layer < 0 || static_cast<size_t>(event.layer) >= view.placement_of_layer.size())
    return view;
  const int32_t index = view.placement_of_layer[static_cast<size_t>(event.layer)];
  if (index < 0 || !event.to.valid() || static_cast<size_t>(event.to.value) >= view.members.size())
    return view;
  auto& slots = view.placement[static_cast<size_t>(index)].slots;
  if (!event.slot.valid() || static_cast<size_t>(event.slot.value) >= slots.size())
    return view;
  auto& slot = slots[static_cast<size_t>(event.slot.value)];
  if (slot.rank == event.to)
    return view;
  slot.rank = event.to;
  ++slot.version;
  ++view.epoch;
  return view;
}

std::string to_table(const View& view) {
  std::string text =
      fmt::format("epoch {}  tp {}  attention groups {}  dispatch {}\n", view.epoch, view.tp,
                  view.num_attention_groups, view.two_hop ? "two-hop" : "direct");
  text += "rank  inc  alive  node  attention  tp  experts\n";
  for (const auto& m : view.members)
    fmt::format_to(std::back_inserter(text), "{:4}  {:3}  {:5}  {:4}  {:9}  {:2}  {}\n",
                   m.rank.value, m.incarnation, m.alive ? "yes" : "no", m.node.value,
                   m.attention_group < 0 ? std::string{"-"} : std::to_string(m.attention_group),
                   m.tp_rank, m.hosts_experts ? "yes" : "no");
  for (const auto& layer : view.placement) {
    fmt::format_to(std::back_inserter(text), "layer {}:", layer.layer);
    for (const auto& s : layer.slots)
      fmt::format_to(std::back_inserter(text), " {}@{}v{}", s.expert.value, s.rank.value,
                     s.version);
    text += '\n';
  }
  return text;
}

} // namespace troupe
