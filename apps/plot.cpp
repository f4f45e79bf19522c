// troupe plot: pictures of training, from its logs and traces.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/plots.hpp"
#include "config/safetensors.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace troupe {

namespace {

struct Output {
  std::string path, title;
};

// To the file, or to standard output without one.
int write_picture(const Output& out, const caf::expected<std::string>& svg) {
  if (!svg)
    return complain(svg.error());
  if (out.path.empty()) {
    std::fwrite(svg->data(), 1, svg->size(), stdout);
    return 0;
  }
  if (auto error = write_text_file(out.path, *svg))
    return complain(error);
  return 0;
}

// Before the work, so that a wrong path is told at once.
caf::error check_output(const Output& out) {
  return out.path.empty() ? caf::error{} : check_writable(out.path);
}

void add_output(CLI::App* command, Output& out) {
  command->add_option("--out,-o", out.path, "The SVG file (default: standard output)");
  command->add_option("--title", out.title, "What stands above the picture");
}

void add_loss(CLI::App* plot, int& code) {
  struct Options {
    std::vector<std::string> logs;
    int64_t from = 0;
    Output out;
  };
  auto o = std::make_shared<Options>();
  auto* command = plot->add_subcommand("loss", "Loss, MTP loss and MaxVio; a curve for each log");
  command->add_option("LOG", o->logs, "Logs of `troupe train`")->required();
  command->add_option("--from", o->from, "Leave out the steps before this one")
      ->check(CLI::Range(int64_t{0}, std::numeric_limits<int64_t>::max()));
  add_output(command, o->out);
  command->callback([o, &code] {
    if (auto error = check_output(o->out))
      code = complain(error);
    else
      code = write_picture(o->out, plot_losses(o->logs, o->from, o->out.title));
  });
}

void add_load(CLI::App* plot, int& code) {
  struct Options {
    std::string log;
    std::optional<int64_t> layer;
    Output out;
  };
  auto o = std::make_shared<Options>();
  auto* command =
      plot->add_subcommand("load", "Tokens on each expert, step by step, relative to the mean");
  command->add_option("LOG", o->log, "Log of `troupe train`")->required();
  command->add_option("--layer", o->layer, "One MoE layer only, counted from 0 as in the log");
  add_output(command, o->out);
  command->callback([o, &code] {
    if (auto error = check_output(o->out))
      code = complain(error);
    else
      code = write_picture(o->out, plot_loads(o->log, o->layer, o->out.title));
  });
}

caf::error check_costs(const TimelineOptions& o) {
  const std::pair<const char*, std::optional<double>> all[] = {{"--cost-f", o.forward},
                                                               {"--cost-b", o.backward},
                                                               {"--cost-w", o.weight},
                                                               {"--cost-fb", o.overlapped}};
  for (const auto& [flag, cost] : all)
    if (cost && !(*cost >= 0 && *cost <= 1e12))
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: {} given, expected milliseconds from 0", flag, *cost));
  return {};
}

void print_text(const TimelineReport& r) {
  fmt::print("step {}: {} on {} ranks, {} micro-batches", r.step, to_string(r.kind), r.pp,
             r.chunks);
  if (r.columns > 1)
    fmt::print(", {} pipelines", r.columns);
  const auto percent = [&](double time) { return r.total > 0 ? 100 * time / r.total : 0.0; };
  fmt::print(
      "\nreal   {:>10.2f} ms, {:.1f} % idle, at most {:.2f} ms on a rank; jobs ran {:.1f} %\n",
      r.total, percent(r.idle), r.most_idle, percent(r.computing));
  fmt::print("ideal  {:>10.2f} ms, by the formula {:.2f} ms idle\n", r.ideal_total, r.formula);
  fmt::print("idle beyond the formula: {:.1f} % of the step\n", 100 * r.excess());
}

void print_json(const TimelineReport& r) {
  const boost::json::object json{{"step", r.step},
                                 {"schedule", to_string(r.kind)},
                                 {"pp", r.pp},
                                 {"pipelines", r.columns},
                                 {"chunks", r.chunks},
                                 {"total_ms", r.total},
                                 {"idle_ms", r.idle},
                                 {"most_idle_ms", r.most_idle},
                                 {"computing_ms", r.computing},
                                 {"ideal_total_ms", r.ideal_total},
                                 {"formula_ms", r.formula},
                                 {"excess", r.excess()},
                                 {"costs_ms",
                                  {{"f", r.costs.forward},
                                   {"b", r.costs.backward},
                                   {"b_input", r.costs.backward_input},
                                   {"w", r.costs.weight},
                                   {"fb", r.costs.overlapped}}}};
  fmt::print("{}\n", boost::json::serialize(json));
}

int draw_timeline(const TimelineOptions& o, const Output& out, bool json) {
  if (auto error = check_costs(o))
    return wrong_usage(error);
  if (auto error = check_output(out))
    return complain(error);
  const auto plot = plot_timeline(o);
  if (!plot)
    return complain(plot.error());
  if (json && out.path.empty()) { // the picture has no place
    print_json(plot->report);
    return 0;
  }
  const int code = write_picture(out, plot->svg);
  if (code == 0 && !out.path.empty())
    json ? print_json(plot->report) : print_text(plot->report);
  return code;
}

void add_timeline(CLI::App* plot, int& code) {
  struct Options {
    TimelineOptions timeline;
    Output out;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  auto& t = o->timeline;
  auto* command =
      plot->add_subcommand("timeline", "A training step as it ran beside the ideal one");
  command
      ->add_option("TRACE", t.traces,
                   "Chrome traces of the ranks: files, or what was given to --trace")
      ->required();
  command->add_option("--step", t.step, "The step (default: the last in the trace)");
  command->add_option("--pp", t.pp, "Ranks of a pipeline (default: as the programs tell)");
  command->add_option("--cost-f", t.forward, "Ideal forward, ms (default: the median)");
  command->add_option("--cost-b", t.backward, "Ideal backward, ms (default: the median)");
  command->add_option("--cost-w", t.weight, "Ideal weight work, ms (default: the median)");
  command->add_option("--cost-fb", t.overlapped, "Ideal overlapped pair, ms (default: the median)");
  add_output(command, o->out);
  command->add_flag("--json", o->json,
                    "Print the step's times as one JSON object, in place of the summary");
  command->callback([o, &code] {
    o->timeline.title = o->out.title;
    code = draw_timeline(o->timeline, o->out, o->json);
  });
}

} // namespace

void add_plot(CLI::App& app, int& code) {
  auto* plot = app.add_subcommand("plot", "Pictures of training, from its logs and traces");
  plot->require_subcommand(1);
  add_loss(plot, code);
  add_load(plot, code);
  add_timeline(plot, code);
}

} // namespace troupe
