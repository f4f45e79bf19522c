// Runs the experts placed on this rank for rows that any rank sends: a server, not a member of a
// collective. Owns the expert blocks of its slots; nobody else reads or writes them.
//
// Dispatches that wait while a job runs are taken together by the next one, so one walk over an
// expert's weights serves every source; by batch invariance nobody can tell. Each dispatch is
// answered by one combine, its rows in the order of `answer_rows`. A dispatch that names a slot
// version this shard does not hold is refused, whatever the epoch says.
#pragma once

#include "actors/messages.hpp"
#include "actors/rank_context.hpp"
#include "kernels/trunk.hpp"
#include "kernels/weights.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <deque>
#include <map>
#include <memory>
#include <utility>

namespace troupe {

using ExpertShard = caf::typed_actor<caf::reacts_to<Envelope>, caf::reacts_to<JobDone>>;

// The experts of one rank: (layer, slot) -> block.
using ExpertBlocks = std::map<std::pair<int32_t, int32_t>, ExpertBlock>;

struct ExpertShardState {
  static inline const char* name = "expert_shard";
  const RankContext* context = nullptr; // not owned; outlives the actor
  struct Work;
  std::shared_ptr<Work> work; // shared with the job in flight
  std::deque<Envelope> waiting;
  bool job_running = false;
};

ExpertShard::behavior_type expert_shard(ExpertShard::stateful_pointer<ExpertShardState> self,
                                        const RankContext* context,
                                        std::shared_ptr<const ExpertBlocks> blocks);

} // namespace troupe
