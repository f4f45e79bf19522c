// Keyed randomness (determinism contract, 1.4): a random number is a pure function of its key, so
// it does not depend on when or where it is drawn. Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <array>
#include <cstdint>

namespace troupe {

// Ten rounds of Philox4x32 on one counter block.
[[nodiscard]] inline std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter,
                                                        std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// The noise of one (request seed, choice index, position, token id): 32 uniform bits.
// position is the index in the sequence of the token being chosen.
[[nodiscard]] inline uint32_t noise_bits(uint64_t seed, uint32_t choice, uint32_t position,
                                         uint32_t token) {
  // Four neighbouring tokens share a block; each takes one word of it.
  const auto block = philox4x32({token >> 2, position, choice, 0x54524F55u},
                                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return block[token & 3u];
}

// A uniform number in (0, 1), exactly representable: (bits >> 8 + 1/2) · 2^-24.
[[nodiscard]] inline float uniform_open(uint32_t bits) {
  return (static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f;
}

// A sequence of 64-bit numbers for tests, placements and initialization: SplitMix-free, the n-th
// value of a stream is again a pure function of (seed, stream, n).
class KeyedStream {
public:
  explicit KeyedStream(uint64_t seed, uint64_t stream = 0) : seed_(seed), stream_(stream) {}
  uint64_t next() {
    const auto block =
        philox4x32({static_cast<uint32_t>(n_), static_cast<uint32_t>(n_ >> 32),
                    static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                   {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)});
    ++n_;
    return (uint64_t{block[1]} << 32) | block[0];
  }
  // Uniform in [0, bound); bound > 0.
  uint64_t below(uint64_t bound) { return next() % bound; }

private:
  uint64_t seed_;
  uint64_t stream_;
  uint64_t n_ = 0;
};

} // namespace troupe
