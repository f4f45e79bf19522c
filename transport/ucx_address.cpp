#include "transport/ucx_address.hpp"

#include "transport/wire.hpp"

#include <cstring>
#include <span>
#include <utility>

namespace troupe {

namespace {

constexpr uint32_t kMagic = 0x58435554; // "TUCX"

void append(std::string& out, uint32_t value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

std::optional<uint32_t> take(std::string_view& in) {
  uint32_t value = 0;
  if (in.size() < sizeof value)
    return std::nullopt;
  std::memcpy(&value, in.data(), sizeof value);
  in.remove_prefix(sizeof value);
  return value;
}

uint32_t crc_of(std::string_view text) { return crc32c(std::as_bytes(std::span{text})); }

} // namespace

std::string encode(const UcxAddress& address) {
  std::string out;
  append(out, kMagic);
  append(out, static_cast<uint32_t>(address.rank.value));
  append(out, address.incarnation);
  append(out, static_cast<uint32_t>(address.workers.size()));
  for (const auto& worker : address.workers) {
    append(out, static_cast<uint32_t>(worker.size()));
    out += worker;
  }
  append(out, crc_of(out));
  return out;
}

std::optional<UcxAddress> decode_ucx_address(std::string_view in) {
  if (in.size() < sizeof(uint32_t))
    return std::nullopt;
  auto tail = in.substr(in.size() - sizeof(uint32_t));
  in.remove_suffix(sizeof(uint32_t));
  if (take(tail) != crc_of(in) || take(in) != kMagic)
    return std::nullopt;
  const auto rank = take(in), incarnation = take(in), channels = take(in);
  if (!channels || *channels < 1 || *channels > kMaxChannels)
    return std::nullopt;
  UcxAddress address{RankId{static_cast<int32_t>(*rank)}, *incarnation, {}};
  for (uint32_t c = 0; c < *channels; ++c) {
    const auto length = take(in);
    if (!length || *length == 0 || *length > in.size())
      return std::nullopt;
    address.workers.emplace_back(in.substr(0, *length));
    in.remove_prefix(*length);
  }
  return in.empty() && address.rank.valid() ? std::optional{std::move(address)} : std::nullopt;
}

} // namespace troupe
