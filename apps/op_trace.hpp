// Reads Chrome traces of training ranks (actors/trace.hpp) for what a pipeline did in a step.
#pragma once

#include "actors/schedule.hpp"
#include "config/errors.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace troupe {

using TimeSpan = std::pair<double, double>; // begin, end; milliseconds

struct TracedOp {
  std::string name; // "[F0.7 B1.3]"
  int64_t step = 0;
  TimeSpan time;
};
struct RankTrace {
  std::vector<TracedOp> ops;       // in the order of their begin
  std::vector<TimeSpan> computing; // spans of the compute track, joined; ascending
  std::vector<TimeSpan> waiting;   // for rows from the stage before or after, likewise
};
using Traces = std::map<int32_t, RankTrace>; // by rank

// Adds the spans of a file: a list of events, or an object whose traceEvents is one. Events of
// other kinds are skipped. Errors name the file.
[[nodiscard]] caf::error read_trace(const std::string& path, Traces& traces);
// After the last file: puts spans in order, joins those that touch.
void tidy(Traces& traces);

// One pass of a program on each rank, recognized as a schedule's.
struct TracedStep {
  int64_t step = 0;
  ScheduleKind kind = ScheduleKind::dualpipe;
  int32_t pp = 0;                // the ranks of a pipeline
  int32_t columns = 0;           // pipelines beside each other; rank = pp rank · columns + column
  int32_t chunks = 0;            // micro-batches of a pipeline
  std::vector<Program> programs; // by rank
  std::vector<std::vector<TimeSpan>> runs; // by rank, parallel to programs
};
// `step` absent: the last; `pp` absent: the deepest pipeline that fits. Errors say what of the
// trace is no program.
[[nodiscard]] caf::expected<TracedStep> find_step(const Traces& traces, std::optional<int64_t> step,
                                                  std::optional<int32_t> pp);

} // namespace troupe
