// Causal MLA: what both forms share, and the naive form.
//
// One unit of work is one head of one sequence. It walks the key blocks once: projects a block's
// keys and values up from the latents, packs them as weight panels (lane = key for the scores,
// lane = value column for the sum), and lets every query row of the step pass. So a block is
// projected once per head, and a step costs memory for its own rows only, however long the context.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

// ---- softmax over one block of keys ----------------------------------------------------------

struct SoftmaxBlock {
  int64_t num_rows = 0;
  float tau = 1;
  float scores[kRowBlock * kPageTokens];        // q · k in, exp(s - max) out
  int64_t valid[kRowBlock];                     // keys a row may see, 1 … 64
  float rescale[kRowBlock];                     // out: exp(old max - new max)
  alignas(64) float p[kRowBlock * kPageTokens]; // out: rounded to A; BF16 bits for dot kinds

  // Row r's weights as a tile input.
  template <class T>
  [[nodiscard]] const T* weights(int64_t r) const {
    return reinterpret_cast<const T*>(p) + r * kPageTokens;
  }
};

inline void store_weights(DType a, SoftmaxBlock& b, int64_t i, V p) {
  if (a == DType::f32)
    return store(b.p + i, p);
#if TROUPE_SIMD_DOT
  store_bf16_flushed(reinterpret_cast<uint16_t*>(b.p) + i, p);
#else
  uint16_t bits[16];
  store_bf16(bits, p);
  store(b.p + i, load_bf16(bits));
#endif
}

// Plain sums of 64 weights in ascending order, eight rows side by side to hide the add's latency.
inline void add_row_sums(const SoftmaxBlock& b, float* sum) {
  for (int64_t r0 = 0; r0 < b.num_rows; r0 += 8) {
    float s[8] = {};
    const int64_t n = std::min<int64_t>(8, b.num_rows - r0);
    const float* p = b.scores + r0 * kPageTokens;
    if (n == 8)
      for (int64_t j = 0; j < kPageTokens; ++j)
        for (int64_t r = 0; r < 8; ++r)
          s[r] += p[r * kPageTokens + j];
    else
      for (int64_t r = 0; r < n; ++r)
        for (int64_t j = 0; j < kPageTokens; ++j)
          s[r] += p[r * kPageTokens + j];
    for (int64_t r = 0; r < n; ++r)
      sum[r0 + r] = sum[r0 + r] * b.rescale[r0 + r] + s[r];
  }
}

// Row r's new maximum and weights. kAll: every key of the block is valid.
template <bool kAll>
TROUPE_INLINE void softmax_row(DType a, SoftmaxBlock& b, int64_t r, float& max_state) {
  const V lowest = set1(-std::numeric_limits<float>::infinity());
  float* scores = b.scores + r * kPageTokens;
  V s[4], top = lowest;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    s[c] = set1(b.tau) * load(scores + 16 * c);
    top = max(top, kAll ? s[c] : first_lanes(b.valid[r] - 16 * c, s[c], lowest));
  }
  const float new_max = std::max(max_state, max_lane(top));
  b.rescale[r] = max_state - new_max;
  max_state = new_max;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const V e = exp(s[c] - set1(new_max));
    const V p = kAll ? e : first_lanes(b.valid[r] - 16 * c, e, zero());
    store(scores + 16 * c, p);
    store_weights(a, b, r * kPageTokens + 16 * c, p);
  }
}

// One step of the online softmax for every row of the block; max and sum are the rows' state.
inline void softmax_step(DType a, SoftmaxBlock& b, float* max_state, float* sum) {
  for (int64_t r = 0; r < b.num_rows; ++r)
    if (b.valid[r] == kPageTokens)
      softmax_row<true>(a, b, r, max_state[r]);
    else
      softmax_row<false>(a, b, r, max_state[r]);
  for (int64_t r = 0; r < b.num_rows; r += 16) {
    const int64_t n = b.num_rows - r;
    store_any(DType::f32, b.rescale, r, n, exp(load_any(DType::f32, b.rescale, r, n)));
  }
  add_row_sums(b, sum);
}

// ---- weights times values ----------------------------------------------------------------------

