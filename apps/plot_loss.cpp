// troupe plot loss: panels of curves over steps.
#include "apps/plots.hpp"

#include "apps/console.hpp"
#include "apps/svg.hpp"
#include "apps/train_log.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

namespace troupe {

namespace {

constexpr double kWidth = 1000, kLeft = 72, kRight = 84, kGap = 46, kBottom = 46;
constexpr std::string_view kInk = "#23272e", kFaint = "#7b828c", kGrid = "#e6e8eb";

struct LogPoint {
  double main_loss = 0;
  std::vector<double> mtp_loss, max_vio;
};

struct Log {
  std::string name;
  std::map<int64_t, LogPoint> steps;
  std::map<int64_t, double> held_out;
};

// One line of a panel: raw values thin, their running mean bold.
struct Curve {
  Points points;
  std::string_view colour;
  std::string_view dashes = {};
  bool bold = true;      // with a mean and its last value; or a thin companion
  bool held_out = false; // few points, marked
};

struct PanelSpec {
  std::string title;
  double height = 200;
  bool from_zero = false;
  std::vector<Curve> curves;
};

// ---- logs ---------------------------------------------------------------------------------------

// A run that was resumed repeats steps; the later ones count.
void add_step(Log& log, const TrainLogLine& line) {
  if (!log.steps.empty() && line.step <= log.steps.rbegin()->first) {
    log.steps.erase(log.steps.lower_bound(line.step), log.steps.end());
    log.held_out.erase(log.held_out.lower_bound(line.step), log.held_out.end());
  }
  log.steps.emplace_hint(log.steps.end(), line.step,
                         LogPoint{line.main_loss, line.mtp_loss, line.max_vio});
}

caf::expected<Log> read_log(const std::string& path, int64_t first_step) {
  Log log;
  auto error = read_train_log(path, false, [&](const TrainLogLine& line) {
    if (line.evaluated)
      log.held_out[line.step] = line.main_loss;
    else
      add_step(log, line);
  });
  if (error)
    return error;
  log.steps.erase(log.steps.begin(), log.steps.lower_bound(first_step));
  log.held_out.erase(log.held_out.begin(), log.held_out.lower_bound(first_step));
  if (log.steps.empty() && log.held_out.empty())
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: no steps from {} on", path, first_step));
  return log;
}

// The files' names; their folders' where those are all the same.
std::vector<std::string> names_of(const std::vector<std::string>& paths) {
  std::vector<std::string> names;
  for (const auto& path : paths)
    names.push_back(std::filesystem::path{path}.stem().string());
  if (std::set<std::string>(names.begin(), names.end()).size() == names.size())
    return names;
  for (size_t i = 0; i < paths.size(); ++i) {
    const std::filesystem::path path{paths[i]};
    names[i] = (path.parent_path().filename() / path.filename()).string();
  }
  if (std::set<std::string>(names.begin(), names.end()).size() == names.size())
    return names;
  return paths;
}

// ---- curves -------------------------------------------------------------------------------------

size_t mean_window(size_t num_points) { return num_points < 150 ? 1 : num_points / 60 | 1; }

// The mean of a window around each point; towards the ends the window shrinks on both sides.
Points running_mean(const Points& points) {
  const size_t half = mean_window(points.size()) / 2;
  std::vector<double> sums(points.size() + 1);
  for (size_t i = 0; i < points.size(); ++i)
    sums[i + 1] = sums[i] + points[i].second;
  Points mean;
  for (size_t i = 0; i < points.size(); ++i) {
    const size_t reach = std::min({half, i, points.size() - 1 - i});
    mean.emplace_back(points[i].first,
                      (sums[i + reach + 1] - sums[i - reach]) / static_cast<double>(2 * reach + 1));
  }
  return mean;
}

// As many points as a screen can show: of each bucket its lowest and highest, in their order.
Points thinned(const Points& points) {
  constexpr size_t kBuckets = 900;
  if (points.size() <= 2 * kBuckets)
    return points;
  Points few;
  for (size_t b = 0; b < kBuckets; ++b) {
    const auto begin = points.begin() + static_cast<std::ptrdiff_t>(b * points.size() / kBuckets);
    const auto end =
        points.begin() + static_cast<std::ptrdiff_t>((b + 1) * points.size() / kBuckets);
    auto [low, high] = std::minmax_element(
        begin, end, [](const auto& x, const auto& y) { return x.second < y.second; });
    few.push_back(*std::min(low, high));
    if (low != high)
      few.push_back(*std::max(low, high));
  }
  return few;
}

template <class Get>
Points points_of(const Log& log, Get get) {
  Points points;
  for (const auto& [step, point] : log.steps)
    if (const std::optional<double> value = get(point))
      points.emplace_back(static_cast<double>(step), *value);
  return points;
}

std::optional<double> at(const std::vector<double>& values, size_t i) {
  return i < values.size() ? std::optional{values[i]} : std::nullopt;
}

size_t widest(const Log& log, std::vector<double> LogPoint::*list) {
  size_t n = 0;
  for (const auto& [step, point] : log.steps)
    n = std::max(n, (point.*list).size());
  return n;
}

PanelSpec loss_panel(const std::vector<Log>& logs) {
  PanelSpec panel{"Loss", 300, false, {}};
  for (size_t i = 0; i < logs.size(); ++i) {
    const auto loss = [](const LogPoint& p) { return std::optional{p.main_loss}; };
    panel.curves.push_back({points_of(logs[i], loss), series_colour(i)});
    Points held_out;
    for (const auto& [step, value] : logs[i].held_out)
      held_out.emplace_back(static_cast<double>(step), value);
    panel.curves.push_back({std::move(held_out), series_colour(i), "1 4", true, true});
  }
  return panel;
}

// A model without MTP may log its MTP loss as 0.
bool has_mtp(const Log& log) {
  return std::ranges::any_of(log.steps, [](const auto& step) {
    return std::ranges::any_of(step.second.mtp_loss, [](double loss) { return loss != 0; });
  });
}

PanelSpec mtp_panel(const std::vector<Log>& logs) {
  constexpr std::array<std::string_view, 3> kDashes{"", "6 4", "2 3"};
  PanelSpec panel{"MTP loss", 180, false, {}};
  bool deep = false;
  for (size_t i = 0; i < logs.size(); ++i) {
    const size_t depths = has_mtp(logs[i]) ? widest(logs[i], &LogPoint::mtp_loss) : 0;
    deep |= depths > 1;
    for (size_t d = 0; d < depths; ++d)
      panel.curves.push_back(
          {points_of(logs[i], [d](const LogPoint& p) { return at(p.mtp_loss, d); }),
           series_colour(i), kDashes[std::min(d, kDashes.size() - 1)]});
  }
  if (deep)
    panel.title += "  (depth 1 whole, deeper ones dashed)";
  return panel;
}

// The worst layer of each log; the others behind it where there is room for them.
PanelSpec balance_panel(const std::vector<Log>& logs) {
  PanelSpec panel{"MaxVio, the worst MoE layer", 180, true, {}};
  const bool single = logs.size() == 1;
  const size_t layers = widest(logs.front(), &LogPoint::max_vio);
  if (single && layers > 1 && layers <= 64) {
    panel.title += "  (thin: each layer)";
    for (size_t l = 0; l < layers; ++l)
      panel.curves.push_back(
          {points_of(logs[0], [l](const LogPoint& p) { return at(p.max_vio, l); }),
           series_colour(0), "", false});
  }
  for (size_t i = 0; i < logs.size(); ++i)
    panel.curves.push_back({points_of(logs[i],
                                      [](const LogPoint& p) {
                                        const auto& v = p.max_vio;
                                        return v.empty()
                                                   ? std::nullopt
                                                   : std::optional{*std::ranges::max_element(v)};
                                      }),
                            series_colour(i)});
  return panel;
}

// ---- the picture --------------------------------------------------------------------------------

std::string short_number(double x) {
  return std::abs(x) >= 1000 ? fmt::format("{:.4g}", x) : fmt::format("{:.3f}", x);
}

struct Range {
  double low, high;
  [[nodiscard]] double share(double x) const { return (x - low) / (high - low); }
};

// Where a panel's values lie on the page.
struct Frame {
  Range steps, values;
  double top, height;

