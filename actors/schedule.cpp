#include "actors/schedule.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <deque>

namespace troupe {

namespace {

constexpr std::array<std::pair<ScheduleKind, std::string_view>, 4> kNames{{
    {ScheduleKind::dualpipe, "dualpipe"},
    {ScheduleKind::dualpipev, "dualpipev"},
    {ScheduleKind::one_f_one_b, "1f1b"},
    {ScheduleKind::zb1p, "zb1p"},
}};

// Counts micro-batches of both phases, and keeps the queue of weight work.
class ProgramWriter {
public:
  void forward(int8_t phase) { add({OpKind::forward, next_forward(phase), {}}); }
  void backward(int8_t phase) { add({OpKind::backward, {}, next_backward(phase)}); }
  void backward_input(int8_t phase) {
    const auto chunk = next_backward(phase);
    queue_.push_back(chunk);
    add({OpKind::backward_input, {}, chunk});
  }
  void backward(int8_t phase, bool input_only) {
    input_only ? backward_input(phase) : backward(phase);
  }
  void weight() {
    add({OpKind::weight, {}, queue_.front()});
    queue_.pop_front();
  }
  void overlapped(int8_t forward_phase, int8_t backward_phase) {
    const auto f = next_forward(forward_phase);
    add({OpKind::overlapped, f, next_backward(backward_phase)});
  }
  [[nodiscard]] bool has_weight() const { return !queue_.empty(); }
  [[nodiscard]] Program take() { return std::move(program_); }

private:
  void add(ScheduleOp op) { program_.push_back(op); }
  ChunkRef next_forward(int8_t phase) { return {phase, forwards_[static_cast<size_t>(phase)]++}; }
  ChunkRef next_backward(int8_t phase) { return {phase, backwards_[static_cast<size_t>(phase)]++}; }

