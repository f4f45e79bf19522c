// UcxChannel, the part towards peers: endpoints, sends, heartbeats, credit and losses.
#include "transport/ucx_channel.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace troupe {

namespace {

caf::error lost(RankId rank, std::string_view why) {
  return make_error(Errc::peer_lost, fmt::format("rank {}: {}", rank.value, why));
}

} // namespace

UcxChannel::Peer& UcxChannel::peer_of(RankId rank) {
  auto& peer = peers_[rank];
  if (!peer) {
    peer = std::make_unique<Peer>();
    peer->rank = rank;
  }
  return *peer;
}

caf::error UcxChannel::open_endpoint(Peer& peer, const std::string& address) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = on_endpoint_error;
  params.err_handler.arg = this;
  if (const auto status = ucp_ep_create(worker_, &params, &peer.endpoint); status != UCS_OK) {
    peer.endpoint = nullptr;
    return make_error(Errc::unreachable, fmt::format("rank {} can't be reached: UCX: {}",
                                                     peer.rank.value, ucs_status_string(status)));
  }
  return {};
}

void UcxChannel::close_endpoint(Peer& peer) {
  if (!peer.endpoint)
    return;
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.cb.send = on_closed;
  param.user_data = this;
  const auto request = ucp_ep_close_nbx(std::exchange(peer.endpoint, nullptr), &param);
  if (UCS_PTR_IS_PTR(request))
    ++closes_in_flight_;
}

void UcxChannel::on_closed(void* request, ucs_status_t /*forced: nothing more to do*/,
                           void* user_data) {
  --static_cast<UcxChannel*>(user_data)->closes_in_flight_;
  ucp_request_free(request);
}

// `bytes` are the payload's, or outlive the send.
void UcxChannel::send(Peer& peer, const WireHeader& header, const void* bytes, BufferRef payload) {
  if (free_send_requests_.empty()) {
    send_requests_.push_back(std::make_unique<SendRequest>());
    free_send_requests_.push_back(send_requests_.back().get());
  }
  auto* request = free_send_requests_.back();
  free_send_requests_.pop_back();
  request->channel = this;
  request->header = encode(header);
  request->payload = std::move(payload);
  request->link = peer.link;
  fabric_.count_sent(header.payload_bytes);
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  // A hello is judged before anything else is done for the peer.
  param.flags = header.kind == WireKind::hello ? UCP_AM_SEND_FLAG_EAGER : 0;
  param.cb.send = on_sent;
  param.user_data = request;
  ++sends_in_flight_;
  const auto pending = ucp_am_send_nbx(peer.endpoint, 0, request->header.data(), kWireHeaderBytes,
                                       bytes, header.payload_bytes, &param);
  if (UCS_PTR_IS_PTR(pending))
    return;
  if (UCS_PTR_IS_ERR(pending))
    doom(peer, peer.link->incarnation, lost(peer.rank, ucs_status_string(UCS_PTR_STATUS(pending))));
  recycle(request);
}

void UcxChannel::recycle(SendRequest* request) {
  request->payload = {};
  request->link = nullptr;
  free_send_requests_.push_back(request);
  --sends_in_flight_;
}

void UcxChannel::on_sent(void* ucx_request, ucs_status_t status, void* user_data) {
  auto* request = static_cast<SendRequest*>(user_data);
  auto& channel = *request->channel;
  auto& peer = channel.peer_of(request->link->peer);
  if (status != UCS_OK && peer.link == request->link)
    channel.doom(peer, peer.link->incarnation, lost(peer.rank, ucs_status_string(status)));
  channel.recycle(request);
  ucp_request_free(ucx_request);
}

// ── the fabric's own messages ──

// May be called inside a UCX callback; goes out after it.
void UcxChannel::say(RankId rank, WireKind kind, uint16_t flags, uint64_t aux) {
  auto header = fabric_.own_header(kind, rank, aux);
  header.flags = flags;
  answers_.emplace_back(rank, header);
}

void UcxChannel::send_answers() {
  auto answers = std::exchange(answers_, {});
  for (const auto& [rank, header] : answers)
    if (auto& peer = peer_of(rank); peer.endpoint)
      send(peer, header, nullptr, {});
}

