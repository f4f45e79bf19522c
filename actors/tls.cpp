#include "actors/tls.hpp"

#include "actors/guarded_port.hpp"

#include <caf/actor_system_config.hpp>
#include <caf/io/middleman.hpp>
#include <caf/openssl/manager.hpp>
#include <caf/openssl/publish.hpp>

#include <caf/scoped_actor.hpp>
#include <caf/sec.hpp>

#include <fmt/format.h>

#include <netdb.h>

#include <algorithm>
#include <set>

namespace troupe {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kLeastAnswerTime = std::chrono::milliseconds{100};

// Whether the name means an address. That it answers is left to CAF: a connection made to find out
// and closed at once would harm the next, which CAF knows by the same descriptor.
caf::error look_up(const std::string& host) {
  addrinfo* found = nullptr;
  if (const int code = getaddrinfo(host.c_str(), nullptr, nullptr, &found))
    return make_error(Errc::not_found, gai_strerror(code));
  freeaddrinfo(found);
  return {};
}

} // namespace

bool speaks_tls(const caf::actor_system& system) {
  return !system.config().openssl_certificate.empty();
}

caf::expected<uint16_t> publish_port(caf::actor_system& system, const caf::actor& actor,
                                     const std::string& host, uint16_t port) {
  const auto number = speaks_tls(system) ? caf::openssl::publish(actor, port, host.c_str(), true)
                                         : publish_guarded(system, actor, host, port);
  if (!number)
    return make_error(
        Errc::unreachable,
        fmt::format("the control port {}:{} can't be opened; is it in use?", host, port));
  return *number;
}

caf::expected<caf::actor> reach_port(caf::actor_system& system, const std::string& host,
                                     uint16_t port, std::chrono::milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  if (auto error = look_up(host))
    return error;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
  const auto middleman = speaks_tls(system) ? system.openssl_manager().actor_handle()
                                            : system.middleman().actor_handle();
  caf::expected<caf::actor> reached{caf::error{}};
  caf::scoped_actor self{system};
  self->request(middleman, std::max(left, kLeastAnswerTime), caf::connect_atom::value, host, port)
      .receive(
          [&](const caf::node_id&, const caf::strong_actor_ptr& actor,
              const std::set<std::string>&) {
            if (actor)
              reached = caf::actor_cast<caf::actor>(actor);
            else
              reached = make_error(Errc::unreachable, "it is no cluster's control port");
          },
          [&](const caf::error& error) {
            reached = make_error(Errc::unreachable,
                                 error == caf::sec::cannot_connect_to_node
                                     ? "nobody listens there"
                                     : "what listens there is no cluster's control port, or "
                                       "refuses this client");
          });
  return reached;
}

} // namespace troupe
