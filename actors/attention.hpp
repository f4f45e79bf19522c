// The trunk of the model on one rank: embedding, MLA, gate, shared experts, head; owns the latent
// KV cache and, on the leader of a TP group, the requests of the group.
//
//            RunRequest                    step ends                Drafts
//   (idle) ────────────▶ walking ───────────────────▶ drafting ────────────▶ walking …
//                           │       no speculation                              │
//                           └──────────────────────────▶ walking, or idle when nothing is left
//
// Two such lanes run side by side once a step would be large enough: while one waits for the wire,
// the other computes.
// A step is a list of (request, positions), prefill and decode mixed (actors/batching.hpp). What a
// request gets never depends on the others in its steps. Siblings of a TP group run the leader's
// steps in the order of their ids and decide nothing.
#pragma once

#include "actors/block_runner.hpp"
#include "actors/messages.hpp"
#include "actors/rank_context.hpp"
#include "config/tokenizer.hpp"
#include "kernels/trunk.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

using Attention =
    caf::typed_actor<caf::reacts_to<Envelope>, caf::reacts_to<JobDone>, caf::reacts_to<RunRequest>,
                     caf::reacts_to<StepPlan>, caf::reacts_to<Drafts>, caf::reacts_to<RowsTaken>,
                     caf::reacts_to<CancelRequest>>;

// What the trunk runs on; shared with the rank's MTP actor. Immutable but for the cache's bytes.
struct TrunkParts {
  std::shared_ptr<const TrunkWeights> weights;
  TrunkShare share;
  std::shared_ptr<LatentCache> cache;         // layers of the main model
  std::shared_ptr<LatentCache> mtp_cache;     // one layer per drafting depth; null without MTP
  std::shared_ptr<const Tokenizer> tokenizer; // null: no stop strings
  std::vector<int32_t> eos_ids;
  int32_t num_ids = 0; // ids from here on are never sampled
};

// A request on its leader: everything it is, as one value.
struct Sequence {
  RunRequest request;
  std::vector<int32_t> tokens; // prompt and answer
  int64_t prompt_length = 0;
  int64_t computed = 0; // positions in the cache
  std::vector<int32_t> pages;
  std::vector<int32_t> drafts;            // to be checked in the next step
  TokenCounts counts;                     // kept only where a penalty needs them
  std::optional<Detokenizer> detokenizer; // kept only for stop strings
  std::string tail;                       // text that a stop string may still begin in
  int64_t drafted = 0, accepted = 0, steps = 0;
  std::deque<RowsReady> rows; // to be sent as the client takes those before
  int64_t unacknowledged = 0; // bytes of rows sent and not yet taken
  std::string ending;         // the reason, once only rows keep the request from ending
  bool in_flight = false;     // in a step, or waiting for drafts
  bool cancelled = false;
  Nanoseconds started{0}, first_token{0};
};

struct AttentionStep;

struct AttentionState {
  static inline const char* name = "attention";
  const RankContext* context = nullptr; // not owned; outlives the actor
  TrunkParts parts;
  std::shared_ptr<Trunk> trunk;
  // Up to two steps are in flight, each on a lane of its own.
  struct Lane {
    std::unique_ptr<BlockRunner> runner;
    uint64_t next_step = 0;
    std::shared_ptr<AttentionStep> step; // the one under way
    bool drafting = false;               // its step is over, drafts are still to come
    std::vector<Sequence*> sequences; // leader: those of the step that ended, until drafts are in
    std::deque<StepPlan> plans;       // sibling: steps to run
  };
  std::vector<Lane> lanes; // never resized once the actor runs
  int64_t overlap_rows = 0;
  uint64_t last_pass = 0;                        // of the MTP modules, asked for
  std::vector<std::unique_ptr<Sequence>> active; // oldest first
  std::deque<RunRequest> queue;                  // waiting for cache pages
  std::vector<int32_t> free_pages;
};

Attention::behavior_type attention(Attention::stateful_pointer<AttentionState> self,
                                   const RankContext* context, TrunkParts parts,
                                   std::shared_ptr<Trunk> trunk);

} // namespace troupe
