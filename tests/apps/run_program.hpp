// Runs the built program as a user would, and sees what it leaves behind.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

namespace troupe::test {

struct Outcome {
  int code = -1; // the exit code, or 128 + n after signal n
  std::string out, err;
  int left_behind = 0; // processes alive after the program had ended
  bool timed_out = false;
};

// A program under way. This process adopts what its children leave (PR_SET_CHILD_SUBREAPER), so
// that an orphan is found by waiting for the program's process group.
class Program {
public:
  using Clock = std::chrono::steady_clock;

  // `prepare` runs in the child before the program starts: limits, closed descriptors.
  explicit Program(std::vector<std::string> args, const std::function<void()>& prepare = {},
                   const char* program = TROUPE_PROGRAM) {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    std::array<int, 2> out{}, err{};
    if (pipe2(out.data(), O_CLOEXEC) != 0 || pipe2(err.data(), O_CLOEXEC) != 0)
      std::abort();
    args.insert(args.begin(), program);
    std::vector<char*> argv;
    for (auto& a : args)
      argv.push_back(a.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      setsid();
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      close(STDIN_FILENO);
      dup2(out[1], STDOUT_FILENO);
      dup2(err[1], STDERR_FILENO);
      if (prepare)
        prepare();
      execvp(argv[0], argv.data());
      _exit(127);
    }
    close(out[1]);
    close(err[1]);
    fds_ = {out[0], err[0]};
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    if (pid_ > 0)
      (void)finish(std::chrono::seconds{0});
  }

  [[nodiscard]] pid_t pid() const { return pid_; }
  void signal_all(int signal) const { kill(-pid_, signal); }

  // The program's children in the order of their start: ranks, then the client.
  [[nodiscard]] std::vector<pid_t> children() const {
    std::ifstream file{"/proc/" + std::to_string(pid_) + "/task/" + std::to_string(pid_) +
                       "/children"};
    std::vector<pid_t> all;
    for (pid_t child = 0; file >> child;)
      all.push_back(child);
    return all;
  }

  // Reads until standard output holds `text`; false when the program ends or time is up first.
  bool await_output(const std::string& text, std::chrono::milliseconds limit) {
    const auto deadline = Clock::now() + limit;
    while (outcome_.out.find(text) == std::string::npos)
      if (!read_some(deadline))
        return false;
    return true;
  }

  [[nodiscard]] const std::string& output() const { return outcome_.out; }

  // Waits for the end, then for what was left to end by itself; kills the rest.
  Outcome finish(std::chrono::milliseconds limit = std::chrono::seconds{30}) {
    const auto deadline = Clock::now() + limit;
    int status = 0;
    while (waitpid(pid_, &status, WNOHANG) == 0) {
      if (Clock::now() >= deadline) {
        outcome_.timed_out = true;
        kill(-pid_, SIGKILL);
        waitpid(pid_, &status, 0);
        break;
      }
      if (!read_some(std::min(deadline, Clock::now() + std::chrono::milliseconds{20})))
        usleep(2000);
    }
    outcome_.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    // Children of a killed agent are killed by the kernel a moment later. All are of its group, and
    // other programs under way are none of theirs.
    const auto patience = Clock::now() + std::chrono::seconds{1};
    pid_t orphan = 0;
    while ((orphan = waitpid(-pid_, nullptr, WNOHANG)) >= 0 && Clock::now() < patience)
      if (orphan == 0)
        usleep(2000);
    if (orphan >= 0) { // still some alive
      kill(-pid_, SIGKILL);
      while (waitpid(-pid_, nullptr, 0) > 0)
        ++outcome_.left_behind;
    }
    while (read_some(Clock::now() + std::chrono::milliseconds{100})) {
    }
    for (const int fd : fds_)
      if (fd >= 0)
        close(fd);
    pid_ = -1;
    return std::move(outcome_);
  }

private:
  // One read from either pipe; false at the end of both, or at the deadline.
  bool read_some(Clock::time_point deadline) {
    std::array<pollfd, 2> polled{pollfd{fds_[0], POLLIN, 0}, pollfd{fds_[1], POLLIN, 0}};
    if (fds_[0] < 0 && fds_[1] < 0)
      return false;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (poll(polled.data(), 2, static_cast<int>(std::max<int64_t>(left, 0))) <= 0)
      return false;
    for (size_t i = 0; i < 2; ++i) {
      if (polled[i].revents == 0)
        continue;
      std::array<char, 4096> bytes;
      const auto n = read(fds_[i], bytes.data(), bytes.size());
      if (n > 0) {
        (i == 0 ? outcome_.out : outcome_.err).append(bytes.data(), static_cast<size_t>(n));
      } else {
        close(fds_[i]);
        fds_[i] = -1;
      }
    }
    return true;
  }

  pid_t pid_ = -1;
  std::array<int, 2> fds_{-1, -1};
  Outcome outcome_;
};

inline Outcome run(std::vector<std::string> args, const std::function<void()>& prepare = {}) {
  return Program{std::move(args), prepare}.finish();
}

// A port of loopback where the kernel takes connections that nobody answers.
class SilentPort {
public:
  SilentPort() {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    auto* address = reinterpret_cast<sockaddr*>(&at);
    if (bind(fd_, address, size) != 0 || listen(fd_, 16) != 0 ||
        getsockname(fd_, address, &size) != 0)
      std::abort();
    port_ = ntohs(at.sin_port);
  }
  SilentPort(const SilentPort&) = delete;
  SilentPort& operator=(const SilentPort&) = delete;
  ~SilentPort() { close(fd_); }
  [[nodiscard]] int port() const { return port_; }

private:
  int fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), port_ = 0;
};

// Runs the program as a launcher would: once for each of `environments` ("NAME=value …"), all at
// the same time. stdout is that of all, and a line rc=N for each in order.
inline Outcome run_tasks(const std::vector<std::string>& environments, const std::string& args) {
  std::string script;
  for (const auto& environment : environments)
    script += "env " + environment + " " TROUPE_PROGRAM " " + args + " & pids=\"$pids $!\"\n";
  script += "for p in $pids; do wait $p; echo rc=$?; done";
  return Program{{"-c", script}, {}, "bash"}.finish();
}

// A folder of its own with a tiny checkpoint (tiny-v3, F32, no tokenizer, context 4096).
class Scratch {
public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "troupe-apps-XXXXXX").string();
    if (!mkdtemp(name.data()))
      std::abort();
    folder = name;
    model = (folder / "model").string();
    if (run({"init", "tiny-v3", model, "--dtype", "f32"}).code != 0)
      std::abort();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::filesystem::remove_all(folder); }
  [[nodiscard]] std::string path(const std::string& name) const { return (folder / name).string(); }

  std::filesystem::path folder;
  std::string model;
};

} // namespace troupe::test
