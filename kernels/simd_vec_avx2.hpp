// 16 floats in two AVX registers, and E4M3 / BF16 weights as 16 pairs of BF16.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

struct V {
  __m256 lo, hi;
};
struct Pairs { // lane c: BF16 of (column c, even k) in the low half, (column c, odd k) in the high
  __m256i lo, hi;
};

inline constexpr int kMaxTileRows = 6;
// 16-lane groups of a panel a tile of `rows` rows walks at once: at most 12 of 16 registers
// accumulate, and at least 8, which hides the latency of an fma.
[[maybe_unused]] constexpr int tile_groups(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

TROUPE_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TROUPE_INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TROUPE_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TROUPE_INLINE void store(float* p, V a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
TROUPE_INLINE V fma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TROUPE_INLINE V operator+(V a, V b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
TROUPE_INLINE V operator-(V a, V b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
TROUPE_INLINE V operator*(V a, V b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
TROUPE_INLINE V operator/(V a, V b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
// b where a is NaN, like std::max(b, a).
TROUPE_INLINE V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TROUPE_INLINE V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TROUPE_INLINE V abs(V a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
// a in lanes below n, b elsewhere.
TROUPE_INLINE V first_lanes(int64_t n, V a, V b) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int>(n < 0 ? 0 : n > 16 ? 16 : n));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i lane8 = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bound, lane))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bound, lane8)))};
}

// To the nearest integer, ties to even.
TROUPE_INLINE V round_even(V a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
TROUPE_INLINE __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// 2^n for whole n in [-126, 127].
TROUPE_INLINE V power_of_two(V n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }

TROUPE_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
TROUPE_INLINE V load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
TROUPE_INLINE __m256i bf16_bits(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(quiet), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
// Rounds like to_bf16.
TROUPE_INLINE void store_bf16(uint16_t* p, V a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

TROUPE_INLINE __m256i e4m3_codes(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff)));
  const __m256 m = _mm256_min_ps(magnitude, _mm256_set1_ps(448.0f));
  const __m256i bits = _mm256_castps_si256(m);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(960));
  const __m256 shifted = _mm256_add_ps(m, _mm256_set1_ps(0x1p14f));
  const __m256i small = _mm256_and_si256(_mm256_castps_si256(shifted), _mm256_set1_epi32(0xf));
  const __m256i is_small =
      _mm256_castps_si256(_mm256_cmp_ps(m, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80));
  const __m256i code = _mm256_or_si256(_mm256_blendv_epi8(normal, small, is_small), sign);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), nan);
}
// Rounds like float_to_e4m3. Below the smallest normal number adding 2^14, whose last bit is worth
// 2^-9, leaves the code in the low bits.
TROUPE_INLINE void store_e4m3(uint8_t* p, V a) {
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(e4m3_codes(a.lo), e4m3_codes(a.hi)), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

TROUPE_INLINE Pairs load_pairs(const std::byte* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
TROUPE_INLINE void store_pairs(uint16_t* p, Pairs a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), a.hi);
}
TROUPE_INLINE V even(Pairs p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(p.lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(p.hi, 16))};
}
TROUPE_INLINE V odd(Pairs p) {
  const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(p.lo, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(p.hi, mask))};
}

// ---- E4M3 to BF16, exact -------------------------------------------------------------------

// Byte arithmetic on 32 codes: a normal code's BF16 is (0x3c + e/2, code << 4), with e and the
// mantissa in place; subnormals come from two tables of eight; NaN is put on top.
struct E4m3Decoder {
  __m256i sub_low, sub_high;
};
TROUPE_INLINE E4m3Decoder e4m3_decoder() {
  return {_mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, char(0x80), char(0xc0), 0, 0x20, 0x40,
                                                    0x60, 0, 0, 0, 0, 0, 0, 0, 0)),
          _mm256_broadcastsi128_si256(
              _mm_setr_epi8(0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, 0, 0, 0, 0, 0, 0, 0, 0))};
}
TROUPE_INLINE Pairs decode32(const E4m3Decoder& d, __m256i codes) {
  codes = _mm256_permute4x64_epi64(codes, 0xd8); // so that the in-lane interleaves are in order
  const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
  const __m256i low = _mm256_and_si256(_mm256_slli_epi16(codes, 4), _mm256_set1_epi8(char(0xf0)));
  const __m256i high = _mm256_add_epi8(
      _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(7)), _mm256_set1_epi8(0x3c));
  const __m256i normal = _mm256_cmpgt_epi8(magnitude, _mm256_set1_epi8(7));
  const __m256i nan = _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f));
  __m256i l = _mm256_blendv_epi8(_mm256_shuffle_epi8(d.sub_low, magnitude), low, normal);
  __m256i h = _mm256_blendv_epi8(_mm256_shuffle_epi8(d.sub_high, magnitude), high, normal);
  l = _mm256_blendv_epi8(l, _mm256_set1_epi8(char(0xc0)), nan);
  h = _mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi8(0x7f)));
  h = _mm256_or_si256(h, _mm256_and_si256(codes, _mm256_set1_epi8(char(0x80))));
  return {_mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h)};
}
template <int C>
TROUPE_INLINE void load_e4m3_pairs(const E4m3Decoder& d, const std::byte* p, Pairs (&w)[C]) {
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    w[c] = decode32(d, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * c)));
}

// ---- along a row ---------------------------------------------------------------------------

// Lanes added in halves: l += l+8, l+4, l+2, l+1.
TROUPE_INLINE float reduce_halves(V a) {
  const __m256 h = _mm256_add_ps(a.lo, a.hi);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
TROUPE_INLINE float max_lane(V a) {
  const __m256 h = _mm256_max_ps(a.lo, a.hi);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

TROUPE_INLINE void reduce16(const V (&a)[16], float* out) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    out[i] = reduce_halves(a[i]);
}

inline constexpr bool kHasDot = false;

} // namespace troupe::TROUPE_SIMD
