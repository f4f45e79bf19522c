#include "actors/agent.hpp"

#include <fmt/format.h>

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

namespace troupe {

// ---- the child's end --------------------------------------------------------------------------

AgentChannel::~AgentChannel() { close(fd_); }

void AgentChannel::say(std::string_view line) {
  std::string text{line};
  std::replace(text.begin(), text.end(), '\n', ' ');
  text += '\n';
  const std::lock_guard lock{mutex_};
  for (size_t sent = 0; sent < text.size();) {
    const auto n = send(fd_, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return; // the agent is gone; hear() says so too
    sent += static_cast<size_t>(n);
  }
}

std::optional<std::string> AgentChannel::hear() {
  for (;;) {
    if (const auto end = buffer_.find('\n'); end != std::string::npos) {
      auto line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return line;
    }
    char bytes[4096];
    const auto n = recv(fd_, bytes, sizeof bytes, 0);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return std::nullopt;
    buffer_.append(bytes, static_cast<size_t>(n));
  }
}

std::string describe_exit(int status) {
  if (WIFSIGNALED(status))
    return fmt::format("was killed by signal {} ({})", WTERMSIG(status),
                       strsignal(WTERMSIG(status)));
  if (WIFEXITED(status))
    return fmt::format("exited with code {}", WEXITSTATUS(status));
  return "ended";
}

// ---- the agent --------------------------------------------------------------------------------

namespace {

using Clock = std::chrono::steady_clock;

struct Child {
  pid_t pid = -1;
  RankId rank; // invalid: the client
  int fd = -1;
  std::string heard;
  std::string failure;  // what it said before it died
  bool cut_off = false; // ... and it was somebody else's end
  bool ready = false;
  bool alive = true;
  int64_t loaded = 0; // bytes
  std::optional<Clock::time_point> stopped;
};

// How near to the cause a complaint is; the nearest is printed.
enum class Blame : uint8_t {
  nobody,
  client_cut_off, // the client lost its cluster
  rank_cut_off,   // a rank lost a peer
  failed,         // a child failed by itself, or was killed
};

constexpr auto kBetterCause = std::chrono::milliseconds{300};

class Running {
public:
  explicit Running(const AgentOptions& options) : options_(options) {}
  int run();

private:
  bool start_all();
  bool start(RankId rank);
  [[noreturn]] void child(RankId rank, int fd, pid_t agent);
  void loop();
  void read_signals();
  void reap();
  void end_stopped();
  void died(Child& child, int status);
  void read_from(Child& child);
  void take_line(Child& child, const std::string& line);
  void tell(Child& child, const std::string& line);
  void tell_seed();
  void tell_client();
  void begin_stop(int code);
  void blame(Blame blame, const std::string& text, int code);
  [[nodiscard]] std::string nearest_cause() const;
  void report();
  void complain(const std::string& text);
  [[nodiscard]] bool any_alive() const;
  [[nodiscard]] int poll_timeout() const;

  const AgentOptions& options_;
  std::vector<Child> children_;
  int signal_fd_ = -1;
  sigset_t old_mask_{};
  std::optional<std::string> seed_;
  bool stopping_ = false;
  bool interrupted_ = false; // the client was told
  bool killed_ = false;
  bool told_ready_ = false;
  int code_ = 0;
  Clock::time_point deadline_;
  Blame blame_ = Blame::nobody; // of `cause_`, which is not printed yet unless `settled_`
  std::string cause_;
  bool settled_ = false; // what ends from here on needs no words
  Clock::time_point report_at_;
};

bool Running::start(RankId rank) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) {
    complain(fmt::format("socketpair: {}", strerror(errno)));
    return false;
  }
  const pid_t agent = getpid();
  const pid_t pid = fork();
  if (pid < 0) {
    complain(fmt::format("fork: {}", strerror(errno)));
    close(fds[0]);
    close(fds[1]);
    return false;
  }
  if (pid == 0) {
    close(fds[0]);
    child(rank, fds[1], agent);
  }
  close(fds[1]);
  Child c;
  c.pid = pid;
  c.rank = rank;
  c.fd = fds[0];
  children_.push_back(std::move(c));
  return true;
}

void Running::child(RankId rank, int fd, pid_t agent) {
  // If the agent died between fork and here the signal would never come.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != agent)
    _exit(1);
  for (const auto& other : children_)
    close(other.fd);
  close(signal_fd_);
  sigprocmask(SIG_SETMASK, &old_mask_, nullptr);
  // The terminal's Ctrl-C goes to the whole group, a launcher's SIGTERM to all its processes;
  // children leave when the agent says so.
  for (const int s : {SIGINT, SIGHUP, SIGPIPE})
    signal(s, SIG_IGN);
  if (rank.valid() || options_.client_ends_run)
    signal(SIGTERM, SIG_IGN);
  AgentChannel channel{fd};
  int code = 1;
  try {
    code = rank.valid() ? options_.rank_main(rank, channel) : options_.client_main(channel);
  } catch (const std::bad_alloc&) {
    channel.say("failed out of memory");
  } catch (const std::exception& error) { // no thread, no file: what the system refuses
    channel.say(std::string{"failed "} + error.what());
  }
  std::fflush(nullptr);
  _exit(code);
}

bool Running::start_all() {
  sigset_t mask;
  sigemptyset(&mask);
  for (const int s : {SIGCHLD, SIGINT, SIGTERM, SIGHUP})
    sigaddset(&mask, s);
  sigprocmask(SIG_BLOCK, &mask, &old_mask_);
  signal_fd_ = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
  if (signal_fd_ < 0) {
    complain(fmt::format("signalfd: {}", strerror(errno)));
    return false;
  }
  std::fflush(nullptr); // or every child would write what is buffered
  for (const auto rank : options_.ranks)
    if (!start(rank))
      return false;
  if (options_.client_main && !start(RankId{}))
    return false;
  seed_ = options_.seed;
  if (seed_)
    tell_seed();
  return true;
}

int Running::run() {
  if (!start_all())
    begin_stop(1);
  loop();
  report();
  for (auto& c : children_)
    if (c.fd >= 0)
      close(c.fd);
  if (signal_fd_ >= 0)
    close(signal_fd_);
  sigprocmask(SIG_SETMASK, &old_mask_, nullptr);
  return code_;
}

bool Running::any_alive() const {
  return std::any_of(children_.begin(), children_.end(), [](const auto& c) { return c.alive; });
}

int Running::poll_timeout() const {
  auto next = Clock::time_point::max();
  if (stopping_)
    next = settled_ ? deadline_ : std::min(deadline_, report_at_);
  for (const auto& c : children_)
    if (c.alive && c.rank.valid() && c.stopped)
      next = std::min(next, *c.stopped + std::chrono::milliseconds{options_.stopped_rank_ms});
  if (next == Clock::time_point::max())
    return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(next - Clock::now()).count();
  return static_cast<int>(std::max<int64_t>(left, 0));
}

void Running::loop() {
  while (any_alive()) {
    std::vector<pollfd> polled{{signal_fd_, POLLIN, 0}};
    std::vector<size_t> who;
    for (size_t i = 0; i < children_.size(); ++i)
      if (children_[i].fd >= 0) {
        polled.push_back({children_[i].fd, POLLIN, 0});
        who.push_back(i);
      }
    const int n = poll(polled.data(), polled.size(), poll_timeout());
    if (n < 0 && errno != EINTR) {
      complain(fmt::format("poll: {}", strerror(errno)));
      begin_stop(1);
    }
    if (n > 0)
      for (size_t i = 0; i < who.size(); ++i)
        if (polled[i + 1].revents)
          read_from(children_[who[i]]);
    if (n > 0 && polled[0].revents)
      read_signals();
    reap();
    end_stopped();
    if (stopping_ && Clock::now() >= report_at_)
      report();
    if (stopping_ && !killed_ && Clock::now() >= deadline_) {
      killed_ = true;
      for (auto& c : children_)
        if (c.alive)
          kill(c.pid, SIGKILL);
      deadline_ = Clock::now() + std::chrono::hours{1};
    }
  }
}

void Running::read_signals() {
  signalfd_siginfo info;
  while (read(signal_fd_, &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
    const int s = static_cast<int>(info.ssi_signo);
    if (s == SIGCHLD)
      continue;
    if (!stopping_ && !interrupted_ && options_.client_ends_run && s != SIGHUP) {
      tell_client();
      interrupted_ = true;
      continue;
    }
    if (stopping_) // a second one: don't be polite
      deadline_ = Clock::now();
    else
      settled_ = true;
    begin_stop(128 + s);
  }
}

void Running::reap() {
  for (auto& c : children_) {
    int status = 0;
    while (c.alive && waitpid(c.pid, &status, WNOHANG | WUNTRACED | WCONTINUED) == c.pid) {
      if (WIFSTOPPED(status)) {
        c.stopped = Clock::now();
      } else if (WIFCONTINUED(status)) {
        c.stopped.reset();
      } else {
        read_from(c); // its last words
        c.alive = false;
        died(c, status);
      }
    }
  }
}

// A rank that stays stopped would keep the others waiting while they form or load, when nobody
// listens for its heartbeats yet.
void Running::end_stopped() {
  const auto patience = std::chrono::milliseconds{options_.stopped_rank_ms};
  for (auto& c : children_)
    if (c.alive && c.rank.valid() && c.stopped && Clock::now() - *c.stopped >= patience) {
      kill(c.pid, SIGKILL);
      blame(Blame::failed,
            fmt::format("rank {} was lost: it was stopped by a signal and did not go on",
                        c.rank.value),
            1);
    }
}

void Running::died(Child& c, int status) {
  if (killed_)
    return; // by us
  const bool client = !c.rank.valid();
  if (status == 0 && c.failure.empty()) { // done, or left because the cluster was told to stop
    if (client && !stopping_) {
      settled_ = true;
      begin_stop(0);
    }
    return;
  }
  // The answer is there, but not all that was asked for: a trace that can't be written.
  if (settled_ && code_ == 0 && !client && !c.failure.empty() && !c.cut_off) {
    complain(fmt::format("rank {} failed: {}", c.rank.value, c.failure));
    code_ = 1;
    return;
  }
  const int code = client && WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  if (c.failure.empty()) {
    if (!stopping_ || (WIFSIGNALED(status) && !client)) // the client was told to stop by SIGTERM
      blame(Blame::failed,
            client ? "the client " + describe_exit(status)
                   : fmt::format("rank {} was lost: it {}", c.rank.value, describe_exit(status)),
            code);
  } else if (c.cut_off) {
    blame(client ? Blame::client_cut_off : Blame::rank_cut_off, c.failure, code);
  } else {
    blame(Blame::failed,
          client ? c.failure : fmt::format("rank {} failed: {}", c.rank.value, c.failure), code);
  }
}

void Running::blame(Blame blame, const std::string& text, int code) {
  if (settled_ || blame <= blame_)
    return;
  blame_ = blame;
  cause_ = text;
  report_at_ = Clock::now() + kBetterCause;
  begin_stop(code);
  code_ = code;
  if (blame == Blame::failed)
    report();
}

// A rank that lost its peer ends, and is lost to others in its turn: where the lost rank has told
// its own cause, that one is nearer.
std::string Running::nearest_cause() const {
  auto cause = cause_;
  for (size_t i = 0; i < children_.size(); ++i) {
    const auto told = std::ranges::find_if(children_, [&](const Child& c) {
      return c.rank.valid() && !c.failure.empty() &&
             cause.starts_with(fmt::format("rank {} was lost:", c.rank.value));
    });
    if (told == children_.end())
      break;
    cause = told->cut_off ? told->failure
                          : fmt::format("rank {} failed: {}", told->rank.value, told->failure);
  }
  return cause;
}

void Running::report() {
  if (!settled_ && blame_ != Blame::nobody)
    complain(nearest_cause());
  settled_ = true;
}

void Running::read_from(Child& c) {
  char bytes[4096];
  while (c.fd >= 0) {
    const auto n = recv(c.fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      break;
    if (n == 0) {
      close(c.fd);
      c.fd = -1;
      break;
    }
    c.heard.append(bytes, static_cast<size_t>(n));
  }
  for (size_t end; (end = c.heard.find('\n')) != std::string::npos;) {
    const auto line = c.heard.substr(0, end);
    c.heard.erase(0, end + 1);
    take_line(c, line);
  }
}

void Running::take_line(Child& c, const std::string& line) {
  if (line.starts_with("port ") && !seed_) {
    seed_ = line.substr(5);
    tell_seed();
  } else if (line.starts_with("loading ")) {
    c.loaded = std::strtoll(line.c_str() + 8, nullptr, 10);
    int64_t bytes = 0;
    for (const auto& x : children_)
      bytes += x.loaded;
    if (options_.on_loading)
      options_.on_loading(bytes);
    for (auto& x : children_)
      if (!x.rank.valid())
        tell(x, fmt::format("loading {}", bytes));
  } else if (line == "ready") {
    c.ready = true;
    const bool all = std::all_of(children_.begin(), children_.end(),
                                 [](const auto& x) { return !x.rank.valid() || x.ready; });
    if (all && !told_ready_ && options_.on_ready) {
      told_ready_ = true;
      options_.on_ready(seed_.value_or(""));
    }
  } else if (line.starts_with("failed ") || line.starts_with("lost ")) {
    if (c.failure.empty()) {
      c.cut_off = line.starts_with("lost ");
      c.failure = line.substr(line.find(' ') + 1);
    }
  } else if (line == "stop") {
    settled_ = true;
    begin_stop(0);
  }
}

void Running::tell(Child& c, const std::string& line) {
  const auto text = line + "\n";
  // A child that does not read its few lines is ended by the stop timeout.
  if (c.fd >= 0 && send(c.fd, text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
      errno != EPIPE && errno != ECONNRESET && errno != EAGAIN)
    complain(fmt::format("telling a child: {}", strerror(errno)));
}

void Running::tell_seed() {
  for (auto& c : children_)
    tell(c, "seed " + *seed_);
}

// Of a launcher's tasks all get the signal, and one has the client.
void Running::tell_client() {
  for (auto& c : children_)
    if (c.alive && !c.rank.valid())
      tell(c, "interrupt");
}

void Running::begin_stop(int code) {
  if (stopping_)
    return;
  stopping_ = true;
  code_ = code;
  if (report_at_ == Clock::time_point{})
    report_at_ = Clock::now();
  deadline_ = Clock::now() + std::chrono::milliseconds{options_.stop_timeout_ms};
  for (auto& c : children_) {
    if (!c.alive)
      continue;
    tell(c, "stop");
    if (!c.rank.valid())
      kill(c.pid, options_.client_ends_run ? SIGKILL : SIGTERM);
  }
}

void Running::complain(const std::string& text) {
  std::fprintf(stderr, "troupe: error: %s\n", text.c_str()); // no matter whether anybody reads it
  std::fflush(stderr);
}

} // namespace

int run_agent(const AgentOptions& options) { return Running{options}.run(); }

} // namespace troupe
