#include "actors/guarded_port.hpp"

#include <caf/actor_cast.hpp>
#include <caf/io/basp/header.hpp>
#include <caf/io/basp_broker.hpp>
#include <caf/io/middleman.hpp>
#include <caf/io/network/default_multiplexer.hpp>
#include <caf/io/network/doorman_impl.hpp>
#include <caf/io/network/scribe_impl.hpp>
#include <caf/message_id.hpp>
#include <caf/send.hpp>

#include <set>
#include <utility>

namespace troupe {

namespace {

namespace net = caf::io::network;
using Kind = caf::io::basp::message_type;

static_assert(caf::io::basp::header_size == kFrameHeaderBytes);

// One connection: CAF's own, but for what it lets through. CAF asks for exactly a header, then for
// exactly the payload that it announced.
class GuardedScribe final : public net::scribe_impl {
public:
  using scribe_impl::scribe_impl;

  bool consume(caf::execution_unit* context, const void* data, size_t size) override {
    if (awaits_payload_) {
      awaits_payload_ = false;
    } else {
      const std::span bytes{static_cast<const std::byte*>(data), size};
      if (size != kFrameHeaderBytes || !guard_.accept(bytes.first<kFrameHeaderBytes>())) {
        io_failure(context, net::operation::read); // as if the peer had hung up
        return false;
      }
      awaits_payload_ = guard_.payload_bytes() > 0;
    }
    return scribe_impl::consume(context, data, size);
  }

private:
  FrameGuard guard_;
  bool awaits_payload_ = false;
};

class GuardedDoorman final : public net::doorman_impl {
public:
  using doorman_impl::doorman_impl;

  bool new_connection() override {
    if (detached())
      return false;
    auto& multiplexer = acceptor_.backend();
    auto scribe = caf::make_counted<GuardedScribe>(multiplexer, acceptor_.accepted_socket());
    const auto handle = scribe->hdl();
    parent()->add_scribe(std::move(scribe));
    return doorman::new_connection(&multiplexer, handle);
  }
};

// A number as BASP writes it: big-endian.
template <class T>
T read_number(std::span<const std::byte, kFrameHeaderBytes> header, size_t at) {
  T value = 0;
  for (size_t i = at; i < at + sizeof(T); ++i)
    value = static_cast<T>(value << 8 | std::to_integer<T>(header[i]));
  return value;
}

} // namespace

bool FrameGuard::accept(std::span<const std::byte, kFrameHeaderBytes> header) {
  const auto kind = static_cast<Kind>(header[0]);
  payload_bytes_ = read_number<uint32_t>(header, 4); // behind the kind, padding and flags
  if (payload_bytes_ > kMaxFrameBytes)
    return false;
  switch (kind) {
  case Kind::client_handshake:
    greeted_ = greeted_ || payload_bytes_ > 0;
    return payload_bytes_ > 0;
  case Kind::direct_message:
  case Kind::routed_message: // CAF takes what is marked as a stream's for one unseen; we have none
    return greeted_ && payload_bytes_ > 0 &&
           !caf::message_id{read_number<uint64_t>(header, 8)}.is_stream_message();
  case Kind::monitor_message:
  case Kind::down_message:
    return greeted_ && payload_bytes_ > 0;
  case Kind::heartbeat:
    return greeted_ && payload_bytes_ == 0;
  case Kind::server_handshake: // ours to send
    return false;
  }
  return false;
}

caf::expected<uint16_t> publish_guarded(caf::actor_system& system, const caf::actor& actor,
                                        const std::string& host, uint16_t port) {
  auto* multiplexer = dynamic_cast<net::default_multiplexer*>(&system.middleman().backend());
  if (!multiplexer)
    return caf::sec::cannot_open_port;
  const auto socket = net::new_tcp_acceptor_impl(port, host.c_str(), true);
  if (!socket)
    return socket.error();
  auto doorman = caf::make_counted<GuardedDoorman>(*multiplexer, *socket);
  const auto bound = doorman->port();
  const auto whom = caf::actor_cast<caf::strong_actor_ptr>(actor);
  caf::anon_send(system.middleman().named_broker<caf::io::basp_broker>(caf::atom("BASP")),
                 caf::publish_atom::value, caf::io::doorman_ptr{std::move(doorman)}, bound, whom,
                 std::set<std::string>{});
  return bound;
}

} // namespace troupe
