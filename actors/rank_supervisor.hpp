// Watches over a rank: its actors, its peers and the command to leave.
//
// Policy: what fails here can't be repaired from inside the rank (its peers may already hold
// different states), so the rank ends with the first cause, unedited, and its agent ends the run. A
// peer's GOODBYE is no failure when the cluster is stopping; before that it is a lost rank.
#pragma once

#include "actors/messages.hpp"
#include "actors/rank_context.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <functional>
#include <string>

namespace troupe {

using RankSupervisor =
    caf::typed_actor<caf::reacts_to<PeerLost>, caf::reacts_to<PeerLeft>, caf::reacts_to<StopRank>,
                     caf::reacts_to<StopCluster>, caf::reacts_to<StatsQuery>>;

struct RankSupervisorState {
  static inline const char* name = "rank_supervisor";
  const RankContext* context = nullptr; // not owned; outlives the actor
  int32_t num_ranks = 0;                // of the view, which is another's to change once ranks join
  bool stopping = false;
  // Called once, on the actor's thread: without error after StopRank, else with the cause.
  std::function<void(const caf::error&)> on_end;
  // What this rank holds; filled in by the rank.
  std::function<RankStats()> stats;
};

RankSupervisor::behavior_type
rank_supervisor(RankSupervisor::stateful_pointer<RankSupervisorState> self,
                const RankContext* context, std::function<RankStats()> stats,
                std::function<void(const caf::error&)> on_end);

} // namespace troupe
