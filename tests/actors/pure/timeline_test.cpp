// The tables of specification §6.7 (start times) and §12.9 (bubbles), and what §6.5 says of them.
#include "actors/timeline.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <vector>

using namespace troupe;

namespace {

// "0:F0.0 1:F0.1 …"
std::string text_of(const RankTimeline& rank) {
  std::string text;
  for (size_t i = 0; i < rank.ops.size(); ++i)
    text += fmt::format("{}{}:{}", i == 0 ? "" : " ", rank.times[i].start, to_string(rank.ops[i]));
  return text;
}

OpCosts with_overlapped(double cost) {
  OpCosts costs;
  costs.overlapped = cost;
  return costs;
}

const std::vector<std::string> kEightRanks{
    "0:F0.0 1:F0.1 2:F0.2 3:F0.3 4:F0.4 5:F0.5 6:F0.6 7:F1.0 8:b1.0 9:W 10:F1.1 11:b1.1 12:W "
    "13:F1.2 14:b1.2 15:W "
    "16:F1.3 17:[F0.7 B1.3] 23:[F1.4 B0.0] 26:[F0.8 B1.4] 29:[F1.5 B0.1] 32:[F0.9 B1.5] "
    "35:[F1.6 B0.2] 38:B1.6 "
    "41:[F1.7 B0.3] 44:B1.7 47:[F1.8 B0.4] 50:B1.8 53:[F1.9 B0.5] 56:B1.9 58:b0.6 59:W 60:b0.7 "
    "61:W 62:b0.8 63:W "
    "64:b0.9 65:W",
    "1:F0.0 2:F0.1 3:F0.2 4:F0.3 5:F0.4 6:F1.0 7:F0.5 8:F1.1 9:b1.0 10:W 11:F1.2 12:b1.1 13:W "
    "14:F1.3 15:[F0.6 B1.2] "
    "20:[F1.4 B0.0] 23:[F0.7 B1.3] 26:[F1.5 B0.1] 29:[F0.8 B1.4] 32:[F1.6 B0.2] 35:[F0.9 B1.5] "
    "38:[F1.7 B0.3] 41:B1.6 "
    "44:[F1.8 B0.4] 47:B1.7 50:[F1.9 B0.5] 53:B1.8 55:B0.6 58:b1.9 59:b0.7 60:W 61:b0.8 62:W "
    "63:b0.9 64:W 65:W",
    "2:F0.0 3:F0.1 4:F0.2 5:F1.0 6:F0.3 7:F1.1 8:F0.4 9:F1.2 10:b1.0 11:W 12:F1.3 13:[F0.5 B1.1] "
    "17:[F1.4 B0.0] "
    "20:[F0.6 B1.2] 23:[F1.5 B0.1] 26:[F0.7 B1.3] 29:[F1.6 B0.2] 32:[F0.8 B1.4] 35:[F1.7 B0.3] "
    "38:[F0.9 B1.5] "
    "41:[F1.8 B0.4] 44:B1.6 47:[F1.9 B0.5] 50:B1.7 52:B0.6 55:B1.8 57:b0.7 59:b1.9 60:b0.8 61:W "
    "62:b0.9 63:W 64:W 65:W",
    "3:F0.0 4:F1.0 5:F0.1 6:F1.1 7:F0.2 8:F1.2 9:F0.3 10:F1.3 11:F0.4 12:B1.0 14:[F1.4 B0.0] "
    "17:[F0.5 B1.1] "
    "20:[F1.5 B0.1] 23:[F0.6 B1.2] 26:[F1.6 B0.2] 29:[F0.7 B1.3] 32:[F1.7 B0.3] 35:[F0.8 B1.4] "
    "38:[F1.8 B0.4] "
    "41:[F0.9 B1.5] 44:[F1.9 B0.5] 47:B1.6 49:B0.6 52:B1.7 54:B0.7 57:b1.8 58:b0.8 60:b1.9 61:b0.9 "
    "62:W 63:W 64:W 65:W"};

const std::vector<std::string> kFourRanks{
    "0:F0.0 1:F0.1 2:F0.2 3:F1.0 4:b1.0 5:W 6:F1.1 7:[F0.3 B1.1] 11:[F1.2 B0.0] 14:B1.2 "
    "17:[F1.3 B0.1] 20:B1.3 22:b0.2 23:W 24:b0.3 25:W",
    "1:F0.0 2:F1.0 3:F0.1 4:F1.1 5:F0.2 6:B1.0 8:[F1.2 B0.0] 11:[F0.3 B1.1] 14:[F1.3 B0.1] "
    "17:B1.2 19:B0.2 22:b1.3 23:b0.3 24:W 25:W"};

} // namespace

