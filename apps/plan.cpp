// troupe plan: what a layout will do, on paper.
#include "actors/timeline.hpp"
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/gantt.hpp"
#include "config/safetensors.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

namespace {

constexpr int64_t kMaxCells = int64_t{1} << 20; // ranks times micro-batches: some 200 MB
constexpr double kMaxCost = 1e12;

struct ScheduleOptions {
  std::string schedule = "dualpipe";
  int32_t pp = 0, chunks = 0;
  std::optional<double> forward, backward, weight, overlapped;
  bool json = false;
  std::string svg;
};

struct Plan {
  ScheduleKind kind = ScheduleKind::dualpipe;
  int32_t pp = 0, chunks = 0;
  OpCosts costs;
  Timeline timeline;
};

// ---- what was asked for -----------------------------------------------------------------------

caf::expected<OpCosts> costs_of(const ScheduleOptions& o) {
  OpCosts c;
  c.forward = o.forward.value_or(1);
  c.backward = o.backward.value_or(2 * c.forward);
  c.weight = o.weight.value_or(c.backward / 2);
  c.overlapped = o.overlapped.value_or(c.forward + c.backward);
  c.backward_input = c.backward - c.weight;
  const std::pair<const char*, double> all[] = {{"--cost-f", c.forward},
                                                {"--cost-b", c.backward},
                                                {"--cost-w", c.weight},
                                                {"--cost-fb", c.overlapped}};
  for (const auto& [flag, cost] : all)
    if (!(cost >= 0 && cost <= kMaxCost))
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: {} given, expected 0 to {:.0e}", flag, cost, kMaxCost));
  if (c.weight > c.backward)
    return make_error(Errc::invalid_argument,
                      fmt::format("--cost-w: {} given, expected at most the {} of a whole backward "
                                  "(--cost-b)",
                                  c.weight, c.backward));
  return c;
}

caf::expected<Plan> make_plan(const ScheduleOptions& o) {
  const auto kind = parse_schedule(o.schedule);
  if (!kind)
    return kind.error();
  if (auto error = check_schedule(*kind, o.pp, o.chunks))
    return error;
  if (int64_t{o.pp} * o.chunks > kMaxCells)
    return make_error(Errc::invalid_argument,
                      fmt::format("{} ranks times {} micro-batches given, expected at most {}",
                                  o.pp, o.chunks, with_commas(kMaxCells)));
  auto costs = costs_of(o);
  if (!costs)
    return costs.error();
  return Plan{*kind, o.pp, o.chunks, *costs, ideal_timeline(*kind, o.pp, o.chunks, *costs)};
}

// ---- as text ----------------------------------------------------------------------------------

std::string number(double x) { return fmt::format("{:.6g}", x); }
std::string percent(double share) { return fmt::format("{:.1f} %", 100 * share); }

std::string stages_text(const Plan& p, int32_t rank) {
  const auto first = stage_of(p.kind, rank, p.pp, 0);
  return num_phases(p.kind) == 1 ? std::to_string(first)
                                 : fmt::format("{}, {}", first, stage_of(p.kind, rank, p.pp, 1));
}

// Where the micro-batches go.
const char* phases_text(ScheduleKind kind) {
  switch (kind) {
  case ScheduleKind::dualpipe:
    return ", half of them in each direction";
  case ScheduleKind::dualpipev:
    return ", down and up the V";
  default:
    return "";
  }
}

// Ops as cells of one width: "17:[F0.7 B1.3]".
void print_program(const RankTimeline& line, int32_t rank) {
  constexpr size_t kLineWidth = 112;
  std::vector<std::string> cells;
  size_t width = 0;
  for (size_t i = 0; i < line.ops.size(); ++i) {
    cells.push_back(fmt::format("{}:{}", number(line.times[i].start), to_string(line.ops[i])));
    width = std::max(width, cells.back().size() + 2);
  }
  const size_t columns = std::max<size_t>((kLineWidth - 10) / width, 1);
  for (size_t i = 0; i < cells.size(); ++i) {
    const bool begins = i % columns == 0,
               ends = i % columns == columns - 1 || i + 1 == cells.size();
    if (begins)
      fmt::print("{:<10}", i == 0 ? fmt::format("rank {}", rank) : "");
    if (ends)
      fmt::print("{}\n", cells[i]);
    else
      fmt::print("{:<{}}", cells[i], width);
  }
}

void print_ranks(const Plan& p) {
  fmt::print("\n{:>5}  {:>10} {:>7} {:>7} {:>7} {:>12} {:>12} {:>8} {:>10}\n", "rank", "stages",
             "ops", "pairs", "W", "busy", "idle", "bubble", "peak live");
  const auto& t = p.timeline;
  for (int32_t rank = 0; rank < p.pp; ++rank) {
    const auto& line = t.ranks[static_cast<size_t>(rank)];
    const auto count = [&](OpKind kind) {
      return std::ranges::count(line.ops, kind, &ScheduleOp::kind);
    };
    fmt::print("{:>5}  {:>10} {:>7} {:>7} {:>7} {:>12} {:>12} {:>8} {:>10}\n", rank,
               stages_text(p, rank), line.ops.size(), count(OpKind::overlapped),
               count(OpKind::weight), number(line.busy), number(line.idle),
               percent(t.total > 0 ? line.idle / t.total : 0), line.peak_live);
  }
}

void print_summary(const Plan& p) {
  const auto& t = p.timeline;
  const auto stages = num_stages(p.kind, p.pp), held = num_phases(p.kind);
  double most_idle = 0;
  for (const auto& line : t.ranks)
    most_idle = std::max(most_idle, line.idle);
  fmt::print("\n{:<14} {}\n", "total", number(t.total));
  fmt::print("{:<14} {} of all ranks' time; at most {} idle on a rank, {} by the formula\n",
             "bubble", percent(t.bubble()), number(most_idle),
             number(bubble_formula(p.kind, p.pp, p.costs)));
  fmt::print("{:<14} {} chunks on a rank, {} by the formula; a chunk is a micro-batch in 1/{} of "
             "the layers\n",
             "peak live", t.peak_live(), peak_live_formula(p.kind, p.pp), stages);
  fmt::print("{:<14} {}×: a rank holds {} of {} stages{}\n", "parameters", held, held, stages,
             p.kind == ScheduleKind::dualpipe ? ", every stage lies on two ranks" : "");
}

// The same model and micro-batches on the same ranks. A stage of a V has half the layers, so its
// ops cost half.
Timeline timeline_as(ScheduleKind kind, const Plan& p) {
  const double scale = static_cast<double>(num_stages(p.kind, p.pp)) / num_stages(kind, p.pp);
  OpCosts c = p.costs;
  for (double* cost : {&c.forward, &c.backward, &c.weight, &c.overlapped, &c.backward_input})
    *cost *= scale;
  return ideal_timeline(kind, p.pp, p.chunks, c);
}

void print_comparison(const Plan& p) {
  fmt::print("\n{:<14}{:>12}  {:>7}  {:>9}  {:>22}  {:>15}\n", "on these ranks", "total", "bubble",
             "peak live", "in whole micro-batches", "parameters/rank");
  for (const auto kind : {ScheduleKind::dualpipe, ScheduleKind::dualpipev,
                          ScheduleKind::one_f_one_b, ScheduleKind::zb1p}) {
    if (check_schedule(kind, p.pp, p.chunks))
      continue; // not for so many ranks or micro-batches
    const auto t = timeline_as(kind, p);
    const double stages = num_stages(kind, p.pp);
    fmt::print("{} {:<12}{:>12}  {:>7}  {:>9}  {:>22.2f}  {:>15}\n", kind == p.kind ? '*' : ' ',
               to_string(kind), number(t.total), percent(t.bubble()), t.peak_live(),
               t.peak_live() / stages, percent(num_phases(kind) / stages));
  }
}

void print_text(const Plan& p) {
  const auto& c = p.costs;
  fmt::print("{} on {} rank{}, {} micro-batch{}{}; F {}, B {}, W {}, F&B {}\n\n", to_string(p.kind),
             p.pp, p.pp == 1 ? "" : "s", p.chunks, p.chunks == 1 ? "" : "es", phases_text(p.kind),
             number(c.forward), number(c.backward), number(c.weight), number(c.overlapped));
  for (int32_t rank = 0; rank < p.pp; ++rank)
    print_program(p.timeline.ranks[static_cast<size_t>(rank)], rank);
  print_ranks(p);
  print_summary(p);
  print_comparison(p);
}

// ---- for programs -----------------------------------------------------------------------------

// Whole numbers without exponent, which others' JSON libraries read as such.
boost::json::value json_number(double x) {
  if (x == std::floor(x) && std::abs(x) < 0x1p53)
    return static_cast<int64_t>(x);
  return x;
}

void print_json(const Plan& p) {
  const auto& t = p.timeline;
  const auto& c = p.costs;
  boost::json::array ranks;
  for (int32_t rank = 0; rank < p.pp; ++rank) {
    const auto& line = t.ranks[static_cast<size_t>(rank)];
    boost::json::array ops, starts, ends, stages;
    for (const auto& op : line.ops)
      ops.emplace_back(to_string(op));
    for (const auto& time : line.times) {
      starts.emplace_back(json_number(time.start));
      ends.emplace_back(json_number(time.end));
    }
    for (int32_t phase = 0; phase < num_phases(p.kind); ++phase)
      stages.emplace_back(stage_of(p.kind, rank, p.pp, phase));
    ranks.push_back(boost::json::object{{"rank", rank},
                                        {"ops", std::move(ops)},
                                        {"starts", std::move(starts)},
                                        {"ends", std::move(ends)},
                                        {"stages", std::move(stages)},
                                        {"busy", json_number(line.busy)},
                                        {"idle", json_number(line.idle)},
                                        {"peak_live", line.peak_live}});
  }
  const boost::json::object json{{"schedule", to_string(p.kind)},
                                 {"pp", p.pp},
                                 {"chunks", p.chunks},
                                 {"costs",
                                  {{"f", json_number(c.forward)},
                                   {"b", json_number(c.backward)},
                                   {"w", json_number(c.weight)},
                                   {"fb", json_number(c.overlapped)}}},
                                 {"total", json_number(t.total)},
                                 {"bubble", json_number(t.bubble())},
                                 {"formula", json_number(bubble_formula(p.kind, p.pp, c))},
                                 {"peak_live", t.peak_live()},
                                 {"parameters", num_phases(p.kind)},
                                 {"ranks", std::move(ranks)}};
  fmt::print("{}\n", boost::json::serialize(json));
}

caf::error write_svg(const Plan& p, const std::string& path) {
  size_t num_ops = 0;
  for (const auto& line : p.timeline.ranks)
    num_ops += line.ops.size();
  if (num_ops > kMaxGanttOps)
    return make_error(Errc::invalid_argument,
                      fmt::format("--svg: {} ops are too many for a picture, expected at most {}",
                                  with_commas(static_cast<int64_t>(num_ops)),
                                  with_commas(static_cast<int64_t>(kMaxGanttOps))));
  const auto& t = p.timeline;
  const auto& c = p.costs;
  GanttChart chart;
  chart.title = fmt::format("total {}, idle {}", number(t.total), percent(t.bubble()));
  chart.note = fmt::format("costs: F {}, B {}, W {}, F&B {}; at most {} chunks alive on a rank",
                           number(c.forward), number(c.backward), number(c.weight),
                           number(c.overlapped), t.peak_live());
  chart.rows = gantt_rows(p.kind, t);
  chart.total = t.total;
  const GanttStyle style{
      fmt::format("{} on {} ranks, {} micro-batches", to_string(p.kind), p.pp, p.chunks), p.kind,
      ""};
  return write_text_file(path, draw_gantt(style, {chart}));
}

int plan_schedule(const ScheduleOptions& o) {
  const auto plan = make_plan(o);
  if (!plan)
    return wrong_usage(plan.error());
  if (!o.svg.empty())
    if (auto error = write_svg(*plan, o.svg))
      return complain(error);
  if (o.json)
    print_json(*plan);
  else
    print_text(*plan);
  return 0;
}

} // namespace

