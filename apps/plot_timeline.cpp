// troupe plot timeline: a step as it really ran beside the ideal one.
//
// A real op lasts from its turn to its end, so it holds its waits for rows from the neighbouring
// stages. Those in which the rank computed nothing are idle time; the rest is the op's cost. The
// ideal timeline runs the same programs with the median cost of each kind of op.
#include "apps/plots.hpp"

#include "apps/gantt.hpp"
#include "apps/op_trace.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

namespace troupe {

namespace {

constexpr size_t kNumKinds = 5;
constexpr size_t kind_idx(OpKind kind) { return static_cast<size_t>(kind); }

// ---- spans --------------------------------------------------------------------------------------

// The parts of ascending, disjoint spans within one.
std::vector<TimeSpan> within(const std::vector<TimeSpan>& spans, const TimeSpan& window) {
  std::vector<TimeSpan> parts;
  auto next = std::ranges::upper_bound(spans, window.first, {}, &TimeSpan::second);
  for (; next != spans.end() && next->first < window.second; ++next)
    parts.emplace_back(std::max(next->first, window.first), std::min(next->second, window.second));
  return parts;
}

double length(const std::vector<TimeSpan>& spans) {
  double sum = 0;
  for (const auto& [begin, end] : spans)
    sum += end - begin;
  return sum;
}

// Of `window`, the time in which the rank waited for rows and computed nothing.
double stood_still(const RankTrace& trace, const TimeSpan& window) {
  double sum = 0;
  for (const auto& wait : within(trace.waiting, window))
    sum += wait.second - wait.first - length(within(trace.computing, wait));
  return sum;
}

// ---- the real step ------------------------------------------------------------------------------

struct RealStep {
  GanttChart chart;
  std::array<std::vector<double>, kNumKinds> costs; // of ops, by kind
  double idle = 0, most_idle = 0, computing = 0;    // as in TimelineReport
};

TimeSpan extent(const TracedStep& step) {
  TimeSpan whole{HUGE_VAL, -HUGE_VAL};
  for (const auto& run : step.runs) {
    whole.first = std::min(whole.first, run.front().first);
    whole.second = std::max(whole.second, run.back().second);
  }
  return whole;
}

// Ranks of one pipeline work at the same time, or their clocks don't tell the same time.
caf::error check_clocks(const TracedStep& step) {
  double last_begin = -HUGE_VAL, first_end = HUGE_VAL;
  for (const auto& run : step.runs) {
    last_begin = std::max(last_begin, run.front().first);
    first_end = std::min(first_end, run.back().second);
  }
  if (last_begin <= first_end)
    return {};
  return make_error(
      Errc::unsupported,
      fmt::format("the ranks' spans of step {} lie {:.1f} ms apart: traces of several "
                  "hosts are on several clocks",
                  step.step, last_begin - first_end));
}

GanttRow real_row(const TracedStep& step, int32_t rank, const RankTrace& trace, double begin,
                  RealStep& real) {
  GanttRow row{rank, {}, second_phases(step.kind, rank / step.columns, step.pp), 0};
  const auto& program = step.programs[static_cast<size_t>(rank)];
  const auto& run = step.runs[static_cast<size_t>(rank)];
  for (size_t i = 0; i < program.size(); ++i) {
    const auto& time = run[i];
    const double cost = time.second - time.first - stood_still(trace, time);
    real.costs[kind_idx(program[i].kind)].push_back(cost);
    row.idle -= cost; // from the total, which the caller knows
    GanttOp op{program[i], time.first - begin, time.second - begin, {}};
    if (!trace.computing.empty()) {
      op.computing = within(trace.computing, time);
      for (auto& [from, to] : *op.computing) {
        from -= begin;
        to -= begin;
      }
    }
    row.ops.push_back(std::move(op));
  }
  return row;
}

RealStep real_step(const TracedStep& step, const Traces& traces) {
  RealStep real;
  const auto [begin, end] = extent(step);
  real.chart.total = end - begin;
  for (size_t rank = 0; rank < step.programs.size(); ++rank) {
    const auto r = static_cast<int32_t>(rank);
    auto row = real_row(step, r, traces.at(r), begin, real);
    row.idle = std::max(row.idle + real.chart.total, 0.0);
    const auto num_ranks = static_cast<double>(step.programs.size());
    real.idle += row.idle / num_ranks;
    real.computing += length(within(traces.at(r).computing, {begin, end})) / num_ranks;
    real.most_idle = std::max(real.most_idle, row.idle);
    real.chart.rows.push_back(std::move(row));
  }
  return real;
}

// ---- the ideal one ------------------------------------------------------------------------------

double median(std::vector<double> values) {
  if (values.empty())
    return 0;
  std::ranges::sort(values);
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Kinds that a schedule has none of follow from the others.
OpCosts ideal_costs(const RealStep& real, const TimelineOptions& o) {
  const auto measured = [&](OpKind kind) { return median(real.costs[kind_idx(kind)]); };
  const auto any = [&](OpKind kind) { return !real.costs[kind_idx(kind)].empty(); };
  OpCosts c;
  c.forward = o.forward.value_or(measured(OpKind::forward));
  c.weight = o.weight.value_or(measured(OpKind::weight));
  c.backward_input = measured(OpKind::backward_input);
  c.backward = o.backward.value_or(any(OpKind::backward) ? measured(OpKind::backward)
                                                         : c.backward_input + c.weight);
  if (o.backward || o.weight || !any(OpKind::backward_input))
    c.backward_input = std::max(c.backward - c.weight, 0.0);
  c.overlapped = o.overlapped.value_or(any(OpKind::overlapped) ? measured(OpKind::overlapped)
                                                               : c.forward + c.backward);
  return c;
}

GanttChart ideal_chart(const TracedStep& step, const OpCosts& costs) {
  const auto t = ideal_timeline(step.kind, step.pp, step.chunks, costs);
  GanttChart chart;
  chart.title = fmt::format("Ideal: {:.1f} ms, idle {:.1f} %", t.total, 100 * t.bubble());
  chart.note = fmt::format("the same programs with F {:.2f}, B {:.2f}, b {:.2f}, W {:.2f}, F&B "
                           "{:.2f} ms, no time for messages{}",
                           costs.forward, costs.backward, costs.backward_input, costs.weight,
                           costs.overlapped, step.columns > 1 ? "; each of the pipelines" : "");
  chart.rows = gantt_rows(step.kind, t);
  chart.total = t.total;
  return chart;
}

// ---- files --------------------------------------------------------------------------------------

// PREFIX.0.json, PREFIX.1.json, … as ranks write them; anything else is a file.
std::vector<std::string> files_of(const std::vector<std::string>& given) {
  namespace fs = std::filesystem;
  std::vector<std::string> files;
  for (const auto& path : given) {
    std::error_code error;
    const auto file = [&](int rank) { return fmt::format("{}.{}.json", path, rank); };
    if (fs::exists(path, error) || !fs::exists(file(0), error)) {
      files.push_back(path);
      continue;
    }
    for (int rank = 0; fs::exists(file(rank), error); ++rank)
      files.push_back(file(rank));
  }
  return files;
}

TimelineReport report_of(const TracedStep& step, const RealStep& real, const GanttChart& ideal,
                         const OpCosts& costs) {
  TimelineReport report;
  report.step = step.step;
  report.kind = step.kind;
  report.pp = step.pp;
  report.columns = step.columns;
  report.chunks = step.chunks;
  report.total = real.chart.total;
  report.idle = real.idle;
  report.computing = real.computing;
  report.most_idle = real.most_idle;
  report.ideal_total = ideal.total;
  report.formula = bubble_formula(step.kind, step.pp, costs);
  report.costs = costs;
  return report;
}

} // namespace

caf::expected<TimelinePlot> plot_timeline(const TimelineOptions& o) {
  Traces traces;
  const auto files = files_of(o.traces);
  for (const auto& file : files)
    if (auto error = read_trace(file, traces))
      return error;
  tidy(traces);
  const auto& where = o.traces.front();
  const auto step = find_step(traces, o.step, o.pp);
  if (!step)
    return with_context(where, step.error());
  if (auto error = check_clocks(*step))
    return with_context(where, error);
  size_t num_ops = 0;
  for (const auto& program : step->programs)
    num_ops += program.size();
  if (num_ops > kMaxGanttOps / 2)
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: {} ops are too many for a picture", where, num_ops));
  auto real = real_step(*step, traces);
  const auto costs = ideal_costs(real, o);
  auto ideal = ideal_chart(*step, costs);
  const double total = real.chart.total;
  const auto percent = [&](double time) { return total > 0 ? 100 * time / total : 0.0; };
  real.chart.title = fmt::format("As it ran: {:.1f} ms, idle {:.1f} %", total, percent(real.idle));
  real.chart.note =
      real.computing > 0
          ? fmt::format("jobs ran {:.1f} % of the time; faint: the rank waited within an op",
                        percent(real.computing))
          : "boxes hold their waits";
  const auto report = report_of(*step, real, ideal, costs);
  const auto title = fmt::format("Step {}: {} on {} ranks, {} micro-batches", step->step,
                                 to_string(step->kind), step->pp, step->chunks);
  const GanttStyle style{o.title.empty() ? title : o.title, step->kind, "ms"};
  return TimelinePlot{draw_gantt(style, {std::move(real.chart), std::move(ideal)}), report};
}

} // namespace troupe
