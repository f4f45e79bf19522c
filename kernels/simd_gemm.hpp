// Rows times one panel of 64 packed weight rows: the inner loop of every Linear.
//
// A register tile of up to 6 rows × 64 columns walks a piece of K upward; each output element
// belongs to one lane of one accumulator, whatever the number of rows, so how rows are tiled,
// pieces are cut and work is spread never reaches a result. Sums travel between pieces through a
// small [rows][64] buffer in F32, which is exact.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

// Arithmetic and weight storage. f32_*: one fma per product, inputs as floats. dot_*: vdpbf16ps,
// inputs as pairs of BF16.
enum class Kind { f32_f32, f32_bf16, f32_f8, dot_bf16, dot_f8 };
constexpr bool is_dot(Kind k) { return k == Kind::dot_bf16 || k == Kind::dot_f8; }
constexpr bool is_f8(Kind k) { return k == Kind::f32_f8 || k == Kind::dot_f8; }
constexpr int64_t bytes_per_pair(Kind k) {
  return 2 * kPanelRows * (k == Kind::f32_f32 ? 4 : is_f8(k) ? 1 : 2);
}
template <Kind kKind>
using Input = std::conditional_t<is_dot(kKind), uint16_t, float>;

// Bytes of the next piece's weights that a tile of some rows prefetches with each pair of K: the
// first tile of a piece would otherwise wait for memory while the others leave it idle.
inline constexpr int64_t kPrefetchBytes = 128;

// What one register tile does. Columns count from the start of a K-segment.
struct Tile {
  const void* const* rows = nullptr; // each row's input, at column `begin`
  const std::byte* w = nullptr;      // the segment's first pair in its panel
  int64_t begin = 0, end = 0;
  float* acc = nullptr;           // [rows][64]
  bool fresh = false;             // sums start from +0, not from acc
  const float* scale_w = nullptr; // [64]: this piece is a scale block, acc = fma(scale, sum, acc)
  const float* const* scale_x = nullptr; // each row's activation scale for this block, or null
  const std::byte* prefetch = nullptr;   // what will be read next, or null
  const std::byte* prefetch_end = nullptr;
  // Where the first of several tiles leaves the F8 weights it decodes, in the BF16 layout and from
  // the pair of `begin` on, for the others; or null.
  uint16_t* decoded = nullptr;
};

// The weights of one pair of K after another, in registers. With kKeep they are stored as well.
template <Kind kKind, int C, bool kKeep>
struct Weights {
  E4m3Decoder decoder{};
  uint16_t* decoded = nullptr;
  TROUPE_INLINE Weights(const Tile& t, int group) {
    if constexpr (is_f8(kKind))
      decoder = e4m3_decoder();
    if constexpr (kKeep)
      decoded = t.decoded + 32 * group;
  }
  TROUPE_INLINE void pairs(const std::byte* p, Pairs (&w)[C]) {
    if constexpr (is_f8(kKind))
      load_e4m3_pairs(decoder, p, w);
    else
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        w[c] = load_pairs(p + 64 * c);
    if constexpr (kKeep) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        store_pairs(decoded + 32 * c, w[c]);
      decoded += 2 * kPanelRows;
    }
  }
};

// One K column of a pair, for ranges that begin or end inside a pair.
template <Kind kKind, int R, int C, bool kKeep>
TROUPE_INLINE void half_step(V (&acc)[R][C], Weights<kKind, C, kKeep>& weights,
                             const Input<kKind>* const (&a)[R], int64_t i, const std::byte* p,
                             bool is_odd) {
  if constexpr (kKind == Kind::f32_f32) {
    const float* w = reinterpret_cast<const float*>(p) + (is_odd ? kPanelRows : 0);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        acc[r][c] = fma(set1(a[r][i]), load(w + 16 * c), acc[r][c]);
  } else {
    Pairs w[C];
    weights.pairs(p, w);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        if constexpr (is_dot(kKind)) // both factors are cut: what lies beyond may be NaN
          acc[r][c] = is_odd ? dot(acc[r][c], keep_odd(w[c]), broadcast_odd(a[r] + i))
                             : dot(acc[r][c], keep_even(w[c]), broadcast_even(a[r] + i));
        else
          acc[r][c] = fma(set1(a[r][i]), is_odd ? odd(w[c]) : even(w[c]), acc[r][c]);
      }
  }
}

