// 16 floats in one AVX-512 register, and E4M3 / BF16 weights as 16 pairs of BF16.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

struct V {
  __m512 v;
};
struct Pairs { // lane c: BF16 of (column c, even k) in the low half, (column c, odd k) in the high
  __m512i v;
};

inline constexpr int kMaxTileRows = 6;
// 16-lane groups of a panel a tile of `rows` rows walks at once: 6 × 4 accumulators of 32
// registers.
[[maybe_unused]] constexpr int tile_groups(int) { return 4; }

TROUPE_INLINE V zero() { return {_mm512_setzero_ps()}; }
TROUPE_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
TROUPE_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
TROUPE_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
TROUPE_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TROUPE_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
TROUPE_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
TROUPE_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
TROUPE_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
// b where a is NaN, like std::max(b, a).
TROUPE_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
TROUPE_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
TROUPE_INLINE V abs(V a) {
  return {_mm512_castsi512_ps(
      _mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
// a in lanes below n, b elsewhere.
TROUPE_INLINE V first_lanes(int64_t n, V a, V b) {
  const uint32_t mask = n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1;
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), b.v, a.v)};
}

// To the nearest integer, ties to even.
TROUPE_INLINE V round_even(V a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for whole n in [-126, 127].
TROUPE_INLINE V power_of_two(V n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

TROUPE_INLINE V load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
// Rounds like to_bf16.
TROUPE_INLINE void store_bf16(uint16_t* p, V a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}

// Rounds like float_to_e4m3. Below the smallest normal number adding 2^14, whose last bit is worth
// 2^-9, leaves the code in the low bits.
TROUPE_INLINE void store_e4m3(uint8_t* p, V a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512 m = _mm512_min_ps(abs(a).v, _mm512_set1_ps(448.0f));
  const __m512i bits = _mm512_castps_si512(m);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(960));
  const __m512 shifted = _mm512_add_ps(m, _mm512_set1_ps(0x1p14f));
  const __m512i small = _mm512_and_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0xf));
  const __mmask16 is_small = _mm512_cmp_ps_mask(m, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
  const __m512i sign = _mm512_and_epi32(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
  __m512i code = _mm512_or_epi32(_mm512_mask_blend_epi32(is_small, normal, small), sign);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  code = _mm512_mask_blend_epi32(nan, code, _mm512_set1_epi32(0x7f));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
}

TROUPE_INLINE Pairs load_pairs(const std::byte* p) { return {_mm512_loadu_si512(p)}; }
TROUPE_INLINE void store_pairs(uint16_t* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
TROUPE_INLINE V even(Pairs p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(p.v, 16))}; }
TROUPE_INLINE V odd(Pairs p) {
  return {_mm512_castsi512_ps(_mm512_and_epi32(p.v, _mm512_set1_epi32(int(0xffff0000u))))};
}

// ---- E4M3 to BF16, exact -------------------------------------------------------------------

