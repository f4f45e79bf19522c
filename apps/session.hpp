// Runs a command against a cluster: one that is already there (`--attach`), one inside this process
// (`--fabric loopback`), or one of rank processes that this process starts as their agent, alone or
// as one of the tasks that mpirun, srun or torchrun started.
#pragma once

#include "actors/client.hpp"
#include "actors/rank.hpp"
#include "apps/launcher_env.hpp"
#include "config/cluster_spec.hpp"

#include <functional>
#include <memory>
#include <string>

namespace CLI {
class App;
}

namespace troupe {

struct SessionOptions {
  ClusterOptions cluster;
  std::string layout = "joint";
  std::string dispatch = "direct";
  std::string fabric = "ucx";
  std::string compute; // "" | f32 | bf16
  std::string fp8;     // "" | weights | activations
  int32_t ranks = 0, tp = 1, nodes = 1;
  std::string attach;            // HOST:PORT or a cluster file
  std::string token, token_file; // of the cluster attached to, or of a launcher's tasks
  std::string trace;
  int32_t join_timeout_s = 60;
  int64_t context = 0; // positions the command needs; for the default of kv_tokens
};

// Adds the options that every command with a cluster shares.
void add_cluster_options(CLI::App& command, SessionOptions& options);

// Tells what the command needs, so that defaults fit: context and drafts.
void need_context(SessionOptions& options, int64_t tokens, int32_t speculate);

// Runs `body` with a client of the cluster, and ends the cluster if it was started here. Returns
// the exit code. `body` runs in a forked child unless attached or in-process, so what it must tell
// goes to stdout, stderr and files.
[[nodiscard]] int with_cluster(SessionOptions options,
                               const std::function<int(ClusterClient&)>& body);

// Which task of a launcher's this process is. Under --fabric loopback it never is one.
[[nodiscard]] caf::expected<std::optional<LauncherTask>> this_task(const std::string& fabric);

// Whether the user has asked for the end (a first SIGINT or SIGTERM): long work then comes to a
// good end. Only where cluster.train is set; elsewhere signals end the run at once.
[[nodiscard]] bool interrupted();

// A variable of the environment; "" when unset.
[[nodiscard]] std::string environment(const char* name);

// What a cluster file says about TLS, and whether its files serve; errors name `file` and field.
[[nodiscard]] TlsFiles tls_of(const ControlSpec& control);
[[nodiscard]] caf::error check_tls(const TlsFiles& tls, const std::string& file);

// Ranks that `launch` starts here: all, or one host's part of several.
struct LocalPart {
  std::string host; // empty: all ranks are here
  int32_t first_rank = 0, num_ranks = 0;
};
// Starts a cluster or its part of this host, prints where to attach, and keeps it up until told to
// stop; for `launch`.
[[nodiscard]] int run_cluster(SessionOptions options, const std::string& control_host,
                              uint16_t control_port, const LocalPart& part, bool json);

} // namespace troupe
