#include "apps/gantt.hpp"

#include "apps/svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string_view>

namespace troupe {

namespace {

constexpr double kLeft = 66, kRight = 104, kTop = 74, kHeading = 40, kBottom = 34, kGap = 22;
constexpr std::string_view kInk = "#23272e", kFaint = "#7b828c", kLane = "#eef0f2";

// Forward warm, backward green, weights blue; the second direction paler.
struct Colours {
  std::string_view forward, backward, backward_input, weight;
};
constexpr Colours kColours[2] = {{"#f0b04a", "#55a868", "#4bb3b0", "#6f8fcf"},
                                 {"#f9d795", "#a3d3ae", "#a5dcda", "#b3c5ea"}};

double row_height(size_t num_rows) { return num_rows <= 16 ? 30 : num_rows <= 48 ? 18 : 10; }

std::string hint_of(const GanttOp& o, const std::string& unit) {
  const auto space = unit.empty() ? "" : " ";
  return fmt::format("{}: {:.6g} to {:.6g}{}{}", to_string(o.op), o.start, o.end, space, unit);
}

class Gantt {
public:
  Gantt(const GanttStyle& style, const std::vector<GanttChart>& charts)
      : style_(style), scale_(choose_scale(charts)), width_(width_of(charts)),
        svg_(width_, height_of(charts), style.title) {}

  std::string draw(const std::vector<GanttChart>& charts) && {
    svg_.text(24, 30, style_.title, {17, kInk, Anchor::start, true});
    draw_legend();
    y_ = kTop;
    for (const auto& chart : charts)
      draw_chart(chart);
    return std::move(svg_).finish();
  }

private:
  // Pixels for a unit of time: enough that a number fits a typical forward, within what screens
  // show.
  static double choose_scale(const std::vector<GanttChart>& charts) {
    double total = 0;
    std::vector<double> lengths;
    for (const auto& chart : charts) {
      total = std::max(total, chart.total);
      for (const auto& row : chart.rows)
        for (const auto& op : row.ops)
          if (op.op.kind == OpKind::forward)
            lengths.push_back(op.end - op.start);
    }
    if (!(total > 0))
      return 1;
    double typical = 0;
    if (!lengths.empty()) {
      const auto middle = lengths.begin() + static_cast<std::ptrdiff_t>(lengths.size() / 2);
      std::nth_element(lengths.begin(), middle, lengths.end());
      typical = *middle;
    }
    const double wanted = typical > 0 ? 19 / typical * total : 0;
    return std::clamp(wanted, 900.0, 2200.0) / total;
  }
  [[nodiscard]] double width_of(const std::vector<GanttChart>& charts) const {
    double total = 0;
    for (const auto& chart : charts)
      total = std::max(total, chart.total);
    return kLeft + std::max(total * scale_, 900.0) + kRight;
  }
  static double height_of(const std::vector<GanttChart>& charts) {
    double height = kTop;
    for (const auto& c : charts)
      height += kHeading + static_cast<double>(c.rows.size()) * row_height(c.rows.size()) +
                kBottom + kGap;
    return height - kGap + 6;
  }

  void draw_legend() {
    double x = 24;
    const double y = 44;
    const auto words = [&](std::string_view text, double width) {
      svg_.text(x, y + 10, text, {11, kInk});
      x += width;
    };
    const bool dual = num_phases(style_.kind) == 2;
    const auto swatch = [&](std::string_view first, std::string_view second) {
      svg_.box(x, y, 14, 13, first);
      if (dual)
        svg_.box(x + 14, y, 14, 13, second);
      x += dual ? 34 : 20;
    };
    const auto& [a, b] = kColours;
    swatch(a.forward, b.forward);
    words("F forward", 68);
    if (style_.kind != ScheduleKind::zb1p) {
      swatch(a.backward, b.backward);
      words("B backward", 78);
    }
    if (style_.kind != ScheduleKind::one_f_one_b) {
      swatch(a.backward_input, b.backward_input);
      words("b for inputs only", 104);
      swatch(a.weight, b.weight);
      words("W for weights", 88);
    }
    if (dual) {
      svg_.box(x, y, 14, 6.5, a.forward);
      svg_.box(x, y + 6.5, 14, 6.5, b.backward);
      x += 20;
      words("F and B take turns", 118);
    }
    svg_.box(x, y, 14, 13, kLane);
    x += 20;
    words("idle", 38);
    words(!dual                                   ? "numbers: micro-batches"
          : style_.kind == ScheduleKind::dualpipe ? "deep and pale: the two directions"
                                                  : "deep and pale: down and up the V",
          0);
  }

  void draw_chart(const GanttChart& chart) {
    svg_.text(24, y_ + 14, chart.title, {13, kInk, Anchor::start, true});
    svg_.text(24, y_ + 30, chart.note, {11, kFaint});
    y_ += kHeading;
    const double height = row_height(chart.rows.size());
    const double first = y_;
    for (const auto& row : chart.rows) {
      draw_row(row, chart.total, height);
      y_ += height;
    }
    draw_axis(chart.total, first);
    y_ += kBottom + kGap;
  }