template <Kind kKind, int R, int C, bool kKeep>
TROUPE_INLINE void pair_step(V (&acc)[R][C], Weights<kKind, C, kKeep>& weights,
                             const Input<kKind>* const (&a)[R], int64_t i, const std::byte* p) {
  if constexpr (kKind == Kind::f32_f32) {
    const float* w = reinterpret_cast<const float*>(p);
#pragma GCC unroll 16
    for (int h = 0; h < 2; ++h) {
      V wh[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        wh[c] = load(w + h * kPanelRows + 16 * c);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V x = set1(a[r][i + h]);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c)
          acc[r][c] = fma(x, wh[c], acc[r][c]);
      }
    }
  } else {
    Pairs w[C];
    weights.pairs(p, w);
    if constexpr (is_dot(kKind)) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Pairs x = broadcast_pair(a[r] + i);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c)
          acc[r][c] = dot(acc[r][c], w[c], x);
      }
    } else {
#pragma GCC unroll 16
      for (int h = 0; h < 2; ++h) {
        V wh[C];
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c)
          wh[c] = h ? odd(w[c]) : even(w[c]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const V x = set1(a[r][i + h]);
#pragma GCC unroll 16
          for (int c = 0; c < C; ++c)
            acc[r][c] = fma(x, wh[c], acc[r][c]);
        }
      }
    }
  }
}

// Columns [16·group, 16·(group + C)) of the tile.
template <Kind kKind, int R, int C, bool kKeep>
TROUPE_INLINE void run_groups(const Tile& t, int group) {
  Weights<kKind, C, kKeep> weights(t, group);
  const Input<kKind>* a[R];
  V acc[R][C];
  float* const out = t.acc + 16 * group;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = static_cast<const Input<kKind>*>(t.rows[r]);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      acc[r][c] = t.fresh || t.scale_w ? zero() : load(out + r * kPanelRows + 16 * c);
  }
  constexpr int64_t kPairBytes = bytes_per_pair(kKind);
  // 16 columns take 16 floats of each row of a pair, or 16 pairs.
  constexpr int64_t kGroupBytes = kKind == Kind::f32_f32 ? 64 : kPairBytes / 4;
  const std::byte* p = t.w + (t.begin / 2) * kPairBytes + group * kGroupBytes;
  const int64_t n = t.end - t.begin;
  int64_t i = 0;
  if (t.begin % 2 && n > 0) {
    half_step<kKind, R, C, kKeep>(acc, weights, a, 0, p, true);
    p += kPairBytes;
    i = 1;
  }
  if (R >= 3 && t.prefetch)
    for (const std::byte* ahead = t.prefetch; i + 2 <= n; i += 2, p += kPairBytes) {
      for (int64_t line = 0; line < kPrefetchBytes; line += 64, ahead += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      pair_step<kKind, R, C, kKeep>(acc, weights, a, i, p);
    }
  else
    for (; i + 2 <= n; i += 2, p += kPairBytes)
      pair_step<kKind, R, C, kKeep>(acc, weights, a, i, p);
  if (i < n)
    half_step<kKind, R, C, kKeep>(acc, weights, a, i, p, false);
  if (!t.scale_w) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        store(out + r * kPanelRows + 16 * c, acc[r][c]);
    return;
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    const V scale = load(t.scale_w + 16 * (group + c));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* o = out + r * kPanelRows + 16 * c;
      const V factor = t.scale_x ? set1(*t.scale_x[r]) * scale : scale;
      store(o, fma(factor, acc[r][c], t.fresh ? zero() : load(o)));
    }
  }
}

template <Kind kKind, int R, bool kKeep>
__attribute__((noinline)) void run_tile(const Tile& t) {
  constexpr int kGroups = tile_groups(R);
  for (int group = 0; group < 4; group += kGroups)
    run_groups<kKind, R, kGroups, kKeep>(t, group);
}

