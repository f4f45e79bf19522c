// troupe plot load: which experts the tokens went to, step by step.
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

namespace troupe {

namespace {

constexpr double kWidth = 1000, kLeft = 72, kRight = 36, kTop = 100, kGap = 40, kBottom = 46;
constexpr std::string_view kInk = "#23272e", kFaint = "#7b828c";
constexpr size_t kMaxColumns = 240; // steps beyond are averaged
constexpr size_t kMaxCells = 600'000;
constexpr size_t kMaxRows = 40'000;

// Below the mean blue, above it red; the colour in the middle is the mean's. Even steps of
// lightness on both sides.
constexpr std::array<std::string_view, 17> kScale{
    "#1d4e89", "#2f65a0", "#477eb6", "#6597c8", "#86b0d7", "#a8c7e3",
    "#c8dcee", "#e3edf5", "#f7f7f5", "#fbe6da", "#f8cdb8", "#f2ad92",
    "#e88c70", "#da6a53", "#c6483c", "#a92a2e", "#861624"};
constexpr size_t kMiddle = kScale.size() / 2;

// ---- loads --------------------------------------------------------------------------------------

struct Load {
  std::vector<size_t> layers;  // those drawn, counted as in the log
  std::vector<size_t> experts; // of each
  std::vector<int64_t> steps;  // ascending
  size_t num_columns = 0;
  std::vector<double> steps_in; // of each column
  // [layer][expert · num_columns + column]: tokens relative to the layer's mean.
  std::vector<std::vector<double>> relative;
  std::vector<std::pair<double, double>> max_vio; // per layer, of the first and the last step
};

// What the log holds, without the loads themselves: logs are larger than memory should be.
struct Outline {
  std::map<int64_t, int64_t> line_of; // step -> the last line that tells of it
  std::vector<size_t> experts;        // per MoE layer
  caf::error error;
};

std::vector<size_t> experts_of(const TrainLogLine& line) {
  std::vector<size_t> experts;
  for (const auto& layer : line.load)
    experts.push_back(layer.size());
  return experts;
}

void note(Outline& outline, const TrainLogLine& line, const std::string& path) {
  if (line.evaluated || outline.error)
    return;
  auto& lines = outline.line_of;
  lines.erase(lines.lower_bound(line.step), lines.end()); // a resumed run repeats steps
  lines.emplace_hint(lines.end(), line.step, line.number);
  const auto experts = experts_of(line);
  if (outline.experts.empty())
    outline.experts = experts;
  if (outline.experts != experts || experts.empty())
    outline.error = make_error(
        Errc::mismatch, experts.empty()
                            ? fmt::format("{}:{}: load: no MoE layers", path, line.number)
                            : fmt::format("{}:{}: load: other layers or experts than in the lines "
                                          "before",
                                          path, line.number));
}

caf::expected<Load> lay_out(const Outline& outline, std::optional<int64_t> layer,
                            const std::string& path) {
  Load load;
  const auto num_layers = static_cast<int64_t>(outline.experts.size());
  if (outline.line_of.empty())
    return make_error(Errc::malformed, fmt::format("{}: holds evaluations only", path));
  if (layer && (*layer < 0 || *layer >= num_layers))
    return make_error(Errc::invalid_argument,
                      fmt::format("--layer: {} given, expected 0 to {} ({} MoE layers in {})",
                                  *layer, num_layers - 1, num_layers, path));
  size_t rows = 0;
  for (int64_t l = layer.value_or(0); l < (layer ? *layer + 1 : num_layers); ++l) {
    load.layers.push_back(static_cast<size_t>(l));
    load.experts.push_back(outline.experts[static_cast<size_t>(l)]);
    rows += load.experts.back();
  }
  if (rows > kMaxRows)
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: {} experts in all are too many for a picture, expected at "
                                  "most {}; --layer picks a layer",
                                  path, rows, kMaxRows));
  for (const auto& [step, line] : outline.line_of)
    load.steps.push_back(step);
  load.num_columns = std::min({load.steps.size(), kMaxColumns, kMaxCells / rows});
  load.steps_in.resize(load.num_columns);
  for (size_t i = 0; i < load.steps.size(); ++i)
    load.steps_in[i * load.num_columns / load.steps.size()] += 1;
  load.max_vio.resize(load.layers.size());
  for (const size_t experts : load.experts)
    load.relative.emplace_back(experts * load.num_columns);
  return load;
}

