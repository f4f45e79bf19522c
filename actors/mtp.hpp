// Multi-token prediction: drafts the tokens that the next step checks (specification §4.1, §4.3).
//
// Module k's row i takes the state of module k-1 at position i (k = 1: the trunk's, after the final
// norm) and the embedding of token i+k, and predicts token i+k+1. Every confirmed position passes
// through every module once its token i+k is known; the last rows run early with drafted tokens,
// and run again when these are confirmed, which overwrites what they left in the cache. So nothing
// of a rejected draft remains. Where more tokens are drafted than the model has modules, the last
// module is used again, with a cache of its own.
//
// Drafts are sampled with the noise of the token they guess, so that a draft is accepted exactly
// when it equals the token the trunk samples (contract, Sampling); they never change a token.
#pragma once

#include "actors/attention.hpp"
#include "actors/block_runner.hpp"
#include "actors/messages.hpp"
#include "actors/rank_context.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <vector>

namespace troupe {

using Mtp = caf::typed_actor<caf::reacts_to<Envelope>, caf::reacts_to<JobDone>,
                             caf::reacts_to<DraftWork>, caf::reacts_to<DraftPlan>,
                             caf::reacts_to<DraftTokens>, caf::reacts_to<ForgetSequence>>;

// How far a sequence's modules have come.
struct DraftProgress {
  std::vector<int64_t> next_row;             // per module: rows below are final
  std::vector<std::vector<std::byte>> state; // per module k > 1: module k-1's state at next_row
};

struct MtpState {
  static inline const char* name = "mtp";
  const RankContext* context = nullptr; // not owned; outlives the actor
  TrunkParts parts;
  std::shared_ptr<Trunk> trunk;
  std::unique_ptr<BlockRunner> runner;
  struct Pass;
  std::shared_ptr<Pass> pass; // the work under way
  std::map<RequestId, DraftProgress> progress;
  uint64_t last_pass = 0; // that is over
  std::vector<ForgetSequence> to_forget;
  std::map<uint64_t, DraftWork> works; // hidden states waiting for their turn, by step
  std::deque<DraftPlan> plans;         // passes to run, in order
  std::map<std::pair<uint64_t, int32_t>, std::vector<int32_t>> leader_drafts; // (pass, module)
};

Mtp::behavior_type mtp(Mtp::stateful_pointer<MtpState> self, const RankContext* context,
                       TrunkParts parts, std::shared_ptr<Trunk> trunk);

} // namespace troupe