  void draw_row(const GanttRow& row, double total, double height) {
    const double size = std::min(11.0, height - 1);
    const double bar = height - (height > 12 ? 4 : 1.5);
    const double base = y_ + bar / 2 + size * 0.36;
    svg_.text(kLeft - 8, base, fmt::format("rank {}", row.rank), {size, kInk, Anchor::end});
    svg_.box(kLeft, y_, total * scale_, bar, kLane);
    for (const auto& op : row.ops)
      draw_op(op, row.second, bar);
    const double share = total > 0 ? 100 * row.idle / total : 0;
    svg_.text(kLeft + total * scale_ + 8, base, fmt::format("{:.1f} % idle", share),
              {size, kFaint});
  }

  void draw_op(const GanttOp& o, const std::array<bool, 2>& second, double bar) {
    const auto colours = [&](const ChunkRef& c) -> const Colours& {
      return kColours[second[static_cast<size_t>(c.phase)] ? 1 : 0];
    };
    const auto hint = hint_of(o, style_.unit);
    switch (o.op.kind) {
    case OpKind::forward:
      return draw_part(o, y_, bar, colours(o.op.f).forward, o.op.f.index, hint);
    case OpKind::backward:
      return draw_part(o, y_, bar, colours(o.op.b).backward, o.op.b.index, hint);
    case OpKind::backward_input:
      return draw_part(o, y_, bar, colours(o.op.b).backward_input, o.op.b.index, hint);
    case OpKind::weight:
      return draw_part(o, y_, bar, colours(o.op.b).weight, o.op.b.index, hint);
    case OpKind::overlapped:
      draw_part(o, y_, bar / 2, colours(o.op.f).forward, o.op.f.index, hint);
      draw_part(o, y_ + bar / 2, bar / 2, colours(o.op.b).backward, o.op.b.index, hint);
    }
  }

  void draw_part(const GanttOp& o, double y, double height, std::string_view colour, int32_t number,
                 const std::string& hint) {
    const double x = kLeft + o.start * scale_;
    const double space = (o.end - o.start) * scale_;
    const double width = std::max(space - (space > 4 ? 1 : 0.2), 0.2);
    if (o.computing) {
      svg_.box(x, y, width, height, colour, 0.35, hint);
      for (const auto& [from, to] : visible(*o.computing))
        svg_.box(kLeft + from * scale_, y,
                 std::min((to - from) * scale_, x + width - kLeft - from * scale_), height, colour);
    } else {
      svg_.box(x, y, width, height, colour, 1, hint);
    }
    const auto text = std::to_string(number);
    const double fitting = (width - 1) / (0.6 * static_cast<double>(text.size()));
    const double size = std::min({10.0, height - 2.5, fitting});
    if (size >= 6)
      svg_.text(x + width / 2, y + height / 2 + size * 0.36, text, {size, kInk, Anchor::middle});
  }

  // Spans closer than a part of a pixel become one: no eye sees the gap, and files stay small.
  [[nodiscard]] std::vector<std::pair<double, double>>
  visible(const std::vector<std::pair<double, double>>& spans) const {
    std::vector<std::pair<double, double>> merged;
    for (const auto& span : spans) {
      if (!merged.empty() && (span.first - merged.back().second) * scale_ < 1.2)
        merged.back().second = std::max(merged.back().second, span.second);
      else
        merged.push_back(span);
    }
    return merged;
  }

  void draw_axis(double total, double first) {
    const auto ticks = nice_ticks(0, total, static_cast<int>(std::max(total * scale_ / 90, 2.0)));
    const double step = ticks[1] - ticks[0];
    const double end = kLeft + total * scale_;
    svg_.line(kLeft, y_ + 4, end, y_ + 4, {kFaint, 1, 0.6});
    for (const double tick : ticks) {
      if (tick > total * (1 + 1e-9))
        break;
      const double x = kLeft + tick * scale_;
      svg_.line(x, first - 2, x, y_ + 8, {kInk, 0.6, 0.13});
      svg_.line(x, y_ + 4, x, y_ + 8, {kFaint, 1, 0.6});
      svg_.text(x, y_ + 20, tick_text(tick, step), {10, kFaint, Anchor::middle});
    }
    svg_.text(end + 8, y_ + 20, style_.unit.empty() ? "time" : style_.unit, {10, kFaint});
  }

  const GanttStyle& style_;
  double scale_, width_;
  Svg svg_;
  double y_ = 0;
};

} // namespace

std::string draw_gantt(const GanttStyle& style, const std::vector<GanttChart>& charts) {
  return Gantt{style, charts}.draw(charts);
}

std::array<bool, 2> second_phases(ScheduleKind kind, int32_t rank, int32_t pp) {
  if (kind == ScheduleKind::dualpipev)
    return {false, true};
  return {direction_of(kind, rank, pp, 0) == 1, direction_of(kind, rank, pp, 1) == 1};
}

std::vector<GanttRow> gantt_rows(ScheduleKind kind, const Timeline& timeline) {
  std::vector<GanttRow> rows;
  const auto pp = static_cast<int32_t>(timeline.ranks.size());
  for (int32_t rank = 0; rank < pp; ++rank) {
    const auto& line = timeline.ranks[static_cast<size_t>(rank)];
    GanttRow row{rank, {}, second_phases(kind, rank, pp), line.idle};
    for (size_t i = 0; i < line.ops.size(); ++i)
      row.ops.push_back({line.ops[i], line.times[i].start, line.times[i].end, {}});
    rows.push_back(std::move(row));
  }
  return rows;
}

} // namespace troupe
