// The elementary functions of the arithmetic, each a fixed sequence of IEEE operations, so that
// neither a compiler nor a libm decides a bit. The SIMD backends perform the same operations, one
// by one (kernels/simd_math.hpp). They assume rounding to nearest, as the whole arithmetic does.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

namespace troupe {

// Inlined everywhere, so that a loop compiled for a newer CPU gets that CPU's instructions.
#define TROUPE_MATH [[nodiscard, gnu::always_inline]] inline

namespace math_detail {

// The nearest integer, ties to even, for |x| < 2^22 (2^51 in F64): adding 1.5 · 2^23 leaves no
// room for a fraction. Unlike nearbyint this is two additions on every CPU.
TROUPE_MATH float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
TROUPE_MATH double round_even(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// 2^n for the exponents of normal numbers, exact.
TROUPE_MATH float power_of_two(float n) {
  return std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}
TROUPE_MATH double power_of_two(double n) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// c[0] + c[1]·x + c[2]·x² + … by Horner's rule in fused multiply-adds.
template <size_t N>
TROUPE_MATH double polynomial(const std::array<double, N>& c, double x) {
  double p = c[N - 1];
  for (size_t i = N - 1; i-- > 0;)
    p = std::fma(p, x, c[i]);
  return p;
}

// ln 2 in two parts; the first ends in zeros, so that a product with an exponent is exact.
inline constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;

inline constexpr std::array<double, 15> kInverseFactorial = [] {
  std::array<double, 15> c{1};
  for (size_t i = 1; i < c.size(); ++i)
    c[i] = c[i - 1] / static_cast<double>(i);
  return c;
}();
// atanh(s)/s = 1 + z/3 + z²/5 + …, z = s².
inline constexpr std::array<double, 12> kAtanh = [] {
  std::array<double, 12> c{};
  for (size_t i = 0; i < c.size(); ++i)
    c[i] = 1.0 / static_cast<double>(2 * i + 1);
  return c;
}();
// sin(r) = r + r·z·S(z), cos(r) = 1 + z·C(z), z = r²: Taylor's series.
inline constexpr std::array<double, 9> kSin = [] {
  std::array<double, 9> c{-1.0 / 6};
  for (size_t i = 1; i < c.size(); ++i)
    c[i] = -c[i - 1] / static_cast<double>((2 * i + 2) * (2 * i + 3));
  return c;
}();
inline constexpr std::array<double, 10> kCos = [] {
  std::array<double, 10> c{-1.0 / 2};
  for (size_t i = 1; i < c.size(); ++i)
    c[i] = -c[i - 1] / static_cast<double>((2 * i + 1) * (2 * i + 2));
  return c;
}();

} // namespace math_detail

// exp(x) within 2 ulp (Cephes). x = n·ln 2 + r, |r| <= ln 2 / 2; 2^n in two factors, so that
// results below the normal range are rounded once. NaN stays NaN; 89 and more give inf, -104 and
// less give 0.
TROUPE_MATH float exp_f32(float x) {
  x = 89.0f < x ? 89.0f : x;
  x = -104.0f > x ? -104.0f : x;
  // A NaN runs through: only the power of two must not be asked for one.
  const float n = x == x ? math_detail::round_even(x * 1.44269504088896341f) : 0.0f;
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.0f);
  const float half = math_detail::round_even(n * 0.5f);
  return p * math_detail::power_of_two(half) * math_detail::power_of_two(n - half);
}

// exp(x) in F64 within 2 ulp, over the whole range: inf from 710 on, 0 from -746 down.
TROUPE_MATH double exp_f64(double x) {
  x = 710.0 < x ? 710.0 : x;
  x = -746.0 > x ? -746.0 : x;
  const double n = x == x ? math_detail::round_even(x * 1.4426950408889634) : 0.0;
  double r = std::fma(n, -math_detail::kLn2High, x);
  r = std::fma(n, -math_detail::kLn2Low, r);
  const double p = math_detail::polynomial(math_detail::kInverseFactorial, r);
  const double half = math_detail::round_even(n * 0.5);
  return p * math_detail::power_of_two(half) * math_detail::power_of_two(n - half);
}

TROUPE_MATH float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
TROUPE_MATH float silu_f32(float x) { return x * (1.0f / (1.0f + exp_f32(-x))); }

// Natural logarithm in F64 within 2 ulp: x = 2^k · m, m in (√½, √2]; log m = 2 atanh((m-1)/(m+1))
// by its series. 0 gives -inf, negative numbers and NaN give NaN.
[[nodiscard]] inline double log_f64(double x) {
  if (x != x || x < 0)
    return std::numeric_limits<double>::quiet_NaN();
  if (x == 0)
    return -std::numeric_limits<double>::infinity();
  if (x > std::numeric_limits<double>::max())
    return x;
  double k = 0;
  if (x < 0x1p-1022) { // subnormal
    x *= 0x1p54;
    k = -54;
  }
  const auto bits = std::bit_cast<uint64_t>(x);
  k += static_cast<double>(static_cast<int64_t>(bits >> 52) - 1023);
  double m = std::bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    k += 1;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  // The leading 2s is kept apart, so that its rounding is the only one near m = 1.
  std::array<double, math_detail::kAtanh.size() - 1> tail;
  for (size_t i = 0; i < tail.size(); ++i)
    tail[i] = math_detail::kAtanh[i + 1];
  const double log_m = std::fma(2.0 * s * z, math_detail::polynomial(tail, z), 2.0 * s);
  return std::fma(k, math_detail::kLn2High, std::fma(k, math_detail::kLn2Low, log_m));
}

// What AdamW divides a moment by after `step` updates, 1 - beta^step; 0 <= beta < 1.
[[nodiscard]] inline double moment_correction(double beta, int64_t step) {
  return 1.0 - exp_f64(static_cast<double>(step) * log_f64(beta));
}

// sin and cos in F64 for |x| up to 2^30: reduction by π/2 in three parts, then Taylor's series.
// Within 2^-52 of the true value.
struct SinCos {
  double sin, cos;
};
[[nodiscard]] inline SinCos sin_cos_f64(double x) {
  const double n = math_detail::round_even(x * 0.63661977236758134308);
  double r = std::fma(n, -1.57079632673412561417e+00, x);
  r = std::fma(n, -6.07710050630396597660e-11, r);
  r = std::fma(n, -2.02226624879595063154e-21, r);
  const double z = r * r;
  const double s = std::fma(r * z, math_detail::polynomial(math_detail::kSin, z), r);
  const double c = std::fma(z, math_detail::polynomial(math_detail::kCos, z), 1.0);
  switch (static_cast<int64_t>(n) & 3) {
  case 0:
    return {s, c};
  case 1:
    return {c, -s};
  case 2:
    return {-s, -c};
  default:
    return {-c, s};
  }
}

// The same function over arrays, in the CPU's widest vectors and with the same bits.
// out[i] = sigmoid(x[i]); in place allowed.
void sigmoid_f32(std::span<const float> x, float* out);
// Σ exp(x[i] - max) in F64 over ascending i; -inf adds 0.
[[nodiscard]] double sum_of_exp(std::span<const float> x, double max);

// out[i] = fma(weight, x[i], out[i]).
void add_weighted(std::span<const float> x, float weight, float* out);

} // namespace troupe
