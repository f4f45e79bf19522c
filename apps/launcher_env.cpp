#include "apps/launcher_env.hpp"

#include "config/errors.hpp"

#include <fmt/format.h>

#include <charconv>

namespace troupe {

namespace {

using Get = std::function<std::string(const char*)>;

struct Variables {
  const char *rank, *size, *local_rank, *local_size;
};

// Reads whole numbers; what the first wrong one was is kept.
class Reader {
public:
  explicit Reader(const Get& get) : get_(get) {}

  // `fallback` where the variable is not set.
  int32_t number(const char* name, int64_t least, int64_t most, int32_t fallback) {
    const auto text = get_(name);
    if (text.empty())
      return fallback;
    int64_t value = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool whole = failed == std::errc{} && end == text.data() + text.size();
    if (whole && value >= least && value <= most)
      return static_cast<int32_t>(value);
    if (!error_)
      error_ = make_error(
          Errc::invalid_argument,
          fmt::format("environment {}: expected {} to {}, got \"{}\"", name, least, most, text));
    return fallback;
  }
  [[nodiscard]] const caf::error& error() const { return error_; }

private:
  const Get& get_;
  caf::error error_;
};

LauncherTask read_task(Reader& reader, const char* launcher, const Variables& v) {
  constexpr int32_t kMostRanks = 65536;
  LauncherTask t;
  t.launcher = launcher;
  t.num_ranks = reader.number(v.size, 1, kMostRanks, 1);
  t.rank = reader.number(v.rank, 0, t.num_ranks - 1, 0);
  t.local_ranks = reader.number(v.local_size, 1, kMostRanks, 1);
  t.local_rank = reader.number(v.local_rank, 0, kMostRanks, 0);
  return t;
}

std::optional<LauncherTask> read_launcher(const Get& get, Reader& reader) {
  if (!get("OMPI_COMM_WORLD_RANK").empty() && !get("OMPI_COMM_WORLD_SIZE").empty()) {
    auto t = read_task(reader, "Open MPI",
                       {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"});
    t.job = get("PMIX_NAMESPACE") + get("OMPI_MCA_ess_base_jobid");
    return t;
  }
  // SLURM_STEP_NUM_TASKS is set for what srun starts, not for the batch script around it.
  if (!get("SLURM_PROCID").empty() && !get("SLURM_STEP_NUM_TASKS").empty()) {
    auto t =
        read_task(reader, "Slurm", {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""});
    t.job = get("SLURM_JOB_ID") + "." + get("SLURM_STEP_ID");
    // Not all nodes have as many; one has all.
    const int32_t nodes = reader.number("SLURM_STEP_NUM_NODES", 1, 65536, 1);
    t.local_ranks = (t.num_ranks + nodes - 1) / nodes;
    return t;
  }
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
    if (get(name).empty())
      return std::nullopt;
  auto t = read_task(reader, "torchrun", {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"});
  t.job = get("TORCHELASTIC_RUN_ID") + get("MASTER_ADDR") + get("MASTER_PORT");
  return t;
}

} // namespace

caf::expected<std::optional<LauncherTask>> detect_launcher(const Get& get) {
  Reader reader{get};
  auto task = read_launcher(get, reader);
  if (task && !get("MASTER_ADDR").empty() && !get("MASTER_PORT").empty()) {
    task->master_host = get("MASTER_ADDR");
    task->master_port = static_cast<uint16_t>(reader.number("MASTER_PORT", 1, 65535, 0));
  }
  if (reader.error())
    return reader.error();
  if (task && task->num_ranks == 1)
    task.reset();
  return task;
}

} // namespace troupe
