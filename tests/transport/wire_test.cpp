#include "config/random.hpp"
#include "transport/rows.hpp"
#include "transport/ucx_address.hpp"
#include "transport/wire.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

using namespace troupe;

namespace {

WireHeader random_header(KeyedStream& draws) {
  WireHeader h;
  h.kind = static_cast<WireKind>(1 + draws.below(static_cast<uint64_t>(WireKind::bulk)));
  h.flags = static_cast<uint16_t>(draws.next());
  h.cluster = draws.next();
  h.epoch = draws.next();
  h.incarnation = static_cast<uint32_t>(draws.next());
  h.source = RankId{static_cast<int32_t>(draws.below(1u << 31))};
  h.destination = RankId{static_cast<int32_t>(draws.below(1u << 31))};
  h.step = draws.next();
  h.layer = static_cast<uint32_t>(draws.next());
  h.attempt = static_cast<uint32_t>(draws.next());
  h.aux = draws.next();
  h.sequence = draws.next();
  if (kind_has_payload_checksum(h.kind)) {
    h.payload_bytes = draws.below(kMaxPayloadBytes + 1);
    h.payload_checksum = draws.next();
  }
  return h;
}

// Overwrites bytes of an encoded header and makes its CRC right again.
template <class T>
EncodedHeader forged(EncodedHeader bytes, size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
  const auto crc = crc32c(std::span{bytes}.first(kWireHeaderBytes - 4));
  std::memcpy(bytes.data() + kWireHeaderBytes - 4, &crc, sizeof crc);
  return bytes;
}

bool refused_for(const EncodedHeader& bytes, std::string_view field) {
  const auto header = decode_header(bytes);
  return !header && code_of(header.error()) == Errc::malformed &&
         text_of(header.error()).find(field) != std::string::npos;
}

} // namespace

TEST_CASE("the CRC is the published CRC-32C") {
  const std::string_view digits = "123456789";
  CHECK(crc32c(std::as_bytes(std::span{digits})) == 0xE3069283u);
  CHECK(crc32c({}) == 0u);
  const std::vector<std::byte> zeros(32); // RFC 3720, B.4
  CHECK(crc32c(zeros) == 0x8A9136AAu);
}

TEST_CASE("every header field survives the wire") {
  KeyedStream draws{20};
  for (int i = 0; i < 2000; ++i) {
    const auto h = random_header(draws);
    const auto decoded = decode_header(encode(h));
    REQUIRE(decoded);
    CHECK(decoded->kind == h.kind);
    CHECK(decoded->flags == h.flags);
    CHECK(decoded->cluster == h.cluster);
    CHECK(decoded->epoch == h.epoch);
    CHECK(decoded->incarnation == h.incarnation);
    CHECK(decoded->source == h.source);
    CHECK(decoded->destination == h.destination);
    CHECK(decoded->step == h.step);
    CHECK(decoded->layer == h.layer);
    CHECK(decoded->attempt == h.attempt);
    CHECK(decoded->aux == h.aux);
    CHECK(decoded->payload_bytes == h.payload_bytes);
    CHECK(decoded->payload_checksum == h.payload_checksum);
    CHECK(decoded->sequence == h.sequence);
  }
}

TEST_CASE("the header's layout is the documented one") {
  WireHeader h;
  h.kind = WireKind::dispatch;
  h.flags = 0x0102;
  h.source = RankId{3};
  h.aux = 0x1122334455667788;
  h.destination = RankId{4};
  const auto bytes = encode(h);
  CHECK(std::memcmp(bytes.data(), "TTRP", 4) == 0);
  CHECK(bytes[4] == std::byte{1});
  CHECK(bytes[6] == static_cast<std::byte>(WireKind::dispatch));
  CHECK(bytes[8] == std::byte{2});
  CHECK(bytes[32] == std::byte{3});
  CHECK(bytes[36] == std::byte{4});
  CHECK(bytes[56] == std::byte{0x88});
}

// The seeds of the fuzzer were written by another implementation of the layouts.
TEST_CASE("headers and addresses written by others are understood") {
  const auto read = [](const std::string& name) {
    std::ifstream file{std::string{TROUPE_SOURCE_DIR} + "/tests/fuzz/corpus/wire/" + name,
                       std::ios::binary};
    return std::string{std::istreambuf_iterator<char>{file}, {}};
  };
  const auto bytes = read("dispatch_header");
  const auto header = decode_header(std::as_bytes(std::span{bytes}));
  REQUIRE(header);
  CHECK(header->kind == WireKind::dispatch);
  CHECK(header->cluster == 0x1122);
  CHECK(header->destination == RankId{1});
  CHECK(header->step == 99);
  CHECK(header->payload_bytes == 1000);
  CHECK(header->sequence == 12);
  const auto address = decode_ucx_address(read("address"));
  REQUIRE(address);
  CHECK(address->rank == RankId{3});
  CHECK(address->incarnation == 1);
  CHECK(address->workers == std::vector<std::string>{"first", "second"});
}

