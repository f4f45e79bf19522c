// What the training kernels need of AVX-512 beyond simd_vec_avx512.hpp. Included once per target,
// see simd_common.hpp; with TROUPE_SIMD_DOT operands of BF16 products are pairs for vdpbf16ps.
namespace troupe::TROUPE_SIMD {

TROUPE_INLINE V sqrt(V a) { return {_mm512_sqrt_ps(a.v)}; }
TROUPE_INLINE V load_words(const uint32_t* p) { return {_mm512_loadu_ps(p)}; }
TROUPE_INLINE void store_words(uint32_t* p, V a) { _mm512_storeu_ps(p, a.v); }
TROUPE_INLINE void store_halves(uint32_t* first, uint32_t* second, V a) {
  const __m512i words = _mm512_castps_si512(a.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(words));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(words, 1));
}
// The largest power of two up to |a|; 0 for denormals, inf for inf and NaN.
TROUPE_INLINE V exponent(V a) {
  return {_mm512_castsi512_ps(
      _mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7f800000)))};
}
TROUPE_INLINE V copy_sign(V magnitude, V sign) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, _mm512_castps_si512(magnitude.v),
                                                        _mm512_castps_si512(sign.v), 0xca))};
}
// To BF16 and back, like to_bf16.
TROUPE_INLINE V round_bf16(V a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  return {_mm512_castsi512_ps(_mm512_and_epi32(r, _mm512_set1_epi32(int(0xffff0000u))))};
}
TROUPE_INLINE V flush_denormals(V a) {
  const __m512i sign =
      _mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(int(0x80000000u)));
  const __mmask16 tiny = _mm512_cmp_ps_mask(abs(a).v, _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(tiny, a.v, _mm512_castsi512_ps(sign))};
}
TROUPE_INLINE V swap_pairs(V a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
TROUPE_INLINE V even_twice(V a) { return {_mm512_moveldup_ps(a.v)}; }
TROUPE_INLINE V odd_twice(V a) { return {_mm512_movehdup_ps(a.v)}; }

// 16 sums in F64, added in halves at the end.
class F64Lanes {
public:
  TROUPE_INLINE F64Lanes() : low_(_mm512_setzero_pd()), high_(_mm512_setzero_pd()) {}
  TROUPE_INLINE void add(V a) {
    const __m256 upper = _mm512_extractf32x8_ps(a.v, 1);
    low_ = _mm512_add_pd(low_, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high_ = _mm512_add_pd(high_, _mm512_cvtps_pd(upper));
  }
  TROUPE_INLINE double reduce() const {
    double lane[8];
    _mm512_storeu_pd(lane, _mm512_add_pd(low_, high_));
    for (int half = 4; half > 0; half /= 2)
      for (int l = 0; l < half; ++l)
        lane[l] += lane[l + half];
    return lane[0];
  }

private:
  __m512d low_, high_;
};

#if TROUPE_SIMD_DOT
// 32 elements of one row as 16 words of BF16 pairs.
TROUPE_INLINE void store_pairs_along(uint32_t* out, V first, V second) {
  _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v)));
}
// 16 words, each of one element of two rows.
TROUPE_INLINE V pairs_across(V even_row, V odd_row) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd_row.v, even_row.v));
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))};
}
// One pair, for the check that the instruction rounds as expected.
[[gnu::noinline]] inline float dot_product(float acc, uint32_t a, uint32_t b) {
  return _mm512_cvtss_f32(_mm512_dpbf16_ps(_mm512_set1_ps(acc),
                                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(a))),
                                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(b)))));
}
#endif

template <bool kDot>
TROUPE_INLINE __m512 multiply_add(uint32_t a, __m512i b, __m512 acc) {
#if TROUPE_SIMD_DOT
  if constexpr (kDot)
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(a))),
                            reinterpret_cast<__m512bh>(b));
#endif
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(a))), _mm512_castsi512_ps(b),
                         acc);
}

// See kernels/train_ops_simd_tile.hpp.
template <bool kDot, bool kAlong>
inline void tile(int64_t steps, const uint32_t* a, int64_t a_step, const uint32_t* b,
                 int64_t b_step, float* c, int64_t c_row, bool from_zero, bool round) {
  constexpr int64_t kRow = kAlong ? kAlongSteps : 1;
  __m512 acc[kTileRows][2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t v = 0; v < 2; ++v)
      acc[i][v] = from_zero ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * c_row + v * 16);
  const auto step = [&](const uint32_t* x) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      acc[i][0] = multiply_add<kDot>(x[i * kRow], b0, acc[i][0]);
      acc[i][1] = multiply_add<kDot>(x[i * kRow], b1, acc[i][1]);
    }
    b += b_step;
  };
  if constexpr (kAlong) {
    for (; steps > 0; steps -= kAlongSteps, a += a_step) {
      const uint32_t* end = a + (steps < kAlongSteps ? steps : kAlongSteps);
      for (const uint32_t* x = a; x < end; ++x)
        step(x);
    }
  } else {
    for (; steps > 0; --steps, a += a_step)
      step(a);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t v = 0; v < 2; ++v) {
      const V sum{acc[i][v]};
      store(c + i * c_row + v * 16, round ? round_bf16(sum) : sum);
    }
}

} // namespace troupe::TROUPE_SIMD
