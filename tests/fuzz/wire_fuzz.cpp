// Any bytes as a header, as an address and as rows. A header is tried as it is, and once more with
// magic, version and CRC made right, or nothing would get past them; one that is believed must come
// out of `encode` as it went in.
#include "transport/rows.hpp"
#include "transport/ucx_address.hpp"
#include "transport/wire.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

using namespace troupe;

namespace {

void require(bool condition) {
  if (!condition)
    std::abort();
}

void try_header(std::span<const std::byte> bytes) {
  const auto header = decode_header(bytes);
  if (!header)
    return require(code_of(header.error()) == Errc::malformed && !text_of(header.error()).empty());
  require(header->source.valid() && header->destination.valid());
  require(header->payload_bytes <= kMaxPayloadBytes);
  require(kind_has_payload_checksum(header->kind) || header->payload_bytes == 0);
  require(std::ranges::equal(encode(*header), bytes));
}

void try_forged_header(std::span<const std::byte> bytes) {
  EncodedHeader forged{};
  std::memcpy(forged.data(), bytes.data(), std::min(bytes.size(), forged.size()));
  std::memcpy(forged.data(), &kWireMagic, sizeof kWireMagic);
  std::memcpy(forged.data() + 4, &kWireVersion, sizeof kWireVersion);
  const uint32_t crc = crc32c(std::span{forged}.first(kWireHeaderBytes - 4));
  std::memcpy(forged.data() + kWireHeaderBytes - 4, &crc, sizeof crc);
  try_header(forged);
}

void try_address(std::string text) {
  const auto parse = [](const std::string& bytes) {
    if (const auto address = decode_ucx_address(bytes))
      require(encode(*address) == bytes);
  };
  parse(text);
  const uint32_t crc = crc32c(std::as_bytes(std::span{text}));
  text.append(reinterpret_cast<const char*>(&crc), sizeof crc);
  parse(text);
}

// Four bytes choose dtype, width and number of rows; the rest are the rows.
void try_rows(std::span<const std::byte> bytes) {
  if (bytes.size() < 4)
    return;
  const auto dtype = static_cast<DType>(std::to_integer<int>(bytes[0]) % 11);
  const int64_t width = std::to_integer<int>(bytes[1]) + 256 * (std::to_integer<int>(bytes[2]) % 2);
  const auto layout = row_layout(dtype, width);
  if (!layout)
    return;
  const auto rows = read_rows(*layout, std::to_integer<int>(bytes[3]), bytes.subspan(4));
  if (!rows)
    return;
  for (int64_t i = 0; i < rows->num_rows; ++i) {
    require(rows->row(i).size() == layout->row_bytes);
    for (int64_t tile = 0; tile < layout->num_scales; ++tile)
      require(rows->scale(i, tile) > 0);
  }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span{data, size});
  try_header(bytes);
  try_forged_header(bytes);
  try_address({reinterpret_cast<const char*>(data), size});
  try_rows(bytes);
  return 0;
}
