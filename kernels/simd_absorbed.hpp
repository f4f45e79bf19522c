// Causal MLA in the absorbed form (§2.3): queries move into the latent space, all heads share one
// key and value per position, and the context is read once per row and group of heads.
//
// Three passes over at most kAbsorbedRows rows: q_abs = W_UKᵀ q (a Linear per head), attention per
// (row, group of heads), W_UV (a Linear per head).
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

static_assert(kAbsorbedRows <= kRowBlock && kAbsorbedHeads <= kRowBlock);

struct AbsorbedRow {
  const SequenceRows* sequence = nullptr;
  int64_t row = 0;      // of the step
  int64_t position = 0; // in the sequence
};

struct AbsorbedPass {
  const MlaAbsorbedArgs* args = nullptr;
  AbsorbedScratch scratch;
  AbsorbedRow rows[kAbsorbedRows];
  int64_t num_rows = 0;
  int64_t heads_per_unit = 1;

  [[nodiscard]] int64_t size() const { return size_of(args->q.dtype); }
  [[nodiscard]] int64_t dim() const { return absorbed_dim(args->shape); }
  // [q_abs ; q_rope ; zeros] of a head.
  [[nodiscard]] std::byte* query(int64_t row, int64_t head) const {
    return scratch.query + (row * args->shape.heads + head) * dim() * size();
  }
  [[nodiscard]] std::byte* latent(int64_t row, int64_t head) const {
    return scratch.latent + (row * args->shape.heads + head) * args->shape.kv_lora_rank * size();
  }
  [[nodiscard]] const std::byte* q(int64_t row, int64_t head) const {
    const int64_t d_qk = args->shape.qk_nope_head_dim + args->shape.qk_rope_head_dim;
    return static_cast<const std::byte*>(row_of(args->q, rows[row].row)) + head * d_qk * size();
  }
};

// ---- queries into the latent space, and back ---------------------------------------------------

// Units (head, panel of its matrix), heads first.
inline void absorb_queries(const AbsorbedPass& pass, int64_t begin, int64_t end) {
  const MlaShape& s = pass.args->shape;
  const DType a = pass.args->q.dtype;
  const int64_t panels = padded_panels(s.kv_lora_rank);
  PanelScratch scratch;
  alignas(64) float sums[kRowBlock * kPanelRows];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / panels, column = unit % panels * kPanelRows;
    RowBlock rows;
    rows.dtype = a;
    for (int64_t r = 0; r < pass.num_rows; ++r)
      rows.data[rows.num_rows++] = pass.q(r, head);
    PanelProduct(rows, pass.args->w_uk_t[static_cast<size_t>(head)], scratch)
        .multiply(unit % panels, sums);
    const int64_t n = std::min(kPanelRows, s.kv_lora_rank - column);
    for (int64_t r = 0; r < pass.num_rows; ++r) {
      std::byte* query = pass.query(r, head);
      for (int64_t c = 0; c < n; c += 16)
        store_any(a, query, column + c, n - c, load(sums + r * kPanelRows + c));
      if (column == 0) {
        const int64_t rope = s.qk_rope_head_dim * pass.size(),
                      latent = s.kv_lora_rank * pass.size();
        std::memcpy(query + latent, rows.data[r] + s.qk_nope_head_dim * pass.size(),
                    static_cast<size_t>(rope));
        std::memset(query + latent + rope, 0,
                    static_cast<size_t>(pass.dim() * pass.size() - latent - rope));
      }
    }
  }
}

inline void project_values(const AbsorbedPass& pass, int64_t begin, int64_t end) {
  const MlaShape& s = pass.args->shape;
  const int64_t panels = padded_panels(s.v_head_dim);
  PanelScratch scratch;
  alignas(64) float sums[kRowBlock * kPanelRows];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / panels, column = unit % panels * kPanelRows;
    RowBlock rows;
    rows.dtype = pass.args->q.dtype;
    for (int64_t r = 0; r < pass.num_rows; ++r)
      rows.data[rows.num_rows++] = pass.latent(r, head);
    PanelProduct(rows, pass.args->w_uv[static_cast<size_t>(head)], scratch)
        .multiply(unit % panels, sums);
    for (int64_t r = 0; r < pass.num_rows; ++r)
      finish_row(sums + r * kPanelRows, pass.rows[r].row, head * s.v_head_dim + column,
                 std::min(kPanelRows, s.v_head_dim - column), {}, pass.args->out);
  }
}

// ---- 16-lane dots ------------------------------------------------------------------------------

// Elements a lane step takes: 16, or 32 where a lane takes pairs.
template <class T>
inline constexpr int64_t kDotStep = kHasDot && sizeof(T) == 2 ? 32 : 16;

