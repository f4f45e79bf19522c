#include "apps/token.hpp"

#include "apps/session.hpp"
#include "config/errors.hpp"

#include <fmt/format.h>

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstring>

namespace troupe {

namespace {

constexpr size_t kLeast = 8, kMost = 4096; // characters of a token

caf::error trouble(const std::string& path, const std::string& what) {
  return make_error(Errc::invalid_argument, fmt::format("{}: {}", path, what));
}

// Open to nobody but its owner, who is this process's user.
bool is_private(const struct stat& s) { return s.st_uid == geteuid() && (s.st_mode & 077) == 0; }

// An open file, closed at the end.
class Descriptor {
public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0)
      close(fd_);
  }
  [[nodiscard]] int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

private:
  int fd_;
};

// Writes a secret under a name of its own and gives it `path`, unless that is there by now.
caf::error make_secret(const std::string& path) {
  const auto secret = random_token();
  if (!secret)
    return secret.error();
  const auto temporary = fmt::format("{}.{}", path, getpid());
  const Descriptor file{open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
  const bool written =
      file && write(file.get(), secret->data(), secret->size()) == std::ssize(*secret);
  const bool named = written && (link(temporary.c_str(), path.c_str()) == 0 || errno == EEXIST);
  const int why = errno;
  if (file)
    unlink(temporary.c_str());
  return named ? caf::error{} : trouble(path, strerror(why));
}

} // namespace

caf::expected<std::string> random_token() {
  std::array<unsigned char, 16> bytes{};
  if (getrandom(bytes.data(), bytes.size(), 0) != std::ssize(bytes))
    return make_error(Errc::io_error, fmt::format("no random numbers: {}", strerror(errno)));
  std::string token;
  for (const auto b : bytes)
    token += fmt::format("{:02x}", b);
  return token;
}

caf::expected<std::string> read_token(const std::string& path) {
  // Without waiting: a FIFO may have no writer.
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat s {};
  if (!file || fstat(file.get(), &s) != 0)
    return trouble(path, strerror(errno));
  if (!S_ISREG(s.st_mode))
    return trouble(path, "no regular file, expected one that holds a token");
  std::string token(kMost + 2, '\0');
  const auto n = read(file.get(), token.data(), token.size());
  if (n < 0)
    return trouble(path, strerror(errno));
  token.resize(static_cast<size_t>(n));
  token.resize(std::min(token.size(), token.find('\n')));
  if (token.ends_with('\r'))
    token.pop_back();
  if (token.size() < kLeast || token.size() > kMost)
    return trouble(path, fmt::format("expected a token of {} to {} characters in its first line",
                                     kLeast, kMost));
  if (std::ranges::any_of(token, [](unsigned char c) { return std::iscntrl(c) != 0; }))
    return trouble(path, "its first line has control characters, expected a token");
  return token;
}

caf::expected<std::string> given_token(const std::string& token, const std::string& file) {
  if (!token.empty())
    return token;
  if (!file.empty())
    return read_token(file);
  auto set = environment("TROUPE_TOKEN");
  if (!set.empty())
    return set;
  const auto named = environment("TROUPE_TOKEN_FILE");
  return named.empty() ? std::string{} : read_token(named);
}

caf::expected<std::string> user_secret() {
  const auto runtime = environment("XDG_RUNTIME_DIR");
  const auto folder =
      runtime.empty() ? fmt::format("/tmp/troupe-{}", geteuid()) : runtime + "/troupe";
  struct stat s {};
  if ((mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) || lstat(folder.c_str(), &s) != 0)
    return trouble(folder, strerror(errno));
  if (!S_ISDIR(s.st_mode) || !is_private(s))
    return trouble(folder, "expected a folder that is this user's alone (mode 0700)");
  const auto path = folder + "/secret";
  if (lstat(path.c_str(), &s) != 0) {
    if (auto error = make_secret(path))
      return error;
    if (lstat(path.c_str(), &s) != 0)
      return trouble(path, strerror(errno));
  }
  if (!S_ISREG(s.st_mode) || !is_private(s))
    return trouble(path, "expected a file that is this user's alone (mode 0600)");
  return read_token(path);
}

} // namespace troupe