template <Kind kKind, bool kKeep>
void run_tile_of(int rows, const Tile& t) {
  static_assert(kMaxTileRows == 6);
  switch (rows) {
  case 1:
    return run_tile<kKind, 1, kKeep>(t);
  case 2:
    return run_tile<kKind, 2, kKeep>(t);
  case 3:
    return run_tile<kKind, 3, kKeep>(t);
  case 4:
    return run_tile<kKind, 4, kKeep>(t);
  case 5:
    return run_tile<kKind, 5, kKeep>(t);
  default:
    return run_tile<kKind, 6, kKeep>(t);
  }
}

inline void run_tile_of(Kind kind, int rows, const Tile& t) {
  switch (kind) {
  case Kind::f32_f32:
    return run_tile_of<Kind::f32_f32, false>(rows, t);
  case Kind::f32_bf16:
    return run_tile_of<Kind::f32_bf16, false>(rows, t);
  case Kind::f32_f8:
    return t.decoded ? run_tile_of<Kind::f32_f8, true>(rows, t)
                     : run_tile_of<Kind::f32_f8, false>(rows, t);
#if TROUPE_SIMD_DOT
  case Kind::dot_bf16:
    return run_tile_of<Kind::dot_bf16, false>(rows, t);
  case Kind::dot_f8:
    return t.decoded ? run_tile_of<Kind::dot_f8, true>(rows, t)
                     : run_tile_of<Kind::dot_f8, false>(rows, t);
#else
  default:
    return;
#endif
  }
}

// `rows` rows in as few and as even tiles as possible. F8 weights are decoded by the first tile,
// beside its products; `decoded` has room for them where there are several tiles.
inline void run_rows(Kind kind, int64_t rows, Tile t, uint16_t* decoded) {
  const int64_t tiles = ceil_div(rows, kMaxTileRows);
  const int64_t prefetched = (t.end - t.begin) / 2 * kPrefetchBytes;
  t.decoded = tiles > 1 && is_f8(kind) ? decoded : nullptr;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t n = rows / tiles + (i < rows % tiles);
    run_tile_of(kind, static_cast<int>(n), t);
    t.rows += n;
    t.acc += n * kPanelRows;
    t.scale_x += t.scale_x ? n : 0;
    t.prefetch = t.prefetch_end - t.prefetch > prefetched ? t.prefetch + prefetched : nullptr;
    if (t.decoded == nullptr)
      continue;
    t.w = reinterpret_cast<const std::byte*>(t.decoded);
    t.decoded = nullptr;
    t.end -= t.begin / 2 * 2;
    t.begin %= 2;
    kind = kind == Kind::dot_f8 ? Kind::dot_bf16 : Kind::f32_bf16;
  }
}

// ---- inputs --------------------------------------------------------------------------------

inline void widen_row(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store(out + i, load_bf16(x + i));
  for (; i < n; ++i)
    out[i] = to_float(BF16{x[i]});
}

// E4M3 codes to BF16, exact.
inline void decode_codes(const uint8_t* codes, int64_t n, uint16_t* out) {
  const E4m3Decoder decoder = e4m3_decoder();
  const auto decode64 = [&](const uint8_t* from, uint16_t* to) {
    Pairs p[2];
    load_e4m3_pairs(decoder, reinterpret_cast<const std::byte*>(from), p);
    store_pairs(to, p[0]);
    store_pairs(to + 32, p[1]);
  };
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    decode64(codes + i, out + i);
  if (i == n)
    return;
  uint8_t in[64] = {};
  uint16_t wide[64];
  std::memcpy(in, codes + i, static_cast<size_t>(n - i));
  decode64(in, wide);
  std::memcpy(out + i, wide, static_cast<size_t>(2 * (n - i)));
}

// Rows per block when num_rows > 0 rows are cut into as few blocks of at most `limit` as possible:
// about even, so that no last block streams the weights for a row or two, and whole tiles.
inline int64_t even_rows(int64_t num_rows, int64_t limit) {
  const int64_t rows = ceil_div(num_rows, ceil_div(num_rows, limit));
  return ceil_div(rows, kMaxTileRows) * kMaxTileRows;
}
static_assert(kRowBlock % (8 * kMaxTileRows) == 0, "halved limits stay whole tiles");

// Up to kRowBlock rows of a RowSource.
struct RowBlock {
  int64_t num_rows = 0;
  DType dtype = DType::f32;         // of plain rows
  bool quantized = false;           // then `data` points at codes
  const std::byte* data[kRowBlock]; // each row's first column
  const float* scales[kRowBlock];   // quantized rows: each row's first scale

