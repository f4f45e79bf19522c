// Programs of pipeline ranks: what each computes, in which order (specification §6; DeepSeek-V3
// report §3.2.1, zero bubble: Qi et al. 2023). Pure.
//
// A rank runs one stage per phase. DualPipe has two phases with a copy of a stage each, whose
// micro-batches run in opposite directions; DualPipeV has two phases with the two legs of a V, and
// all micro-batches pass both; 1F1B and ZB1P have one. A program names micro-batches by phase and
// index: the index-th of that phase.
#pragma once

#include "config/errors.hpp"

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe {

enum class ScheduleKind : uint8_t { dualpipe, dualpipev, one_f_one_b, zb1p };
[[nodiscard]] std::string_view to_string(ScheduleKind kind); // "dualpipe", …, "1f1b", "zb1p"
[[nodiscard]] caf::expected<ScheduleKind> parse_schedule(std::string_view name);

enum class OpKind : uint8_t {
  forward,        // F
  backward,       // B: for inputs and weights
  backward_input, // b: for inputs; its weight work joins a queue
  weight,         // W: the weight work at the queue's front
  overlapped,     // [F B]: a forward and a backward that take turns
};

struct ChunkRef {
  int8_t phase = 0;
  int32_t index = 0;
  friend bool operator==(const ChunkRef&, const ChunkRef&) = default;
};

struct ScheduleOp {
  OpKind kind = OpKind::forward;
  ChunkRef f; // of forward and overlapped
  ChunkRef b; // of all others and overlapped; of weight: the chunk whose work this is
  friend bool operator==(const ScheduleOp&, const ScheduleOp&) = default;
};
using Program = std::vector<ScheduleOp>;
// "F0.3", "B1.3", "b0.6", "W", "[F0.7 B1.3]".
[[nodiscard]] std::string to_string(const ScheduleOp& op);

// Errc::invalid_argument naming what pp (ranks) and num_chunks (micro-batches of a step) must be.
[[nodiscard]] caf::error check_schedule(ScheduleKind kind, int32_t pp, int32_t num_chunks);
// The program of a rank. Arguments must have passed check_schedule.
[[nodiscard]] Program make_program(ScheduleKind kind, int32_t rank, int32_t pp, int32_t num_chunks);

// ---- where stages lie ----
[[nodiscard]] int32_t num_stages(ScheduleKind kind, int32_t pp);
[[nodiscard]] int32_t num_phases(ScheduleKind kind);
[[nodiscard]] int32_t stage_of(ScheduleKind kind, int32_t rank, int32_t pp, int32_t phase);
// The direction of the micro-batches in a phase; 0 but for DualPipe.
[[nodiscard]] int32_t direction_of(ScheduleKind kind, int32_t rank, int32_t pp, int32_t phase);
// (rank, phase) of the copy of a stage that serves a direction.
[[nodiscard]] std::pair<int32_t, int32_t> place_of(ScheduleKind kind, int32_t stage,
                                                   int32_t direction, int32_t pp);

} // namespace troupe
