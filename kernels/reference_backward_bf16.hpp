// The arithmetic of BF16 products in training: sums in F32, two elements of the contraction at a
// time, odd one first, each a fused multiply-add of its own:
//
//   acc = fma(a[2i], b[2i], fma(a[2i+1], b[2i+1], acc))
//
// where every operand and every result below 2^-126 counts as a zero of its sign. This is
// vdpbf16ps to the bit (Intel's manual; measured on AMD as well), and what a CPU without it does
// with F32 FMAs under MXCSR's FTZ and DAZ.
#pragma once

#include "config/dtype.hpp"

#include <cmath>
#include <cstdint>

namespace troupe::reference {

[[nodiscard]] inline float flush_denormal(float x) {
  return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

// What a BF16 product takes for x.
[[nodiscard]] inline float bf16_operand(float x) { return to_float(to_bf16(flush_denormal(x))); }

// A result is tiny if it were below 2^-126 after rounding to 24 bits without a bound on exponents.
[[nodiscard]] inline float flushed_fma(float a, float b, float acc) {
  const float sum = std::fma(a, b, flush_denormal(acc));
  if (std::abs(sum) != 0x1p-126f)
    return flush_denormal(sum);
  // Rounded up to there, or really there? The product of two BF16 is exact in F64; the error of
  // its sum with acc is too (Knuth).
  const double p = static_cast<double>(a) * static_cast<double>(b);
  const double c = static_cast<double>(flush_denormal(acc));
  const double s = p + c, virtual_c = s - p;
  const double error = (p - (s - virtual_c)) + (c - virtual_c);
  constexpr double kTiny = 0x1p-126 - 0x1p-151;
  const double beyond = std::abs(s) - kTiny;
  const bool tiny = beyond < 0 || (beyond == 0 && (s < 0 ? error > 0 : error < 0));
  return tiny ? std::copysign(0.0f, sum) : sum;
}

// acc + Σ a(i)·b(i) over i < n; a missing partner is zero. a and b give BF16 values.
template <class A, class B>
[[nodiscard]] float bf16_chain(float acc, int64_t n, A a, B b) {
  for (int64_t i = 0; i < n; i += 2) {
    const bool pair = i + 1 < n;
    acc = flushed_fma(pair ? a(i + 1) : 0.0f, pair ? b(i + 1) : 0.0f, acc);
    acc = flushed_fma(a(i), b(i), acc);
  }
  return acc;
}

// From zero, of any operands: a Sum of kernels/reference_math.hpp.
struct Bf16Sum {
  template <class A, class B>
  [[nodiscard]] float operator()(int64_t n, A a, B b) const {
    return bf16_chain(
        0.0f, n, [&](int64_t i) { return bf16_operand(a(i)); },
        [&](int64_t i) { return bf16_operand(b(i)); });
  }
};

} // namespace troupe::reference