TEST_CASE("DualPipe on eight ranks follows the published timeline") {
  const auto t = ideal_timeline(ScheduleKind::dualpipe, 8, 20, {});
  CHECK(t.total == 66);
  CHECK(t.bubble() == doctest::Approx(6.0 / 66));
  for (size_t rank = 0; rank < 8; ++rank) {
    CAPTURE(rank);
    CHECK(text_of(t.ranks[rank]) == kEightRanks[std::min(rank, 7 - rank)]);
    CHECK(t.ranks[rank].idle == 6);
    CHECK(t.ranks[rank].busy == 60);
    CHECK(t.ranks[rank].peak_live == 9);
  }
}

TEST_CASE("DualPipe on four ranks follows the published timeline") {
  const auto t = ideal_timeline(ScheduleKind::dualpipe, 4, 8, {});
  CHECK(t.total == 26);
  for (size_t rank = 0; rank < 4; ++rank) {
    CAPTURE(rank);
    CHECK(text_of(t.ranks[rank]) == kFourRanks[std::min(rank, 3 - rank)]);
    CHECK(t.ranks[rank].idle == 2);
    CHECK(t.ranks[rank].peak_live == 5);
  }
}

TEST_CASE("DualPipe on two ranks never stands still") {
  const auto t = ideal_timeline(ScheduleKind::dualpipe, 2, 4, {});
  CHECK(t.total == 12);
  for (const auto& rank : t.ranks) {
    CHECK(text_of(rank) == "0:F0.0 1:F1.0 2:F0.1 3:B1.0 5:[F1.1 B0.0] 8:B1.1 10:b0.1 11:W");
    CHECK(rank.idle == 0);
    CHECK(rank.peak_live == 3);
  }
}

TEST_CASE("DualPipeV follows the timeline of DualPipe's first half") {
  const auto two = ideal_timeline(ScheduleKind::dualpipev, 2, 4, {});
  for (size_t rank = 0; rank < 2; ++rank)
    CHECK(text_of(two.ranks[rank]) == kFourRanks[rank]);
  const auto four = ideal_timeline(ScheduleKind::dualpipev, 4, 10, {});
  for (size_t rank = 0; rank < 4; ++rank)
    CHECK(text_of(four.ranks[rank]) == kEightRanks[rank]);
  CHECK(four.total == 66);
  CHECK(four.peak_live() == 9);
}

TEST_CASE("the bubbles of all schedules are those of the table") {
  struct Row {
    int32_t pp;
    double one_f_one_b, zb1p, dualpipe, dualpipe_2_5, dualpipe_2;
  };
  for (const auto& row :
       {Row{4, 9, 3, 2, 1.5, 1}, Row{8, 21, 7, 6, 4.5, 3}, Row{16, 45, 15, 14, 10.5, 7}}) {
    CAPTURE(row.pp);
    CHECK(bubble_formula(ScheduleKind::one_f_one_b, row.pp, {}) == row.one_f_one_b);
    CHECK(bubble_formula(ScheduleKind::zb1p, row.pp, {}) == row.zb1p);
    const std::vector<std::pair<double, double>> overlapped{
        {3, row.dualpipe}, {2.5, row.dualpipe_2_5}, {2, row.dualpipe_2}};
    for (const auto& [cost, bubble] : overlapped) {
      CHECK(bubble_formula(ScheduleKind::dualpipe, row.pp, with_overlapped(cost)) == bubble);
      CHECK(bubble_formula(ScheduleKind::dualpipev, row.pp / 2, with_overlapped(cost)) == bubble);
    }
    for (const auto kind : {ScheduleKind::one_f_one_b, ScheduleKind::zb1p})
      for (const int32_t chunks : {2 * row.pp, 3 * row.pp + 1})
        for (const auto& rank : ideal_timeline(kind, row.pp, chunks, {}).ranks)
          CHECK(rank.idle == bubble_formula(kind, row.pp, {}));
  }
}

TEST_CASE("simulated DualPipe takes the published totals") {
  struct Row {
    int32_t pp, chunks;
    double total;
  };
  for (const auto& row : {Row{2, 4, 12}, Row{4, 8, 26}, Row{4, 12, 38}, Row{8, 20, 66},
                          Row{8, 40, 126}, Row{16, 32, 110}, Row{16, 64, 206}}) {
    CAPTURE(row.pp);
    CAPTURE(row.chunks);
    CHECK(ideal_timeline(ScheduleKind::dualpipe, row.pp, row.chunks, {}).total == row.total);
  }
}

TEST_CASE("DualPipe's idle time is the formula, whatever the number of micro-batches") {
  for (int32_t pp = 2; pp <= 16; pp += 2) {
    for (int32_t chunks = 2 * pp; chunks <= 2 * pp + 20; chunks += 2) {
      CAPTURE(pp);
      CAPTURE(chunks);
      const auto t = ideal_timeline(ScheduleKind::dualpipe, pp, chunks, {});
      CHECK(t.total == 3 * chunks + 2 * (pp / 2 - 1));
      for (const auto& rank : t.ranks) {
        CHECK(rank.idle == bubble_formula(ScheduleKind::dualpipe, pp, {}));
        CHECK(rank.busy + rank.idle == t.total);
        CHECK(rank.peak_live == pp + 1);
      }
    }
  }
}

