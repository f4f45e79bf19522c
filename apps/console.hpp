// What the subcommands share in talking to a person: errors on stderr, sizes and counts as people
// write them, a progress line on a terminal.
#pragma once

#include "config/errors.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace troupe {

// "troupe: error: …" on stderr; returns the exit code 1.
int complain(const caf::error& error);
int complain(const std::string& text);
// The same for options that make no sense; returns the exit code 2.
int wrong_usage(const caf::error& error);
int wrong_usage(const std::string& text);
// A client among ranks tells its agent instead, which knows whether somebody else's end was the
// cause.
void divert_complaints(std::function<void(const caf::error&)> listener);

// To stderr, what a person may want to read. That nobody reads it any more, or that its disk is
// full, is no reason to end.
void note(const std::string& text);

// `code`, unless what was printed could not be written (a full disk, a closed pipe).
[[nodiscard]] int after_output(int code);
// Whether a file can be written there, found out before the work that fills it. An existing file
// is left as it is.
[[nodiscard]] caf::error check_writable(const std::string& path);

// "671,026,419,200"
[[nodiscard]] std::string with_commas(int64_t n);
// "641.3 GiB"
[[nodiscard]] std::string bytes_text(int64_t bytes);

// "5,7,9" -> ids. Errors name the piece that is no token id.
[[nodiscard]] caf::expected<std::vector<int32_t>> parse_ids(const std::string& text);
// An error unless a folder stands there, for commands that would miss one of its files instead.
[[nodiscard]] caf::error check_folder(const std::string& path);

// The whole file, or standard input for "-". Errors name the file.
[[nodiscard]] caf::expected<std::string> read_file(const std::string& path);

// A line of ASCII on stderr that is overwritten; silent when stderr is no terminal.
class ProgressLine {
public:
  explicit ProgressLine(bool enabled);
  ~ProgressLine();
  void show(const std::string& text); // cut at width()
  void clear();
  [[nodiscard]] static size_t width(); // columns of the terminal, 79 where it does not tell

private:
  bool enabled_;
  bool shown_ = false;
};

} // namespace troupe
