#include "actors/tls.hpp"

#include <caf/actor_system_config.hpp>
#include <caf/io/middleman.hpp>
#include <caf/openssl/publish.hpp>
#include <caf/openssl/remote_actor.hpp>

#include <fmt/format.h>

namespace troupe {

bool speaks_tls(const caf::actor_system& system) {
  return !system.config().openssl_certificate.empty();
}

caf::expected<uint16_t> publish_port(caf::actor_system& system, const caf::actor& actor,
                                     const std::string& host, uint16_t port) {
  const auto number = speaks_tls(system)
                          ? caf::openssl::publish(actor, port, host.c_str(), true)
                          : system.middleman().publish(actor, port, host.c_str(), true);
  if (!number)
    return make_error(
        Errc::unreachable,
        fmt::format("the control port {}:{} can't be opened; is it in use?", host, port));
  return *number;
}

caf::expected<caf::actor> reach_port(caf::actor_system& system, const std::string& host,
                                     uint16_t port) {
  return speaks_tls(system) ? caf::openssl::remote_actor(system, host, port)
                            : system.middleman().remote_actor(host, port);
}

} // namespace troupe
