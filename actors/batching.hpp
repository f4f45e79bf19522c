// Continuous batching: which rows run in the next step, and how rows are shared out between the two
// micro-batches in flight. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace troupe {

// A request as the planner sees it, oldest first.
struct BatchItem {
  int64_t known = 0; // tokens known (prompt + answer)
  int64_t prompt_length = 0;
  int64_t computed = 0; // positions whose latents are in the cache
  int64_t drafts = 0;   // drafted tokens waiting for their check
  bool paused = false;  // not now: in flight, or its client must first take what it was sent
};

struct BatchLimits {
  int64_t max_sequences = 0; // --batch
  int64_t prefill_chunk = 0; // prompt rows of one step, over all requests
};

// Rows of item `item` in the step: positions computed … computed + num_rows - 1; the last
// `num_drafts` of them carry drafted tokens.
struct BatchRows {
  int32_t item = 0;
  int64_t num_rows = 0;
  int64_t num_drafts = 0;
};

// Decoding requests first (one row and their drafts each), then prompts in order of age until the
// chunk is full. Which requests share a step never changes a token, only when it comes.
[[nodiscard]] std::vector<BatchRows> plan_batch(std::span<const BatchItem> items,
                                                const BatchLimits& limits);

// Two steps may be in flight at once, each with sequences of its own: while one waits for the wire,
// the other computes. `batch` is what plan_batch found ready; `rows_in_flight` are those of the
// other step, 0 when there is none. From `overlap_rows` rows on, ready and in flight together, the
// step that starts now takes about half of them; below (or with overlap_rows 0) everything waits
// for one step, because small halves would read the weights twice and gain nothing.
[[nodiscard]] std::vector<BatchRows> take_micro_batch(std::vector<BatchRows> batch,
                                                      int64_t rows_in_flight, int64_t overlap_rows);

} // namespace troupe