  [[nodiscard]] std::pair<double, double> place(const std::pair<double, double>& p) const {
    return {kLeft + (kWidth - kLeft - kRight) * steps.share(p.first),
            top + height * (1 - values.share(p.second))};
  }
  [[nodiscard]] Points place(const Points& points) const {
    Points placed;
    for (const auto& p : points)
      placed.push_back(place(p));
    return placed;
  }
};

class LossPicture {
public:
  LossPicture(const std::vector<Log>& logs, std::vector<PanelSpec> panels, const std::string& title)
      : logs_(logs), panels_(std::move(panels)), legend_(lay_out_legend()), title_(title),
        svg_(kWidth, height(), title) {}

  std::string draw() && {
    svg_.text(24, 32, title_, {17, kInk, Anchor::start, true});
    for (const auto& entry : legend_)
      draw_legend_entry(entry);
    double y = top();
    for (size_t i = 0; i < panels_.size(); ++i) {
      draw_panel(panels_[i], y, i + 1 == panels_.size());
      y += panels_[i].height + kGap;
    }
    return std::move(svg_).finish();
  }

private:
  struct LegendEntry {
    std::string text;
    std::string_view colour;
    bool dot;
    double x, y;
  };

  std::vector<LegendEntry> lay_out_legend() const {
    std::vector<LegendEntry> entries;
    double x = 24, y = 56;
    const auto add = [&](const std::string& text, std::string_view colour, bool dot) {
      const double width = 34 + 6.6 * static_cast<double>(text.size());
      if (x > 24 && x + width > kWidth - 24) {
        x = 24;
        y += 18;
      }
      entries.push_back({text, colour, dot, x, y});
      x += width;
    };
    for (size_t i = 0; i < logs_.size(); ++i)
      add(logs_[i].name, series_colour(i), false);
    size_t window = 1;
    bool held_out = false;
    for (const auto& log : logs_) {
      window = std::max(window, mean_window(log.steps.size()));
      held_out |= !log.held_out.empty();
    }
    if (held_out)
      add("on held-out data", logs_.size() == 1 ? series_colour(0) : kFaint, true);
    if (window > 1)
      add(fmt::format("bold: mean of {} steps", window), "", false);
    return entries;
  }
  [[nodiscard]] double top() const { return legend_.back().y + 40; }
  [[nodiscard]] double height() const {
    double h = top();
    for (const auto& panel : panels_)
      h += panel.height + kGap;
    return h - kGap + kBottom;
  }

