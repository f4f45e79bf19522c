// exp and silu over 16 lanes: the operations of kernels/math.hpp, one by one.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

// x = n·ln 2 + r with |r| ≤ ln 2 / 2; exp(r) by a polynomial; 2^n in two factors, so that results
// below the normal range are rounded once.
TROUPE_INLINE V exp(V x) {
  x = max(set1(-104.0f), min(set1(89.0f), x)); // NaN stays: it is the second operand
  const V n = round_even(x * set1(1.44269504088896341f));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  const V half = round_even(n * set1(0.5f));
  return p * power_of_two(half) * power_of_two(n - half);
}

TROUPE_INLINE V silu(V x) { return x * (set1(1.0f) / (set1(1.0f) + exp(zero() - x))); }

} // namespace troupe::TROUPE_SIMD