  void add(const RowSource& source, int64_t row) {
    const int64_t i = num_rows++;
    if (source.quantized()) {
      data[i] = reinterpret_cast<const std::byte*>(source.xq.codes + row * source.xq.code_stride);
      scales[i] = source.xq.scales + row * source.xq.scale_stride;
    } else {
      data[i] = static_cast<const std::byte*>(source.x.data) +
                row * source.x.stride * size_of(source.x.dtype);
    }
  }
  void start(const RowSource& source) {
    num_rows = 0;
    quantized = source.quantized();
    dtype = quantized ? DType::f8_e4m3 : source.x.dtype;
  }
};

inline Kind kind_of(DType x, DType w) {
  if (kHasDot && x != DType::f32 && w != DType::f32)
    return w == DType::bf16 ? Kind::dot_bf16 : Kind::dot_f8;
  return w == DType::f32 ? Kind::f32_f32 : w == DType::bf16 ? Kind::f32_bf16 : Kind::f32_f8;
}

// Buffers of one panel multiplication, on the stack of the worker.
struct PanelScratch {
  alignas(64) float input[kRowBlock * kPieceColumns]; // converted rows (floats or BF16)
  alignas(64) uint16_t weights[kPieceColumns * kPanelRows + 2 * kPanelRows]; // decoded E4M3
  alignas(64) float block_sum[kRowBlock * kPanelRows];
  alignas(64) float pending[3][kRowBlock * kPanelRows]; // left halves of the tree of segments
};
static_assert(kMaxSegments == 8, "three pending levels");

class PanelProduct {
public:
  // Sums of `rows` with panel `panel` of w, into out [rows][64] in F32.
  PanelProduct(const RowBlock& rows, const PackedMatrix& w, PanelScratch& scratch)
      : rows_(rows), w_(w), scratch_(scratch), kind_(kind_of(rows.dtype, w.dtype)),
        pair_bytes_(pair_bytes(w.dtype)),
        blocks_(w.dtype == DType::f8_e4m3 ? num_scale_blocks(w) : 0) {
    for (int s = 0; s < w.segments.count; ++s)
      panel_pairs_ += ceil_div(w.segments.begin[s + 1] - w.segments.begin[s], 2);
  }

  void multiply(int64_t panel, float* out) {
    segment_ = w_.data + panel * panel_pairs_ * pair_bytes_;
    scales_ = w_.scales + panel * blocks_ * kPanelRows;
    for (int s = 0; s < w_.segments.count; ++s) {
      const int64_t begin = w_.segments.begin[s], end = w_.segments.begin[s + 1];
      sum_segment(begin, end, out);
      if (w_.segments.count > 1)
        fold(s, out);
      segment_ += ceil_div(end - begin, 2) * pair_bytes_;
    }
  }

  static int64_t num_scale_blocks(const PackedMatrix& w) {
    return ceil_div(w.k0 + w.k, w.block_k) - w.k0 / w.block_k;
  }

private:
  // Adds the tree of adjacent pairs as a binary counter: after segment s, as many pending left
  // halves are complete as s has trailing ones.
  void fold(int s, float* out) {
    const int64_t n = rows_.num_rows * kPanelRows;
    int level = 0;
    for (; s >> level & 1; ++level)
      for (int64_t i = 0; i < n; i += 16)
        store(out + i, load(scratch_.pending[level] + i) + load(out + i));
    if (s + 1 < w_.segments.count)
      std::memcpy(scratch_.pending[level], out, static_cast<size_t>(n) * sizeof(float));
  }

  void sum_segment(int64_t begin, int64_t end, float* out) {
    if (begin == end)
      std::memset(out, 0, static_cast<size_t>(rows_.num_rows * kPanelRows) * sizeof(float));
    bool fresh = true;
    for (int64_t k = begin; k < end;) {
      int64_t next = std::min(end, k + kPieceColumns);
      if (blocks_) { // pieces are scale blocks
        const int64_t block = (w_.k0 + k) / w_.block_k;
        next = std::min(end, (block + 1) * w_.block_k - w_.k0);
        sum_scale_block(begin, k, next, block - w_.k0 / w_.block_k, out, fresh);
      } else {
        sum_piece(begin, k, next, out, fresh, nullptr, nullptr);
      }
      fresh = false;
      k = next;
    }
  }

