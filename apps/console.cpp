#include "apps/console.hpp"

#include <fmt/format.h>

#include <unistd.h>

#include <charconv>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

namespace troupe {

int complain(const std::string& text) {
  fmt::print(stderr, "troupe: error: {}\n", text);
  return 1;
}

int complain(const caf::error& error) { return complain(text_of(error)); }

std::string with_commas(int64_t n) {
  auto digits = std::to_string(n < 0 ? -n : n);
  for (auto i = static_cast<std::ptrdiff_t>(digits.size()) - 3; i > 0; i -= 3)
    digits.insert(static_cast<size_t>(i), 1, ',');
  return (n < 0 ? "-" : "") + digits;
}

std::string bytes_text(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, units[unit]);
}

caf::expected<std::vector<int32_t>> parse_ids(const std::string& text) {
  std::vector<int32_t> ids;
  std::istringstream pieces{text};
  for (std::string piece; std::getline(pieces, piece, ',');) {
    const auto first = piece.find_first_not_of(" \t\n");
    const auto last = piece.find_last_not_of(" \t\n");
    int32_t id = -1;
    if (first != std::string::npos) {
      const auto [end, error] =
        std::from_chars(piece.data() + first, piece.data() + last + 1, id);
      if (error != std::errc{} || end != piece.data() + last + 1)
        id = -1;
    }
    if (id < 0)
      return make_error(Errc::invalid_argument,
                        fmt::format("tokens: \"{}\" is no token id, expected numbers as 5,7,9",
                                    piece));
    ids.push_back(id);
  }
  if (ids.empty())
    return make_error(Errc::invalid_argument, "tokens: empty, expected numbers as 5,7,9");
  return ids;
}

caf::expected<std::string> read_file(const std::string& path) {
  if (path == "-")
    return std::string{std::istreambuf_iterator<char>{std::cin}, {}};
  std::ifstream file{path, std::ios::binary};
  std::string text{std::istreambuf_iterator<char>{file}, {}};
  if (!file.good() && !file.eof())
    return make_error(Errc::not_found, fmt::format("{}: can't be read", path));
  return text;
}

ProgressLine::ProgressLine(bool enabled) : enabled_(enabled && isatty(STDERR_FILENO) != 0) {}

ProgressLine::~ProgressLine() { clear(); }

void ProgressLine::show(const std::string& text) {
  if (!enabled_)
    return;
  fmt::print(stderr, "\r\x1b[K{}", text);
  std::fflush(stderr);
  shown_ = true;
}

void ProgressLine::clear() {
  if (shown_)
    fmt::print(stderr, "\r\x1b[K");
  shown_ = false;
}

} // namespace troupe
