#include "apps/svg.hpp"

#include "apps/console.hpp"
#include "config/tokenizer_text.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

namespace troupe {

namespace {

template <class... Args>
void append(std::string& out, fmt::format_string<Args...> format, Args&&... args) {
  fmt::format_to(std::back_inserter(out), format, std::forward<Args>(args)...);
}

std::string stroke(const LineStyle& s) {
  std::string text =
      fmt::format("stroke=\"{}\" stroke-width=\"{}\"", s.colour, coordinate(s.width));
  if (s.opacity < 1)
    append(text, " stroke-opacity=\"{}\"", coordinate(s.opacity));
  if (!s.dashes.empty())
    append(text, " stroke-dasharray=\"{}\"", s.dashes);
  return text;
}

} // namespace

Svg::Svg(double width, double height, std::string_view title) {
  const auto w = coordinate(width), h = coordinate(height);
  append(text_,
         "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" "
         "viewBox=\"0 0 {0} {1}\" font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n"
         "<title>{2}</title>\n<rect width=\"{0}\" height=\"{1}\" fill=\"#ffffff\"/>\n",
         w, h, xml_text(title));
}

void Svg::box(double x, double y, double width, double height, std::string_view colour,
              double opacity, std::string_view hint) {
  append(text_, "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"", coordinate(x),
         coordinate(y), coordinate(width), coordinate(height), colour);
  if (opacity < 1)
    append(text_, " fill-opacity=\"{}\"", coordinate(opacity));
  if (hint.empty())
    text_ += "/>\n";
  else
    append(text_, "><title>{}</title></rect>\n", xml_text(hint));
}

void Svg::frame(double x, double y, double width, double height, const LineStyle& style) {
  append(text_, "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"none\" {}/>\n",
         coordinate(x), coordinate(y), coordinate(width), coordinate(height), stroke(style));
}

void Svg::line(double x1, double y1, double x2, double y2, const LineStyle& style) {
  append(text_, "<path d=\"M{} {}L{} {}\" {}/>\n", coordinate(x1), coordinate(y1), coordinate(x2),
         coordinate(y2), stroke(style));
}

void Svg::curve(const Points& points, const LineStyle& style) {
  if (points.empty())
    return;
  text_ += "<polyline points=\"";
  for (size_t i = 0; i < points.size(); ++i)
    append(text_, "{}{},{}", i == 0 ? "" : " ", coordinate(points[i].first),
           coordinate(points[i].second));
  append(text_, "\" fill=\"none\" stroke-linejoin=\"round\" stroke-linecap=\"round\" {}/>\n",
         stroke(style));
}

void Svg::dot(double x, double y, double radius, std::string_view fill, std::string_view edge) {
  append(text_, "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{}\" stroke=\"{}\"/>\n", coordinate(x),
         coordinate(y), coordinate(radius), fill, edge);
}

void Svg::text(double x, double y, std::string_view text, const TextStyle& style) {
  constexpr std::array<std::string_view, 3> kAnchors{"start", "middle", "end"};
  append(text_, "<text x=\"{}\" y=\"{}\" font-size=\"{}\" fill=\"{}\"", coordinate(x),
         coordinate(y), coordinate(style.size), style.colour);
  if (style.anchor != Anchor::start)
    append(text_, " text-anchor=\"{}\"", kAnchors[static_cast<size_t>(style.anchor)]);
  if (style.bold)
    text_ += " font-weight=\"bold\"";
  if (style.upwards)
    append(text_, " transform=\"rotate(-90 {} {})\"", coordinate(x), coordinate(y));
  append(text_, ">{}</text>\n", xml_text(text));
}

void Svg::cells(double x, double y, double cell_width, double cell_height, std::string_view colour,
                std::string_view path) {
  append(text_,
         "<path transform=\"translate({} {}) scale({:.6f} {:.6f})\" fill=\"{}\" d=\"{}\" "
         "shape-rendering=\"crispEdges\"/>\n",
         coordinate(x), coordinate(y), cell_width, cell_height, colour, path);
}

std::string Svg::finish() && {
  text_ += "</svg>\n";
  return std::move(text_);
}

std::string xml_text(std::string_view text) {
  std::string bytes{text}, out;
  for (const char c : text::take_lossy(bytes, true)) {
    switch (c) {
    case '<':
      out += "&lt;";
      break;
    case '>':
      out += "&gt;";
      break;
    case '&':
      out += "&amp;";
      break;
    case '"':
      out += "&quot;";
      break;
    default: // XML has no place for control characters
      out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return out;
}

std::string coordinate(double value) {
  auto text = fmt::format("{:.2f}", value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.')
    text.pop_back();
  return text == "-0" ? "0" : text;
}

std::string_view series_colour(size_t index) {
  constexpr std::array<std::string_view, 8> kColours{"#1668b0", "#d1622b", "#2f8a57", "#8650a6",
                                                     "#c33b59", "#0f8f99", "#8a6d3b", "#5d6472"};
  return kColours[index % kColours.size()];
}

std::vector<double> nice_ticks(double low, double high, int count) {
  const double largest = std::max(std::abs(low), std::abs(high));
  if (!(high - low > 1e-12 * largest) || largest < 1e-200) { // one value: something around it
    const double margin = largest < 1e-200 ? 1 : largest * 0.05;
    low -= margin;
    high += margin;
  }
  const double rough = (high - low) / std::max(count, 1);
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0})
    if (factor * power >= rough * (1 - 1e-9)) {
      step = factor * power;
      break;
    }
  std::vector<double> ticks;
  const double first = std::floor(low / step + 1e-9), last = std::ceil(high / step - 1e-9);
  for (double i = first; i <= last; ++i)
    ticks.push_back(i * step);
  return ticks;
}

std::string tick_text(double value, double step) {
  int decimals = 0;
  for (double s = step; decimals < 9 && std::abs(s - std::round(s)) > 1e-6 * step; s *= 10)
    ++decimals;
  if (std::abs(value) >= 1e15 || (step > 0 && step < 1e-8))
    return fmt::format("{:.3g}", value);
  if (decimals > 0)
    return fmt::format("{:.{}f}", value, decimals);
  return with_commas(std::llround(value));
}

} // namespace troupe