TEST_CASE("with cheaper overlapped pairs DualPipe's idle time is at most the formula") {
  for (const double cost : {2.0, 2.25, 2.5, 2.75}) {
    for (int32_t pp = 2; pp <= 16; pp += 2) {
      CAPTURE(cost);
      CAPTURE(pp);
      const auto costs = with_overlapped(cost);
      const auto t = ideal_timeline(ScheduleKind::dualpipe, pp, 3 * pp + 2, costs);
      for (const auto& rank : t.ranks)
        CHECK(rank.idle <= bubble_formula(ScheduleKind::dualpipe, pp, costs));
    }
  }
}

TEST_CASE("1F1B and ZB1P hold as many chunks as there are ranks") {
  for (int32_t pp = 1; pp <= 8; ++pp) {
    CAPTURE(pp);
    const auto plain = ideal_timeline(ScheduleKind::one_f_one_b, pp, 3 * pp, {});
    for (int32_t rank = 0; rank < pp; ++rank)
      CHECK(plain.ranks[static_cast<size_t>(rank)].peak_live == pp - rank);
    CHECK(plain.peak_live() == peak_live_formula(ScheduleKind::one_f_one_b, pp));
    // The chunks a rank no longer needs to go back wait for their weight work.
    for (const auto& rank : ideal_timeline(ScheduleKind::zb1p, pp, 3 * pp, {}).ranks)
      CHECK(rank.peak_live == peak_live_formula(ScheduleKind::zb1p, pp));
  }
}

TEST_CASE("no op starts before its inputs are there or its rank is free") {
  OpCosts costs;
  costs.forward = 1.25;
  costs.backward = 2.75;
  costs.weight = 0.75;
  costs.backward_input = 2;
  costs.overlapped = 3.5;
  for (const auto kind : {ScheduleKind::dualpipe, ScheduleKind::dualpipev,
                          ScheduleKind::one_f_one_b, ScheduleKind::zb1p}) {
    CAPTURE(to_string(kind));
    const int32_t pp = 6, chunks = 18, stages = num_stages(kind, pp);
    const auto t = ideal_timeline(kind, pp, chunks, costs);
    // [backward][direction][stage][chunk]: when it ran.
    std::vector<OpTime> when(static_cast<size_t>(2 * 2 * stages * chunks));
    const auto slot = [&](bool back, int32_t rank, const ChunkRef& c) -> OpTime& {
      const auto direction = direction_of(kind, rank, pp, c.phase);
      const auto stage = stage_of(kind, rank, pp, c.phase);
      return when[static_cast<size_t>(((back * 2 + direction) * stages + stage) * chunks +
                                      c.index)];
    };
    for (int32_t rank = 0; rank < pp; ++rank) {
      const auto& line = t.ranks[static_cast<size_t>(rank)];
      REQUIRE(line.times.size() == line.ops.size());
      double free_at = 0;
      for (size_t i = 0; i < line.ops.size(); ++i) {
        const auto& op = line.ops[i];
        CHECK(line.times[i].start >= free_at);
        CHECK(line.times[i].end == line.times[i].start + costs.of(op.kind));
        free_at = line.times[i].end;
        if (op.kind == OpKind::forward || op.kind == OpKind::overlapped)
          slot(false, rank, op.f) = line.times[i];
        if (op.kind != OpKind::forward && op.kind != OpKind::weight)
          slot(true, rank, op.b) = line.times[i];
      }
      CHECK(free_at <= t.total);
    }
    const int32_t directions = kind == ScheduleKind::dualpipe ? 2 : 1;
    for (int32_t d = 0; d < directions; ++d) {
      for (int32_t s = 0; s < stages; ++s) {
        for (int32_t c = 0; c < chunks / directions; ++c) {
          const auto at = [&](bool back, int32_t stage) {
            return when[static_cast<size_t>(((back * 2 + d) * stages + stage) * chunks + c)];
          };
          CHECK(at(true, s).start >= at(false, s).end);
          if (s + 1 < stages) {
            CHECK(at(false, s + 1).start >= at(false, s).end);
            CHECK(at(true, s).start >= at(true, s + 1).end);
          }
        }
      }
    }
  }
}

TEST_CASE("ops that cost nothing take no time and leave no bubble") {
  OpCosts nothing{0, 0, 0, 0, 0};
  const auto t = ideal_timeline(ScheduleKind::dualpipe, 4, 8, nothing);
  CHECK(t.total == 0);
  CHECK(t.bubble() == 0);
}