  void draw_legend_entry(const LegendEntry& e) {
    double x = e.x;
    if (e.dot)
      svg_.dot(x + 8, e.y - 4, 3.2, "#ffffff", e.colour);
    else if (!e.colour.empty())
      svg_.line(x, e.y - 4, x + 18, e.y - 4, {e.colour, 2.4});
    if (!e.colour.empty())
      x += 24;
    svg_.text(x, e.y, e.text, {11, e.colour.empty() ? kFaint : kInk});
  }

  [[nodiscard]] Range step_range() const {
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (const auto& panel : panels_)
      for (const auto& curve : panel.curves)
        for (const auto& [x, y] : curve.points) {
          low = std::min(low, x);
          high = std::max(high, x);
        }
    return high > low ? Range{low, high} : Range{low - 1, high + 1};
  }

  static std::vector<double> value_ticks(const PanelSpec& panel) {
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (const auto& curve : panel.curves)
      for (const auto& [x, y] : curve.points) {
        low = std::min(low, y);
        high = std::max(high, y);
      }
    return nice_ticks(panel.from_zero ? std::min(low, 0.0) : low, high,
                      static_cast<int>(panel.height / 36));
  }

  void draw_panel(const PanelSpec& panel, double y, bool last) {
    svg_.text(kLeft, y - 9, panel.title, {12, kInk, Anchor::start, true});
    const auto ticks = value_ticks(panel);
    const Frame frame{step_range(), {ticks.front(), ticks.back()}, y, panel.height};
    for (const double tick : ticks) {
      const double at = frame.place({frame.steps.low, tick}).second;
      svg_.line(kLeft, at, kWidth - kRight, at, {kGrid, 1});
      svg_.text(kLeft - 8, at + 3.5, tick_text(tick, ticks[1] - ticks[0]),
                {10, kFaint, Anchor::end});
    }
    draw_steps(frame.steps, y, panel.height, last);
    for (const auto& curve : panel.curves)
      draw_raw(curve, frame);
    for (const auto& curve : panel.curves)
      if (!curve.held_out)
        draw_mean(curve, frame);
    for (const auto& curve : panel.curves)
      if (curve.held_out)
        draw_held_out(curve, frame);
    draw_last_values(panel, frame);
  }

