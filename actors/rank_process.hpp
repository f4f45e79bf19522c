// What a rank's process does, from its start under an agent to its exit code.
#pragma once

#include "actors/agent.hpp"
#include "actors/rank.hpp"

#include <chrono>
#include <string>

namespace troupe {

struct RankProcessOptions {
  ClusterOptions cluster;
  std::string control_host = "127.0.0.1"; // rank 0 listens here
  uint16_t control_port = 0;              // 0: any free one
  std::chrono::milliseconds join_timeout{60000};
  bool several_hosts = false; // rank 0, told to stop by its agent, stops the others too
  std::string trace_file;     // rank R appends ".R.json"; empty: none
};

// Runs in a forked child. Exit code 0 after a clean stop, else 1 with the cause said to the agent.
[[nodiscard]] int rank_process_main(RankId self, const RankProcessOptions& options,
                                    AgentChannel& agent);

} // namespace troupe