void UcxChannel::say_goodbye(Peer& peer) {
  auto header = fabric_.own_header(WireKind::goodbye, peer.rank);
  header.sequence = peer.link->next_sequence++;
  // One that never spoke can't answer.
  peer.awaits_goodbye = peer.origin.heard;
  send(peer, header, nullptr, {});
}

void UcxChannel::ask(Peer& peer) { say(peer.rank, WireKind::heartbeat, kPleaseAnswer, 0); }

void UcxChannel::return_credits() {
  for (auto& [rank, peer] : peers_)
    if (peer->uncredited > 0 && peer->endpoint)
      say(rank, WireKind::credit, 0, std::exchange(peer->uncredited, 0));
}

// ── watching ──

void UcxChannel::watch(Nanoseconds elapsed) {
  watch_neighbours(elapsed);
  const auto patience = std::chrono::milliseconds{fabric_.options().heartbeat_timeout_ms};
  for (auto& [rank, peer] : peers_) {
    const bool missing =
        !peer->arrivals.empty() && peer->arrivals.begin()->first != peer->next_sequence;
    peer->gap = missing ? peer->gap + elapsed : Nanoseconds{0};
    if (peer->gap > patience)
      doom(*peer, peer->origin.incarnation,
           lost(rank, fmt::format("message {} never came", peer->next_sequence)));
  }
}

// Each rank asks the few that follow it, cyclically, among those it is connected to.
void UcxChannel::watch_neighbours(Nanoseconds elapsed) {
  const auto& options = fabric_.options();
  auto links = fabric_.links();
  std::erase_if(links, [&](const LinkRef& link) {
    return link->peer == fabric_.self() || link->state != Link::State::connected;
  });
  const auto after =
      std::ranges::find_if(links, [&](const LinkRef& link) { return link->peer > fabric_.self(); });
  std::ranges::rotate(links, after);
  if (links.size() > static_cast<size_t>(options.heartbeat_neighbours))
    links.resize(static_cast<size_t>(options.heartbeat_neighbours));
  for (auto& [rank, peer] : peers_)
    if (std::ranges::find(links, peer->link) == links.end())
      peer->silence = {}; // nobody asks it
  for (const auto& link : links) {
    const auto it = peers_.find(link->peer);
    // Another channel's, or one that did not speak yet and so can't answer.
    if (it == peers_.end() || it->second->link != link || !it->second->origin.heard)
      continue;
    auto& peer = *it->second;
    peer.silence += elapsed;
    if (peer.silence > std::chrono::milliseconds{options.heartbeat_timeout_ms})
      doom(peer, link->incarnation,
           lost(peer.rank, fmt::format("silent for {} ms", options.heartbeat_timeout_ms)));
    else
      ask(peer);
  }
}

// ── losses ──

void UcxChannel::on_endpoint_error(void* channel, ucp_ep_h endpoint, ucs_status_t status) {
  static_cast<UcxChannel*>(channel)->failed_endpoints_.emplace_back(endpoint, status);
}

// Nothing more is heard of the peer; the rest waits until no UCX callback is on the stack.
void UcxChannel::doom(Peer& peer, uint32_t incarnation, caf::error why) {
  if (!peer.origin.known || peer.origin.incarnation == incarnation)
    peer.origin = {incarnation, true, false, 0};
  doomed_.push_back({&peer, incarnation, std::move(why)});
}

void UcxChannel::bury_doomed() {
  for (const auto& [endpoint, status] : std::exchange(failed_endpoints_, {}))
    for (auto& [rank, peer] : peers_)
      if (peer->endpoint == endpoint)
        doom(*peer, peer->link->incarnation, lost(rank, ucs_status_string(status)));
  for (const auto& [peer, incarnation, why] : std::exchange(doomed_, {}))
    bury(*peer, incarnation, why);
}

// A newer incarnation, which may have shown itself meanwhile, is left alone.
void UcxChannel::bury(Peer& peer, uint32_t incarnation, const caf::error& why) {
  if (peer.origin.incarnation == incarnation) {
    peer.uncredited = 0;
    drop_arrivals(peer);
  }
  if (!peer.link || peer.link->incarnation != incarnation)
    return;
  peer.awaits_goodbye = false;
  close_endpoint(peer);
  if (FabricBase::leave_connected(*peer.link, Link::State::lost))
    fabric_.sink().on_peer_lost(peer.rank, why);
}

} // namespace troupe