template <class T>
TROUPE_INLINE void dot_step(V (&acc)[16], const T* const (&q)[4], const T* const (&k)[4],
                            int64_t i) {
#if TROUPE_SIMD_DOT
  if constexpr (sizeof(T) == 2) {
    Pairs key[4];
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j)
      key[j] = load_pairs(reinterpret_cast<const std::byte*>(k[j] + i));
#pragma GCC unroll 16
    for (int h = 0; h < 4; ++h) {
      const Pairs x = load_pairs(reinterpret_cast<const std::byte*>(q[h] + i));
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j)
        acc[4 * h + j] = dot(acc[4 * h + j], key[j], x);
    }
    return;
  }
#endif
  V key[4];
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j)
    if constexpr (sizeof(T) == 2)
      key[j] = load_bf16(k[j] + i);
    else
      key[j] = load(k[j] + i);
#pragma GCC unroll 16
  for (int h = 0; h < 4; ++h) {
    V x;
    if constexpr (sizeof(T) == 2)
      x = load_bf16(q[h] + i);
    else
      x = load(q[h] + i);
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j)
      acc[4 * h + j] = fma(x, key[j], acc[4 * h + j]);
  }
}

// Scores of up to 4 heads with keys [0, count): scores[head][64]. `dim` is a multiple of the step.
template <class T>
void dot_heads(const std::byte* const* queries, int64_t heads, const T* keys, int64_t key_stride,
               int64_t count, int64_t dim, float* scores) {
  const T* q[4];
  for (int64_t h = 0; h < 4; ++h) // missing heads repeat the last: their results are not used
    q[h] = reinterpret_cast<const T*>(queries[std::min(h, heads - 1)]);
  for (int64_t j0 = 0; j0 < count; j0 += 4) {
    const T* k[4];
    for (int64_t j = 0; j < 4; ++j)
      k[j] = keys + std::min(j0 + j, count - 1) * key_stride;
    V acc[16];
#pragma GCC unroll 16
    for (V& v : acc)
      v = zero();
    for (int64_t i = 0; i < dim; i += kDotStep<T>)
      dot_step<T>(acc, q, k, i);
    float sums[16];
    reduce16(acc, sums);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < std::min<int64_t>(4, count - j0); ++j)
        scores[h * kPageTokens + j0 + j] = sums[4 * h + j];
  }
}

// ---- attention of one row ----------------------------------------------------------------------

// The latents of a block as value panels: lane = latent element, K = key.
template <class T>
void pack_values(const T* latents, int64_t stride, int64_t count, int64_t d_c, T* out) {
  for (int64_t panel = 0; panel < padded_panels(d_c); ++panel, out += kPageTokens * kPanelRows) {
    const int64_t column = panel * kPanelRows, n = std::min(kPanelRows, d_c - column);
    for (int64_t j = 0; j < count; j += sizeof(T) == 4 ? 1 : 2) {
      const T* row = latents + j * stride + column;
      T* o = out + packed_index<T>(j, 0);
      if constexpr (sizeof(T) == 4) {
        std::memcpy(o, row, static_cast<size_t>(n) * sizeof(T));
      } else { // the odd half after the last key is never read
        const T* next = j + 1 < count ? row + stride : row;
        interleave(row, next, n, o);
      }
    }
  }
}

// Keys padded with zeros to whole dot steps; the cache itself where its rows are whole already.
template <class T>
const T* whole_keys(const AbsorbedPass& pass, const T* latents, int64_t count, T* padded) {
  const int64_t row = pass.args->cache.row_elements, dim = pass.dim();
  const int64_t used = pass.args->shape.kv_lora_rank + pass.args->shape.qk_rope_head_dim;
  if (used == dim)
    return latents;
  for (int64_t j = 0; j < count; ++j) {
    std::memcpy(padded + j * dim, latents + j * row, static_cast<size_t>(used) * sizeof(T));
    std::fill(padded + j * dim + used, padded + (j + 1) * dim, T{});
  }
  return padded;
}