  void sum_scale_block(int64_t segment, int64_t begin, int64_t end, int64_t block, float* out,
                       bool fresh) {
    const float* scale = scales_ + block * kPanelRows;
    const float* scale_x[kRowBlock];
    if (rows_.quantized)
      for (int64_t r = 0; r < rows_.num_rows; ++r)
        scale_x[r] = rows_.scales[r] + begin / kQuantTile;
    const float* const* scale_rows = rows_.quantized ? scale_x : nullptr;
    if (end - begin <= kPieceColumns)
      return sum_piece(segment, begin, end, out, fresh, scale, scale_rows);
    // A block longer than a piece is summed by itself first.
    for (int64_t k = begin; k < end; k += kPieceColumns)
      sum_piece(segment, k, std::min(end, k + kPieceColumns), scratch_.block_sum, k == begin,
                nullptr, nullptr);
    for (int64_t r = 0; r < rows_.num_rows; ++r)
      for (int64_t c = 0; c < kPanelRows; c += 16) {
        float* o = out + r * kPanelRows + c;
        store(o, fma(load(scale + c), load(scratch_.block_sum + r * kPanelRows + c),
                     fresh ? zero() : load(o)));
      }
  }

  // Columns [begin, end) of the matrix, at most kPieceColumns of them.
  void sum_piece(int64_t segment, int64_t begin, int64_t end, float* out, bool fresh,
                 const float* scale, const float* const* scale_x) {
    const void* inputs[kRowBlock];
    const int64_t n = end - begin;
    for (int64_t r = 0; r < rows_.num_rows; ++r)
      inputs[r] = input(r, begin, n);
    Tile t{.rows = inputs,
           .w = segment_,
           .begin = begin - segment,
           .end = end - segment,
           .acc = out,
           .fresh = fresh,
           .scale_w = scale,
           .scale_x = scale_x};
    if (rows_.num_rows > kMaxTileRows) { // a single tile streams: the hardware sees what comes
      t.prefetch = t.w + ceil_div(t.end, 2) * pair_bytes_;
      t.prefetch_end = t.prefetch + n / 2 * pair_bytes_;
    }
    run_rows(kind_, rows_.num_rows, t, scratch_.weights);
  }

  // Row r's columns [begin, begin + n) as the kind wants them.
  const void* input(int64_t r, int64_t begin, int64_t n) {
    const std::byte* data = rows_.data[r] + begin * size_of(rows_.dtype);
    if (rows_.dtype == (is_dot(kind_) ? DType::bf16 : DType::f32))
      return data;
    float* out = scratch_.input + r * kPieceColumns;
    if (!rows_.quantized) {
      widen_row(reinterpret_cast<const uint16_t*>(data), n, out);
      return out;
    }
    const auto* codes = reinterpret_cast<const uint8_t*>(data);
    if (is_dot(kind_)) {
      decode_codes(codes, n, reinterpret_cast<uint16_t*>(out));
      return out;
    }
    uint16_t wide[kPieceColumns];
    decode_codes(codes, n, wide);
    widen_row(wide, n, out);
    return out;
  }

  const RowBlock& rows_;
  const PackedMatrix& w_;
  PanelScratch& scratch_;
  Kind kind_;
  int64_t pair_bytes_, blocks_;
  int64_t panel_pairs_ = 0;
  const std::byte* segment_ = nullptr;
  const float* scales_ = nullptr;
};

// ---- outputs -------------------------------------------------------------------------------

// out[row, column … column + n) = round(residual + sums), n ≤ 64.
inline void finish_row(const float* sums, int64_t row, int64_t column, int64_t n,
                       const Rows& residual, const MutableRows& out) {
  void* o = row_of(out, row);
  const void* add = residual.data ? row_of(residual, row) : nullptr;
  for (int64_t c = 0; c < n; c += 16) {
    V v = load(sums + c);
    if (add)
      v = load_any(residual.dtype, add, column + c, n - c) + v;
    store_any(out.dtype, o, column + c, n - c, v);
  }
}

} // namespace troupe::TROUPE_SIMD