// Sums p_j · v_j of up to 6 rows with one panel of values, each over its own valid keys only: what
// lies in the cache beyond a row's position never touches it, not even as 0 · NaN.
inline void sum_values_tile(Kind kind, const SoftmaxBlock& b, int64_t row, int64_t n,
                            const std::byte* panel, float* out) {
  const void* p[kMaxTileRows];
  int64_t common = kPageTokens;
  for (int64_t r = 0; r < n; ++r) {
    p[r] = is_dot(kind) ? static_cast<const void*>(b.weights<uint16_t>(row + r))
                        : b.weights<float>(row + r);
    common = std::min(common, b.valid[row + r]);
  }
  if (common < kPageTokens)
    common -= common % 2;
  Tile tile{.rows = p, .w = panel, .begin = 0, .end = common, .acc = out, .fresh = true};
  run_tile_of(kind, static_cast<int>(n), tile);
  for (int64_t r = 0; r < n; ++r)
    if (b.valid[row + r] > common) {
      const void* rest = static_cast<const std::byte*>(p[r]) + common * (is_dot(kind) ? 2 : 4);
      Tile one{.rows = &rest,
               .w = panel,
               .begin = common,
               .end = b.valid[row + r],
               .acc = out + r * kPanelRows};
      run_tile_of(kind, 1, one);
    }
}

// o = o · rescale + sum_j p_j · v_j, for all rows and `panels` panels of values.
// o: row r at out + r · out_stride, panels · 64 columns.
inline void accumulate_values(DType a, const SoftmaxBlock& b, const std::byte* values,
                              int64_t panels, float* out, int64_t out_stride) {
  const Kind kind = a == DType::f32 ? Kind::f32_f32 : kHasDot ? Kind::dot_bf16 : Kind::f32_bf16;
  const int64_t panel_bytes = kPageTokens * kPanelRows * size_of(a);
  alignas(64) float sums[kMaxTileRows * kPanelRows];
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t row = 0; row < b.num_rows; row += kMaxTileRows) {
      const int64_t n = std::min<int64_t>(kMaxTileRows, b.num_rows - row);
      sum_values_tile(kind, b, row, n, values + panel * panel_bytes, sums);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < kPanelRows; c += 16) {
          float* o = out + (row + r) * out_stride + panel * kPanelRows + c;
          store(o, load(o) * set1(b.rescale[row + r]) + load(sums + r * kPanelRows + c));
        }
    }
}

// out = round(o · (1/l)), n columns.
inline void finish_attention_row(const float* o, float sum, int64_t n, DType dtype, void* out,
                                 int64_t column) {
  const V scale = set1(1.0f / sum);
  for (int64_t c = 0; c < n; c += 16)
    store_any(dtype, out, column + c, n - c, load_any(DType::f32, o, c, n - c) * scale);
}

// ---- naive form --------------------------------------------------------------------------------

inline int64_t padded_panels(int64_t n) { return ceil_div(n, kPanelRows); }

// Row p of a sequence in the cache.
inline const std::byte* latent_block(const LatentCacheLayer& cache, const SequenceRows& sequence,
                                     int64_t block) {
  return cache.base +
         sequence.pages[block] * kPageTokens * cache.row_elements * size_of(cache.dtype);
}

// Where element (k, column) of a packed block of keys or values lies: pairs of k side by side for
// BF16, plain rows for F32.
template <class T>
TROUPE_INLINE int64_t packed_index(int64_t k, int64_t column) {
  return sizeof(T) == 4 ? k * kPanelRows + column : (k / 2 * kPanelRows + column) * 2 + k % 2;
}

// to[2c] = even[c], to[2c + 1] = odd[c].
template <class T>
void interleave(const T* even, const T* odd, int64_t n, T* to) {
  for (int64_t c = 0; c < n; ++c) {
    to[2 * c] = even[c];
    to[2 * c + 1] = odd[c];
  }
}

// A head's keys and values of one block, in A (float or BF16 bits).
template <class T>
class HeadBlock {
public:
  HeadBlock(const MlaNaiveArgs& args, int64_t head, const NaiveScratch& scratch)
      : a_(args), head_(head), keys_(reinterpret_cast<T*>(scratch.keys)),
        values_(reinterpret_cast<T*>(scratch.values)), dtype_(args.cache.dtype) {}

