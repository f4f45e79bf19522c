#include "actors/postman.hpp"

#include <caf/binary_deserializer.hpp>
#include <caf/binary_serializer.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <cstring>

namespace troupe {

void Postman::set_route(Route r, caf::actor actor) {
  const std::lock_guard lock{mutex_};
  routes_[static_cast<size_t>(r)] = std::move(actor);
}

caf::actor Postman::route(Route r) const {
  const std::lock_guard lock{mutex_};
  return routes_[static_cast<size_t>(r)];
}

void Postman::clear_routes() {
  std::array<caf::actor, kNumRoutes> dropped; // released outside the lock
  const std::lock_guard lock{mutex_};
  dropped.swap(routes_);
}

void Postman::report(RankId peer, const caf::error& why) {
  if (const auto supervisor = route(Route::supervisor))
    caf::anon_send(supervisor, PeerLost{peer, why});
}

void Postman::post(RankId to, Route route_to, WireHeader header, BufferRef payload) {
  header.flags = static_cast<uint16_t>(route_to);
  if (to == self_) {
    header.source = self_;
    header.destination = self_;
    header.payload_bytes = payload ? payload->size() : 0;
    on_message(Envelope{header, std::move(payload)});
    return;
  }
  if (auto error = fabric_->send(to, header, std::move(payload)))
    report(to, error);
}

void Postman::send_control(RankId to, Route route_to, caf::message message) {
  if (to == self_) {
    if (const auto target = route(route_to))
      caf::anon_send(target, std::move(message));
    return;
  }
  std::vector<char> bytes;
  caf::binary_serializer sink{system_, bytes};
  if (auto error = sink(message)) {
    report(to, with_context("control message", error));
    return;
  }
  auto buffer = fabric_->pool().acquire(bytes.size());
  if (!buffer) {
    report(to, buffer.error());
    return;
  }
  std::memcpy((*buffer)->data(), bytes.data(), bytes.size());
  WireHeader header;
  header.kind = WireKind::control;
  const std::lock_guard lock{control_mutex_};
  header.aux = next_sent_[to]++;
  post(to, route_to, header, std::move(*buffer));
}

// Far more than are ever under way between two ranks; a peer that skips numbers can't fill memory.
constexpr size_t kMaxEarly = 1024;

void Postman::take_control(Envelope envelope) {
  const std::lock_guard lock{control_mutex_};
  auto& inbox = inbox_[envelope.header.source];
  const uint64_t number = envelope.header.aux;
  const bool early = number > inbox.next;
  if (number < inbox.next || (early && inbox.early.size() >= kMaxEarly))
    return;
  inbox.early.emplace(number, std::move(envelope));
  for (auto first = inbox.early.begin(); first != inbox.early.end() && first->first == inbox.next;
       first = inbox.early.begin()) {
    deliver_control(first->second);
    inbox.early.erase(first);
    ++inbox.next;
  }
}

void Postman::deliver_control(const Envelope& envelope) {
  const auto to = envelope.header.flags;
  const auto target = to < kNumRoutes ? route(static_cast<Route>(to)) : caf::actor{};
  if (!target)
    return on_refused(make_error(Errc::malformed, fmt::format("message from rank {} for nobody",
                                                              envelope.header.source.value)));
  caf::message message;
  if (envelope.payload) {
    const auto bytes = envelope.payload->bytes();
    caf::binary_deserializer source{system_, reinterpret_cast<const char*>(bytes.data()),
                                    bytes.size()};
    if (auto error = source(message)) {
      on_refused(make_error(Errc::malformed, fmt::format("control message from rank {}",
                                                         envelope.header.source.value)));
      return;
    }
  }
  caf::anon_send(target, std::move(message));
}

void Postman::on_message(Envelope message) {
  if (message.header.kind == WireKind::control)
    return take_control(std::move(message));
  Route to = static_cast<Route>(message.header.flags);
  if (message.header.kind == WireKind::dispatch)
    to = Route::expert_shard;
  else if (message.header.kind == WireKind::forward)
    to = Route::forwarder;
  const auto target = static_cast<size_t>(to) < kNumRoutes ? route(to) : caf::actor{};
  if (!target) {
    on_refused(make_error(Errc::malformed, fmt::format("message from rank {} for nobody",
                                                       message.header.source.value)));
    return;
  }
  caf::anon_send(target, std::move(message));
}

void Postman::on_peer_lost(RankId peer, const caf::error& why) { report(peer, why); }

void Postman::on_peer_left(RankId peer) {
  if (const auto supervisor = route(Route::supervisor))
    caf::anon_send(supervisor, PeerLeft{peer});
}

void Postman::on_refused(const caf::error& why) {
  // A stranger's message harms nobody here; the fabric counts it and has logged it.
  static_cast<void>(why);
}

} // namespace troupe
