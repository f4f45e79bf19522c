// The elementary functions of the arithmetic, each a fixed sequence of IEEE operations, so that
// neither a compiler nor a libm decides a bit. The SIMD backends perform the same operations, one
// by one (kernels/simd_math.hpp).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace troupe {

// 2^n for |n| <= 126, exact.
[[nodiscard]] inline float power_of_two(float n) {
  return std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// exp(x) within 2 ulp (Cephes). x = n·ln 2 + r, |r| <= ln 2 / 2; 2^n in two factors, so that
// results below the normal range are rounded once. NaN stays NaN; 89 and more give inf, -104 and
// less give 0.
[[nodiscard]] inline float exp_f32(float x) {
  x = 89.0f < x ? 89.0f : x;
  x = -104.0f > x ? -104.0f : x;
  if (x != x)
    return x;
  const float n = std::nearbyintf(x * 1.44269504088896341f);
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  const float half = std::nearbyintf(n * 0.5f);
  return p * power_of_two(half) * power_of_two(n - half);
}

[[nodiscard]] inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
[[nodiscard]] inline float silu_f32(float x) { return x * (1.0f / (1.0f + exp_f32(-x))); }

// Natural logarithm in F64 within 1 ulp or so: x = 2^k · m, m in [√½, √2); log m = 2 atanh((m-1)/(m+1))
// by its series. 0 gives -inf, negative numbers and NaN give NaN.
[[nodiscard]] inline double log_f64(double x) {
  if (x != x || x < 0)
    return std::numeric_limits<double>::quiet_NaN();
  if (x == 0)
    return -std::numeric_limits<double>::infinity();
  if (x > std::numeric_limits<double>::max())
    return x;
  int k = 0;
  if (x < 0x1p-1022) { // subnormal
    x *= 0x1p54;
    k = -54;
  }
  uint64_t bits = std::bit_cast<uint64_t>(x);
  k += static_cast<int>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++k;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 23.0;
  for (int i = 21; i >= 3; i -= 2)
    p = std::fma(p, z, 1.0 / i);
  const double log_m = std::fma(2.0 * s * z, p, 2.0 * s);
  // ln 2 in two parts; the first has trailing zeros, so that k · hi is exact.
  return std::fma(static_cast<double>(k), 0x1.62e42fee00000p-1,
                  std::fma(static_cast<double>(k), 0x1.a39ef35793c76p-33, log_m));
}

// exp(x) in F64 within a few ulp.
[[nodiscard]] inline double exp_f64(double x) {
  if (x != x)
    return x;
  if (x > 709.7)
    return std::numeric_limits<double>::infinity();
  if (x < -708.0)
    return 0.0;
  const double n = std::nearbyint(x * 1.4426950408889634);
  double r = std::fma(n, -0x1.62e42fee00000p-1, x);
  r = std::fma(n, -0x1.a39ef35793c76p-33, r);
  double p = 1.0;
  for (int i = 18; i >= 1; --i) // Horner's form of sum r^i / i!
    p = std::fma(p, r / i, 1.0);
  return p * std::bit_cast<double>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// sin and cos in F64 for |x| up to 2^30: reduction by π/2 in three parts, then Taylor's series.
struct SinCos {
  double sin, cos;
};
[[nodiscard]] inline SinCos sin_cos_f64(double x) {
  const double n = std::nearbyint(x * 0.63661977236758134308);
  double r = std::fma(n, -1.57079632673412561417e+00, x);
  r = std::fma(n, -6.07710050630396597660e-11, r);
  r = std::fma(n, -2.02226624879595063154e-21, r);
  const double z = r * r;
  double s = 1.0, c = 1.0;
  for (int i = 20; i >= 2; i -= 2) {
    s = std::fma(s, -z / static_cast<double>(i * (i + 1)), 1.0);
    c = std::fma(c, -z / static_cast<double>(i * (i - 1)), 1.0);
  }
  s *= r;
  switch (static_cast<int64_t>(n) & 3) {
  case 0: return {s, c};
  case 1: return {c, -s};
  case 2: return {-s, -c};
  default: return {-c, s};
  }
}

} // namespace troupe
