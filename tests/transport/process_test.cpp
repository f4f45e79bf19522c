// Ranks in processes of their own: what a kill, a stop and a clean exit look like from outside.
//
// A child is this program again with a single, otherwise skipped test case, so that it starts
// without threads. It writes its address to standard output and reads its orders, one line each,
// from standard input: "address <hex>", "flood <bytes>", "leave".
#include "tests/transport/fabric_helpers.hpp"

#include "transport/ucx_fabric.hpp"

#include <array>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

using namespace troupe;
using namespace troupe::test;
using namespace std::chrono_literals;

namespace {

std::string to_hex(const std::string& bytes) {
  std::string out;
  for (const unsigned char c : bytes) {
    out += "0123456789abcdef"[c >> 4];
    out += "0123456789abcdef"[c & 15];
  }
  return out;
}

std::string from_hex(const std::string& text) {
  std::string out;
  for (size_t i = 0; i + 1 < text.size(); i += 2)
    out += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
  return out;
}

// Few milliseconds of patience, so that the tests of silence are quick.
FabricOptions process_options(int rank) {
  auto o = options_for(rank);
  o.heartbeat_period_ms = 50;
  o.heartbeat_timeout_ms = 1000;
  return o;
}

class Child {
public:
  explicit Child(int rank) {
    std::array<int, 2> orders{}, answers{};
    REQUIRE(::pipe2(orders.data(), O_CLOEXEC) == 0);
    REQUIRE(::pipe2(answers.data(), O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, orders[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, answers[1], STDOUT_FILENO);
    std::string program = "/proc/self/exe";
    std::string test = "--test-case=child process of the tests below";
    std::string skip = "--no-skip", quiet = "--no-version";
    std::array<char*, 5> argv{program.data(), test.data(), skip.data(), quiet.data(), nullptr};
    const auto number = std::to_string(rank);
    ::setenv("TROUPE_TEST_CHILD", number.c_str(), 1);
    REQUIRE(::posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv.data(), ::environ) == 0);
    ::unsetenv("TROUPE_TEST_CHILD");
    posix_spawn_file_actions_destroy(&actions);
    ::close(orders[0]);
    ::close(answers[1]);
    orders_ = orders[1];
    answers_ = ::fdopen(answers[0], "r");
    address_ = from_hex(read_line());
    REQUIRE(address_.size() > 20);
  }
  ~Child() {
    if (!reaped_) {
      ::kill(pid_, SIGKILL);
      wait();
    }
    ::close(orders_);
    std::fclose(answers_);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  [[nodiscard]] const std::string& address() const { return address_; }
  void order(const std::string& line) const {
    const auto text = line + "\n";
    CHECK(::write(orders_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  }
  void signal(int number) const { ::kill(pid_, number); }
  int wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    reaped_ = true;
    return status;
  }

private:
  std::string read_line() {
    std::array<char, 4096> line{};
    // doctest's banner goes to the same stream.
    while (std::fgets(line.data(), line.size(), answers_))
      if (std::string_view text{line.data()}; text.starts_with("address ")) {
        text.remove_prefix(8);
        text.remove_suffix(1);
        return std::string{text};
      }
    return {};
  }
  pid_t pid_ = -1;
  bool reaped_ = false;
  int orders_ = -1;
  FILE* answers_ = nullptr;
  std::string address_;
};

// Rank 0 here and rank 1 in a child, connected, with a first message exchanged.
struct Pair {
  Pair() : child(1), fabric(std::move(*make_ucx_fabric(process_options(0)))) {
    sink.keep_messages = false;
    REQUIRE_FALSE(fabric->start(&sink));
    REQUIRE_FALSE(fabric->connect(RankId{1}, 1, child.address()));
    child.order("address " + to_hex(fabric->address()));
    REQUIRE(sink.wait_for_messages(1));
  }
  bool loses_child_within(std::chrono::milliseconds time) {
    return sink.wait([&] { return !sink.lost.empty(); }, time);
  }
  RecordingSink sink;
  Child child;
  std::unique_ptr<Fabric> fabric;
};

} // namespace

TEST_CASE("child process of the tests below" * doctest::skip()) {
  const char* number = std::getenv("TROUPE_TEST_CHILD");
  if (!number)
    return;
  RecordingSink sink;
  sink.keep_messages = false;
  auto fabric = std::move(*make_ucx_fabric(process_options(std::atoi(number))));
  REQUIRE_FALSE(fabric->start(&sink));
  std::cout << "address " << to_hex(fabric->address()) << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words{line};
    std::string word, argument;
    words >> word >> argument;
    if (word == "address") {
      REQUIRE_FALSE(fabric->connect(RankId{0}, 1, from_hex(argument)));
      REQUIRE_FALSE(fabric->send(RankId{0}, header_of(WireKind::control), {}));
    } else if (word == "flood") { // until killed
      const auto payload = filled(fabric->pool(), std::stoul(argument), 1);
      while (true)
        (void)send_patiently(*fabric, RankId{0}, header_of(WireKind::bulk), payload);
    } else if (word == "leave") {
      fabric->stop(true, 2000);
      return;
    }
  }
}

TEST_CASE("a killed process is lost within milliseconds, and nothing can be sent to it") {
  Pair pair;
  pair.child.signal(SIGKILL);
  CHECK(pair.loses_child_within(900ms)); // sooner than heartbeats could tell
  CHECK(pair.sink.lost[0].first == RankId{1});
  CHECK(pair.sink.left.empty());
  CHECK(code_of(pair.fabric->send(RankId{1}, header_of(WireKind::control), {})) == Errc::peer_lost);
}

TEST_CASE("a process killed in the middle of its messages is lost, and its buffers come back") {
  for (const int bytes : {3000, 20'000'000}) {
    CAPTURE(bytes);
    Pair pair;
    pair.child.order("flood " + std::to_string(bytes));
    REQUIRE(pair.sink.wait_for_messages(5));
    pair.child.signal(SIGKILL);
    REQUIRE(pair.loses_child_within(5s));
    pair.fabric->stop(true, 1000);
    CHECK(pair.sink.lost.size() == 1);
    CHECK(pair.fabric->pool().stats().bytes_lent == 0);
    CHECK(pair.sink.refused.empty());
  }
}

TEST_CASE("a process killed in the middle of ours gives their buffers back") {
  Pair pair;
  pair.child.signal(SIGSTOP);
  const auto payload = filled(pair.fabric->pool(), 5'000'000, 1);
  for (int i = 0; i < 5; ++i)
    REQUIRE_FALSE(pair.fabric->send(RankId{1}, header_of(WireKind::bulk), payload));
  pair.child.signal(SIGKILL);
  REQUIRE(pair.loses_child_within(5s));
  pair.fabric->stop(true, 1000);
  CHECK(pair.fabric->pool().stats().bytes_lent == payload->capacity());
  CHECK(payload->references() == 1);
}

TEST_CASE("a process that hangs is lost when its heartbeats stop, and stays lost when it returns") {
  Pair pair;
  std::this_thread::sleep_for(300ms);
  CHECK(pair.sink.lost.empty()); // an idle, healthy peer is not
  const auto stopped = std::chrono::steady_clock::now();
  pair.child.signal(SIGSTOP);
  REQUIRE(pair.loses_child_within(5s));
  CHECK(std::chrono::steady_clock::now() - stopped > 800ms);
  CHECK(pair.sink.lost[0].second.find("silent") != std::string::npos);
  pair.child.signal(SIGCONT);
  std::this_thread::sleep_for(200ms);
  CHECK(pair.sink.lost.size() == 1);
  CHECK(code_of(pair.fabric->connect(RankId{1}, 1, pair.child.address())) == Errc::peer_lost);
}

TEST_CASE("a process that leaves cleanly has left and is never lost") {
  Pair pair;
  pair.child.order("leave");
  CHECK(pair.sink.wait([&] { return pair.sink.left.size() == 1; }));
  const int status = pair.child.wait();
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  std::this_thread::sleep_for(100ms);
  CHECK(pair.sink.lost.empty());
}

TEST_CASE("a rank that leaves does not wait for one that hangs longer than it was told") {
  Pair pair;
  pair.child.signal(SIGSTOP);
  const auto before = std::chrono::steady_clock::now();
  pair.fabric->stop(true, 200);
  CHECK(std::chrono::steady_clock::now() - before < 3s);
}
