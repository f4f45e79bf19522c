// The fixed header in front of every message between ranks, and its decoder.
//
// Layout: 96 bytes, little-endian; the CRC-32C covers the 92 bytes before it. A decoder survives
// any bytes: it checks length, magic, version, CRC, kind, ranks and sizes before anything is
// believed.
//
//    0 u32 magic         16 u64 cluster      40 u64 step       64 u64 payload_bytes
//    4 u16 version       24 u64 epoch        48 u32 layer      72 u64 payload_checksum
//    6 u16 kind          32 i32 source       52 u32 attempt    80 u64 sequence
//    8 u16 flags         36 i32 destination  56 u64 aux        88 u32 0
//   10 u16 0                                                   92 u32 CRC-32C
//   12 u32 incarnation
// The epoch fences votes and ownership, the slot version inside a dispatch fences
// weights (contract, Agreement; architecture, section 3).
#pragma once

#include "config/errors.hpp"
#include "config/ids.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace troupe {

inline constexpr uint32_t kWireMagic = 0x50525454; // "TTRP"
inline constexpr uint16_t kWireVersion = 1;
inline constexpr size_t kWireHeaderBytes = 96;
inline constexpr uint64_t kMaxPayloadBytes = uint64_t{1} << 32;

enum class WireKind : uint16_t {
  // Between fabrics; never reach an actor.
  hello = 1, // first message on a connection: cluster token and incarnation
  heartbeat, // payload-free; `aux` counts the sender's scheduler progress
  goodbye,   // a clean leave: the silence that follows is no failure
  credit,    // `aux` more bytes may be sent
  // Between actors.
  dispatch,   // attention or forwarder -> expert shard: rows, gate weights, index table
  combine,    // expert shard or forwarder -> source: rows by slot or by complete gate group
  forward,    // attention -> forwarder of a node (two-hop dispatch)
  stage_rows, // pipeline stage -> the next or previous one: activations, gradients
  partial,    // TP sibling -> siblings: FP32 partial sums of a K-cut matrix
  gathered,   // TP sibling -> siblings: rows it combined
  control,    // a serialized control message (requests, tokens, shutdown, agreement)
  bulk,       // optimizer -> optimizer: pieces of gradients and of weights
};

// True for kinds whose payload carries a checksum (all but the fabric's own, payload-free ones).
[[nodiscard]] bool kind_has_payload_checksum(WireKind kind);
// True for kinds that an actor gets, in order and against credit.
[[nodiscard]] bool kind_is_for_actors(WireKind kind);

struct WireHeader {
  WireKind kind = WireKind::heartbeat;
  uint16_t flags = 0;
  uint64_t cluster = 0;     // cluster id, from the token
  uint64_t epoch = 0;       // of the view the sender acts under
  uint32_t incarnation = 0; // of the sender
  RankId source;
  RankId destination;
  // Dispatch id: (request step, layer, attempt), echoed by the answer.
  uint64_t step = 0;
  uint32_t layer = 0;
  uint32_t attempt = 0;
  uint64_t aux = 0; // kind-specific
  uint64_t payload_bytes = 0;
  uint64_t payload_checksum = 0; // XXH3-64 of the payload, 0 where the kind has none
  // Place among the messages from source to destination, from 0: they are delivered in this order.
  // 0 for heartbeats, credits and hellos, which stand outside it.
  uint64_t sequence = 0;
};

using EncodedHeader = std::array<std::byte, kWireHeaderBytes>;
[[nodiscard]] EncodedHeader encode(const WireHeader& header);
// Errc::malformed with the field that is wrong.
[[nodiscard]] caf::expected<WireHeader> decode_header(std::span<const std::byte> bytes);
[[nodiscard]] uint64_t payload_checksum(std::span<const std::byte> payload);
// CRC-32C (Castagnoli), as iSCSI and ext4 use it: crc32c("123456789") is 0xE3069283.
[[nodiscard]] uint32_t crc32c(std::span<const std::byte> bytes);

} // namespace troupe
