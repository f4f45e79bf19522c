// What the training kernels need of AVX2 beyond simd_vec_avx2.hpp. Included once, see
// simd_common.hpp.
namespace troupe::TROUPE_SIMD {

TROUPE_INLINE V sqrt(V a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
TROUPE_INLINE V load_words(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
TROUPE_INLINE void store_words(uint32_t* p, V a) { store(reinterpret_cast<float*>(p), a); }
TROUPE_INLINE void store_halves(uint32_t* first, uint32_t* second, V a) {
  _mm256_storeu_ps(reinterpret_cast<float*>(first), a.lo);
  _mm256_storeu_ps(reinterpret_cast<float*>(second), a.hi);
}
TROUPE_INLINE V both(V a, int32_t bits) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(bits));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
// The largest power of two up to |a|; 0 for denormals, inf for inf and NaN.
TROUPE_INLINE V exponent(V a) { return both(a, 0x7f800000); }
TROUPE_INLINE V copy_sign(V magnitude, V sign) {
  const V m = abs(magnitude), s = both(sign, int(0x80000000u));
  return {_mm256_or_ps(m.lo, s.lo), _mm256_or_ps(m.hi, s.hi)};
}
TROUPE_INLINE __m256 round_bf16(__m256 a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a), 16));
}
// To BF16 and back, like to_bf16.
TROUPE_INLINE V round_bf16(V a) { return {round_bf16(a.lo), round_bf16(a.hi)}; }
TROUPE_INLINE V flush_denormals(V a) {
  const V sign = both(a, int(0x80000000u)), magnitude = abs(a);
  const __m256 normal = _mm256_set1_ps(0x1p-126f);
  return {_mm256_blendv_ps(a.lo, sign.lo, _mm256_cmp_ps(magnitude.lo, normal, _CMP_LT_OQ)),
          _mm256_blendv_ps(a.hi, sign.hi, _mm256_cmp_ps(magnitude.hi, normal, _CMP_LT_OQ))};
}
TROUPE_INLINE V swap_pairs(V a) {
  return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
}
TROUPE_INLINE V even_twice(V a) { return {_mm256_moveldup_ps(a.lo), _mm256_moveldup_ps(a.hi)}; }
TROUPE_INLINE V odd_twice(V a) { return {_mm256_movehdup_ps(a.lo), _mm256_movehdup_ps(a.hi)}; }

// 16 sums in F64, added in halves at the end.
class F64Lanes {
public:
  TROUPE_INLINE F64Lanes() {
    for (auto& sum : sums_)
      sum = _mm256_setzero_pd();
  }
  TROUPE_INLINE void add(V a) {
    add(sums_[0], _mm256_castps256_ps128(a.lo));
    add(sums_[1], _mm256_extractf128_ps(a.lo, 1));
    add(sums_[2], _mm256_castps256_ps128(a.hi));
    add(sums_[3], _mm256_extractf128_ps(a.hi, 1));
  }
  TROUPE_INLINE double reduce() const {
    double lane[4];
    _mm256_storeu_pd(
        lane, _mm256_add_pd(_mm256_add_pd(sums_[0], sums_[2]), _mm256_add_pd(sums_[1], sums_[3])));
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }

private:
  static TROUPE_INLINE void add(__m256d& sum, __m128 part) {
    sum = _mm256_add_pd(sum, _mm256_cvtps_pd(part));
  }
  __m256d sums_[4];
};

// A quarter of a tile: four rows of 16 columns fill 8 of 16 registers, which hides the latency of
// an fma.
template <bool kAlong>
TROUPE_INLINE void quarter_tile(int64_t steps, const float* a, int64_t a_step, const float* b,
                                int64_t b_step, float* c, int64_t c_row, bool from_zero,
                                bool round) {
  constexpr int64_t kRow = kAlong ? kAlongSteps : 1;
  __m256 acc[4][2];
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t v = 0; v < 2; ++v)
      acc[i][v] = from_zero ? _mm256_setzero_ps() : _mm256_loadu_ps(c + i * c_row + v * 8);
  const auto step = [&](const float* x) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const __m256 w = _mm256_broadcast_ss(x + i * kRow);
      acc[i][0] = _mm256_fmadd_ps(w, b0, acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(w, b1, acc[i][1]);
    }
    b += b_step;
  };
  if constexpr (kAlong) {
    for (; steps > 0; steps -= kAlongSteps, a += a_step) {
      const float* end = a + (steps < kAlongSteps ? steps : kAlongSteps);
      for (const float* x = a; x < end; ++x)
        step(x);
    }
  } else {
    for (; steps > 0; --steps, a += a_step)
      step(a);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t v = 0; v < 2; ++v)
      _mm256_storeu_ps(c + i * c_row + v * 8, round ? round_bf16(acc[i][v]) : acc[i][v]);
}

// See kernels/train_ops_simd_tile.hpp.
template <bool kDot, bool kAlong>
inline void tile(int64_t steps, const uint32_t* a, int64_t a_step, const uint32_t* b,
                 int64_t b_step, float* c, int64_t c_row, bool from_zero, bool round) {
  static_assert(!kDot);
  const auto* x = reinterpret_cast<const float*>(a);
  const auto* y = reinterpret_cast<const float*>(b);
  for (int64_t i = 0; i < kTileRows; i += 4)
    for (int64_t j = 0; j < kTileColumns; j += 16)
      quarter_tile<kAlong>(steps, x + i * (kAlong ? kAlongSteps : 1), a_step, y + j, b_step,
                           c + i * c_row + j, c_row, from_zero, round);
}

} // namespace troupe::TROUPE_SIMD
