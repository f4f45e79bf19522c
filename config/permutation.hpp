// An order of [0, n) that is a function of its key, without a table: as quick to enter anywhere as
// at its beginning, which is what resuming asks for.
#pragma once

#include "config/random.hpp"

#include <bit>
#include <cstdint>
#include <utility>

namespace troupe {

// Four Feistel rounds permute the numbers of 2·b bits, with b the least such that n fit in them:
// fewer than 4 · n. One that comes out as n or more is sent through again, until it is below; as
// the walk follows a cycle of the larger permutation, no two starts below n end at one place.
class KeyedPermutation {
public:
  // n > 0, at most 2^62.
  KeyedPermutation(uint64_t n, uint64_t key)
      : n_(n), key_(key),
        half_bits_(n > 1 ? (static_cast<int>(std::bit_width(n - 1)) + 1) / 2 : 1) {}

  // Where the i-th comes from; i < n.
  [[nodiscard]] uint64_t operator()(uint64_t i) const {
    do
      i = once(i);
    while (i >= n_);
    return i;
  }

private:
  [[nodiscard]] uint64_t once(uint64_t i) const {
    constexpr uint32_t kOrder = 0x4F524452u; // no other use of this key draws the same numbers
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1; // half of 62 bits: 31 at most
    uint64_t left = i >> half_bits_, right = i & mask;
    for (uint32_t round = 0; round < 4; ++round) {
      const auto block =
          philox4x32({static_cast<uint32_t>(right), 0, round, kOrder},
                     {static_cast<uint32_t>(key_), static_cast<uint32_t>(key_ >> 32)});
      left = std::exchange(right, (left ^ block[0]) & mask);
    }
    return left << half_bits_ | right;
  }

  uint64_t n_, key_;
  int half_bits_;
};

} // namespace troupe
