#include "apps/launcher_env.hpp"

#include <charconv>

namespace troupe {

namespace {

using Get = std::function<std::string(const char*)>;

int32_t number(const Get& get, const char* name, int32_t fallback) {
  const auto text = get(name);
  int32_t value = fallback;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size() ? value : fallback;
}

std::optional<LauncherTask> task(const Get& get, const char* launcher, const char* rank,
                                 const char* size, const char* local_rank, const char* local_size) {
  LauncherTask t;
  t.launcher = launcher;
  t.rank = number(get, rank, -1);
  t.num_ranks = number(get, size, 0);
  t.local_rank = number(get, local_rank, 0);
  t.local_ranks = number(get, local_size, 1);
  if (t.rank < 0 || t.num_ranks < 2 || t.rank >= t.num_ranks)
    return std::nullopt;
  return t;
}

} // namespace

std::optional<LauncherTask> detect_launcher(const Get& get) {
  if (auto t = task(get, "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                    "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")) {
    t->job = get("PMIX_NAMESPACE") + get("OMPI_MCA_ess_base_jobid");
    return t;
  }
  // SLURM_STEP_NUM_TASKS is set for what srun starts, not for the batch script around it.
  if (auto t = task(get, "Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                    "SLURM_NTASKS_PER_NODE")) {
    t->job = get("SLURM_JOB_ID") + "." + get("SLURM_STEP_ID");
    t->master_host = get("SLURM_LAUNCH_NODE_IPADDR");
    if (number(get, "SLURM_STEP_NUM_NODES", 1) == 1)
      t->local_ranks = t->num_ranks;
    return t;
  }
  if (get("MASTER_ADDR").empty() || get("MASTER_PORT").empty())
    return std::nullopt;
  if (auto t = task(get, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) {
    t->master_host = get("MASTER_ADDR");
    t->master_port = static_cast<uint16_t>(number(get, "MASTER_PORT", 0));
    t->job = get("TORCHELASTIC_RUN_ID") + t->master_host + get("MASTER_PORT");
    return t;
  }
  return std::nullopt;
}

} // namespace troupe
