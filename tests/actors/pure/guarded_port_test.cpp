#include "actors/guarded_port.hpp"

#include <doctest/doctest.h>

namespace troupe {

namespace {

constexpr uint8_t kServerHandshake = 0, kClientHandshake = 1, kDirect = 2, kDown = 5,
                  kHeartbeat = 6;

std::array<std::byte, kFrameHeaderBytes> header(uint8_t kind, uint32_t payload) {
  std::array<std::byte, kFrameHeaderBytes> bytes{};
  bytes[0] = std::byte{kind};
  for (size_t i = 0; i < 4; ++i)
    bytes[4 + i] = static_cast<std::byte>(payload >> (24 - 8 * i));
  return bytes;
}

} // namespace

TEST_CASE("a connection begins with a client handshake, and frames have the payload they need") {
  FrameGuard guard;
  for (const uint8_t kind : {kServerHandshake, kDirect, kDown, kHeartbeat})
    CHECK_FALSE(guard.accept(header(kind, 10)));
  CHECK_FALSE(FrameGuard{}.accept(header(kClientHandshake, 0)));
  REQUIRE(guard.accept(header(kClientHandshake, 32)));
  CHECK(guard.payload_bytes() == 32);
  CHECK(guard.accept(header(kClientHandshake, 32))); // the one that selects the connection
  for (uint8_t kind = kDirect; kind <= kDown; ++kind) {
    CHECK_FALSE(guard.accept(header(kind, 0)));
    CHECK(guard.accept(header(kind, 1)));
    CHECK(guard.accept(header(kind, kMaxFrameBytes)));
    CHECK_FALSE(guard.accept(header(kind, kMaxFrameBytes + 1)));
  }
  for (int bits = 0; bits < 4; ++bits) { // the kind of a message: urgent, normal, two of streams
    auto message = header(kDirect, 10);
    message[8] = static_cast<std::byte>(bits << 4);
    CHECK(guard.accept(message) == (bits < 2));
  }
  CHECK(guard.accept(header(kHeartbeat, 0)));
  CHECK(guard.payload_bytes() == 0);
  CHECK_FALSE(guard.accept(header(kHeartbeat, 1)));
  CHECK_FALSE(guard.accept(header(kServerHandshake, 32)));
  for (int kind = 7; kind < 256; ++kind)
    CHECK_FALSE(guard.accept(header(static_cast<uint8_t>(kind), 1)));
}

} // namespace troupe
