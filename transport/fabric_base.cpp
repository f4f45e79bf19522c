#include "transport/fabric_base.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <utility>

namespace troupe {

namespace {

constexpr size_t kMaxTokenBytes = 4096;
// A stranger that keeps talking may not fill the log.
constexpr uint64_t kMaxRefusalsLogged = 10;

caf::error invalid(std::string text) {
  return make_error(Errc::invalid_argument, "fabric: " + std::move(text));
}

std::span<const std::byte> bytes_of(const BufferRef& payload) {
  return payload ? std::as_const(*payload).bytes() : std::span<const std::byte>{};
}

// Takes `bytes` of the link's credit unless that would pass `limit`; an idle link takes any size.
bool take_credit(Link& link, size_t bytes, size_t limit) {
  auto outstanding = link.outstanding.load(std::memory_order_relaxed);
  do {
    if (outstanding != 0 && (outstanding >= limit || bytes > limit - outstanding))
      return false;
  } while (!link.outstanding.compare_exchange_weak(outstanding, outstanding + bytes,
                                                   std::memory_order_relaxed));
  return true;
}

} // namespace

caf::error check(const FabricOptions& o) {
  if (!o.self.valid())
    return invalid(fmt::format("self is {}, expected a rank", o.self.value));
  if (!o.pool)
    return invalid("no buffer pool");
  if (o.credit_bytes == 0)
    return invalid("credit_bytes is 0, expected at least 1");
  if (o.cluster_token.size() > kMaxTokenBytes)
    return invalid(fmt::format("cluster_token has {} bytes, expected at most {}",
                               o.cluster_token.size(), kMaxTokenBytes));
  if (o.heartbeat_period_ms < 0 || o.heartbeat_neighbours < 0)
    return invalid("heartbeat_period_ms and heartbeat_neighbours can't be negative");
  if (o.heartbeat_period_ms > 0 && o.heartbeat_timeout_ms <= o.heartbeat_period_ms)
    return invalid(fmt::format("heartbeat_timeout_ms is {}, expected more than the period of {}",
                               o.heartbeat_timeout_ms, o.heartbeat_period_ms));
  return {};
}

FabricBase::FabricBase(FabricOptions options)
    : options_(std::move(options)),
      cluster_(payload_checksum(std::as_bytes(std::span{options_.cluster_token}))) {}

FabricStats FabricBase::stats() const {
  FabricStats s;
  s.bytes_sent = bytes_sent_.load(std::memory_order_relaxed);
  s.bytes_received = bytes_received_.load(std::memory_order_relaxed);
  s.messages_sent = messages_sent_.load(std::memory_order_relaxed);
  s.messages_received = messages_received_.load(std::memory_order_relaxed);
  s.refused = refused_.load(std::memory_order_relaxed);
  s.waiting_bytes =
      static_cast<size_t>(std::max<int64_t>(0, waiting_bytes_.load(std::memory_order_relaxed)));
  const std::shared_lock lock{links_mutex_};
  for (const auto& [peer, link] : links_)
    s.queued_bytes += link->outstanding.load(std::memory_order_relaxed);
  return s;
}

// ── sending ──

LinkRef FabricBase::find_link(RankId peer) const {
  const std::shared_lock lock{links_mutex_};
  const auto it = links_.find(peer);
  return it == links_.end() ? nullptr : it->second;
}

std::vector<LinkRef> FabricBase::links() const {
  std::vector<LinkRef> all;
  {
    const std::shared_lock lock{links_mutex_};
    for (const auto& [peer, link] : links_)
      all.push_back(link);
  }
  std::ranges::sort(all, {}, [](const LinkRef& link) { return link->peer; });
  return all;
}

caf::expected<FabricBase::NewLink> FabricBase::add_link(RankId peer, uint32_t incarnation,
                                                        const std::string& address) {
  if (!peer.valid())
    return invalid(fmt::format("can't connect to rank {}", peer.value));
  const std::unique_lock lock{links_mutex_};
  auto& known = links_[peer];
  if (known && incarnation < known->incarnation)
    return make_error(Errc::stale,
                      fmt::format("rank {} is known as incarnation {}, not {} any more", peer.value,
                                  known->incarnation, incarnation));
  if (known && incarnation == known->incarnation) {
    if (known->state != Link::State::connected)
      return make_error(Errc::peer_lost,
                        fmt::format("rank {} is gone as incarnation {}; it comes back only as a "
                                    "new one",
                                    peer.value, incarnation));
    if (known->address != address)
      return make_error(Errc::mismatch, fmt::format("rank {} shows a second address under one "
                                                    "incarnation",
                                                    peer.value));
    return NewLink{known, nullptr, false};
  }
  NewLink result{std::make_shared<Link>(), known, true};
  result.link->peer = peer;
  result.link->incarnation = incarnation;
  result.link->address = address;
  if (known)
    leave_connected(*known, Link::State::lost);
  known = result.link;
  return result;
}

caf::expected<Outgoing> FabricBase::admit(RankId destination, WireHeader header,
                                          BufferRef payload) {
  const auto link = find_link(destination);
  if (!link)
    return make_error(Errc::peer_lost, fmt::format("rank {} is not connected", destination.value));
  if (const auto state = link->state.load(); state != Link::State::connected)
    return make_error(Errc::peer_lost,
                      fmt::format("rank {} {}", destination.value,
                                  state == Link::State::left ? "has left" : "is lost"));
  if (!kind_is_for_actors(header.kind))
    return make_error(Errc::invalid_argument,
                      fmt::format("kind {} is the fabric's own", static_cast<int>(header.kind)));
  const auto bytes = bytes_of(payload);
  if (bytes.size() > kMaxPayloadBytes)
    return make_error(
        Errc::invalid_argument,
        fmt::format("payload has {} bytes, expected at most {}", bytes.size(), kMaxPayloadBytes));
  if (!take_credit(*link, kWireHeaderBytes + bytes.size(), options_.credit_bytes))
    return make_error(Errc::overloaded,
                      fmt::format("rank {} does not keep up: {} bytes are on their way to it",
                                  destination.value, link->outstanding.load()));
  header.cluster = cluster_;
  header.epoch = epoch_.load(std::memory_order_relaxed);
  header.incarnation = options_.incarnation;
  header.source = options_.self;
  header.destination = destination;
  header.payload_bytes = bytes.size();
  header.payload_checksum = payload_checksum(bytes);
  return Outgoing{header, std::move(payload), link};
}

WireHeader FabricBase::own_header(WireKind kind, RankId destination, uint64_t aux) const {
  WireHeader header;
  header.kind = kind;
  header.aux = aux;
  header.cluster = cluster_;
  header.epoch = epoch_.load(std::memory_order_relaxed);
  header.incarnation = options_.incarnation;
  header.source = options_.self;
  header.destination = destination;
  return header;
}

WireHeader FabricBase::hello_header(RankId destination) const {
  auto header = own_header(WireKind::hello, destination, options_.credit_bytes);
  header.payload_bytes = token().size();
  header.payload_checksum = cluster_;
  return header;
}

void FabricBase::count_sent(size_t payload_bytes) {
  messages_sent_.fetch_add(1, std::memory_order_relaxed);
  bytes_sent_.fetch_add(kWireHeaderBytes + payload_bytes, std::memory_order_relaxed);
}

void FabricBase::return_credit(Link& link, size_t bytes) {
  auto outstanding = link.outstanding.load(std::memory_order_relaxed);
  // A peer that returns more than it got gains nothing.
  while (!link.outstanding.compare_exchange_weak(
      outstanding, outstanding - std::min(bytes, outstanding), std::memory_order_relaxed)) {
  }
}

bool FabricBase::leave_connected(Link& link, Link::State state) {
  auto expected = Link::State::connected;
  if (!link.state.compare_exchange_strong(expected, state))
    return false;
  link.outstanding.store(0, std::memory_order_relaxed);
  return true;
}

// ── receiving ──

caf::error FabricBase::check_cluster(const WireHeader& h) const {
  if (h.cluster != cluster_)
    return make_error(Errc::mismatch,
                      fmt::format("rank {} refused a message of another cluster (it says it is "
                                  "from rank {})",
                                  self().value, h.source.value));
  if (h.destination != self())
    return make_error(Errc::mismatch,
                      fmt::format("rank {} refused a message from rank {} to rank {}", self().value,
                                  h.source.value, h.destination.value));
  return {};
}

caf::error FabricBase::check_origin(const WireHeader& h, const Origin* origin) const {
  if (h.source == self())
    return h.incarnation == options_.incarnation
               ? caf::error{}
               : make_error(Errc::mismatch,
                            fmt::format("rank {} refused a message in its own name", self().value));
  if (!origin || !origin->heard || h.incarnation != origin->incarnation)
    return make_error(Errc::stale,
                      fmt::format("rank {} refused a message from rank {}, incarnation {}: no "
                                  "hello, or gone",
                                  self().value, h.source.value, h.incarnation));
  return {};
}

caf::error FabricBase::check_payload(const WireHeader& h,
                                     std::span<const std::byte> payload) const {
  if (payload.size() != h.payload_bytes)
    return make_error(Errc::malformed,
                      fmt::format("message from rank {}: payload has {} bytes, header says {}",
                                  h.source.value, payload.size(), h.payload_bytes));
  if (kind_has_payload_checksum(h.kind) && payload_checksum(payload) != h.payload_checksum)
    return make_error(Errc::malformed,
                      fmt::format("message from rank {}: payload of {} bytes does not match its "
                                  "checksum",
                                  h.source.value, payload.size()));
  return {};
}

caf::expected<Origin> FabricBase::accept_hello(const WireHeader& h,
                                               std::span<const std::byte> payload,
                                               const Origin* before) const {
  if (auto error = check_cluster(h))
    return error;
  if (auto error = check_payload(h, payload))
    return error;
  const auto mine = std::as_bytes(std::span{options_.cluster_token});
  if (!std::ranges::equal(payload, mine))
    return make_error(Errc::mismatch,
                      fmt::format("rank {} refused a hello with a wrong cluster token (it says it "
                                  "is from rank {})",
                                  self().value, h.source.value));
  if (h.source == self() || (before && before->known &&
                             (h.incarnation < before->incarnation ||
                              (h.incarnation == before->incarnation && !before->heard))))
    return make_error(Errc::stale,
                      fmt::format("rank {} refused the hello of rank {}, incarnation {}, which is "
                                  "gone",
                                  self().value, h.source.value, h.incarnation));
  const auto credit = std::min<uint64_t>(h.aux, std::numeric_limits<size_t>::max());
  return Origin{h.incarnation, true, true, static_cast<size_t>(credit)};
}

void FabricBase::deliver(const WireHeader& header, BufferRef payload) {
  messages_received_.fetch_add(1, std::memory_order_relaxed);
  bytes_received_.fetch_add(wire_bytes(header), std::memory_order_relaxed);
  sink_->on_message(Envelope{header, std::move(payload)});
}

void FabricBase::refuse(const caf::error& why) {
  const auto before = refused_.fetch_add(1, std::memory_order_relaxed);
  if (before < kMaxRefusalsLogged)
    fmt::print(stderr, "troupe: {}\n", text_of(why));
  if (before + 1 == kMaxRefusalsLogged)
    fmt::print(stderr, "troupe: rank {} logs no further refusals\n", self().value);
  sink_->on_refused(why);
}

} // namespace troupe
