#include "apps/console.hpp"

#include <fmt/format.h>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <sstream>

namespace troupe {

namespace {

std::function<void(const caf::error&)>& complaints() {
  static std::function<void(const caf::error&)> listener;
  return listener;
}

} // namespace

void divert_complaints(std::function<void(const caf::error&)> listener) {
  complaints() = std::move(listener);
}

void note(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

int complain(const caf::error& error) {
  std::fflush(stdout); // results before the trouble that ended them
  if (complaints())
    complaints()(error);
  else
    note(fmt::format("troupe: error: {}\n", text_of(error)));
  return 1;
}

int complain(const std::string& text) { return complain(make_error(Errc::invalid_argument, text)); }

int wrong_usage(const caf::error& error) {
  complain(error);
  return 2;
}

int wrong_usage(const std::string& text) {
  return wrong_usage(make_error(Errc::invalid_argument, text));
}

int after_output(int code) {
  errno = 0;
  if (std::fflush(stdout) == 0 && !std::ferror(stdout))
    return code;
  const int why = errno;
  std::clearerr(stdout);
  if (code != 0) // a first error was told
    return code;
  return complain(
      make_error(Errc::io_error, fmt::format("standard output: can't be written{}{}",
                                             why ? ": " : "", why ? strerror(why) : "")));
}

caf::error check_writable(const std::string& path) {
  struct stat found {};
  const bool exists = lstat(path.c_str(), &found) == 0; // a link would be replaced, not followed
  if (exists && !S_ISREG(found.st_mode))
    return make_error(Errc::invalid_argument, path + ": is not a regular file");
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0)
    return make_error(Errc::io_error,
                      fmt::format("{}: can't be written: {}", path, strerror(errno)));
  close(fd);
  if (!exists)
    unlink(path.c_str());
  return {};
}

caf::error check_folder(const std::string& path) {
  struct stat found {};
  if (path.empty())
    return make_error(Errc::invalid_argument, "MODEL: empty, expected the folder of a checkpoint");
  if (stat(path.c_str(), &found) != 0)
    return make_error(Errc::not_found, fmt::format("{}: {}", path, strerror(errno)));
  return S_ISDIR(found.st_mode)
             ? caf::error{}
             : make_error(Errc::invalid_argument,
                          path + ": is no folder, expected that of a checkpoint");
}

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
      const auto [end, error] = std::from_chars(piece.data() + first, piece.data() + last + 1, id);
      if (error != std::errc{} || end != piece.data() + last + 1)
        id = -1;
    }
    if (id < 0)
      return make_error(
          Errc::invalid_argument,
          fmt::format("tokens: \"{}\" is no token id, expected numbers as 5,7,9", piece));
    ids.push_back(id);
  }
  if (ids.empty())
    return make_error(Errc::invalid_argument, "tokens: empty, expected numbers as 5,7,9");
  return ids;
}

caf::expected<std::string> read_file(const std::string& path) {
  constexpr size_t kMaxBytes = size_t{1} << 30; // of a pipe or device, which may be endless
  const bool standard = path == "-";
  const auto name = standard ? std::string{"standard input"} : path;
  const int fd = standard ? STDIN_FILENO : open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat kind {};
  const bool bounded = fd >= 0 && fstat(fd, &kind) == 0 && S_ISREG(kind.st_mode);
  std::string text;
  ssize_t n = fd < 0 ? -1 : 1;
  for (char bytes[65536]; n > 0 && (bounded || text.size() <= kMaxBytes);) {
    n = read(fd, bytes, sizeof bytes);
    if (n < 0 && errno == EINTR)
      n = 1; // again
    else if (n > 0)
      text.append(bytes, static_cast<size_t>(n));
  }
  const int why = n < 0 ? errno : 0;
  if (!standard && fd >= 0)
    close(fd);
  if (why != 0)
    return make_error(why == ENOENT ? Errc::not_found : Errc::io_error,
                      fmt::format("{}: can't be read: {}", name, strerror(why)));
  if (!bounded && text.size() > kMaxBytes)
    return make_error(Errc::malformed, fmt::format("{}: more than {} of text", name,
                                                   bytes_text(static_cast<int64_t>(kMaxBytes))));
  return text;
}

ProgressLine::ProgressLine(bool enabled) : enabled_(enabled && isatty(STDERR_FILENO) != 0) {}

ProgressLine::~ProgressLine() { clear(); }

size_t ProgressLine::width() {
  winsize size{};
  // The last column stays free: some terminals wrap there.
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1u : 79u;
}

void ProgressLine::show(const std::string& text) {
  if (!enabled_)
    return;
  // A line that wraps could not be taken back.
  note("\r\x1b[K" + text.substr(0, width()));
  shown_ = true;
}

void ProgressLine::clear() {
  if (shown_)
    note("\r\x1b[K");
  shown_ = false;
}

} // namespace troupe