  Program program_;
  std::array<int32_t, 2> forwards_{}, backwards_{};
  std::deque<ChunkRef> queue_;
};

// The eight steps of §6.3. `depth` counts from the entry end to the middle, where depth = last;
// `per_phase` micro-batches pass each phase, in a pipeline of `stages`.
Program dual_program(int32_t depth, int32_t last, int32_t per_phase, int32_t stages) {
  ProgramWriter w;
  const int32_t inner = last - depth;
  for (int32_t i = 0; i < 2 * inner; ++i)
    w.forward(0);
  for (int32_t i = 0; i <= depth; ++i) {
    w.forward(0);
    w.forward(1);
  }
  for (int32_t i = 0; i < inner; ++i) {
    w.backward_input(1);
    w.weight();
    w.forward(1);
  }
  for (int32_t i = 0; i < per_phase - stages + depth + 1; ++i) {
    if (i == 0 && depth == last) {
      w.forward(0);
      w.backward(1);
    } else {
      w.overlapped(0, 1);
    }
    w.overlapped(1, 0);
  }
  for (int32_t i = 0; i < inner; ++i) {
    w.backward(1);
    w.overlapped(1, 0);
  }
  const int32_t turn = (depth + 1) / 2; // from here on only for inputs
  for (int32_t i = 0; i <= depth; ++i) {
    w.backward(1, depth % 2 == 1 ? i >= turn : i > turn);
    w.backward(0, i >= turn);
  }
  for (int32_t i = 0; i < inner; ++i) {
    w.weight();
    w.backward_input(0);
  }
  while (w.has_weight())
    w.weight();
  return w.take();
}

Program one_f_one_b_program(int32_t rank, int32_t pp, int32_t num_chunks, bool zero_bubble) {
  ProgramWriter w;
  const int32_t ahead = std::min(pp - 1 - rank, num_chunks);
  for (int32_t i = 0; i < ahead; ++i)
    w.forward(0);
  for (int32_t i = 0; i < num_chunks; ++i) {
    if (i + ahead < num_chunks)
      w.forward(0);
    w.backward(0, zero_bubble);
    if (zero_bubble && i >= rank)
      w.weight();
  }
  while (w.has_weight())
    w.weight();
  return w.take();
}

} // namespace

std::string_view to_string(ScheduleKind kind) {
  return std::find_if(kNames.begin(), kNames.end(), [&](const auto& n) { return n.first == kind; })
      ->second;
}

caf::expected<ScheduleKind> parse_schedule(std::string_view name) {
  for (const auto& [kind, text] : kNames)
    if (text == name)
      return kind;
  return make_error(
      Errc::invalid_argument,
      fmt::format("schedule: \"{}\" given, expected dualpipe, dualpipev, 1f1b or zb1p", name));
}

std::string to_string(const ScheduleOp& op) {
  const auto chunk = [](char letter, const ChunkRef& c) {
    return fmt::format("{}{}.{}", letter, c.phase, c.index);
  };
  switch (op.kind) {
  case OpKind::forward:
    return chunk('F', op.f);
  case OpKind::backward:
    return chunk('B', op.b);
  case OpKind::backward_input:
    return chunk('b', op.b);
  case OpKind::weight:
    return "W";
  case OpKind::overlapped:
    return fmt::format("[{} {}]", chunk('F', op.f), chunk('B', op.b));
  }
  return {};
}

caf::error check_schedule(ScheduleKind kind, int32_t pp, int32_t num_chunks) {
  const auto wrong = [](std::string text) {
    return make_error(Errc::invalid_argument, std::move(text));
  };
  if (pp < 1)
    return wrong(fmt::format("pp: {} given, expected at least 1", pp));
  if (num_chunks < 1)
    return wrong(fmt::format("{} micro-batches given, expected at least 1", num_chunks));
  if (kind == ScheduleKind::dualpipe && pp % 2 != 0)
    return wrong(fmt::format("pp: {} given; dualpipe expects an even number of ranks", pp));
  if (kind == ScheduleKind::dualpipe && num_chunks % 2 != 0)
    return wrong(fmt::format("{} micro-batches given; dualpipe expects an even number, as many in "
                             "each direction",
                             num_chunks));
  const bool dual = kind == ScheduleKind::dualpipe || kind == ScheduleKind::dualpipev;
  if (dual && int64_t{num_chunks} < 2 * int64_t{pp})
    return wrong(fmt::format("{} micro-batches given; {} on {} ranks expects at least {}",
                             num_chunks, to_string(kind), pp, 2 * int64_t{pp}));
  return {};
}

Program make_program(ScheduleKind kind, int32_t rank, int32_t pp, int32_t num_chunks) {
  switch (kind) {
  case ScheduleKind::dualpipe:
    return dual_program(std::min(rank, pp - 1 - rank), pp / 2 - 1, num_chunks / 2, pp);
  case ScheduleKind::dualpipev:
    return dual_program(rank, pp - 1, num_chunks, 2 * pp);
  case ScheduleKind::one_f_one_b:
  case ScheduleKind::zb1p:
    return one_f_one_b_program(rank, pp, num_chunks, kind == ScheduleKind::zb1p);
  }
  return {};
}

int32_t num_stages(ScheduleKind kind, int32_t pp) {
  return kind == ScheduleKind::dualpipev ? 2 * pp : pp;
}

int32_t num_phases(ScheduleKind kind) {
  return kind == ScheduleKind::dualpipe || kind == ScheduleKind::dualpipev ? 2 : 1;
}

int32_t direction_of(ScheduleKind kind, int32_t rank, int32_t pp, int32_t phase) {
  if (kind != ScheduleKind::dualpipe)
    return 0;
  return rank < pp / 2 ? phase : 1 - phase;
}

int32_t stage_of(ScheduleKind kind, int32_t rank, int32_t pp, int32_t phase) {
  if (kind == ScheduleKind::dualpipev)
    return phase == 0 ? rank : 2 * pp - 1 - rank;
  return direction_of(kind, rank, pp, phase) == 0 ? rank : pp - 1 - rank;
}

std::pair<int32_t, int32_t> place_of(ScheduleKind kind, int32_t stage, int32_t direction,
                                     int32_t pp) {
  if (kind == ScheduleKind::dualpipev)
    return stage < pp ? std::pair{stage, 0} : std::pair{2 * pp - 1 - stage, 1};
  const int32_t rank = direction == 0 ? stage : pp - 1 - stage;
  if (kind != ScheduleKind::dualpipe)
    return {rank, 0};
  return {rank, rank < pp / 2 ? direction : 1 - direction};
}

} // namespace troupe