void add(Load& load, size_t step_idx, const TrainLogLine& line) {
  const size_t column = step_idx * load.num_columns / load.steps.size();
  for (size_t l = 0; l < load.layers.size(); ++l) {
    const auto& tokens = line.load[load.layers[l]];
    double sum = 0, most = 0;
    for (const double n : tokens) {
      sum += n;
      most = std::max(most, n);
    }
    const double mean = sum / static_cast<double>(tokens.size());
    for (size_t e = 0; e < tokens.size(); ++e) // a step without tokens is even
      load.relative[l][e * load.num_columns + column] +=
          (mean > 0 ? tokens[e] / mean : 1) / load.steps_in[column];
    const double vio = mean > 0 ? most / mean - 1 : 0;
    if (step_idx == 0)
      load.max_vio[l].first = vio;
    if (step_idx + 1 == load.steps.size())
      load.max_vio[l].second = vio;
  }
}

caf::expected<Load> read_load(const std::string& path, std::optional<int64_t> layer) {
  Outline outline;
  auto error =
      read_train_log(path, true, [&](const TrainLogLine& line) { note(outline, line, path); });
  if (!error)
    error = outline.error;
  if (error)
    return error;
  auto load = lay_out(outline, layer, path);
  if (!load)
    return load.error();
  std::vector<int64_t> lines;
  for (const auto& [step, line] : outline.line_of)
    lines.push_back(line);
  size_t next = 0; // the log may have changed since
  error = read_train_log(path, true, [&](const TrainLogLine& line) {
    if (next < lines.size() && line.number == lines[next] && experts_of(line) == outline.experts)
      add(*load, next++, line);
  });
  if (error)
    return error;
  return load;
}

// ---- colours ------------------------------------------------------------------------------------

// Deviation above the mean at which the scale ends: nearly all cells lie within.
double choose_limit(const Load& load) {
  std::vector<double> deviations;
  for (const auto& layer : load.relative)
    for (const double r : layer)
      deviations.push_back(std::abs(r - 1));
  const auto at = deviations.begin() + static_cast<std::ptrdiff_t>(deviations.size() * 98 / 100);
  std::nth_element(deviations.begin(), at, deviations.end());
  for (const double limit : {0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0})
    if (*at <= limit)
      return limit;
  return 32;
}

// No load can lie below 0, so that side never needs more than 1.
size_t colour_of(double relative, double limit) {
  const double deviation = relative - 1;
  const double share = deviation < 0 ? deviation / std::min(limit, 1.0) : deviation / limit;
  const double steps = static_cast<double>(kMiddle) * std::clamp(share, -1.0, 1.0);
  return static_cast<size_t>(static_cast<long>(kMiddle) + std::lround(steps));
}

// ---- the picture --------------------------------------------------------------------------------

double cell_height(size_t num_rows) {
  return num_rows <= 32 ? 12 : num_rows <= 512 ? 5 : num_rows <= 4096 ? 2 : 1;
}

class LoadPicture {
public:
  LoadPicture(const Load& load, const std::string& title)
      : load_(load), limit_(choose_limit(load)), svg_(kWidth, height(), title) {
    svg_.text(24, 32, title, {17, kInk, Anchor::start, true});
    svg_.text(24, 52,
              "Tokens on each expert, relative to the mean of its layer. Rows: experts; columns: "
              "steps.",
              {11, kFaint});
  }

  std::string draw() && {
    draw_scale();
    double y = kTop;
    for (size_t l = 0; l < load_.layers.size(); ++l) {
      draw_layer(l, y);
      y += panel_height(l) + kGap;
    }
    return std::move(svg_).finish();
  }

private:
  [[nodiscard]] double row_height() const {
    size_t rows = 0;
    for (const size_t n : load_.experts)
      rows += n;
    return cell_height(rows);
  }
  [[nodiscard]] double panel_height(size_t layer) const {
    return row_height() * static_cast<double>(load_.experts[layer]);
  }
  [[nodiscard]] double height() const {
    double h = kTop;
    for (size_t l = 0; l < load_.layers.size(); ++l)
      h += panel_height(l) + kGap;
    return h - kGap + kBottom;
  }

