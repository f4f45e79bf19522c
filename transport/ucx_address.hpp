// What a UcxFabric tells others, so that they reach it: opaque bytes for everybody else.
//
//   u32 magic "TUCX", i32 rank, u32 incarnation, u32 number of channels (1 to 64)
//   per channel: u32 length, worker address
//   u32 CRC-32C of all before
//
// UCX believes worker addresses, so they get to it only under a checksum.
#pragma once

#include "config/ids.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

inline constexpr int kMaxChannels = 64;

struct UcxAddress {
  RankId rank;
  uint32_t incarnation = 0;
  std::vector<std::string> workers; // by channel
};

[[nodiscard]] std::string encode(const UcxAddress& address);
// Nothing for bytes that `encode` did not make.
[[nodiscard]] std::optional<UcxAddress> decode_ucx_address(std::string_view bytes);

} // namespace troupe
