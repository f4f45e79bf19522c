// Takes messages from the fabric to the actors of a rank, and theirs to other ranks.
//
// A message to this rank itself never touches the fabric. Control messages between two ranks are
// numbered and handed on once and in order, whatever the fabric does with them; envelopes carry
// their own ids (dispatch id, walk), and who gets one twice drops the second. Callable from any
// thread.
#pragma once

#include "actors/messages.hpp"
#include "transport/fabric.hpp"

#include <caf/actor.hpp>
#include <caf/actor_system.hpp>
#include <caf/message.hpp>

#include <array>
#include <cstdint>
#include <map>
#include <mutex>

namespace troupe {

// Who inside a rank. Travels in the wire header's flags: of a dispatch or forward it names who
// gets the answer, of everything else who gets the message.
enum class Route : uint16_t {
  supervisor,
  membership,
  gateway,
  attention,
  mtp,
  expert_shard, // train experts, in training
  forwarder,
  pipeline_stage,
  optimizer,
  trainer,
  balance_controller
};
inline constexpr size_t kNumRoutes = 11;

class Postman final : public FabricSink {
public:
  Postman(caf::actor_system& system, RankId self) : system_(system), self_(self) {}
  void set_route(Route route, caf::actor actor);
  // Drops the handles at the end, so that the actors can go.
  void clear_routes();
  void set_fabric(Fabric* fabric) { fabric_ = fabric; }
  // Null where this rank has no such actor.
  [[nodiscard]] caf::actor route(Route r) const;

  // Sends an envelope; kind, step, layer, attempt and aux are the caller's. A refusal is reported
  // to the supervisor, which decides.
  void post(RankId to, Route route, WireHeader header, BufferRef payload);

  // Sends a CAF message to an actor of any rank; to a remote one as a `control` envelope.
  template <class T>
  void tell(RankId to, Route route, T&& message) {
    send_control(to, route, caf::make_message(std::forward<T>(message)));
  }

  void on_message(Envelope message) override;
  void on_peer_lost(RankId peer, const caf::error& why) override;
  void on_peer_left(RankId peer) override;
  void on_refused(const caf::error& why) override;

private:
  void send_control(RankId to, Route route, caf::message message);
  void take_control(Envelope envelope);
  void deliver_control(const Envelope& envelope);
  void report(RankId peer, const caf::error& why);

  caf::actor_system& system_;
  RankId self_;
  Fabric* fabric_ = nullptr; // set before the fabric starts
  mutable std::mutex mutex_;
  std::array<caf::actor, kNumRoutes> routes_;
  // Numbering of control messages, by peer.
  std::mutex control_mutex_; // held while one is handed on, so that their order is kept
  std::map<RankId, uint64_t> next_sent_;
  struct Inbox {
    uint64_t next = 0;
    std::map<uint64_t, Envelope> early;
  };
  std::map<RankId, Inbox> inbox_;
};

} // namespace troupe
