// Which task of which launcher this process is: Open MPI, Slurm or torchrun-style variables. Pure.
#pragma once

#include <caf/expected.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace troupe {

struct LauncherTask {
  std::string launcher; // "Open MPI", "Slurm", "torchrun"
  int32_t rank = 0, num_ranks = 1, local_rank = 0, local_ranks = 1;
  std::string job; // unique to this run
  // From MASTER_ADDR and MASTER_PORT, where both are set; else "" and 0.
  std::string master_host;
  uint16_t master_port = 0;
};

// `get` looks a variable up ("" when unset). nullopt when no launcher started this process, or it
// started only one: Open MPI and Slurm are known by a variable of their own, torchrun by RANK,
// WORLD_SIZE, MASTER_ADDR and MASTER_PORT together. Errors name a variable whose value can't be.
[[nodiscard]] caf::expected<std::optional<LauncherTask>>
detect_launcher(const std::function<std::string(const char*)>& get);

} // namespace troupe
