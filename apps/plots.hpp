// The pictures of `troupe plot`, as SVG.
#pragma once

#include "actors/timeline.hpp"
#include "config/errors.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

// Loss, MTP loss and MaxVio over steps; a curve for each log. From a resumed run's log the later
// run of a step counts. `first_step` leaves out what came before it.
[[nodiscard]] caf::expected<std::string> plot_losses(const std::vector<std::string>& logs,
                                                     int64_t first_step, const std::string& title);

// Expert loads relative to their mean, experts × steps, a map for each MoE layer (`layer` picks
// one, counted from 0 as in the log).
[[nodiscard]] caf::expected<std::string>
plot_loads(const std::string& log, std::optional<int64_t> layer, const std::string& title);

struct TimelineOptions {
  std::vector<std::string> traces; // one for each rank, or one that holds all; or PREFIX
  std::optional<int64_t> step;     // absent: the last
  std::optional<int32_t> pp;       // absent: what fits the programs
  // Of the ideal timeline, in milliseconds; absent: the medians of the real ops.
  std::optional<double> forward, backward, weight, overlapped;
  std::string title;
};
// Times in milliseconds.
struct TimelineReport {
  int64_t step = 0;
  ScheduleKind kind = ScheduleKind::dualpipe;
  int32_t pp = 0, columns = 0, chunks = 0; // pipelines of pp ranks with chunks micro-batches each
  double total = 0;                        // of the real step
  // Of a rank, the mean: between ops and in waits for rows, without a job that runs; in jobs. The
  // rest are waits within ops, which are part of what ops cost: for experts, for the machine.
  double idle = 0, computing = 0;
  double most_idle = 0;                // the largest of all ranks
  double ideal_total = 0, formula = 0; // idle time of a rank by the formula
  OpCosts costs;                       // of the ideal timeline

  // Idle time that the schedule does not explain, as a share of the step.
  [[nodiscard]] double excess() const { return total > 0 ? (idle - formula) / total : 0; }
};
struct TimelinePlot {
  std::string svg;
  TimelineReport report;
};
// A training step as it really ran beside the ideal one.
[[nodiscard]] caf::expected<TimelinePlot> plot_timeline(const TimelineOptions& options);

} // namespace troupe