void add_plan(CLI::App& app, int& code) {
  auto* plan = app.add_subcommand("plan", "What a layout will do, on paper");
  plan->require_subcommand(1);
  auto o = std::make_shared<ScheduleOptions>();
  auto* command = plan->add_subcommand(
      "schedule", "Every rank's program, when its ops run on an ideal machine, bubble and memory");
  command->add_option("--schedule", o->schedule, "dualpipe, dualpipev, 1f1b or zb1p")
      ->capture_default_str();
  command->add_option("--pp", o->pp, "Pipeline ranks")->required();
  command
      ->add_option("--chunks", o->chunks,
                   "Micro-batches of a step, those of both directions together")
      ->required();
  command->add_option("--cost-f", o->forward, "Time of a forward (default: 1)");
  command->add_option("--cost-b", o->backward, "Time of a whole backward (default: 2 F)");
  command->add_option("--cost-w", o->weight, "Its part for weights (default: B/2)");
  command->add_option("--cost-fb", o->overlapped,
                      "Time of a forward and a backward that overlap (default: F + B)");
  command->add_flag("--json", o->json, "Print one JSON object");
  command->add_option("--svg", o->svg, "Draw the timeline into this file");
  command->callback([o, &code] { code = plan_schedule(*o); });
}

} // namespace troupe