TEST_CASE("a header with any bit flipped is refused") {
  KeyedStream draws{21};
  const auto good = encode(random_header(draws));
  for (size_t byte = 0; byte < good.size(); ++byte)
    for (int bit = 0; bit < 8; ++bit) {
      auto bad = good;
      bad[byte] ^= static_cast<std::byte>(1 << bit);
      CAPTURE(byte);
      CHECK_FALSE(decode_header(bad));
    }
}

TEST_CASE("a header of any other length is refused") {
  KeyedStream draws{22};
  const auto good = encode(random_header(draws));
  std::vector<std::byte> longer(good.begin(), good.end());
  longer.push_back({});
  CHECK_FALSE(decode_header(longer));
  for (size_t n = 0; n < good.size(); ++n)
    CHECK_FALSE(decode_header(std::span{good}.first(n)));
}

TEST_CASE("a well-summed header that makes no sense is refused by field") {
  WireHeader h;
  h.kind = WireKind::dispatch;
  h.source = RankId{0};
  h.destination = RankId{1};
  const auto good = encode(h);
  REQUIRE(decode_header(good));
  CHECK(refused_for(forged(good, 0, uint32_t{7}), "magic"));
  CHECK(refused_for(forged(good, 4, uint16_t{2}), "version"));
  CHECK(refused_for(forged(good, 6, uint16_t{0}), "kind"));
  CHECK(refused_for(forged(good, 6, uint16_t{13}), "kind"));
  CHECK(refused_for(forged(good, 10, uint16_t{1}), "reserved"));
  CHECK(refused_for(forged(good, 88, uint32_t{1}), "reserved"));
  CHECK(refused_for(forged(good, 32, int32_t{-1}), "source"));
  CHECK(refused_for(forged(good, 36, std::numeric_limits<int32_t>::min()), "destination"));
  CHECK(refused_for(forged(good, 64, kMaxPayloadBytes + 1), "payload_bytes"));
  h.kind = WireKind::credit;
  CHECK(refused_for(forged(encode(h), 64, uint64_t{1}), "payload_bytes"));
  CHECK(refused_for(forged(encode(h), 72, uint64_t{1}), "payload_checksum"));
}

TEST_CASE("rows are laid out as documented, each a multiple of 16 bytes") {
  const auto f32 = row_layout(DType::f32, 7);
  REQUIRE(f32);
  CHECK(f32->row_bytes == 32);
  CHECK(f32->num_scales == 0);
  const auto bf16 = row_layout(DType::bf16, 7168);
  REQUIRE(bf16);
  CHECK(bf16->row_bytes == 14336);
  const auto fp8 = row_layout(DType::f8_e4m3, 7168);
  REQUIRE(fp8);
  CHECK(fp8->scales_offset == 7168);
  CHECK(fp8->num_scales == 56);
  CHECK(fp8->row_bytes == 7168 + 224);
  const auto ragged = row_layout(DType::f8_e4m3, 130);
  REQUIRE(ragged);
  CHECK(ragged->scales_offset == 144);
  CHECK(ragged->num_scales == 2);
  CHECK(ragged->row_bytes == 160);
}

TEST_CASE("rows of a peer are believed only after their sizes and scales are checked") {
  CHECK(code_of(row_layout(DType::i64, 8).error()) == Errc::unsupported);
  for (const int64_t width :
       {int64_t{0}, int64_t{-1}, kMaxRowWidth + 1, std::numeric_limits<int64_t>::max()})
    CHECK(code_of(row_layout(DType::f8_e4m3, width).error()) == Errc::malformed);
  const auto layout = *row_layout(DType::f8_e4m3, 256); // 256 codes, two scales, 16-byte aligned
  std::vector<std::byte> bytes(3 * layout.row_bytes);
  for (size_t row = 0; row < 3; ++row)
    for (size_t tile = 0; tile < 2; ++tile) {
      const float scale = 0.5f + static_cast<float>(row);
      std::memcpy(bytes.data() + row * layout.row_bytes + layout.scales_offset + 4 * tile, &scale,
                  4);
    }
  const auto rows = read_rows(layout, 3, bytes);
  REQUIRE(rows);
  CHECK(rows->scale(2, 1) == 2.5f);
  CHECK(rows->row(1).data() == bytes.data() + layout.row_bytes);
  for (const int64_t n : {int64_t{2}, int64_t{4}, int64_t{-3}, std::numeric_limits<int64_t>::max()})
    CHECK_FALSE(read_rows(layout, n, bytes));
  CHECK_FALSE(read_rows(layout, 3, std::span{bytes}.first(bytes.size() - 1)));
  for (const float bad : {0.0f, -1.0f, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    auto copy = bytes;
    std::memcpy(copy.data() + layout.row_bytes + layout.scales_offset + 4, &bad, 4);
    CHECK_FALSE(read_rows(layout, 3, copy));
  }
}
