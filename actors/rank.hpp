// One rank, from its options to its actors. A process hosts one; `--fabric loopback`, tests and the
// simulation host many.
//
//   make ── join_request ──(membership, or its pure function)── start(Welcome) ── … ── stop
//
// The environment (actor system, fabric, compute stream, clock) is lent, so that the same rank runs
// on UCX and threads or on a loopback and virtual time.
#pragma once

#include "actors/messages.hpp"
#include "actors/placement.hpp"
#include "actors/rank_context.hpp"
#include "actors/tls.hpp"
#include "actors/train_setup.hpp"
#include "config/checkpoint.hpp"

#include <caf/actor_system.hpp>
#include <caf/actor_system_config.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace troupe {

inline constexpr const char* kVersion = "0.1.0";

// What a user chose; equal on all ranks.
struct ClusterOptions {
  std::string model;
  ClusterShape shape;
  std::optional<DType> compute;   // default: see default_arithmetic
  std::optional<std::string> fp8; // "weights" or "activations"
  std::string backend = "simd";
  RankLimits limits;   // zeros take defaults
  int num_threads = 0; // per rank; 0: cores / local ranks, at least 2
  int local_ranks = 1; // ranks on this host
  std::string cluster_token;
  TlsFiles tls; // of the control port; empty: plain, on loopback
  bool trace = false;
  std::shared_ptr<const TrainSetup> train; // null: the cluster serves
};

// Resolved arithmetic of a checkpoint under the options; Errc::unsupported where it can't be.
[[nodiscard]] caf::expected<Arithmetic> choose_arithmetic(const Checkpoint& checkpoint,
                                                          const ClusterOptions& options);

// CAF, set up as the runtime needs it: message types, policy `sharing`, few threads.
class RankSystemConfig : public caf::actor_system_config {
public:
  // `testing`: CAF's single-threaded test scheduler; otherwise with the I/O middleman.
  explicit RankSystemConfig(bool testing = false, const TlsFiles& tls = {});
};

struct RankEnvironment {
  caf::actor_system* system = nullptr;
  Fabric* fabric = nullptr;
  ComputeStream* stream = nullptr;
  const Clock* clock = nullptr;
  ComputeStream* background = nullptr; // training: for what no step waits for
};

class Rank {
public:
  // Checks options against the model; loads nothing yet. `checkpoint` may be shared by ranks. A
  // rank that trains has a setup instead, which may be shared too.
  [[nodiscard]] static caf::expected<std::unique_ptr<Rank>>
  make(RankId self, const ClusterOptions& options, std::shared_ptr<const Checkpoint> checkpoint,
       const RankEnvironment& environment);
  [[nodiscard]] static caf::expected<std::unique_ptr<Rank>>
  make_training(RankId self, const ClusterOptions& options, std::shared_ptr<const TrainSetup> setup,
                const RankEnvironment& environment);
  ~Rank();

  // Receives from the fabric; to be handed to Fabric::start.
  [[nodiscard]] Postman& postman();
  // The view this rank expects before addresses are known (epoch 1).
  [[nodiscard]] const View& planned_view() const;
  [[nodiscard]] JoinRequest join_request() const;
  // Spawns the supervisor. `on_end` is called once, on an actor's thread: without error when the
  // rank was told to stop, else with the cause.
  void supervise(std::function<void(const caf::error&)> on_end);
  // Connects to peers, loads this rank's weights and starts its actors.
  [[nodiscard]] caf::error start(const Welcome& welcome, const LoadProgress& progress);
  // Rank 0, once all ranks are ready: where clients' questions go, the trainer of a training run.
  [[nodiscard]] caf::expected<caf::actor> open_gateway();
  // Stops the actors in reverse order of their start. Jobs under way end first when the stream is
  // destroyed.
  void stop();

  [[nodiscard]] RankStats stats() const;
  [[nodiscard]] Trace& trace();
  [[nodiscard]] const RankContext& context() const;

private:
  struct Impl;
  explicit Rank(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

} // namespace troupe
