// A plain port of CAF's protocol (BASP) that survives what strangers send.
//
// CAF 0.17 parses a frame before any token can be asked for, and trusts its header: a frame that
// announces no payload where one belongs ends the process with a null pointer, one that announces
// 4 GiB takes them. Here each header is read first, and a connection whose next frame can't be
// right is closed. What passes is CAF's to parse, then the control port's to refuse.
#pragma once

#include <caf/actor.hpp>
#include <caf/actor_system.hpp>
#include <caf/expected.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace troupe {

constexpr size_t kFrameHeaderBytes = 32;
// More than any control message takes: the longest, a prompt, has 4 B for each token.
constexpr uint32_t kMaxFrameBytes = 64u << 20;

// What one connection may send next, header by header.
class FrameGuard {
public:
  // Whether the frame with this header may come now; the first has to be a client's handshake (CAF
  // sends a second one). When so, `payload_bytes()` follow.
  [[nodiscard]] bool accept(std::span<const std::byte, kFrameHeaderBytes> header);
  [[nodiscard]] uint32_t payload_bytes() const { return payload_bytes_; }

private:
  bool greeted_ = false;
  uint32_t payload_bytes_ = 0;
};

// Publishes `actor` behind a FrameGuard for each connection. The port that was bound.
[[nodiscard]] caf::expected<uint16_t> publish_guarded(caf::actor_system& system,
                                                      const caf::actor& actor,
                                                      const std::string& host, uint16_t port);

} // namespace troupe
