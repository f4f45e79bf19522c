// A fabric inside one process. Payloads travel by reference: sender and receivers share the
// buffer, so nobody writes to it once it is sent.
//
// Threaded: one delivery thread per endpoint, order kept; `--fabric loopback`.
// Simulated: no threads. Every delivery is given to a scheduler of the caller's with a delay drawn
// from the seed, and links can reorder, duplicate and drop. The draws of a pair of ranks are a
// function of (seed, pair, number of the message), whatever the other pairs do.
//
// Headers, checksums, credit and statistics are the ones of the real fabric (fabric_base.hpp).
#pragma once

#include "config/clock.hpp"
#include "transport/fabric.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

namespace troupe {

// Whoever keeps virtual time. Single-threaded.
struct DeliveryScheduler {
  virtual ~DeliveryScheduler() = default;
  // Calls `deliver` once after `delay`, never inside this call.
  virtual void schedule(Nanoseconds delay, std::function<void()> deliver) = 0;
};

// What happens to messages from one rank to another. Delays are uniform in [min, max].
struct LinkPolicy {
  Nanoseconds min_delay{2'000};
  Nanoseconds max_delay{2'000};
  uint32_t drop_one_in = 0;      // 0: never
  uint32_t duplicate_one_in = 0; // 0: never; the copy has a delay of its own
  bool reorder = false;          // a message with a shorter delay may overtake
};

struct SimulationOptions {
  uint64_t seed = 0;
  LinkPolicy links;
  // From a kill or a cut until peers hear of it.
  Nanoseconds loss_delay{1'000'000};
};

class LoopbackHub {
public:
  [[nodiscard]] static std::shared_ptr<LoopbackHub> threaded(int num_ranks);
  // `scheduler` outlives the hub and its endpoints.
  [[nodiscard]] static std::shared_ptr<LoopbackHub>
  simulated(int num_ranks, DeliveryScheduler& scheduler, const SimulationOptions& options);
  ~LoopbackHub();

  // The fabric of rank options.self. A rank can have a new one, under a higher incarnation, when
  // its last one was stopped or killed.
  [[nodiscard]] caf::expected<std::unique_ptr<Fabric>> endpoint(FabricOptions options);

  // Simulated only: replaces the policy of one direction of one pair.
  void set_link(RankId from, RankId to, const LinkPolicy& policy);
  // From now on nothing is heard of the rank, and what it sent vanishes; those connected to it get
  // on_peer_lost.
  void kill(RankId rank);
  // Simulated only: messages between `some` and all other ranks vanish until `heal`, as do those on
  // their way. Pairs that are still apart after the loss delay report each other lost; healed
  // before, they may have lost messages in silence.
  void partition(std::span<const RankId> some);
  void heal();

  struct Impl;

private:
  explicit LoopbackHub(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

} // namespace troupe
