// What every fabric does alike: fills in headers, keeps the credit of each peer, decides whom to
// listen to, and counts. The implementations move the bytes.
//
// Credit: a sender may have `credit_bytes` (headers included) on their way to a peer, and one
// message of any size when nothing is. A message is on its way until the receiver's sink got it.
// A receiver that stops reading (its thread hangs, or its pool is full) thus stops its senders:
// `send` refuses, and their memory stays flat.
//
// Threads: links are shared between the callers of `send` and the progress thread; origins belong
// to the progress thread of the peer alone.
#pragma once

#include "transport/fabric.hpp"

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace troupe {

// The way to a peer under one incarnation; a new incarnation gets a new link.
struct Link {
  enum class State : uint8_t {
    connected,
    left, // said GOODBYE
    lost, // reported by on_peer_lost
  };
  RankId peer;
  uint32_t incarnation = 0;
  std::string address;
  std::atomic<State> state{State::connected};
  std::atomic<size_t> outstanding{0}; // bytes sent and not credited yet
  uint64_t next_sequence = 0;         // of whoever puts messages in their order
};
using LinkRef = std::shared_ptr<Link>;

// A message that was let in by `admit`, on its way to the wire.
struct Outgoing {
  WireHeader header; // complete but for the sequence
  BufferRef payload;
  LinkRef link;
};

// A peer as its messages show it.
struct Origin {
  uint32_t incarnation = 0;
  bool known = false;      // of this incarnation something was heard, or its loss
  bool heard = false;      // a valid hello came, and the peer is neither lost nor gone
  size_t credit_bytes = 0; // the peer's bound, from its hello
};

class FabricBase : public Fabric {
public:
  [[nodiscard]] RankId self() const override { return options_.self; }
  void set_epoch(uint64_t epoch) override { epoch_.store(epoch, std::memory_order_relaxed); }
  [[nodiscard]] FabricStats stats() const override;
  [[nodiscard]] BufferPool& pool() override { return *options_.pool; }

  [[nodiscard]] const FabricOptions& options() const { return options_; }
  [[nodiscard]] FabricSink& sink() const { return *sink_; }

  // Sending.
  [[nodiscard]] LinkRef find_link(RankId peer) const;
  [[nodiscard]] std::vector<LinkRef> links() const; // ascending by rank
  // Takes credit, stamps the header and sums the payload, on the caller's thread.
  [[nodiscard]] caf::expected<Outgoing> admit(RankId destination, WireHeader header,
                                              BufferRef payload);
  // A header of the fabric's own kinds.
  [[nodiscard]] WireHeader own_header(WireKind kind, RankId destination, uint64_t aux = 0) const;
  // Its payload is the cluster token.
  [[nodiscard]] WireHeader hello_header(RankId destination) const;
  [[nodiscard]] std::string_view token() const { return options_.cluster_token; }
  void count_sent(size_t payload_bytes);
  static void return_credit(Link& link, size_t bytes);
  // Marks a connected link; false when it was not connected any more.
  static bool leave_connected(Link& link, Link::State state);

  // Receiving. An error is the reason of a refusal; the caller passes it to `refuse`.
  [[nodiscard]] caf::error check_cluster(const WireHeader& header) const;
  [[nodiscard]] caf::error check_origin(const WireHeader& header, const Origin* origin) const;
  [[nodiscard]] caf::error check_payload(const WireHeader& header,
                                         std::span<const std::byte> payload) const;
  // The origin as it is after a hello. Errc::stale for one that an earlier life sent.
  [[nodiscard]] caf::expected<Origin> accept_hello(const WireHeader& header,
                                                   std::span<const std::byte> payload,
                                                   const Origin* before) const;
  // Hands a checked message to the sink and counts it.
  void deliver(const WireHeader& header, BufferRef payload);
  void refuse(const caf::error& why);
  void add_waiting(int64_t bytes) { waiting_bytes_.fetch_add(bytes, std::memory_order_relaxed); }

protected:
  explicit FabricBase(FabricOptions options);
  // The link of `peer` under `incarnation`: the one there is (`is_new` false), or a new one that
  // replaces an older incarnation's. Errc::stale for an older incarnation, Errc::peer_lost for one
  // that is gone.
  struct NewLink {
    LinkRef link;
    LinkRef replaced;
    bool is_new = false;
  };
  [[nodiscard]] caf::expected<NewLink> add_link(RankId peer, uint32_t incarnation,
                                                const std::string& address);
  void set_sink(FabricSink* sink) { sink_ = sink; }

private:
  FabricOptions options_;
  uint64_t cluster_; // cluster id
  FabricSink* sink_ = nullptr;
  std::atomic<uint64_t> epoch_{0};
  mutable std::shared_mutex links_mutex_;
  std::unordered_map<RankId, LinkRef> links_;
  std::atomic<uint64_t> bytes_sent_{0}, bytes_received_{0}, messages_sent_{0},
      messages_received_{0}, refused_{0};
  std::atomic<int64_t> waiting_bytes_{0};
};

[[nodiscard]] inline size_t wire_bytes(const WireHeader& header) {
  return kWireHeaderBytes + header.payload_bytes;
}

} // namespace troupe