  // `count` keys whose latents start at `latents`; the other lanes become zero.
  void project(const std::byte* latents, int64_t count, PanelScratch& panel_scratch) {
    const MlaShape& s = a_.shape;
    const int64_t d_qk = s.qk_nope_head_dim + s.qk_rope_head_dim;
    std::memset(keys_, 0, static_cast<size_t>((d_qk + d_qk % 2) * kPageTokens) * sizeof(T));
    std::memset(values_, 0,
                static_cast<size_t>(padded_panels(s.v_head_dim) * kPanelRows * kPageTokens) *
                    sizeof(T));
    RowBlock rows;
    rows.dtype = dtype_;
    for (int64_t j = 0; j < count; ++j)
      rows.data[rows.num_rows++] = latents + j * a_.cache.row_elements * size_of(dtype_);
    PanelProduct product(rows, *a_.kv_b, panel_scratch);
    const int64_t first = head_ * (s.qk_nope_head_dim + s.v_head_dim);
    const int64_t last = first + s.qk_nope_head_dim + s.v_head_dim;
    alignas(64) float sums[kPageTokens * kPanelRows];
    for (int64_t panel = first / kPanelRows; panel * kPanelRows < last; ++panel) {
      product.multiply(panel, sums);
      scatter(sums, count, panel * kPanelRows - first);
    }
    const T* rope = reinterpret_cast<const T*>(latents) + s.kv_lora_rank;
    put_keys(rope, a_.cache.row_elements, count, s.qk_nope_head_dim, s.qk_rope_head_dim);
  }

private:
  // Columns of the head [column0, column0 + 64) to their places; those outside the head are other
  // heads'.
  void scatter(const float* sums, int64_t count, int64_t column0) {
    alignas(64) T rounded[kPageTokens * kPanelRows];
    for (int64_t i = 0; i < count * kPanelRows; i += 16)
      store_any(dtype_, rounded, i, 16, load(sums + i));
    const int64_t nope = a_.shape.qk_nope_head_dim, v = a_.shape.v_head_dim;
    const int64_t key0 = std::max<int64_t>(0, -column0);
    put_keys(rounded + key0, kPanelRows, count, column0 + key0,
             std::min(kPanelRows, nope - column0) - key0);
    const int64_t value0 = std::max<int64_t>(0, nope - column0);
    put_values(rounded + value0, count, column0 + value0 - nope,
               std::min(kPanelRows, nope + v - column0) - value0);
  }

  // Elements [k, k + n) of `count` keys, one key a row of `from`: a transposition, by pairs where
  // two elements share a word.
  void put_keys(const T* from, int64_t stride, int64_t count, int64_t k, int64_t n) {
    for (int64_t i = 0; i < n;) {
      const bool both = sizeof(T) == 2 && (k + i) % 2 == 0 && i + 1 < n;
      T* to = keys_ + packed_index<T>(k + i, 0);
      if (both)
        for (int64_t j = 0; j < count; ++j)
          std::memcpy(to + 2 * j, from + j * stride + i, 2 * sizeof(T));
      else
        for (int64_t j = 0; j < count; ++j)
          to[packed_index<T>(0, j)] = from[j * stride + i];
      i += both ? 2 : 1;
    }
  }

  // Columns [column, column + n) of `count` values, one key's a row of `from`.
  void put_values(const T* from, int64_t count, int64_t column, int64_t n) {
    while (n > 0) { // panel by panel
      const int64_t c0 = column % kPanelRows, width = std::min(n, kPanelRows - c0);
      T* panel = values_ + column / kPanelRows * kPageTokens * kPanelRows;
      for (int64_t j = 0; j < count; j += sizeof(T) == 4 ? 1 : 2)
        put_value_pair(from + j * kPanelRows, j + 1 < count, width, panel + packed_index<T>(j, c0));
      from += width;
      column += width;
      n -= width;
    }
  }
  // One key's values (F32) or two keys' (BF16), the second all zero where there is none.
  static void put_value_pair(const T* row, bool has_next, int64_t n, T* to) {
    static constexpr T kNone[kPanelRows] = {};
    if constexpr (sizeof(T) == 4)
      std::memcpy(to, row, static_cast<size_t>(n) * sizeof(T));
    else
      interleave(row, has_next ? row + kPanelRows : kNone, n, to);
  }

  const MlaNaiveArgs& a_;
  int64_t head_;
  T* keys_;
  T* values_;
  DType dtype_;
};

