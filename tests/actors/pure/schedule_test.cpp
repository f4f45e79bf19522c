#include "actors/schedule.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <set>
#include <string>
#include <vector>

using namespace troupe;

namespace {

std::string text_of(const Program& program) {
  std::string text;
  for (const auto& op : program) {
    if (!text.empty())
      text += ' ';
    text += to_string(op);
  }
  return text;
}

std::vector<Program> programs(ScheduleKind kind, int32_t pp, int32_t chunks) {
  std::vector<Program> all;
  for (int32_t rank = 0; rank < pp; ++rank)
    all.push_back(make_program(kind, rank, pp, chunks));
  return all;
}

// What a program did, and whether it kept its rules on the way.
struct Tally {
  std::array<int32_t, 2> forwards{}, backwards{};
  int32_t weights = 0, inputs_only = 0, overlapped = 0;
  bool in_order = true;        // each phase's chunks come as 0, 1, 2, …
  bool forward_first = true;   // no chunk goes back before it came
  bool weights_in_turn = true; // W is the work of the oldest b that has none yet
  bool queue_empty = false;
};

Tally tally(const Program& program) {
  Tally t;
  std::deque<ChunkRef> queue;
  const auto take = [&](std::array<int32_t, 2>& counts, const ChunkRef& c) {
    t.in_order &= c.index == counts[static_cast<size_t>(c.phase)]++;
  };
  for (const auto& op : program) {
    if (op.kind == OpKind::weight) {
      ++t.weights;
      t.weights_in_turn &= !queue.empty() && queue.front() == op.b;
      if (!queue.empty())
        queue.pop_front();
      continue;
    }
    if (op.kind != OpKind::forward) {
      t.forward_first &= op.b.index < t.forwards[static_cast<size_t>(op.b.phase)];
      take(t.backwards, op.b);
    }
    if (op.kind == OpKind::forward || op.kind == OpKind::overlapped)
      take(t.forwards, op.f);
    if (op.kind == OpKind::backward_input) {
      ++t.inputs_only;
      queue.push_back(op.b);
    }
    t.overlapped += op.kind == OpKind::overlapped;
  }
  t.queue_empty = queue.empty();
  return t;
}

void check_rules(const Program& program, int32_t per_phase, int32_t phases) {
  const auto t = tally(program);
  CHECK(t.forwards[0] == per_phase);
  CHECK(t.backwards[0] == per_phase);
  CHECK(t.forwards[1] == (phases == 2 ? per_phase : 0));
  CHECK(t.backwards[1] == (phases == 2 ? per_phase : 0));
  CHECK(t.weights == t.inputs_only);
  CHECK(t.in_order);
  CHECK(t.forward_first);
  CHECK(t.weights_in_turn);
  CHECK(t.queue_empty);
}

// Every chunk that a rank sends somewhere arrives there in a phase that runs it.
void check_places(ScheduleKind kind, int32_t pp) {
  std::set<std::pair<int32_t, int32_t>> taken;
  const int32_t directions = kind == ScheduleKind::dualpipe ? 2 : 1;
  for (int32_t direction = 0; direction < directions; ++direction) {
    for (int32_t stage = 0; stage < num_stages(kind, pp); ++stage) {
      const auto [rank, phase] = place_of(kind, stage, direction, pp);
      CAPTURE(stage);
      CAPTURE(direction);
      REQUIRE(rank >= 0);
      REQUIRE(rank < pp);
      REQUIRE(phase >= 0);
      REQUIRE(phase < num_phases(kind));
      CHECK(stage_of(kind, rank, pp, phase) == stage);
      CHECK(direction_of(kind, rank, pp, phase) == direction);
      CHECK(taken.emplace(rank, phase).second);
    }
  }
  CHECK(static_cast<int32_t>(taken.size()) == pp * num_phases(kind));
}

} // namespace

TEST_CASE("DualPipe on two ranks runs the published program") {
  for (int32_t rank = 0; rank < 2; ++rank)
    CHECK(text_of(make_program(ScheduleKind::dualpipe, rank, 2, 4)) ==
          "F0.0 F1.0 F0.1 B1.0 [F1.1 B0.0] B1.1 b0.1 W");
}

