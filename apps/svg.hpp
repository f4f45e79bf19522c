// Pictures as SVG: one file, no scripts, no fonts from elsewhere. What is drawn later covers what
// was drawn before. Lengths are pixels, the origin is at the top left.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe {

using Points = std::vector<std::pair<double, double>>; // x, y

enum class Anchor : uint8_t { start, middle, end };

struct TextStyle {
  double size = 11;
  std::string_view colour = "#3c4149";
  Anchor anchor = Anchor::start;
  bool bold = false;
  bool upwards = false; // turned by 90° to the left, about its own position
};

struct LineStyle {
  std::string_view colour = "#000000";
  double width = 1;
  double opacity = 1;
  std::string_view dashes = {}; // "4 3": drawn, left out; empty: whole
};

class Svg {
public:
  // `title` is what a viewer reads out, and shows as the document's name.
  Svg(double width, double height, std::string_view title);

  // `hint` is shown when the pointer rests on it.
  void box(double x, double y, double width, double height, std::string_view colour,
           double opacity = 1, std::string_view hint = {});
  void frame(double x, double y, double width, double height, const LineStyle& style);
  void line(double x1, double y1, double x2, double y2, const LineStyle& style);
  void curve(const Points& points, const LineStyle& style);
  void dot(double x, double y, double radius, std::string_view fill, std::string_view edge);
  void text(double x, double y, std::string_view text, const TextStyle& style = {});
  // Cells of one colour on a grid that begins at (x, y): `path` in units of cells.
  void cells(double x, double y, double cell_width, double cell_height, std::string_view colour,
             std::string_view path);

  [[nodiscard]] std::string finish() &&;

private:
  std::string text_;
};

// The text as XML holds it; broken UTF-8 and control characters are replaced.
[[nodiscard]] std::string xml_text(std::string_view text);
// A coordinate: two decimals at most, none where they are zero.
[[nodiscard]] std::string coordinate(double value);
// Colours that can be told apart, also by most who see fewer of them.
[[nodiscard]] std::string_view series_colour(size_t index);

// Round values that cover [low, high] in about `count` steps, both ends within.
[[nodiscard]] std::vector<double> nice_ticks(double low, double high, int count);
// "0.25", "1,500": a tick's value as its neighbours are written.
[[nodiscard]] std::string tick_text(double value, double step);

} // namespace troupe
