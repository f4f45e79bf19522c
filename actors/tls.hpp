// The control port's way over the network: plain, on loopback only, or mutual TLS (contract, Files
// and flags). Both ends show a certificate that the same authority signed; a stranger without one
// gets no further than the handshake. What is said is then the control port's business.
#pragma once

#include "config/errors.hpp"

#include <caf/actor.hpp>
#include <caf/actor_system.hpp>

#include <chrono>
#include <cstdint>
#include <string>

namespace troupe {

// PEM files; all or none.
struct TlsFiles {
  std::string certificate, key, ca;

  [[nodiscard]] bool empty() const { return certificate.empty(); }
};

// Whether the system was set up with TlsFiles (RankSystemConfig).
[[nodiscard]] bool speaks_tls(const caf::actor_system& system);
// Over TLS where the system speaks it. The port that was bound;
// Errc::unreachable names host and port.
[[nodiscard]] caf::expected<uint16_t> publish_port(caf::actor_system& system,
                                                   const caf::actor& actor, const std::string& host,
                                                   uint16_t port);
// One try, for at most `timeout`, whoever is there and whatever it says. Errc::not_found where the
// host has no address, else Errc::unreachable; the error is the reason alone.
[[nodiscard]] caf::expected<caf::actor> reach_port(caf::actor_system& system,
                                                   const std::string& host, uint16_t port,
                                                   std::chrono::milliseconds timeout);

} // namespace troupe
