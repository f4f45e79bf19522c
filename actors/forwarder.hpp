// Two-hop dispatch: the one rank of a node that a source's tokens cross to.
//
// It deals a forwarded dispatch out to the expert ranks of its node, and when their rows are back
// answers with one row for each complete gate group and single rows otherwise, in the order of
// `answer_rows`. The group sums are the same as anywhere else (contract, Combine), so direct and
// two-hop dispatch agree to the bit.
#pragma once

#include "actors/messages.hpp"
#include "actors/rank_context.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <cstdint>
#include <map>
#include <memory>

namespace troupe {

using Forwarder = caf::typed_actor<caf::reacts_to<Envelope>, caf::reacts_to<JobDone>>;

struct ForwarderState {
  static inline const char* name = "forwarder";
  const RankContext* context = nullptr; // not owned; outlives the actor
  struct Work;
  std::map<uint64_t, std::shared_ptr<Work>> open; // by our own number, echoed in `aux`
  uint64_t next_id = 1;
};

Forwarder::behavior_type forwarder(Forwarder::stateful_pointer<ForwarderState> self,
                                   const RankContext* context);

} // namespace troupe