// BF16 bits of the 128 non-negative codes.
struct alignas(64) E4m3Tables {
  uint16_t words[128];
  uint8_t low[128], high[128];
};
inline constexpr E4m3Tables make_e4m3_tables() {
  E4m3Tables t{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    int bits = ((exponent + 120) << 7) | (mantissa << 4);
    if (code == 0x7f)
      bits = 0x7fc0;
    else if (exponent == 0) { // mantissa · 2^-9, normalized
      const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
      bits = mantissa == 0 ? 0 : ((118 + top) << 7) | (((mantissa << (7 - top)) & 0x7f));
    }
    t.words[code] = static_cast<uint16_t>(bits);
    t.low[code] = static_cast<uint8_t>(bits & 0xff);
    t.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return t;
}
inline constexpr E4m3Tables kE4m3Tables = make_e4m3_tables();

#if TROUPE_SIMD_DOT
// With VBMI one vpermi2b looks up 64 codes in a table of 128 bytes: two of them and an interleave
// give 64 BF16. Bit 7 of the index is ignored, so the sign only has to be put back.
struct E4m3Decoder {
  __m512i low0, low1, high0, high1, order;
};
TROUPE_INLINE E4m3Decoder e4m3_decoder() {
  return {_mm512_load_si512(kE4m3Tables.low), _mm512_load_si512(kE4m3Tables.low + 64),
          _mm512_load_si512(kE4m3Tables.high), _mm512_load_si512(kE4m3Tables.high + 64),
          // quadwords such that the in-lane interleaves below come out in order
          _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)};
}
TROUPE_INLINE void decode64(const E4m3Decoder& d, __m512i codes, Pairs& a, Pairs& b) {
  codes = _mm512_permutexvar_epi64(d.order, codes);
  const __m512i low = _mm512_permutex2var_epi8(d.low0, codes, d.low1);
  __m512i high = _mm512_permutex2var_epi8(d.high0, codes, d.high1);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(char(0x80)), 0xf8); // h | (c & s)
  a = {_mm512_unpacklo_epi8(low, high)};
  b = {_mm512_unpackhi_epi8(low, high)};
}
template <int C>
TROUPE_INLINE void load_e4m3_pairs(const E4m3Decoder& d, const std::byte* p, Pairs (&w)[C]) {
  static_assert(C % 2 == 0);
#pragma GCC unroll 16
  for (int c = 0; c < C; c += 2)
    decode64(d, _mm512_loadu_si512(p + 32 * c), w[c], w[c + 1]);
}
#else
struct E4m3Decoder {
  __m512i t0, t1, t2, t3;
};
TROUPE_INLINE E4m3Decoder e4m3_decoder() {
  const uint16_t* t = kE4m3Tables.words;
  return {_mm512_load_si512(t), _mm512_load_si512(t + 32), _mm512_load_si512(t + 64),
          _mm512_load_si512(t + 96)};
}
TROUPE_INLINE Pairs decode32(const E4m3Decoder& d, __m256i codes) {
  const __m512i c = _mm512_cvtepu8_epi16(codes);
  const __m512i lower = _mm512_permutex2var_epi16(d.t0, c, d.t1);
  const __m512i upper = _mm512_permutex2var_epi16(d.t2, c, d.t3);
  const __mmask32 big = _mm512_test_epi16_mask(c, _mm512_set1_epi16(0x40));
  const __m512i magnitude = _mm512_mask_blend_epi16(big, lower, upper);
  return {_mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(c, 8),
                                    _mm512_set1_epi16(short(0x8000)), 0xf8)};
}
template <int C>
TROUPE_INLINE void load_e4m3_pairs(const E4m3Decoder& d, const std::byte* p, Pairs (&w)[C]) {
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    w[c] = decode32(d, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * c)));
}
#endif

// ---- along a row ---------------------------------------------------------------------------

// Lanes added in halves: l += l+8, l+4, l+2, l+1.
TROUPE_INLINE float reduce_halves(V a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
TROUPE_INLINE float max_lane(V a) { return _mm512_reduce_max_ps(a.v); }

// out[i] = reduce_halves(a[i]) for all 16 at once: four rounds that each add halves and merge two
// vectors into one, as one transposition would.
TROUPE_INLINE void reduce16(const V (&a)[16], float* out) {
  // The rounds leave vector kOrder's k-th entry in lane k.
  constexpr int kOrder[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  __m512 s[16];
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane)
    s[kOrder[lane]] = a[lane].v;
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i)
    s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[i], s[i + 8], 0x44),
                         _mm512_shuffle_f32x4(s[i], s[i + 8], 0xee));
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i)
    s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[i], s[i + 4], 0x88),
                         _mm512_shuffle_f32x4(s[i], s[i + 4], 0xdd));
#pragma GCC unroll 16
  for (int i = 0; i < 2; ++i) {
    const __m512d x = _mm512_castps_pd(s[i]), y = _mm512_castps_pd(s[i + 2]);
    s[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  _mm512_storeu_ps(
      out, _mm512_add_ps(_mm512_shuffle_ps(s[0], s[1], 0x88), _mm512_shuffle_ps(s[0], s[1], 0xdd)));
}

#if TROUPE_SIMD_DOT
inline constexpr bool kHasDot = true;
// acc + a.even·w.even + a.odd·w.odd as vdpbf16ps rounds it.
TROUPE_INLINE V dot(V acc, Pairs w, Pairs a) {
  return {
      _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(a.v))};
}
// Rounds to BF16 with subnormals as zero: what dot takes them for anyway.
TROUPE_INLINE void store_bf16_flushed(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
TROUPE_INLINE Pairs broadcast_pair(const uint16_t* a) {
  int32_t both;
  std::memcpy(&both, a, sizeof both);
  return {_mm512_set1_epi32(both)};
}
TROUPE_INLINE Pairs broadcast_even(const uint16_t* a) { return {_mm512_set1_epi32(*a)}; }
TROUPE_INLINE Pairs broadcast_odd(const uint16_t* a) {
  return {_mm512_set1_epi32(int(uint32_t{*a} << 16))};
}
TROUPE_INLINE Pairs keep_even(Pairs p) {
  return {_mm512_and_epi32(p.v, _mm512_set1_epi32(0xffff))};
}
TROUPE_INLINE Pairs keep_odd(Pairs p) {
  return {_mm512_and_epi32(p.v, _mm512_set1_epi32(int(0xffff0000u)))};
}
#else
inline constexpr bool kHasDot = false;
#endif

} // namespace troupe::TROUPE_SIMD