TEST_CASE("DualPipe on eight ranks takes as many ops in each of its eight steps as published") {
  // [rank 0, 1, 2, 3]; steps 1 … 8 are what stands between: their sum, and the number of W.
  const std::vector<std::vector<size_t>> steps{{6, 2, 9, 6, 6, 2, 6, 1},
                                               {4, 4, 6, 8, 4, 4, 4, 2},
                                               {2, 6, 3, 10, 2, 6, 2, 3},
                                               {0, 8, 0, 13, 0, 8, 0, 4}};
  const std::vector<size_t> totals{38, 36, 34, 33};
  for (int32_t rank = 0; rank < 8; ++rank) {
    CAPTURE(rank);
    const auto program = make_program(ScheduleKind::dualpipe, rank, 8, 20);
    const auto h = static_cast<size_t>(std::min(rank, 7 - rank));
    CHECK(program.size() == totals[h]);
    CHECK(tally(program).weights == 7 - static_cast<int32_t>(h));
    // The steps can be told apart by what they hold.
    size_t at = 0;
    const auto step = [&](size_t number) {
      const auto begin = program.begin() + static_cast<std::ptrdiff_t>(at);
      at += steps[h][number - 1];
      return Program{begin, program.begin() + static_cast<std::ptrdiff_t>(at)};
    };
    const auto count = [](const Program& ops, OpKind kind) {
      return static_cast<size_t>(std::ranges::count(ops, kind, &ScheduleOp::kind));
    };
    const auto only_f0 = step(1);
    CHECK(std::ranges::all_of(only_f0, [](const ScheduleOp& op) {
      return op.kind == OpKind::forward && op.f.phase == 0;
    }));
    CHECK(count(step(2), OpKind::forward) == steps[h][1]);
    const auto zero_bubble = step(3);
    CHECK(count(zero_bubble, OpKind::backward_input) == steps[h][2] / 3);
    CHECK(count(zero_bubble, OpKind::weight) == steps[h][2] / 3);
    CHECK(count(step(4), OpKind::overlapped) == (h == 3 ? 11 : steps[h][3]));
    CHECK(count(step(5), OpKind::overlapped) == steps[h][4] / 2);
    const auto turning = step(6);
    CHECK(count(turning, OpKind::backward) + count(turning, OpKind::backward_input) == steps[h][5]);
    CHECK(count(step(7), OpKind::weight) == steps[h][6] / 2);
    CHECK(count(step(8), OpKind::weight) == steps[h][7]);
    CHECK(at == program.size());
  }
}

TEST_CASE("DualPipe runs every chunk once each way, and as many W as b, on 2 to 16 ranks") {
  for (int32_t pp = 2; pp <= 16; pp += 2) {
    for (int32_t chunks = 2 * pp; chunks <= 2 * pp + 24; chunks += 2) {
      CAPTURE(pp);
      CAPTURE(chunks);
      const auto all = programs(ScheduleKind::dualpipe, pp, chunks);
      for (int32_t rank = 0; rank < pp; ++rank) {
        CAPTURE(rank);
        const auto& program = all[static_cast<size_t>(rank)];
        check_rules(program, chunks / 2, 2);
        const int32_t h = std::min(rank, pp - 1 - rank);
        CHECK(tally(program).weights == pp - 1 - h);
        CHECK(program == all[static_cast<size_t>(pp - 1 - rank)]);
      }
    }
    check_places(ScheduleKind::dualpipe, pp);
  }
}

TEST_CASE("DualPipeV is the first half of a DualPipe of twice the ranks and micro-batches") {
  for (int32_t pp = 1; pp <= 8; ++pp) {
    for (int32_t chunks = 2 * pp; chunks <= 2 * pp + 11; ++chunks) {
      CAPTURE(pp);
      CAPTURE(chunks);
      for (int32_t rank = 0; rank < pp; ++rank) {
        const auto program = make_program(ScheduleKind::dualpipev, rank, pp, chunks);
        check_rules(program, chunks, 2);
        CHECK(program == make_program(ScheduleKind::dualpipe, rank, 2 * pp, 2 * chunks));
      }
    }
    check_places(ScheduleKind::dualpipev, pp);
  }
}

TEST_CASE("1F1B warms up by its distance from the end, then alternates") {
  CHECK(text_of(make_program(ScheduleKind::one_f_one_b, 0, 4, 6)) ==
        "F0.0 F0.1 F0.2 F0.3 B0.0 F0.4 B0.1 F0.5 B0.2 B0.3 B0.4 B0.5");
  CHECK(text_of(make_program(ScheduleKind::one_f_one_b, 2, 4, 6)) ==
        "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 F0.4 B0.3 F0.5 B0.4 B0.5");
  CHECK(text_of(make_program(ScheduleKind::one_f_one_b, 3, 4, 2)) == "F0.0 B0.0 F0.1 B0.1");
  CHECK(text_of(make_program(ScheduleKind::one_f_one_b, 0, 4, 2)) == "F0.0 F0.1 B0.0 B0.1");
}