  void draw_scale() {
    constexpr double kCell = 15, kY = 24;
    const double x = kWidth - kRight - kCell * static_cast<double>(kScale.size());
    for (size_t i = 0; i < kScale.size(); ++i)
      svg_.box(x + kCell * static_cast<double>(i), kY, kCell, 11, kScale[i]);
    const double low = 1 - std::min(limit_, 1.0);
    const double end = kWidth - kRight;
    svg_.text(x, kY + 25, fmt::format("{}{:g}×", low > 0 ? "≤ " : "", low), {10, kFaint});
    svg_.text((x + end) / 2, kY + 25, "mean", {10, kFaint, Anchor::middle});
    svg_.text(end, kY + 25, fmt::format("≥ {:g}×", 1 + limit_), {10, kFaint, Anchor::end});
  }

  void draw_layer(size_t l, double y) {
    const double width = kWidth - kLeft - kRight, cell = row_height();
    const auto& [first, last] = load_.max_vio[l];
    svg_.text(kLeft, y - 8, fmt::format("MoE layer {}", load_.layers[l]),
              {12, kInk, Anchor::start, true});
    svg_.text(kWidth - kRight, y - 8, fmt::format("MaxVio {:.2f} → {:.2f}", first, last),
              {11, kFaint, Anchor::end});
    const double column = width / static_cast<double>(load_.num_columns);
    const auto paths = paths_of(l);
    for (size_t c = 0; c < kScale.size(); ++c)
      if (!paths[c].empty())
        svg_.cells(kLeft, y, column, cell, kScale[c], paths[c]);
    draw_axes(l, y);
  }

  // For each colour its cells; those side by side are one.
  [[nodiscard]] std::array<std::string, kScale.size()> paths_of(size_t l) const {
    std::array<std::string, kScale.size()> paths;
    const auto& values = load_.relative[l];
    for (size_t e = 0; e < load_.experts[l]; ++e) {
      const auto colour = [&](size_t column) {
        return colour_of(values[e * load_.num_columns + column], limit_);
      };
      for (size_t begin = 0, end = 0; begin < load_.num_columns; begin = end) {
        const size_t c = colour(begin);
        while (end < load_.num_columns && colour(end) == c)
          ++end;
        paths[c] += fmt::format("M{} {}h{}v1h-{}z", begin, e, end - begin, end - begin);
      }
    }
    return paths;
  }

  void draw_axes(size_t l, double y) {
    const double width = kWidth - kLeft - kRight, height = panel_height(l);
    const auto experts = static_cast<double>(load_.experts[l]);
    for (const double e : nice_ticks(0, experts - 1, std::max(static_cast<int>(height / 40), 1))) {
      if (e > experts - 1 || e < 0 || e != std::floor(e))
        continue;
      svg_.text(kLeft - 8, y + (e + 0.5) * row_height() + 3.5, tick_text(e, 1),
                {10, kFaint, Anchor::end});
    }
    svg_.text(24, y + height / 2, "expert", {10, kFaint, Anchor::middle, false, true});
    svg_.frame(kLeft, y, width, height, {kFaint, 0.8, 0.6});
    if (l + 1 < load_.layers.size())
      return;
    draw_steps(y + height);
    svg_.text(kLeft + width / 2, y + height + 34, "step", {11, kFaint, Anchor::middle});
  }

  // Columns stand for steps in their order; a log may leave some out.
  void draw_steps(double y) {
    const double width = kWidth - kLeft - kRight;
    const auto& steps = load_.steps;
    for (const double tick :
         nice_ticks(static_cast<double>(steps.front()), static_cast<double>(steps.back()), 10)) {
      const auto found = std::ranges::lower_bound(steps, static_cast<int64_t>(tick));
      if (found == steps.end() || tick < 0 || static_cast<double>(*found) != tick)
        continue;
      const double place = static_cast<double>(found - steps.begin()) + 0.5;
      const double x = kLeft + width * place / static_cast<double>(steps.size());
      svg_.line(x, y, x, y + 4, {kFaint, 1});
      svg_.text(x, y + 17, with_commas(*found), {10, kFaint, Anchor::middle});
    }
  }

  const Load& load_;
  double limit_;
  Svg svg_;
};

} // namespace

caf::expected<std::string> plot_loads(const std::string& log, std::optional<int64_t> layer,
                                      const std::string& title) {
  const auto load = read_load(log, layer);
  if (!load)
    return load.error();
  return LoadPicture{*load, title.empty() ? "Expert load" : title}.draw();
}

} // namespace troupe
