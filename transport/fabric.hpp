// How bytes reach a peer. Two implementations: UCX active messages between processes
// (transport/ucx_fabric.hpp) and an in-process loopback (transport/loopback_fabric.hpp) that can
// delay, reorder, duplicate and drop.
//
// Promises: messages from one rank to another arrive in the order sent, at most once, whole and
// with checked header and payload, or the peer is reported lost (the loopback breaks these on
// request, to test those above). A peer that stops reading makes `send` refuse with
// Errc::overloaded after a bounded number of bytes; nothing else of the sender is affected.
#pragma once

#include "config/errors.hpp"
#include "config/ids.hpp"
#include "transport/buffer.hpp"
#include "transport/wire.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace troupe {

struct Envelope {
  WireHeader header;
  BufferRef payload; // null when payload_bytes is 0
};

// Where a fabric reports. Called on the fabric's own progress thread (loopback in a simulation:
// on the simulator's thread; with several channels, on one thread per peer); must not block, throw
// or stop the fabric. A payload that came in is read-only: on the loopback it is the sender's own.
class FabricSink {
public:
  virtual ~FabricSink() = default;
  virtual void on_message(Envelope message) = 0;
  // The peer's connection broke or its heartbeats stopped: a suspicion, not a verdict.
  virtual void on_peer_lost(RankId peer, const caf::error& why) = 0;
  // The peer said GOODBYE.
  virtual void on_peer_left(RankId peer) = 0;
  // A stranger or an unreadable message was refused; already logged.
  virtual void on_refused(const caf::error& why) = 0;
};

struct FabricStats {
  uint64_t bytes_sent = 0, bytes_received = 0; // headers included
  uint64_t messages_sent = 0, messages_received = 0;
  uint64_t refused = 0;     // messages dropped for a bad header, token or checksum
  size_t queued_bytes = 0;  // sent, and not yet delivered as far as this side knows
  size_t waiting_bytes = 0; // arrived, waiting for room in the pool
};

struct FabricOptions {
  RankId self;
  uint32_t incarnation = 0;
  std::string cluster_token;
  std::shared_ptr<BufferPool> pool;       // receives land here
  size_t credit_bytes = size_t{64} << 20; // unacknowledged bytes per peer before refusal
  int64_t heartbeat_period_ms = 100;      // 0: none
  int64_t heartbeat_timeout_ms = 2000;
  int heartbeat_neighbours = 2; // how many following ranks each rank watches
};

// Errc::invalid_argument with the option that makes no sense.
[[nodiscard]] caf::error check(const FabricOptions& options);

class Fabric {
public:
  virtual ~Fabric() = default;
  [[nodiscard]] virtual RankId self() const = 0;
  // What others need to reach this rank; opaque bytes, exchanged when joining.
  [[nodiscard]] virtual std::string address() const = 0;
  // Starts progress; `sink` outlives the fabric.
  virtual caf::error start(FabricSink* sink) = 0;
  // Makes `peer` reachable; after `start`. Idempotent for an equal address and incarnation. A peer
  // that was lost comes back only as a new incarnation: Errc::peer_lost for the old one.
  virtual caf::error connect(RankId peer, uint32_t incarnation, const std::string& address) = 0;
  // Sets the epoch stamped on outgoing headers.
  virtual void set_epoch(uint64_t epoch) = 0;
  // Queues a message; kind, step, layer, attempt, aux and flags are the caller's, the rest of the
  // header is filled in. The payload must not change until the last reference is gone. Sending to
  // self delivers through the sink like any other message. Callable from any thread.
  // Errc::peer_lost for a lost or unknown peer, Errc::overloaded without credit.
  virtual caf::error send(RankId destination, WireHeader header, BufferRef payload) = 0;
  [[nodiscard]] virtual FabricStats stats() const = 0;
  [[nodiscard]] virtual BufferPool& pool() = 0;
  // Says GOODBYE to all peers when `clean`, flushes what is queued (at most `flush_ms`), stops
  // progress and closes endpoints. After it returns the sink is not called again.
  virtual void stop(bool clean, int64_t flush_ms) = 0;
};

} // namespace troupe
