// Packing, and tiles at the edges of a result. Included once per target after the target's own
// header, which has
//
//   tile<kDot, kAlong>   c [8, 32] = (from_zero ? 0 : c) + a · b over `steps` words; a_step is
//   words
//                        from one step to the next (along: from 16 to the next 16)
//
// Each element of c is one chain over ascending steps: neither the cut of the steps into calls nor
// the place in a tile changes a bit.
namespace troupe::TROUPE_SIMD {

inline constexpr Operand kBf16Operand = kHasDot ? Operand::dot : Operand::swapped;

TROUPE_INLINE V load_some(const float* p, int64_t n) {
  if (n >= 16)
    return load(p);
  float part[16] = {};
  if (n > 0)
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof(float));
  return load(part);
}
TROUPE_INLINE void store_some(float* p, int64_t n, V v) {
  if (n >= 16)
    return store(p, v);
  float part[16];
  store(part, v);
  if (n > 0)
    std::memcpy(p, part, static_cast<size_t>(n) * sizeof(float));
}
TROUPE_INLINE V maybe_bf16(V a, bool round) { return round ? round_bf16(a) : a; }
TROUPE_INLINE V bf16_operand(V a) { return round_bf16(flush_denormals(a)); }

// 16 words of a row from its n remaining elements on.
template <Operand kOperand>
TROUPE_INLINE void words_along(const float* x, int64_t n, uint32_t* out) {
  if constexpr (kOperand == Operand::f32)
    store_words(out, load_some(x, n));
  else if constexpr (kOperand == Operand::swapped)
    store_words(out, swap_pairs(bf16_operand(load_some(x, n))));
#if TROUPE_SIMD_DOT
  else
    store_pairs_along(out, load_some(x, n), load_some(x + 16, n - 16));
#endif
}

template <Operand kOperand>
inline constexpr int64_t kElementsAlong = kOperand == Operand::dot ? 32 : 16; // in 16 words

// A panel of a: up to 8 rows of n elements; rows that are not there are zeros.
template <Operand kOperand>
inline void pack_along(int64_t rows, int64_t n, const float* x, int64_t stride, uint32_t* out) {
  for (int64_t at = 0; at < n; at += kElementsAlong<kOperand>) {
    for (int64_t i = 0; i < rows; ++i, out += kAlongSteps)
      words_along<kOperand>(x + i * stride + at, n - at, out);
    for (int64_t i = rows; i < kTileRows; ++i, out += kAlongSteps)
      store_words(out, zero());
  }
}

// Rows that words_across asks for ahead: it waits for memory more than it works, and a stride is
// too long for the CPU to guess.
inline constexpr int64_t kRowsAhead = 6;

// put(step, column, words) for n rows and every 16 of their columns. Rows are read as they lie in
// memory.
template <Operand kOperand, class Put>
TROUPE_INLINE void words_across(int64_t n, int64_t columns, const float* x, int64_t stride,
                                Put put) {
  if constexpr (kOperand == Operand::f32) {
    for (int64_t s = 0; s < n; ++s, x += stride)
      for (int64_t j = 0; j < columns; j += 16) {
        __builtin_prefetch(x + kRowsAhead * stride + j);
        put(s, j, load_some(x + j, columns - j));
      }
  } else {
    for (int64_t s = 0; s < n; s += 2, x += 2 * stride)
      for (int64_t j = 0; j < columns; j += 16) {
        __builtin_prefetch(x + kRowsAhead * stride + j);
        __builtin_prefetch(x + (kRowsAhead + 1) * stride + j);
        const V even = load_some(x + j, columns - j);
        const V odd = s + 1 < n ? load_some(x + stride + j, columns - j) : zero();
#if TROUPE_SIMD_DOT
        put(s / 2, j, pairs_across(even, odd));
#else
        put(s, j, bf16_operand(odd));
        put(s + 1, j, bf16_operand(even));
#endif
      }
  }
}