TEST_CASE("ZB1P takes up weight work as late as its rank is far down") {
  CHECK(text_of(make_program(ScheduleKind::zb1p, 0, 3, 4)) ==
        "F0.0 F0.1 F0.2 b0.0 W F0.3 b0.1 W b0.2 W b0.3 W");
  CHECK(text_of(make_program(ScheduleKind::zb1p, 1, 3, 4)) ==
        "F0.0 F0.1 b0.0 F0.2 b0.1 W F0.3 b0.2 W b0.3 W W");
  CHECK(text_of(make_program(ScheduleKind::zb1p, 2, 3, 4)) ==
        "F0.0 b0.0 F0.1 b0.1 F0.2 b0.2 W F0.3 b0.3 W W W");
}

TEST_CASE("1F1B and ZB1P run every chunk once each way, however few there are") {
  for (int32_t pp = 1; pp <= 9; ++pp) {
    for (int32_t chunks = 1; chunks <= 2 * pp + 3; ++chunks) {
      CAPTURE(pp);
      CAPTURE(chunks);
      for (int32_t rank = 0; rank < pp; ++rank) {
        const auto plain = make_program(ScheduleKind::one_f_one_b, rank, pp, chunks);
        check_rules(plain, chunks, 1);
        CHECK(tally(plain).weights == 0);
        const auto zero_bubble = make_program(ScheduleKind::zb1p, rank, pp, chunks);
        check_rules(zero_bubble, chunks, 1);
        CHECK(tally(zero_bubble).weights == chunks);
        CHECK(tally(zero_bubble).overlapped == 0);
      }
    }
    check_places(ScheduleKind::one_f_one_b, pp);
    check_places(ScheduleKind::zb1p, pp);
  }
}

TEST_CASE("a W names the chunk whose weight work it is") {
  const auto program = make_program(ScheduleKind::dualpipe, 0, 2, 4);
  CHECK(program.back() == ScheduleOp{OpKind::weight, {}, {0, 1}});
}

TEST_CASE("a schedule that can't be is refused, saying what it needs") {
  struct Case {
    ScheduleKind kind;
    int32_t pp, chunks;
    const char* text;
  };
  const std::vector<Case> cases{
      {ScheduleKind::dualpipe, 0, 4, "pp: 0 given, expected at least 1"},
      {ScheduleKind::one_f_one_b, -2, 4, "pp: -2 given, expected at least 1"},
      {ScheduleKind::zb1p, 2, 0, "0 micro-batches given, expected at least 1"},
      {ScheduleKind::dualpipe, 3, 8, "pp: 3 given; dualpipe expects an even number of ranks"},
      {ScheduleKind::dualpipe, 2, 5,
       "5 micro-batches given; dualpipe expects an even number, as many in each direction"},
      {ScheduleKind::dualpipe, 4, 6,
       "6 micro-batches given; dualpipe on 4 ranks expects at least 8"},
      {ScheduleKind::dualpipev, 4, 7,
       "7 micro-batches given; dualpipev on 4 ranks expects at least 8"},
      {ScheduleKind::dualpipev, 2'000'000'000, 2'000'000'000,
       "2000000000 micro-batches given; dualpipev on 2000000000 ranks expects at least 4000000000"},
  };
  for (const auto& c : cases) {
    const auto error = check_schedule(c.kind, c.pp, c.chunks);
    CHECK(code_of(error) == Errc::invalid_argument);
    CHECK(text_of(error) == c.text);
  }
  CHECK(!check_schedule(ScheduleKind::dualpipe, 4, 8));
  CHECK(!check_schedule(ScheduleKind::dualpipe, 4, 10)); // need not be divisible by pp
  CHECK(!check_schedule(ScheduleKind::dualpipev, 3, 7));
  CHECK(!check_schedule(ScheduleKind::one_f_one_b, 5, 1));
  CHECK(!check_schedule(ScheduleKind::zb1p, 1, 1));
}

TEST_CASE("schedules have names") {
  for (const char* name : {"dualpipe", "dualpipev", "1f1b", "zb1p"}) {
    const auto kind = parse_schedule(name);
    REQUIRE(kind);
    CHECK(to_string(*kind) == name);
  }
  const auto unknown = parse_schedule("gpipe");
  REQUIRE(!unknown);
  CHECK(text_of(unknown.error()) ==
        "schedule: \"gpipe\" given, expected dualpipe, dualpipev, 1f1b or zb1p");
}
