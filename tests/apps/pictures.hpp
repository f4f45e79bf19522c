// What the tests of commands share: refusals in one line, and pictures that a browser can open.
#pragma once

#include "tests/apps/run_program.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::test {

// A folder that is gone afterwards.
class Folder {
public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "troupe-plot-XXXXXX").string();
    if (!mkdtemp(name.data()))
      std::abort();
    path_ = name;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::string path(const std::string& name) const { return (path_ / name).string(); }
  // Writes a file; gives its path.
  [[nodiscard]] std::string with(const std::string& name, const std::string& text) const {
    std::ofstream{path_ / name, std::ios::binary} << text;
    return path(name);
  }

private:
  std::filesystem::path path_;
};

inline std::string contents(const std::string& path) {
  std::ifstream file{path, std::ios::binary};
  return {std::istreambuf_iterator<char>{file}, {}};
}

// One line on stderr that starts as ours do and says `text`.
inline void check_refusal(const Outcome& o, int code, const std::string& text) {
  CAPTURE(o.err);
  CAPTURE(o.out);
  CAPTURE(text);
  CHECK(o.code == code);
  CHECK(std::ranges::count(o.err, '\n') == 1);
  CHECK(o.err.starts_with("troupe: error: "));
  CHECK(o.err.find(text) != std::string::npos);
}

inline size_t count_of(std::string_view text, std::string_view piece) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(piece, at)) != std::string_view::npos; at += piece.size())
    ++n;
  return n;
}

// Tags are closed in turn, attributes quoted, numbers finite, nothing comes from elsewhere.
inline void check_svg(const std::string& svg) {
  REQUIRE(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
  REQUIRE(svg.ends_with("</svg>\n"));
  for (const char* alien : {"nan", "inf\"", "<script", "href", "url("})
    CHECK(svg.find(alien) == std::string::npos);
  std::vector<std::string> open;
  bool well_formed = true;
  for (size_t at = 0; (at = svg.find('<', at)) != std::string::npos;) {
    const auto end = svg.find('>', at);
    REQUIRE(end != std::string::npos);
    const auto tag = svg.substr(at + 1, end - at - 1);
    well_formed &= tag.find('<') == std::string::npos && count_of(tag, "\"") % 2 == 0;
    const auto name = tag.substr(0, tag.find(' '));
    if (tag.starts_with("/")) {
      well_formed &= !open.empty() && "/" + open.back() == tag;
      if (!open.empty())
        open.pop_back();
    } else if (!tag.ends_with("/")) {
      open.push_back(name);
    }
    at = end;
  }
  CHECK(well_formed);
  CHECK(open.empty());
}

} // namespace troupe::test
