#include "actors/timeline.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

namespace troupe {

namespace {

constexpr double kNotYet = std::numeric_limits<double>::infinity();

// When each chunk's passes through each stage were done.
class Arrivals {
public:
  Arrivals(ScheduleKind kind, int32_t pp, int32_t num_chunks)
      : kind_(kind), pp_(pp), stages_(num_stages(kind, pp)), chunks_(num_chunks) {
    for (auto& pass : done_)
      pass.assign(size_t{2} * static_cast<size_t>(stages_) * static_cast<size_t>(chunks_), kNotYet);
  }

  // When the input of a forward or backward is there; kNotYet if its sender isn't that far.
  [[nodiscard]] double forward_input(int32_t rank, const ChunkRef& c) const {
    const int32_t stage = stage_of(kind_, rank, pp_, c.phase);
    return stage == 0 ? 0 : done_[0][place(rank, c, stage - 1)];
  }
  // The last stage's gradients begin at its own output, and no chunk goes back before it came.
  [[nodiscard]] double backward_input(int32_t rank, const ChunkRef& c) const {
    const int32_t stage = stage_of(kind_, rank, pp_, c.phase);
    const double own = done_[0][place(rank, c, stage)];
    return stage == stages_ - 1 ? own : std::max(own, done_[1][place(rank, c, stage + 1)]);
  }
  void forward_done(int32_t rank, const ChunkRef& c, double when) { mark(0, rank, c, when); }
  void backward_done(int32_t rank, const ChunkRef& c, double when) { mark(1, rank, c, when); }

private:
  [[nodiscard]] size_t place(int32_t rank, const ChunkRef& c, int32_t stage) const {
    const int32_t direction = direction_of(kind_, rank, pp_, c.phase);
    const auto row = static_cast<size_t>(direction * stages_ + stage);
    return row * static_cast<size_t>(chunks_) + static_cast<size_t>(c.index);
  }
  void mark(size_t pass, int32_t rank, const ChunkRef& c, double when) {
    done_[pass][place(rank, c, stage_of(kind_, rank, pp_, c.phase))] = when;
  }

  ScheduleKind kind_;
  int32_t pp_, stages_, chunks_;
  std::array<std::vector<double>, 2> done_; // forward, backward; [direction][stage][chunk]
};

// One rank on its way through its program.
class Walk {
public:
  Walk(int32_t rank, Program ops) : rank_(rank) {
    line_.ops = std::move(ops);
    line_.times.reserve(line_.ops.size());
  }

  // Runs ops until one lacks its inputs; whether any ran.
  bool advance(Arrivals& arrivals, const OpCosts& costs) {
    const auto before = line_.times.size();
    while (!finished()) {
      const auto& op = line_.ops[line_.times.size()];
      const double start = std::max(free_at_, ready_at(op, arrivals));
      if (start == kNotYet)
        break;
      run(op, start, costs.of(op.kind), arrivals);
    }
    return line_.times.size() > before;
  }
  [[nodiscard]] bool finished() const { return line_.times.size() == line_.ops.size(); }
  [[nodiscard]] double free_at() const { return free_at_; }
  [[nodiscard]] RankTimeline take() { return std::move(line_); }

private:
  [[nodiscard]] static bool goes_forward(const ScheduleOp& op) {
    return op.kind == OpKind::forward || op.kind == OpKind::overlapped;
  }
  [[nodiscard]] static bool goes_back(const ScheduleOp& op) {
    return op.kind != OpKind::forward && op.kind != OpKind::weight;
  }

  [[nodiscard]] double ready_at(const ScheduleOp& op, const Arrivals& arrivals) const {
    const double f = goes_forward(op) ? arrivals.forward_input(rank_, op.f) : 0;
    const double b = goes_back(op) ? arrivals.backward_input(rank_, op.b) : 0;
    return std::max(f, b);
  }

  void run(const ScheduleOp& op, double start, double cost, Arrivals& arrivals) {
    free_at_ = start + cost;
    line_.times.push_back({start, free_at_});
    line_.busy += cost;
    if (goes_forward(op)) {
      arrivals.forward_done(rank_, op.f, free_at_);
      line_.peak_live = std::max(line_.peak_live, ++live_);
    }
    if (goes_back(op))
      arrivals.backward_done(rank_, op.b, free_at_);
    if (op.kind != OpKind::forward && op.kind != OpKind::backward_input)
      --live_;
  }

  int32_t rank_, live_ = 0;
  double free_at_ = 0;
  RankTimeline line_;
};

} // namespace

double OpCosts::of(OpKind kind) const {
  switch (kind) {
  case OpKind::forward:
    return forward;
  case OpKind::backward:
    return backward;
  case OpKind::backward_input:
    return backward_input;
  case OpKind::weight:
    return weight;
  case OpKind::overlapped:
    return overlapped;
  }
  return 0;
}

double Timeline::bubble() const {
  double idle = 0;
  for (const auto& rank : ranks)
    idle += rank.idle;
  return total > 0 ? idle / (total * static_cast<double>(ranks.size())) : 0;
}

int32_t Timeline::peak_live() const {
  int32_t most = 0;
  for (const auto& rank : ranks)
    most = std::max(most, rank.peak_live);
  return most;
}

Timeline ideal_timeline(ScheduleKind kind, int32_t pp, int32_t num_chunks, const OpCosts& costs) {
  Arrivals arrivals{kind, pp, num_chunks};
  std::vector<Walk> walks;
  for (int32_t rank = 0; rank < pp; ++rank)
    walks.emplace_back(rank, make_program(kind, rank, pp, num_chunks));
  for (bool moved = true; moved;) {
    moved = false;
    for (auto& walk : walks)
      moved |= walk.advance(arrivals, costs);
  }
  Timeline timeline;
  for (auto& walk : walks) {
    if (!walk.finished())
      throw std::logic_error{"the programs of a schedule wait for each other"};
    timeline.total = std::max(timeline.total, walk.free_at());
  }
  for (auto& walk : walks) {
    timeline.ranks.push_back(walk.take());
    timeline.ranks.back().idle = timeline.total - timeline.ranks.back().busy;
  }
  return timeline;
}

double bubble_formula(ScheduleKind kind, int32_t pp, const OpCosts& c) {
  const double others = pp - 1;
  switch (kind) {
  case ScheduleKind::one_f_one_b:
    return others * (c.forward + c.backward);
  case ScheduleKind::zb1p:
    return others * (c.forward + c.backward - 2 * c.weight);
  case ScheduleKind::dualpipe:
  case ScheduleKind::dualpipev: {
    const double pairs = num_stages(kind, pp) / 2 - 1;
    return pairs * (c.overlapped + c.backward - 3 * c.weight);
  }
  }
  return 0;
}

int32_t peak_live_formula(ScheduleKind kind, int32_t pp) {
  return num_phases(kind) == 2 ? num_stages(kind, pp) + 1 : pp;
}

} // namespace troupe
