// The agent: the process that forks the ranks of its host (and, for a command such as `generate`,
// the client), certifies their deaths by exit status, and ends what it started. It does nothing
// else, so that it can be trusted to live; its death is the host's loss, and its children end with
// it (they lose their channel and get a kernel signal).
//
// It forks before it creates any thread, then sleeps in poll(2). A lost rank ends the run, and so
// does one that stays stopped (unless the agent is stopped along with it, by Ctrl-Z): the rank
// is named on stderr, everybody else is told to stop, and the exit code is 1.
//
// One death makes many complaints: peers lose their peer, the client loses its cluster. Children
// tell theirs here, and only the first cause is printed: a failure or a kill at once, "I lost
// somebody" only when nobody turns up in a moment who knows better.
//
//   child → agent   port H:P      rank 0's control port is open
//                   loading N     this rank has loaded N bytes of its part so far
//                   ready         this rank serves
//                   failed TEXT   this child can't go on; it exits next
//                   lost TEXT     likewise, because somebody else went away
//                   stop          end the run cleanly (a client that asked the cluster to stop)
//   agent → child   seed H:P      where rank 0's control port is
//                   loading N     to the client: bytes that the ranks of this host have loaded
//                   interrupt     to the client: the user wants the run to end (first signal)
//                   stop          leave cleanly
#pragma once

#include "config/errors.hpp"
#include "config/ids.hpp"

#include <sys/types.h>

#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace troupe {

// A child's end of the line to its agent. One line, one message.
class AgentChannel {
public:
  explicit AgentChannel(int fd) : fd_(fd) {}
  AgentChannel(const AgentChannel&) = delete;
  AgentChannel& operator=(const AgentChannel&) = delete;
  ~AgentChannel();
  // Thread-safe. Line breaks in `line` become spaces.
  void say(std::string_view line);
  // The next line, blocking; nullopt when the agent is gone.
  [[nodiscard]] std::optional<std::string> hear();

private:
  int fd_;
  std::mutex mutex_;
  std::string buffer_;
};

struct AgentOptions {
  std::vector<RankId> ranks; // to start here
  // What a rank does; runs in the child, its result is the exit code.
  std::function<int(RankId, AgentChannel&)> rank_main;
  // The client, if there is one; the run ends with its exit code.
  std::function<int(AgentChannel&)> client_main;
  // Known before the start (other hosts); otherwise rank 0 of this host tells.
  std::optional<std::string> seed;
  // Called now and then with the bytes that the ranks of this host have loaded so far.
  std::function<void(int64_t bytes)> on_loading;
  // Called once when all ranks of this host are ready (launch prints where to attach).
  std::function<void(const std::string& seed)> on_ready;
  // The first SIGINT or SIGTERM goes to the client, wherever it is, which brings its work to an
  // end; from the second on they stop the run.
  bool client_ends_run = false;
  int stop_timeout_ms = 5000; // how long a clean stop may take
  int stopped_rank_ms = 4000; // how long a rank may be stopped (SIGSTOP) until it counts as lost
};

// Starts everything, waits for the end, reaps every child. Returns the exit code: the client's, 0
// after a clean stop, 1 after a loss, 128 + n after signal n.
[[nodiscard]] int run_agent(const AgentOptions& options);

// A death certificate's text: "exited with code 3", "was killed by signal 9 (Killed)".
[[nodiscard]] std::string describe_exit(int wait_status);

} // namespace troupe