// Heads [head0, head0 + heads) of one row.
template <class T>
void attend_absorbed(const AbsorbedPass& pass, int64_t row, int64_t head0, int64_t heads,
                     const AbsorbedThread& thread, SoftmaxBlock& softmax) {
  const MlaAbsorbedArgs& a = *pass.args;
  const AbsorbedRow& where = pass.rows[row];
  const int64_t panels = padded_panels(a.shape.kv_lora_rank), stride = panels * kPanelRows;
  float max[kAbsorbedHeads], sum[kAbsorbedHeads] = {};
  std::fill_n(max, heads, -std::numeric_limits<float>::infinity());
  std::fill_n(thread.out, heads * stride, 0.0f);
  const std::byte* queries[kAbsorbedHeads];
  for (int64_t h = 0; h < heads; ++h)
    queries[h] = pass.query(row, head0 + h);
  softmax.tau = a.shape.tau;
  softmax.num_rows = heads;
  for (int64_t block = 0; block * kPageTokens <= where.position; ++block) {
    const int64_t count = std::min(kPageTokens, where.position - block * kPageTokens + 1);
    const T* latents = reinterpret_cast<const T*>(latent_block(a.cache, *where.sequence, block));
    const T* keys = whole_keys<T>(pass, latents, count, reinterpret_cast<T*>(thread.keys));
    const int64_t key_stride = keys == latents ? a.cache.row_elements : pass.dim();
    std::fill_n(softmax.valid, heads, count);
    for (int64_t h = 0; h < heads; h += 4)
      dot_heads<T>(queries + h, std::min<int64_t>(4, heads - h), keys, key_stride, count,
                   pass.dim(), softmax.scores + h * kPageTokens);
    softmax_step(a.q.dtype, softmax, max, sum);
    pack_values<T>(latents, a.cache.row_elements, count, a.shape.kv_lora_rank,
                   reinterpret_cast<T*>(thread.values));
    accumulate_values(a.q.dtype, softmax, thread.values, panels, thread.out, stride);
  }
  for (int64_t h = 0; h < heads; ++h)
    finish_attention_row(thread.out + h * stride, sum[h], a.shape.kv_lora_rank, a.q.dtype,
                         pass.latent(row, head0 + h), 0);
}

// Units (row, group of heads).
inline void attend_units(const AbsorbedPass& pass, const AbsorbedThread& thread, int64_t begin,
                         int64_t end) {
  SoftmaxBlock softmax;
  const int64_t heads = pass.args->shape.heads, groups = ceil_div(heads, pass.heads_per_unit);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / groups, head0 = unit % groups * pass.heads_per_unit;
    const int64_t n = std::min(pass.heads_per_unit, heads - head0);
    if (pass.args->q.dtype == DType::f32)
      attend_absorbed<float>(pass, row, head0, n, thread, softmax);
    else
      attend_absorbed<uint16_t>(pass, row, head0, n, thread, softmax);
  }
}

inline void run_pass(AbsorbedPass& pass, std::byte* memory, int64_t thread_bytes,
                     Workers& workers) {
  const MlaShape& s = pass.args->shape;
  const int threads = workers.num_threads();
  pass.heads_per_unit = std::clamp(ceil_div(s.heads * pass.num_rows, int64_t{threads}),
                                   std::min<int64_t>(4, s.heads), kAbsorbedHeads);
  const int64_t absorb = s.heads * padded_panels(s.kv_lora_rank);
  workers.parallel_for(absorb, grain_for(absorb, threads, 2 * s.qk_nope_head_dim * kPanelRows),
                       [&](int64_t begin, int64_t end, int) { absorb_queries(pass, begin, end); });
  const int64_t units = pass.num_rows * ceil_div(s.heads, pass.heads_per_unit);
  workers.parallel_for(units, 1, [&](int64_t begin, int64_t end, int worker) {
    ScratchCursor part({memory + worker * thread_bytes, static_cast<size_t>(thread_bytes)});
    attend_units(pass, AbsorbedThread(part, s, pass.args->q.dtype), begin, end);
  });
  const int64_t project = s.heads * padded_panels(s.v_head_dim);
  workers.parallel_for(project, grain_for(project, threads, 2 * s.kv_lora_rank * kPanelRows),
                       [&](int64_t begin, int64_t end, int) { project_values(pass, begin, end); });
  pass.num_rows = 0;
}

inline void mla_absorbed(const MlaAbsorbedArgs& args, Workers& workers) {
  ScratchCursor cursor(args.scratch);
  const int64_t bytes = AbsorbedThread::bytes(args.shape, args.q.dtype);
  AbsorbedPass pass{&args, {cursor, args.shape, args.q.dtype}, {}, 0, 1};
  std::byte* memory = cursor.take(workers.num_threads() * bytes);
  for (const SequenceRows& sequence : args.sequences)
    for (int64_t r = 0; r < sequence.num_rows; ++r) {
      pass.rows[pass.num_rows++] = {&sequence, sequence.row_begin + r, sequence.first_position + r};
      if (pass.num_rows == kAbsorbedRows)
        run_pass(pass, memory, bytes, workers);
    }
  if (pass.num_rows > 0)
    run_pass(pass, memory, bytes, workers);
}

} // namespace troupe::TROUPE_SIMD