// Panels of a across n rows of x, up to a whole number of 16 columns.
template <Operand kOperand>
inline void pack_a_across(int64_t n, int64_t columns, const float* x, int64_t stride,
                          uint32_t* out) {
  const int64_t panel = steps_of(kOperand, n) * kTileRows;
  words_across<kOperand>(n, columns, x, stride, [&](int64_t s, int64_t j, V words) {
    uint32_t* to = out + j / kTileRows * panel + s * kTileRows;
    store_halves(to, to + panel, words);
  });
}
// Panels of b across n rows of x; what is missing of the last one is zeros.
template <Operand kOperand>
inline void pack_b_across(int64_t n, int64_t columns, const float* x, int64_t stride, uint32_t* out,
                          int64_t panel_steps) {
  const auto at = [&](int64_t s, int64_t j) {
    return out + (j / kTileColumns * panel_steps + s) * kTileColumns + j % kTileColumns;
  };
  words_across<kOperand>(n, columns, x, stride,
                         [&](int64_t s, int64_t j, V words) { store_words(at(s, j), words); });
  const int64_t last = round_up(columns, 16);
  for (int64_t s = 0; last % kTileColumns != 0 && s < steps_of(kOperand, n); ++s)
    store_words(at(s, last), zero());
}

// out[j · out_stride + i] = in[i · 16 + j] for 16 × 16 words.
inline void transpose16(const uint32_t* in, uint32_t* out, int64_t out_stride) {
  const auto* x = reinterpret_cast<const float*>(in);
  auto* y = reinterpret_cast<float*>(out);
  for (int64_t j = 0; j < 16; j += 4)
    for (int64_t i = 0; i < 16; i += 4) {
      __m128 r0 = _mm_loadu_ps(x + i * 16 + j), r1 = _mm_loadu_ps(x + (i + 1) * 16 + j);
      __m128 r2 = _mm_loadu_ps(x + (i + 2) * 16 + j), r3 = _mm_loadu_ps(x + (i + 3) * 16 + j);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      _mm_storeu_ps(y + j * out_stride + i, r0);
      _mm_storeu_ps(y + (j + 1) * out_stride + i, r1);
      _mm_storeu_ps(y + (j + 2) * out_stride + i, r2);
      _mm_storeu_ps(y + (j + 3) * out_stride + i, r3);
    }
}

// Panels of b whose columns are rows of x, n elements each.
template <Operand kOperand>
inline void pack_b_along(int64_t n, int64_t columns, const float* x, int64_t stride, uint32_t* out,
                         int64_t panel_steps) {
  alignas(64) uint32_t block[16 * 16], turned[16 * 16];
  const int64_t steps = steps_of(kOperand, n);
  for (int64_t j = 0; j < round_up(columns, kTileColumns); j += 16) {
    uint32_t* to = out + j / kTileColumns * panel_steps * kTileColumns + j % kTileColumns;
    for (int64_t at = 0, s = 0; at < n; at += kElementsAlong<kOperand>, s += kAlongSteps) {
      for (int64_t i = 0; i < 16; ++i)
        if (j + i < columns)
          words_along<kOperand>(x + (j + i) * stride + at, n - at, block + i * 16);
        else
          store_words(block + i * 16, zero());
      transpose16(block, turned, 16);
      for (int64_t i = 0; i < std::min(kAlongSteps, steps - s); ++i)
        store_words(to + (s + i) * kTileColumns, load_words(turned + i * 16));
    }
  }
}

// A tile of which [rows, columns] exists.
template <bool kDot, bool kAlong>
inline void tile_at(int64_t rows, int64_t columns, int64_t steps, const uint32_t* a, int64_t a_step,
                    const uint32_t* b, int64_t b_step, float* c, int64_t c_row, bool from_zero,
                    bool round) {
  if (rows >= kTileRows && columns >= kTileColumns)
    return tile<kDot, kAlong>(steps, a, a_step, b, b_step, c, c_row, from_zero, round);
  alignas(64) float whole[kTileRows * kTileColumns] = {};
  rows = std::min(rows, kTileRows);
  columns = std::min(columns, kTileColumns);
  for (int64_t i = 0; i < rows && !from_zero; ++i)
    std::memcpy(whole + i * kTileColumns, c + i * c_row,
                static_cast<size_t>(columns) * sizeof(float));
  tile<kDot, kAlong>(steps, a, a_step, b, b_step, whole, kTileColumns, from_zero, round);
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(c + i * c_row, whole + i * kTileColumns,
                static_cast<size_t>(columns) * sizeof(float));
}

} // namespace troupe::TROUPE_SIMD
