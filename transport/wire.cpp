#include "transport/wire.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <bit>
#include <cstring>

namespace troupe {

namespace {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

// Slicing by eight: tables[k][b] is the CRC of byte b followed by k zero bytes.
using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit)
      crc = (crc >> 1) ^ ((crc & 1u) ? 0x82F63B78u : 0u);
    tables[0][b] = crc;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t b = 0; b < 256; ++b)
      tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xffu];
  return tables;
}

constexpr CrcTables kCrc = make_crc_tables();

struct Field {
  size_t offset;
};
constexpr Field kMagicAt{0}, kVersionAt{4}, kKindAt{6}, kFlagsAt{8}, kZero16At{10},
    kIncarnationAt{12}, kClusterAt{16}, kEpochAt{24}, kSourceAt{32}, kDestinationAt{36},
    kStepAt{40}, kLayerAt{48}, kAttemptAt{52}, kAuxAt{56}, kPayloadBytesAt{64},
    kPayloadChecksumAt{72}, kSequenceAt{80}, kZero32At{88}, kCrcAt{92};
static_assert(kCrcAt.offset + sizeof(uint32_t) == kWireHeaderBytes);

template <class T>
void put(EncodedHeader& out, Field field, T value) {
  std::memcpy(out.data() + field.offset, &value, sizeof value);
}

template <class T>
T get(std::span<const std::byte> in, Field field) {
  T value;
  std::memcpy(&value, in.data() + field.offset, sizeof value);
  return value;
}

bool known(uint16_t kind) {
  return kind >= static_cast<uint16_t>(WireKind::hello) &&
         kind <= static_cast<uint16_t>(WireKind::bulk);
}

template <class... Args>
caf::error wrong(fmt::format_string<Args...> format, Args&&... args) {
  return make_error(Errc::malformed,
                    "wire header: " + fmt::format(format, std::forward<Args>(args)...));
}

caf::error check_meaning(const WireHeader& h) {
  if (!h.source.valid())
    return wrong("source is {}, expected a rank", h.source.value);
  if (!h.destination.valid())
    return wrong("destination is {}, expected a rank", h.destination.value);
  if (h.payload_bytes > kMaxPayloadBytes)
    return wrong("payload_bytes is {}, expected at most {}", h.payload_bytes, kMaxPayloadBytes);
  if (kind_has_payload_checksum(h.kind))
    return {};
  if (h.payload_bytes != 0)
    return wrong("payload_bytes is {}, expected 0 for kind {}", h.payload_bytes,
                 static_cast<int>(h.kind));
  if (h.payload_checksum != 0)
    return wrong("payload_checksum is not 0 for kind {}, which has no payload",
                 static_cast<int>(h.kind));
  return {};
}

} // namespace

bool kind_has_payload_checksum(WireKind kind) {
  return kind != WireKind::heartbeat && kind != WireKind::goodbye && kind != WireKind::credit;
}

bool kind_is_for_actors(WireKind kind) { return kind >= WireKind::dispatch; }

uint32_t crc32c(std::span<const std::byte> bytes) {
  uint32_t crc = 0xffffffffu;
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + i, sizeof word);
    word ^= crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k)
      crc ^= kCrc[7 - k][(word >> (8 * k)) & 0xffu];
  }
  for (; i < bytes.size(); ++i)
    crc = (crc >> 8) ^ kCrc[0][(crc ^ static_cast<uint32_t>(bytes[i])) & 0xffu];
  return ~crc;
}

EncodedHeader encode(const WireHeader& h) {
  EncodedHeader out{};
  put(out, kMagicAt, kWireMagic);
  put(out, kVersionAt, kWireVersion);
  put(out, kKindAt, static_cast<uint16_t>(h.kind));
  put(out, kFlagsAt, h.flags);
  put(out, kIncarnationAt, h.incarnation);
  put(out, kClusterAt, h.cluster);
  put(out, kEpochAt, h.epoch);
  put(out, kSourceAt, h.source.value);
  put(out, kDestinationAt, h.destination.value);
  put(out, kStepAt, h.step);
  put(out, kLayerAt, h.layer);
  put(out, kAttemptAt, h.attempt);
  put(out, kAuxAt, h.aux);
  put(out, kPayloadBytesAt, h.payload_bytes);
  put(out, kPayloadChecksumAt, h.payload_checksum);
  put(out, kSequenceAt, h.sequence);
  put(out, kCrcAt, crc32c(std::span{out}.first(kCrcAt.offset)));
  return out;
}

caf::expected<WireHeader> decode_header(std::span<const std::byte> in) {
  if (in.size() != kWireHeaderBytes)
    return wrong("{} bytes, expected {}", in.size(), kWireHeaderBytes);
  if (const auto magic = get<uint32_t>(in, kMagicAt); magic != kWireMagic)
    return wrong("magic is {:#010x}, expected {:#010x}", magic, kWireMagic);
  if (const auto version = get<uint16_t>(in, kVersionAt); version != kWireVersion)
    return wrong("version is {}, expected {}", version, kWireVersion);
  const auto crc = crc32c(in.first(kCrcAt.offset));
  if (const auto stated = get<uint32_t>(in, kCrcAt); stated != crc)
    return wrong("CRC is {:#010x}, expected {:#010x}", stated, crc);
  const auto kind = get<uint16_t>(in, kKindAt);
  if (!known(kind))
    return wrong("kind is {}, expected 1 to {}", kind, static_cast<int>(WireKind::bulk));
  if (get<uint16_t>(in, kZero16At) != 0 || get<uint32_t>(in, kZero32At) != 0)
    return wrong("a reserved field is not 0");
  WireHeader h;
  h.kind = static_cast<WireKind>(kind);
  h.flags = get<uint16_t>(in, kFlagsAt);
  h.cluster = get<uint64_t>(in, kClusterAt);
  h.epoch = get<uint64_t>(in, kEpochAt);
  h.incarnation = get<uint32_t>(in, kIncarnationAt);
  h.source = RankId{get<int32_t>(in, kSourceAt)};
  h.destination = RankId{get<int32_t>(in, kDestinationAt)};
  h.step = get<uint64_t>(in, kStepAt);
  h.layer = get<uint32_t>(in, kLayerAt);
  h.attempt = get<uint32_t>(in, kAttemptAt);
  h.aux = get<uint64_t>(in, kAuxAt);
  h.payload_bytes = get<uint64_t>(in, kPayloadBytesAt);
  h.payload_checksum = get<uint64_t>(in, kPayloadChecksumAt);
  h.sequence = get<uint64_t>(in, kSequenceAt);
  if (auto error = check_meaning(h))
    return error;
  return h;
}

uint64_t payload_checksum(std::span<const std::byte> payload) {
  return XXH3_64bits(payload.data(), payload.size());
}

} // namespace troupe