  void draw_steps(const Range& steps, double y, double height, bool last) {
    const double width = kWidth - kLeft - kRight;
    const auto ticks = nice_ticks(steps.low, steps.high, 10);
    for (const double tick : ticks) {
      if (tick < steps.low || tick > steps.high || tick != std::floor(tick))
        continue;
      const double x = kLeft + width * steps.share(tick);
      svg_.line(x, y, x, y + height, {kGrid, 1});
      svg_.line(x, y + height, x, y + height + 4, {kFaint, 1});
      if (last)
        svg_.text(x, y + height + 18, tick_text(tick, 1), {10, kFaint, Anchor::middle});
    }
    svg_.line(kLeft, y + height, kLeft + width, y + height, {kFaint, 1});
    if (last)
      svg_.text(kLeft + width / 2, y + height + 36, "step", {11, kFaint, Anchor::middle});
  }

  // Thin: curves that stand behind others, and the values of one that is drawn as a mean.
  void draw_raw(const Curve& curve, const Frame& frame) {
    const bool smoothed = mean_window(curve.points.size()) > 1;
    if (!curve.held_out && (smoothed || !curve.bold))
      svg_.curve(frame.place(thinned(curve.points)), {curve.colour, 1, 0.28});
  }

  void draw_mean(const Curve& curve, const Frame& frame) {
    if (!curve.bold)
      return;
    const auto placed = frame.place(thinned(running_mean(curve.points)));
    svg_.curve(placed, {curve.colour, 1.9, 1, curve.dashes});
    if (placed.size() == 1)
      svg_.dot(placed[0].first, placed[0].second, 2.6, curve.colour, curve.colour);
  }

  void draw_held_out(const Curve& curve, const Frame& frame) {
    const auto placed = frame.place(thinned(curve.points));
    svg_.curve(placed, {curve.colour, 1.2, 0.9, curve.dashes});
    for (const auto& [x, y] : placed)
      svg_.dot(x, y, 3.2, "#ffffff", curve.colour);
  }

  // Beside the curves' ends, none over another.
  void draw_last_values(const PanelSpec& panel, const Frame& frame) {
    std::vector<std::pair<double, const Curve*>> labels; // height, curve
    for (const auto& curve : panel.curves)
      if (curve.bold && !curve.held_out && !curve.points.empty())
        labels.emplace_back(frame.place(running_mean(curve.points).back()).second, &curve);
    std::ranges::sort(labels);
    double free_from = 0;
    for (const auto& [height, curve] : labels) {
      const double y = std::max(height + 3.5, free_from);
      svg_.text(kWidth - kRight + 8, y, short_number(running_mean(curve->points).back().second),
                {11, curve->colour, Anchor::start, true});
      free_from = y + 13;
    }
  }

  const std::vector<Log>& logs_;
  std::vector<PanelSpec> panels_;
  std::vector<LegendEntry> legend_;
  std::string title_;
  Svg svg_;
};

} // namespace

caf::expected<std::string> plot_losses(const std::vector<std::string>& paths, int64_t first_step,
                                       const std::string& title) {
  std::vector<Log> logs;
  const auto names = names_of(paths);
  for (size_t i = 0; i < paths.size(); ++i) {
    auto log = read_log(paths[i], first_step);
    if (!log)
      return log.error();
    log->name = names[i];
    logs.push_back(std::move(*log));
  }
  std::vector<PanelSpec> panels;
  for (auto make : {loss_panel, mtp_panel, balance_panel}) {
    auto panel = make(logs);
    const auto has_points = [](const Curve& c) { return !c.points.empty(); };
    if (std::ranges::any_of(panel.curves, has_points))
      panels.push_back(std::move(panel));
  }
  return LossPicture{logs, std::move(panels), title.empty() ? "Training" : title}.draw();
}

} // namespace troupe
