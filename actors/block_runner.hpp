// Walks the rows of one step through transformer blocks: compute, dispatch, compute, combine, …
//
// Not an actor: the attention actor and the MTP actor each own one and hand it the messages that
// are its own. It never waits; it starts jobs on the rank's compute stream, and a job runs on until
// it needs somebody else's bytes:
//
//            ┌──────────────── next layer ───────────────────────────┐
//            ▼                                                       │
//   attention ──(tp>1: partials)── finish ── dense FFN ──(partials)──┤
//                                     └───── gate, fill dispatches ──▶ shared experts ─┐
//                                              ╰┄┄ wire, experts ┄┄▶ answers ──────────▶ combine
//                                                                   (tp>1: gather rows)
//
// The shared experts run while the dispatches are away. Under tensor parallelism every sibling
// walks the same rows; each dispatches and combines its own share of them.
#pragma once

#include "actors/dispatch_plan.hpp"
#include "actors/rank_context.hpp"
#include "kernels/trunk.hpp"

#include <caf/actor_addr.hpp>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

namespace troupe {

// One block of the walk.
struct WalkBlock {
  const BlockWeights* weights = nullptr;
  int32_t layer = 0; // global number: placement and dispatch id
  LatentCacheLayer cache;
};

// One walk. `x` holds the residual stream throughout.
struct Walk {
  uint64_t id = 0; // on the wire; grows from walk to walk, equal on all siblings
  StepRows rows;   // points into `pages`
  std::vector<std::vector<int32_t>> pages; // page tables of the sequences, kept alive here
  std::vector<WalkBlock> blocks;
  std::function<void(Workers&)> prologue; // fills x; runs in the first job
  std::function<void(Workers&)> epilogue; // reads x; runs in the last job
  // Sees the residual stream before each block (index into blocks); in a job. May be empty.
  std::function<void(size_t)> tap;

  // Appends rows for positions [first, first + count) of a sequence; those below `prompt_length`
  // take the naive form.
  void add_rows(int64_t first, int64_t count, int64_t prompt_length,
                std::vector<int32_t> sequence_pages);
};

class BlockRunner {
public:
  // Jobs' ends come to `self` as JobDone, whose ticket it hands to on_job_done.
  BlockRunner(const RankContext& context, std::shared_ptr<Trunk> trunk, Route route,
              caf::actor_addr self);
  ~BlockRunner();

  [[nodiscard]] bool busy() const;
  [[nodiscard]] MutableRows x() const;
  // Starts a walk; `done` is called on the actor's thread, with an error when memory or a peer
  // failed. Not while busy.
  void start(Walk walk, std::function<void(const caf::error&)> done);

  void on_envelope(Envelope envelope);
  void on_job_done(uint64_t walk);

private:
  struct State;
  void start_stage_job();
  void after_stage_job();
  void send_dispatches();
  void send_partials(const BufferRef& own, uint32_t stage);
  void maybe_continue();
  void finish(const caf::error& error);

  std::shared_ptr<State> state_;
  caf::actor_addr self_; // weak: the owner owns this
};

} // namespace troupe
