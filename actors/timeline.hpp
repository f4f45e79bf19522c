// Programs of pipeline ranks on an ideal machine: every op starts once its rank is free and its
// inputs are there, and messages take no time (specification §6.4, §6.5). Pure.
#pragma once

#include "actors/schedule.hpp"

#include <cstdint>
#include <vector>

namespace troupe {

// Times of ops, in any unit.
struct OpCosts {
  double forward = 1;
  double backward = 2; // for inputs and weights
  double weight = 1;
  double overlapped = 3;     // [F B]
  double backward_input = 1; // in theory backward − weight

  [[nodiscard]] double of(OpKind kind) const;
};

struct OpTime {
  double start = 0, end = 0;
};

struct RankTimeline {
  Program ops;
  std::vector<OpTime> times; // parallel to ops
  double busy = 0, idle = 0; // sum: the timeline's total
  // Most chunks alive at once: from the start of a chunk's forward to the end of its last backward
  // work, W where there is one.
  int32_t peak_live = 0;
};

struct Timeline {
  std::vector<RankTimeline> ranks;
  double total = 0; // from the first op's start to the last one's end

  [[nodiscard]] double bubble() const; // share of all ranks' time that is idle; 0 … 1
  [[nodiscard]] int32_t peak_live() const;
};

// Arguments must have passed check_schedule; costs are finite and not negative.
[[nodiscard]] Timeline ideal_timeline(ScheduleKind kind, int32_t pp, int32_t num_chunks,
                                      const OpCosts& costs);

// The idle time of a rank by the table of §6.5; `pp` counts ranks.
[[nodiscard]] double bubble_formula(ScheduleKind kind, int32_t pp, const OpCosts& costs);
// Activations of that table: the most chunks alive on a rank.
[[nodiscard]] int32_t peak_live_formula(ScheduleKind kind, int32_t pp);

} // namespace troupe
