// Where requests enter: gives each an id and an attention group, and carries news back to its
// client. A client that goes away has its requests cancelled. Lives on rank 0.
#pragma once

#include "actors/messages.hpp"
#include "actors/rank_context.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>
#include <caf/typed_response_promise.hpp>

#include <cstdint>
#include <map>
#include <vector>

namespace troupe {

using Gateway =
    caf::typed_actor<caf::replies_to<SubmitRequest>::with<RequestId>, caf::reacts_to<TokensReady>,
                     caf::reacts_to<RowsReady>, caf::reacts_to<RequestDone>,
                     caf::reacts_to<RowsTaken>, caf::reacts_to<CancelRequest>,
                     caf::replies_to<GetClusterStats>::with<ClusterStats>,
                     caf::reacts_to<RankStats>, caf::replies_to<GetClusterInfo>::with<ClusterInfo>>;

struct GatewayState {
  static inline const char* name = "gateway";
  const RankContext* context = nullptr; // not owned; outlives the actor
  ClusterInfo info;
  struct Open {
    caf::actor client;
    int32_t group = 0;
  };
  std::map<RequestId, Open> open;
  std::vector<int64_t> load; // open requests per attention group
  int64_t next_id = 1;
  struct Query {
    caf::typed_response_promise<ClusterStats> promise;
    ClusterStats stats;
  };
  std::map<uint64_t, Query> queries;
  uint64_t next_query = 1;
};

// The group for a new request: the least loaded, ties to the lower number. Pure.
[[nodiscard]] int32_t choose_group(const std::vector<int64_t>& load);

Gateway::behavior_type gateway(Gateway::stateful_pointer<GatewayState> self,
                               const RankContext* context, ClusterInfo info);

} // namespace troupe
