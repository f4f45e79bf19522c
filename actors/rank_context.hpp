// What every actor of a rank is handed: services it may use but does not own.
//
// One RankContext lives as long as the rank's actors and jobs. Its pointers are set before the
// first actor starts and never change.
#pragma once

#include "actors/postman.hpp"
#include "actors/trace.hpp"
#include "actors/view.hpp"
#include "config/clock.hpp"
#include "config/model_config.hpp"
#include "kernels/backend.hpp"
#include "kernels/stream.hpp"
#include "kernels/weights.hpp"
#include "transport/fabric.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>

namespace troupe {

struct RankLimits {
  int64_t batch = 16;          // sequences of one step
  int64_t prefill_chunk = 256; // prompt rows of one step
  int64_t kv_tokens = 0;       // positions the cache has room for
  int64_t max_context = 0;     // longest sequence
  int64_t max_speculate = 0;   // deepest draft
  int64_t max_queue = 1024;    // requests waiting per attention group
  int64_t overlap_rows = 64;   // from here on a step becomes two micro-batches; 0: never
  // Rows of the largest walk. A step has its prompts' rows and, for each sequence, a token and its
  // drafts; when these all turn out right, MTP module k gets as many again and the k - 1 it lags
  // behind by.
  [[nodiscard]] int64_t max_rows() const {
    return prefill_chunk + batch * std::max(1 + max_speculate, 2 * max_speculate);
  }
};

struct RankContext {
  RankId self;
  ModelConfig config;
  Arithmetic arithmetic;
  const Backend* backend = nullptr;
  RankLimits limits;
  std::shared_ptr<const View> view;
  Fabric* fabric = nullptr;
  ComputeStream* stream = nullptr;
  const Clock* clock = nullptr;
  Postman* postman = nullptr;
  Trace* trace = nullptr; // may be null

  [[nodiscard]] const Member& me() const { return view->member(self); }
  [[nodiscard]] int tp() const { return view->tp; }
  [[nodiscard]] RankId sibling(int32_t tp_rank) const {
    return view->attention_rank(me().attention_group, tp_rank);
  }
};

} // namespace troupe
