// The picture of a pipeline: a row for each rank, a box for each op, over time.
#pragma once

#include "actors/timeline.hpp"

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace troupe {

struct GanttOp {
  ScheduleOp op;
  double start = 0, end = 0;
  // When the rank computed, ascending; the rest of the box is drawn pale. Absent: all the time.
  std::optional<std::vector<std::pair<double, double>>> computing;
};

struct GanttRow {
  int32_t rank = 0;
  std::vector<GanttOp> ops;
  // Whether a phase is drawn in the colours of the second direction (or leg of a V).
  std::array<bool, 2> second{};
  double idle = 0;
};

struct GanttChart {
  std::string title, note; // the note stands below the title
  std::vector<GanttRow> rows;
  double total = 0;
};

struct GanttStyle {
  std::string title; // of the document
  ScheduleKind kind = ScheduleKind::dualpipe;
  std::string unit; // of time; empty: none
};

inline constexpr size_t kMaxGanttOps = 200'000; // more make no picture a viewer opens

// The charts one above the other, on one scale of time.
[[nodiscard]] std::string draw_gantt(const GanttStyle& style,
                                     const std::vector<GanttChart>& charts);

// The rows of a timeline of `pp` ranks; row r stands for rank r.
[[nodiscard]] std::vector<GanttRow> gantt_rows(ScheduleKind kind, const Timeline& timeline);
// GanttRow::second of a rank.
[[nodiscard]] std::array<bool, 2> second_phases(ScheduleKind kind, int32_t rank, int32_t pp);

} // namespace troupe
