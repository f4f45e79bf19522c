// UcxChannel, the part from peers: active messages, their order, and room for them.
#include "transport/ucx_channel.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace troupe {

namespace {

std::span<const std::byte> bytes_of(const void* data, size_t length) {
  return {static_cast<const std::byte*>(data), length};
}

} // namespace

ucs_status_t UcxChannel::on_active_message(void* channel, const void* header, size_t header_length,
                                           void* data, size_t length,
                                           const ucp_am_recv_param_t* param) {
  return static_cast<UcxChannel*>(channel)->receive(bytes_of(header, header_length), data, length,
                                                    param->recv_attr);
}

// UCS_OK: UCX may forget `data`. UCS_INPROGRESS: it is held.
ucs_status_t UcxChannel::receive(std::span<const std::byte> encoded, void* data, size_t length,
                                 uint64_t attributes) {
  const auto header = decode_header(encoded);
  if (phase_ != Phase::running && phase_ != Phase::leaving) {
    if (header && !fabric_.check_cluster(*header))
      receive_last_words(*header);
    return UCS_OK;
  }
  auto error = header ? fabric_.check_cluster(*header) : header.error();
  if (!error && header->payload_bytes != length)
    error = make_error(Errc::malformed,
                       fmt::format("message from rank {}: payload has {} bytes, header says {}",
                                   header->source.value, length, header->payload_bytes));
  if (!error && header->kind == WireKind::hello) {
    const bool here = (attributes & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
    receive_hello(*header, here ? bytes_of(data, length) : std::span<const std::byte>{});
    return UCS_OK;
  }
  const auto it = header ? peers_.find(header->source) : peers_.end();
  // What the fabrics still had to say to each other when one said GOODBYE or was given up.
  const bool afterthought = it != peers_.end() && it->second->origin.known &&
                            !it->second->origin.heard && !kind_is_for_actors(header->kind) &&
                            header->incarnation == it->second->origin.incarnation;
  if (!error && afterthought) {
    receive_last_words(*header);
    return UCS_OK;
  }
  if (!error)
    error = fabric_.check_origin(*header, it == peers_.end() ? nullptr : &it->second->origin);
  if (!error && header->source == fabric_.self())
    error = make_error(Errc::mismatch, fmt::format("rank {} refused a message in its own name",
                                                   header->source.value));
  if (error) {
    fabric_.refuse(error);
    return UCS_OK;
  }
  auto& peer = *it->second;
  peer.silence = {};
  switch (header->kind) {
  case WireKind::heartbeat:
    answer_heartbeat(peer, *header);
    return UCS_OK;
  case WireKind::credit:
    if (peer.link && peer.link->incarnation == header->incarnation)
      FabricBase::return_credit(*peer.link, header->aux);
    return UCS_OK;
  case WireKind::goodbye:
    if (header->flags & kAnswer) {
      peer.awaits_goodbye = false;
      peer.settled = true;
      return UCS_OK;
    }
    [[fallthrough]];
  default:
    return receive_ordered(peer, *header, data, attributes);
  }
}

void UcxChannel::receive_hello(const WireHeader& header, std::span<const std::byte> payload) {
  // No state is kept for a stranger.
  const auto it = peers_.find(header.source);
  auto accepted =
      fabric_.accept_hello(header, payload, it == peers_.end() ? nullptr : &it->second->origin);
  if (!accepted) {
    fabric_.refuse(accepted.error());
    return;
  }
  auto& peer = peer_of(header.source);
  note_handshake(header);
  if (peer.origin.heard && peer.origin.incarnation == accepted->incarnation)
    return;
  drop_arrivals(peer);
  peer.origin = *accepted;
  peer.next_sequence = 0;
  peer.uncredited = 0;
  peer.silence = {};
}

// The hello came through the peer's own endpoint, so its handshake is behind us, and what we ask
// now is queued after our answer to it.
void UcxChannel::note_handshake(const WireHeader& hello) {
  const auto it = peers_.find(hello.source);
  if (it == peers_.end())
    return;
  auto& peer = *it->second;
  peer.met = hello.incarnation;
  peer.met_at = clock_.now();
  if (peer.endpoint && peer.link->incarnation == hello.incarnation)
    ask(peer);
}

void UcxChannel::answer_heartbeat(Peer& peer, const WireHeader& header) {
  if (header.flags & kPleaseAnswer)
    say(peer.rank, WireKind::heartbeat, 0, 0);
  else if (peer.endpoint && peer.link->incarnation == header.incarnation)
    peer.settled = true;
}

// Nobody listens any more, but the handshakes are brought to their end.
void UcxChannel::receive_last_words(const WireHeader& header) {
  const auto it = peers_.find(header.source);
  if (it == peers_.end())
    return;
  if (header.kind == WireKind::hello)
    note_handshake(header);
  if (header.kind == WireKind::heartbeat)
    answer_heartbeat(*it->second, header);
}

ucs_status_t UcxChannel::receive_ordered(Peer& peer, const WireHeader& header, void* data,
                                         uint64_t attributes) {
  if (header.sequence < peer.next_sequence || peer.arrivals.contains(header.sequence)) {
    fabric_.refuse(make_error(Errc::stale, fmt::format("rank {} sent message {} twice",
                                                       peer.rank.value, header.sequence)));
    return UCS_OK;
  }
  auto& arrival = peer.arrivals[header.sequence];
  arrival.header = header;
  if (header.payload_bytes == 0) {
    deliver_ready(peer);
    return UCS_OK;
  }
  arrival.descriptor = data;
  const bool rendezvous = (attributes & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  arrival.rendezvous = rendezvous;
  const auto placement = peer.waiting.empty() ? place(peer, arrival) : Placement::no_room;
  if (placement == Placement::no_room) {
    arrival.state = Arrival::State::waiting;
    peer.waiting.push_back(header.sequence);
    ++num_waiting_;
    fabric_.add_waiting(static_cast<int64_t>(header.payload_bytes));
    return UCS_INPROGRESS;
  }
  if (!rendezvous) // UCX takes it back
    arrival.descriptor = nullptr;
  if (placement == Placement::placed)
    deliver_ready(peer);
  return rendezvous && placement == Placement::placed ? UCS_INPROGRESS : UCS_OK;
}

// Finds room for an arrival whose descriptor is at hand, and fills it or starts to. Leaves an eager
// descriptor to the caller; a rendezvous takes it.
UcxChannel::Placement UcxChannel::place(Peer& peer, Arrival& arrival) {
  const auto bytes = arrival.header.payload_bytes;
  auto& pool = fabric_.pool();
  if (BufferPool::capacity_for(bytes) > pool.limit()) {
    doom(peer, peer.origin.incarnation,
         make_error(Errc::out_of_memory,
                    fmt::format("rank {} sent a message of {} bytes, more than the whole "
                                "buffer pool of {} bytes",
                                peer.rank.value, bytes, pool.limit())));
    return Placement::failed;
  }
  auto buffer = pool.acquire(bytes);
  if (!buffer)
    return Placement::no_room;
  arrival.payload = std::move(*buffer);
  if (arrival.rendezvous) {
    arrival.state = Arrival::State::fetching;
    fetch(peer, arrival);
    return Placement::placed;
  }
  std::memcpy(arrival.payload->data(), arrival.descriptor, bytes);
  arrival.state = Arrival::State::ready;
  return Placement::placed;
}

// Takes the descriptor, also when it fails.
void UcxChannel::fetch(Peer& peer, Arrival& arrival) {
  auto owned = std::make_unique<FetchRequest>(
      FetchRequest{this, &peer, peer.origin.incarnation, arrival.header.sequence, arrival.payload});
  auto* request = owned.get();
  fetches_.emplace(request, std::move(owned));
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  param.cb.recv_am = on_fetched;
  param.user_data = request;
  const auto pending =
      ucp_am_recv_data_nbx(worker_, std::exchange(arrival.descriptor, nullptr),
                           request->payload->data(), request->payload->size(), &param);
  if (!UCS_PTR_IS_PTR(pending))
    fetched(request, UCS_PTR_STATUS(pending));
}

void UcxChannel::on_fetched(void* ucx_request, ucs_status_t status, size_t /*length: all*/,
                            void* user_data) {
  auto* request = static_cast<FetchRequest*>(user_data);
  request->channel->fetched(request, status);
  ucp_request_free(ucx_request);
}

void UcxChannel::fetched(FetchRequest* request, ucs_status_t status) {
  const auto owned = std::move(fetches_.extract(request).mapped());
  auto& peer = *owned->peer;
  const bool current = peer.origin.heard && peer.origin.incarnation == owned->incarnation;
  const auto it = peer.arrivals.find(owned->sequence);
  if (!current || it == peer.arrivals.end())
    return; // lost meanwhile
  if (status != UCS_OK) {
    doom(peer, owned->incarnation,
         make_error(Errc::peer_lost,
                    fmt::format("rank {}: {}", peer.rank.value, ucs_status_string(status))));
    return;
  }
  it->second.state = Arrival::State::ready;
  deliver_ready(peer);
}

void UcxChannel::deliver_ready(Peer& peer) {
  while (peer.origin.heard && !peer.arrivals.empty()) {
    const auto first = peer.arrivals.begin();
    if (first->first != peer.next_sequence || first->second.state != Arrival::State::ready)
      return;
    const auto arrival = std::move(first->second);
    peer.arrivals.erase(first);
    ++peer.next_sequence;
    if (arrival.header.kind == WireKind::goodbye) {
      receive_goodbye(peer);
      return;
    }
    const auto bytes =
        arrival.payload ? std::as_const(*arrival.payload).bytes() : std::span<const std::byte>{};
    if (auto error = fabric_.check_payload(arrival.header, bytes)) {
      fabric_.refuse(error);
      doom(peer, arrival.header.incarnation,
           std::move(error)); // what came whole is delivered, in order, or the peer is lost
      return;
    }
    fabric_.deliver(arrival.header, arrival.payload);
    peer.uncredited += wire_bytes(arrival.header);
    if (peer.uncredited >= peer.origin.credit_bytes / 4 && peer.endpoint)
      say(peer.rank, WireKind::credit, 0, std::exchange(peer.uncredited, 0));
    else
      credit_due_ = true;
  }
}

void UcxChannel::receive_goodbye(Peer& peer) {
  say(peer.rank, WireKind::goodbye, kAnswer, 0);
  peer.origin.heard = false;
  peer.awaits_goodbye = false; // both leave
  if (peer.link)
    FabricBase::leave_connected(*peer.link, Link::State::left);
  fabric_.sink().on_peer_left(peer.rank);
}

void UcxChannel::retry_waiting() {
  for (auto& [rank, peer] : peers_) {
    while (peer->origin.heard && !peer->waiting.empty()) {
      auto& arrival = peer->arrivals.at(peer->waiting.front());
      void* eager = arrival.rendezvous ? nullptr : arrival.descriptor;
      const auto bytes = static_cast<int64_t>(arrival.header.payload_bytes);
      const auto placement = place(*peer, arrival);
      if (placement != Placement::placed)
        break; // no room for this peer, or it is doomed and all is dropped soon
      peer->waiting.pop_front();
      --num_waiting_;
      fabric_.add_waiting(-bytes);
      if (!eager)
        continue;
      arrival.descriptor = nullptr;
      ucp_am_data_release(worker_, eager);
    }
    deliver_ready(*peer);
  }
}

void UcxChannel::drop_arrivals(Peer& peer) {
  for (auto& [sequence, arrival] : peer.arrivals) {
    if (arrival.state != Arrival::State::waiting)
      continue;
    ucp_am_data_release(worker_, arrival.descriptor);
    --num_waiting_;
    fabric_.add_waiting(-static_cast<int64_t>(arrival.header.payload_bytes));
  }
  peer.arrivals.clear();
  peer.waiting.clear();
}

} // namespace troupe