// Rows [row0, row1) of the run against the packed block `block`.
inline void attend_rows(const MlaNaiveArgs& a, const SequenceRows& sequence, int64_t head,
                        int64_t block, int64_t row0, int64_t row1, const NaiveScratch& scratch,
                        PanelScratch& panel_scratch, SoftmaxBlock& softmax) {
  const int64_t d_qk = a.shape.qk_nope_head_dim + a.shape.qk_rope_head_dim;
  const int64_t panels = padded_panels(a.shape.v_head_dim), stride = panels * kPanelRows;
  RowBlock rows;
  rows.dtype = a.q.dtype;
  for (int64_t r = row0; r < row1; ++r) {
    rows.data[rows.num_rows] = static_cast<const std::byte*>(row_of(a.q, sequence.row_begin + r)) +
                               head * d_qk * size_of(a.q.dtype);
    softmax.valid[rows.num_rows++] =
        std::min(kPageTokens, sequence.first_position + r - block * kPageTokens + 1);
  }
  PackedMatrix keys;
  keys.n = kPageTokens;
  keys.k = d_qk;
  keys.dtype = a.q.dtype;
  keys.segments.begin[1] = d_qk;
  keys.data = scratch.keys;
  PanelProduct(rows, keys, panel_scratch).multiply(0, softmax.scores);
  softmax.num_rows = rows.num_rows;
  softmax_step(a.q.dtype, softmax, scratch.max + row0, scratch.sum + row0);
  accumulate_values(a.q.dtype, softmax, scratch.values, panels, scratch.out + row0 * stride,
                    stride);
}

template <class T>
void naive_head(const MlaNaiveArgs& a, const SequenceRows& sequence, int64_t head,
                const NaiveScratch& scratch) {
  PanelScratch panel_scratch;
  SoftmaxBlock softmax;
  softmax.tau = a.shape.tau;
  const int64_t n = sequence.num_rows, num_keys = sequence.first_position + n;
  const int64_t stride = padded_panels(a.shape.v_head_dim) * kPanelRows;
  std::fill_n(scratch.out, n * stride, 0.0f);
  std::fill_n(scratch.max, n, -std::numeric_limits<float>::infinity());
  std::fill_n(scratch.sum, n, 0.0f);
  HeadBlock<T> packed(a, head, scratch);
  for (int64_t block = 0; block * kPageTokens < num_keys; ++block) {
    const int64_t first_key = block * kPageTokens;
    packed.project(latent_block(a.cache, sequence, block),
                   std::min(kPageTokens, num_keys - first_key), panel_scratch);
    for (int64_t r = std::max<int64_t>(0, first_key - sequence.first_position); r < n;
         r += kRowBlock)
      attend_rows(a, sequence, head, block, r, std::min(n, r + kRowBlock), scratch, panel_scratch,
                  softmax);
  }
  for (int64_t r = 0; r < n; ++r)
    finish_attention_row(scratch.out + r * stride, scratch.sum[r], a.shape.v_head_dim, a.out.dtype,
                         row_of(a.out, sequence.row_begin + r), head * a.shape.v_head_dim);
}

inline void mla_naive(const MlaNaiveArgs& args, Workers& workers) {
  int64_t longest = 0;
  for (const SequenceRows& s : args.sequences)
    longest = std::max(longest, s.num_rows);
  if (longest == 0)
    return;
  const int64_t bytes = NaiveScratch::bytes(args.shape, args.q.dtype, longest);
  ScratchCursor cursor(args.scratch);
  std::byte* memory = cursor.take(workers.num_threads() * bytes);
  const int64_t units = static_cast<int64_t>(args.sequences.size()) * args.shape.heads;
  workers.parallel_for(units, 1, [&](int64_t begin, int64_t end, int worker) {
    ScratchCursor part({memory + worker * bytes, static_cast<size_t>(bytes)});
    const NaiveScratch scratch(part, args.shape, args.q.dtype, longest);
    for (int64_t unit = begin; unit < end; ++unit) {
      const SequenceRows& s = args.sequences[static_cast<size_t>(unit / args.shape.heads)];
      if (s.num_rows == 0)
        continue;
      if (args.q.dtype == DType::f32)
        naive_head<float>(args, s, unit % args.shape.heads, scratch);
      else
        naive_head<uint16_t>(args, s, unit % args.shape.heads, scratch);
    }
  });
}

} // namespace troupe::TROUPE_SIMD
