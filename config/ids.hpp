// Identities. Each is a type of its own, so that a rank can't be passed for an expert.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace troupe {

template <class Tag, class Rep = int32_t>
struct Id {
  using rep = Rep;
  Rep value = -1;

  constexpr Id() = default;
  constexpr explicit Id(Rep v) : value(v) {}
  [[nodiscard]] constexpr bool valid() const { return value >= 0; }
  friend constexpr auto operator<=>(const Id&, const Id&) = default;
};

// A process of the cluster, numbered from 0; a restarted process keeps its rank and gets a new
// incarnation.
using RankId = Id<struct RankTag>;
// A host (or what the operator counts as one); gate groups are placed on nodes.
using NodeId = Id<struct NodeTag>;
// A routed expert of one layer as the checkpoint numbers it: [0, n_routed_experts). The shared
// experts of a layer count as one further logical expert, numbered n_routed_experts.
using ExpertId = Id<struct ExpertTag>;
// A physical place that hosts one logical expert of one layer.
using SlotId = Id<struct SlotTag>;
// A request, unique within a cluster's life.
using RequestId = Id<struct RequestTag, int64_t>;

template <class Inspector, class Tag, class Rep>
auto inspect(Inspector& f, Id<Tag, Rep>& x) {
  return f(x.value);
}

} // namespace troupe

template <class Tag, class Rep>
struct std::hash<troupe::Id<Tag, Rep>> {
  size_t operator()(const troupe::Id<Tag, Rep>& id) const noexcept {
    return std::hash<Rep>{}(id.value);
  }
};
