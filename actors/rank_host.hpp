// A rank with everything it runs on: actor system, fabric, compute stream. One per rank, in a
// process of its own or beside others.
#pragma once

#include "actors/rank.hpp"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace troupe {

class RankHost {
public:
  // Makes a rank on `fabric`; nothing runs yet but the fabric, which starts when `start_fabric` is
  // called.
  [[nodiscard]] static caf::expected<std::unique_ptr<RankHost>>
  make(RankId self, const ClusterOptions& options, std::shared_ptr<const Checkpoint> checkpoint,
       std::unique_ptr<Fabric> fabric);
  [[nodiscard]] static caf::expected<std::unique_ptr<RankHost>>
  make_training(RankId self, const ClusterOptions& options, std::shared_ptr<const TrainSetup> setup,
                std::unique_ptr<Fabric> fabric);
  ~RankHost(); // shuts down

  [[nodiscard]] caf::actor_system& system() { return *system_; }
  [[nodiscard]] Rank& rank() { return *rank_; }
  [[nodiscard]] Fabric& fabric() { return *fabric_; }

  // Spawns the supervisor and starts receiving.
  [[nodiscard]] caf::error start_fabric();
  // Rank 0: spawns membership and control port. `decided` below answers when the group has formed.
  [[nodiscard]] caf::actor open_control_port(std::chrono::milliseconds join_timeout);
  // Rank 0 of a group that formed without messages: a control port that is open at once.
  [[nodiscard]] caf::actor open_local_control_port(const caf::actor& gateway);
  // Rank 0: waits until all ranks are ready (or the group failed), then lets clients in.
  [[nodiscard]] caf::error await_cluster();
  // Tells rank 0's membership how loading went.
  void report_ready(const caf::error& error);
  // Blocks until the rank ends; empty after a clean stop.
  [[nodiscard]] caf::error await_end();
  // Ends the wait above.
  void end(const caf::error& why);
  // Calls `on_failure`, on some thread and once, when the rank ends with an error.
  void watch(std::function<void(const caf::error&)> on_failure);
  void shut_down(bool clean);

private:
  RankHost(const ClusterOptions& options, std::unique_ptr<Fabric> fabric);
  [[nodiscard]] RankEnvironment environment() const;
  SteadyClock clock_;
  RankSystemConfig config_;
  std::unique_ptr<caf::actor_system> system_;
  std::unique_ptr<Fabric> fabric_;
  std::unique_ptr<ComputeStream> stream_, background_;
  std::unique_ptr<Rank> rank_;
  caf::actor membership_, control_port_;
  std::string token_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<caf::error> ended_, decided_;
  std::function<void(const caf::error&)> on_failure_;
};

// Threads of a rank's compute stream under the options.
[[nodiscard]] int compute_threads(const ClusterOptions& options);
// The room a rank's messages may take.
[[nodiscard]] size_t buffer_pool_bytes(const ModelConfig& config, const RankLimits& limits);
// What may be on its way to one peer: all that the walks of both can have sent each other.
[[nodiscard]] size_t credit_bytes(const ModelConfig& config, const RankLimits& limits);

} // namespace troupe
