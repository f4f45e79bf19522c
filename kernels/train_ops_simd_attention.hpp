// Attention of training. Included once per target.
//
// The rows of a sample and head are a segment. Lanes are queries, 32 neighbouring ones of a segment
// (a group); so a query's softmax and all sums over keys run in the reference's order without a sum
// across lanes, and every product is one of kernels/train_ops_simd_linear.hpp's, in F32 or BF16:
//
//   scoresᵀ [keys, 32] = K · Qᵀ            outᵀ [d_v, 32] = Vᵀ · P
//   dPᵀ = V · dOutᵀ      dQᵀ += Kᵀ · dS    dK += dSᵀ · Q    dV += Pᵀ · dOut
//
// A masked weight is 0 and adds nothing. Forward: units are groups, after all keys are packed.
// Backward: units are segments, whose groups run in order because dK and dV sum over queries.
namespace troupe::TROUPE_SIMD {

inline constexpr int64_t kKeys = 64, kQueries = 32;
static_assert(kKeys == kPageTokens && kKeys % kTileRows == 0 && kQueries == kTileColumns);

// c [rows, columns] (+)= a · b. Rows and columns that don't exist may be computed: buffers hold
// whole tiles.
template <Operand kOperand, bool kAlong>
TROUPE_INLINE void attention_product(int64_t rows, int64_t columns, int64_t steps,
                                     const uint32_t* a, int64_t a_panel, const uint32_t* b,
                                     int64_t b_panel, float* c, int64_t c_row, bool from_zero) {
  const Stretch s{round_up(rows, kTileRows),
                  columns,
                  steps,
                  a,
                  a_panel,
                  b,
                  b_panel,
                  c,
                  c_row,
                  from_zero,
                  false};
  if constexpr (kOperand == Operand::swapped) {
    const FlushDenormals flush{true};
    multiply<kOperand, kAlong>(s, {});
  } else {
    multiply<kOperand, kAlong>(s, {});
  }
}

// Words of the forms the rows of a head are packed in.
template <Operand kOperand>
struct Widths {
  int64_t qk, v;     // elements
  int64_t qk32, v32; // whole panels of b; also room for panels of a across, packed in pairs
  int64_t qk_steps, v_steps;
  int64_t qk_panel, v_panel; // words of a panel of 8 keys along
  explicit Widths(const AttentionTask& t)
      : qk(t.d_nope + t.d_rope), v(t.d_v), qk32(round_up(qk, kTileColumns)),
        v32(round_up(v, kTileColumns)), qk_steps(steps_of(kOperand, qk)),
        v_steps(steps_of(kOperand, v)), qk_panel(round_up(qk_steps, kAlongSteps) * kTileRows),
        v_panel(round_up(v_steps, kAlongSteps) * kTileRows) {}
};

// Rows [begin, end) that see the first one.
struct Segment {
  int64_t begin, end;
  int64_t first_group; // of the call's groups
  int64_t k, v;        // where the forward pass packs its keys and values, in words of a head
  [[nodiscard]] int64_t size() const { return end - begin; }
  [[nodiscard]] int64_t groups() const { return ceil_div(size(), kQueries); }
};
struct Segments {
  std::span<const Segment> list;
  int64_t groups = 0, k_words = 0, v_words = 0;
  [[nodiscard]] const Segment& of_group(int64_t group) const {
    const auto after =
        std::upper_bound(list.begin(), list.end(), group,
                         [](int64_t g, const Segment& s) { return g < s.first_group; });
    return *(after - 1);
  }
};
// Fills memory for one segment per row.
template <Operand kOperand>
inline Segments find_segments(const AttentionTask& t, const Widths<kOperand>& w, Segment* memory) {
  size_t n = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    if (n > 0 && t.first_key[r] == memory[n - 1].begin)
      memory[n - 1].end = r + 1;
    else
      memory[n++] = {t.first_key[r], r + 1, 0, 0, 0};
  }
  Segments found{{memory, n}};
  for (size_t i = 0; i < n; ++i) {
    auto& s = memory[i];
    s.first_group = found.groups;
    s.k = found.k_words;
    s.v = found.v_words;
    found.groups += s.groups();
    found.k_words += ceil_div(s.size(), kTileRows) * w.qk_panel;
    found.v_words += steps_of(kOperand, s.size()) * w.v32;
  }
  return found;
}
inline constexpr int64_t kSegmentWords = sizeof(Segment) / sizeof(uint32_t);

// Takes consecutive parts of lent words.
struct WordCursor {
  uint32_t* at;
  uint32_t* take(int64_t n) { return std::exchange(at, at + round_up(n, 16)); }
  float* take_floats(int64_t n) { return reinterpret_cast<float*>(take(n)); }
};
[[nodiscard]] inline size_t bytes_of(std::initializer_list<int64_t> words) {
  int64_t sum = 0;
  for (const int64_t n : words)
    sum += round_up(n, 16);
  return static_cast<size_t>(sum) * sizeof(uint32_t);
}

// A head's keys, nope beside rope, as [rows, qk].
inline void copy_keys(const AttentionTask& t, int64_t head, const Segment& s, float* out) {
  const int64_t kv_row = t.heads * (t.d_nope + t.d_v);
  for (int64_t r = s.begin; r < s.end; ++r) {
    const float* nope = t.kv + r * kv_row + head * (t.d_nope + t.d_v);
    out = std::copy_n(nope, t.d_nope, out);
    out = std::copy_n(t.k_rope + r * t.k_rope_stride, t.d_rope, out);
  }
}
inline const float* values_of(const AttentionTask& t, int64_t head, int64_t row) {
  return t.kv + (row * t.heads + head) * (t.d_nope + t.d_v) + t.d_nope;
}
template <Operand kOperand>
inline void pack_panels(int64_t rows, int64_t n, const float* x, int64_t stride, uint32_t* out) {
  const int64_t panel = round_up(steps_of(kOperand, n), kAlongSteps) * kTileRows;
  for (int64_t r = 0; r < rows; r += kTileRows, out += panel)
    pack_along<kOperand>(std::min(kTileRows, rows - r), n, x + r * stride, stride, out);
}

// out[lane, i] = in[i, lane] for i < n; rounded if so wished.
inline void put_lanes(int64_t lanes, int64_t n, const float* in, bool round, float* out,
                      int64_t stride) {
  alignas(64) uint32_t turned[16 * 16];
  for (int64_t i = 0; i < n; i += 16)
    for (int64_t first = 0; first < lanes; first += 16) {
      alignas(64) uint32_t block[16 * 16] = {};
      for (int64_t e = 0; e < std::min<int64_t>(16, n - i); ++e)
        store_words(block + e * 16, load(in + (i + e) * kQueries + first));
      transpose16(block, turned, 16);
      for (int64_t l = 0; l < std::min<int64_t>(16, lanes - first); ++l)
        store_some(out + (first + l) * stride + i, n - i,
                   maybe_bf16(load_words(turned + l * 16), round));
    }
}

// n rows of 32 lanes as a panel of b: themselves in F32.
template <Operand kOperand>
inline const uint32_t* lanes_panel(int64_t n, const float* x, uint32_t* memory) {
  if constexpr (kOperand == Operand::f32)
    return reinterpret_cast<const uint32_t*>(x);
  pack_b_across<kOperand>(n, kQueries, x, kQueries, memory, steps_of(kOperand, n));
  return memory;
}

// ---- forward
// --------------------------------------------------------------------------------------

struct ForwardScratch {
  uint32_t *queries, *weights; // [qk steps][32], [64][32]
  float *scores, *part, *out;  // [64][32], [v32][32] twice
  template <Operand kOperand>
  ForwardScratch(std::byte* memory, const Widths<kOperand>& w) {
    WordCursor cursor{reinterpret_cast<uint32_t*>(memory)};
    queries = cursor.take(w.qk_steps * kQueries);
    weights = cursor.take(kKeys * kQueries);
    scores = cursor.take_floats(kKeys * kQueries);
    part = cursor.take_floats(w.v32 * kQueries);
    out = cursor.take_floats(w.v32 * kQueries);
  }
  template <Operand kOperand>
  static size_t bytes(const Widths<kOperand>& w) {
    return bytes_of({w.qk_steps * kQueries, kKeys * kQueries, kKeys * kQueries, w.v32 * kQueries,
                     w.v32 * kQueries});
  }
};
struct SoftmaxLanes {
  V max, sum;
};

// Key `first` + j of a segment against its queries from `query` on, 16 of them: scores of n keys
// become weights. Lanes of queries before a key don't see it. Returns what earlier blocks' sums are
// multiplied by.
inline V softmax_block(int64_t n, int64_t first, int64_t query, float tau, float* scores,
                       SoftmaxLanes& lanes) {
  const V minus_inf = set1(-std::numeric_limits<float>::infinity());
  V top = lanes.max;
  for (int64_t j = 0; j < n; ++j) {
    const V s = first_lanes(first + j - query, minus_inf, set1(tau) * load(scores + j * kQueries));
    store(scores + j * kQueries, s);
    top = max(s, top);
  }
  const V rescale = exp(lanes.max - top);
  V sum = zero();
  for (int64_t j = 0; j < n; ++j) {
    const V p = exp(load(scores + j * kQueries) - top);
    store(scores + j * kQueries, p);
    sum = sum + p;
  }
  lanes.max = top;
  lanes.sum = lanes.sum * rescale + sum;
  return rescale;
}

// k and v: the segment's packed keys (along) and values (across).
template <Operand kOperand>
inline void forward_group(const AttentionTask& t, const Widths<kOperand>& w, int64_t head,
                          const Segment& s, int64_t query, const uint32_t* k, const uint32_t* v,
                          const ForwardScratch& scratch) {
  const int64_t count = std::min(kQueries, s.size() - query), row = s.begin + query;
  const int64_t v_panel = steps_of(kOperand, s.size()) * kTileRows;
  pack_b_along<kOperand>(w.qk, count, t.q + (row * t.heads + head) * w.qk, t.heads * w.qk,
                         scratch.queries, w.qk_steps);
  std::fill_n(scratch.out, w.v * kQueries, 0.0f);
  SoftmaxLanes lanes[2];
  for (auto& l : lanes)
    l = {set1(-std::numeric_limits<float>::infinity()), zero()};
  for (int64_t first = 0; first < query + count; first += kKeys) {
    const int64_t n = std::min(kKeys, query + count - first);
    attention_product<kOperand, true>(n, kQueries, w.qk_steps, k + first / kTileRows * w.qk_panel,
                                      w.qk_panel, scratch.queries, 0, scratch.scores, kQueries,
                                      true);
    V rescale[2];
    for (int64_t h = 0; h < 2; ++h)
      rescale[h] =
          softmax_block(n, first, query + h * 16, t.tau, scratch.scores + h * 16, lanes[h]);
    attention_product<kOperand, false>(
        w.v, kQueries, steps_of(kOperand, n), v + steps_of(kOperand, first) * kTileRows, v_panel,
        lanes_panel<kOperand>(n, scratch.scores, scratch.weights), 0, scratch.part, kQueries, true);
    for (int64_t i = 0; i < w.v * kQueries; i += 16)
      store(scratch.out + i, load(scratch.out + i) * rescale[i / 16 % 2] + load(scratch.part + i));
  }
  alignas(64) float max[kQueries], sum[kQueries];
  V inverse[2];
  for (int64_t h = 0; h < 2; ++h) {
    store(max + h * 16, lanes[h].max);
    store(sum + h * 16, lanes[h].sum);
    inverse[h] = set1(1.0f) / lanes[h].sum;
  }
  for (int64_t i = 0; i < w.v * kQueries; i += 16)
    store(scratch.out + i, load(scratch.out + i) * inverse[i / 16 % 2]);
  put_lanes(count, w.v, scratch.out, t.round, t.out + (row * t.heads + head) * w.v, t.heads * w.v);
  for (int64_t l = 0; l < count; ++l)
    t.lse[(row + l) * t.heads + head] =
        max[l] + static_cast<float>(log_f64(static_cast<double>(sum[l])));
}

template <Operand kOperand>
inline void attention_as(const AttentionTask& t, TrainScratch& scratch, Workers& workers) {
  const Widths<kOperand> w(t);
  const auto list_bytes = bytes_of({t.rows * kSegmentWords});
  auto found = find_segments(t, w, reinterpret_cast<Segment*>(scratch.of(-1, list_bytes)));
  const int64_t k_words = found.k_words, v_words = found.v_words;
  // Memory asked for again is new memory: the list is made anew in it.
  WordCursor cursor{reinterpret_cast<uint32_t*>(
      scratch.of(-1, list_bytes + bytes_of({t.heads * k_words, t.heads * v_words})))};
  found = find_segments(t, w, reinterpret_cast<Segment*>(cursor.take(t.rows * kSegmentWords)));
  uint32_t* const k = cursor.take(t.heads * k_words);
  uint32_t* const v = cursor.take(t.heads * v_words);
  workers.parallel_for(t.heads, 1, [&](int64_t begin, int64_t end, int worker) {
    auto* keys = reinterpret_cast<float*>(
        scratch.of(worker, static_cast<size_t>(t.rows * w.qk) * sizeof(float)));
    for (int64_t head = begin; head < end; ++head)
      for (const auto& s : found.list) {
        copy_keys(t, head, s, keys);
        pack_panels<kOperand>(s.size(), w.qk, keys, w.qk, k + head * k_words + s.k);
        pack_a_across<kOperand>(s.size(), w.v, values_of(t, head, s.begin),
                                t.heads * (t.d_nope + t.d_v), v + head * v_words + s.v);
      }
  });
  // Late groups see the most keys and go first.
  workers.parallel_for(t.heads * found.groups, 1, [&](int64_t begin, int64_t end, int worker) {
    const ForwardScratch memory(scratch.of(worker, ForwardScratch::bytes(w)), w);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t head = u % t.heads, group = found.groups - 1 - u / t.heads;
      const Segment& s = found.of_group(group);
      forward_group(t, w, head, s, (group - s.first_group) * kQueries, k + head * k_words + s.k,
                    v + head * v_words + s.v, memory);
    }
  });
}

inline void attention(const AttentionTask& t, TrainScratch& scratch, Workers& workers) {
  if (t.rows == 0)
    return;
  t.round ? attention_as<kBf16Operand>(t, scratch, workers)
          : attention_as<Operand::f32>(t, scratch, workers);
}

// ---- backward
// -------------------------------------------------------------------------------------

// What a thread holds of one segment.
struct BackwardScratch {
  float* keys;                       // [rows, qk]
  uint32_t *k, *v;                   // panels of 8 keys along
  uint32_t* k_across;                // panels of 8 elements of keys
  uint32_t *q, *dout;                // panels of b across rows
  float *dk, *dv;                    // [rows to 8, qk32], [rows to 8, v32]
  uint32_t *queries, *douts;         // of a group: [qk steps][32], [v steps][32]
  float *scores, *dp;                // [64][32]; then gradients of weights, and weights
  uint32_t *p_along, *ds_along, *ds; // [64 keys][32 queries], packed
  float* dq;                         // [qk32][32]
  template <Operand kOperand>
  BackwardScratch(std::byte* memory, const Widths<kOperand>& w, int64_t rows) {
    WordCursor c{reinterpret_cast<uint32_t*>(memory)};
    const int64_t padded = round_up(rows, kTileRows), steps = steps_of(kOperand, rows);
    keys = c.take_floats(rows * w.qk);
    k = c.take(padded / kTileRows * w.qk_panel);
    v = c.take(padded / kTileRows * w.v_panel);
    k_across = c.take(steps * w.qk32);
    q = c.take(steps * w.qk32);
    dout = c.take(steps * w.v32);
    dk = c.take_floats(padded * w.qk32);
    dv = c.take_floats(padded * w.v32);
    queries = c.take(w.qk_steps * kQueries);
    douts = c.take(w.v_steps * kQueries);
    scores = c.take_floats(kKeys * kQueries);
    dp = c.take_floats(kKeys * kQueries);
    p_along = c.take(kKeys * kQueries);
    ds_along = c.take(kKeys * kQueries);
    ds = c.take(kKeys * kQueries);
    dq = c.take_floats(w.qk32 * kQueries);
  }
  template <Operand kOperand>
  static size_t bytes(const Widths<kOperand>& w, int64_t rows) {
    const int64_t padded = round_up(rows, kTileRows), steps = steps_of(kOperand, rows);
    constexpr int64_t kBlock = kKeys * kQueries;
    return bytes_of({rows * w.qk, padded / kTileRows * w.qk_panel, padded / kTileRows * w.v_panel,
                     steps * w.qk32, steps * w.qk32, steps * w.v32, padded * w.qk32, padded * w.v32,
                     w.qk_steps * kQueries, w.v_steps * kQueries, kBlock, kBlock, kBlock, kBlock,
                     kBlock, w.qk32 * kQueries});
  }
};

// Log-sum-exps and Σ dout·out of a group's queries.
struct QueryLanes {
  alignas(64) float lse[kQueries] = {}, delta[kQueries] = {};
};

// Of n keys from `first` on: scores become gradients of weights, dp becomes weights. Rows up to a
// whole panel are zeros.
inline void weights_block(const AttentionTask& t, int64_t n, int64_t first, int64_t query,
                          int64_t count, const QueryLanes& lanes, float* scores, float* dp) {
  const V tau = set1(t.tau);
  for (int64_t j = 0; j < round_up(n, kTileRows); ++j)
    for (int64_t h = 0; h < 2; ++h, scores += 16, dp += 16) {
      const V p = exp(tau * load(scores) - load(lanes.lse + h * 16));
      const V ds = tau * (p * (load(dp) - load(lanes.delta + h * 16)));
      // Lanes before the key's own query don't see it; lanes from `count` on are no queries.
      const int64_t before = first + j - query - h * 16, there = j < n ? count - h * 16 : 0;
      store(scores, first_lanes(there, first_lanes(before, zero(), ds), zero()));
      store(dp, first_lanes(there, first_lanes(before, zero(), p), zero()));
    }
}

template <Operand kOperand>
inline void backward_group(const AttentionTask& t, const Widths<kOperand>& w, int64_t head,
                           const Segment& s, int64_t query, const BackwardScratch& b) {
  constexpr int64_t kLanesPanel = round_up(steps_of(kOperand, kQueries), kAlongSteps) * kTileRows;
  const int64_t count = std::min(kQueries, s.size() - query), row = s.begin + query;
  const int64_t rows_steps = steps_of(kOperand, s.size());
  const int64_t query_at = steps_of(kOperand, query) * kTileColumns;
  const int64_t count_steps = steps_of(kOperand, count);
  const float* dout = t.dout + (row * t.heads + head) * w.v;
  const float* out = t.out + (row * t.heads + head) * w.v;
  pack_b_along<kOperand>(w.qk, count, t.q + (row * t.heads + head) * w.qk, t.heads * w.qk,
                         b.queries, w.qk_steps);
  pack_b_along<kOperand>(w.v, count, dout, t.heads * w.v, b.douts, w.v_steps);
  QueryLanes lanes;
  for (int64_t l = 0; l < count; ++l) {
    lanes.lse[l] = t.lse[(row + l) * t.heads + head];
    const int64_t at = l * t.heads * w.v;
    lanes.delta[l] = row_sum(w.v, [&](V sum, int64_t i, int64_t left) {
      return fma_some(left, load_some(dout + at + i, left), load_some(out + at + i, left), sum);
    });
  }
  for (int64_t first = 0; first < query + count; first += kKeys) {
    const int64_t n = std::min(kKeys, query + count - first), panel = first / kTileRows;
    attention_product<kOperand, true>(n, kQueries, w.qk_steps, b.k + panel * w.qk_panel, w.qk_panel,
                                      b.queries, 0, b.scores, kQueries, true);
    attention_product<kOperand, true>(n, kQueries, w.v_steps, b.v + panel * w.v_panel, w.v_panel,
                                      b.douts, 0, b.dp, kQueries, true);
    weights_block(t, n, first, query, count, lanes, b.scores, b.dp);
    pack_panels<kOperand>(round_up(n, kTileRows), kQueries, b.dp, kQueries, b.p_along);
    pack_panels<kOperand>(round_up(n, kTileRows), kQueries, b.scores, kQueries, b.ds_along);
    attention_product<kOperand, true>(n, w.v32, count_steps, b.p_along, kLanesPanel,
                                      b.dout + query_at, rows_steps * kTileColumns,
                                      b.dv + first * w.v32, w.v32, false);
    attention_product<kOperand, true>(n, w.qk32, count_steps, b.ds_along, kLanesPanel,
                                      b.q + query_at, rows_steps * kTileColumns,
                                      b.dk + first * w.qk32, w.qk32, false);
    attention_product<kOperand, false>(
        w.qk, kQueries, steps_of(kOperand, n), b.k_across + steps_of(kOperand, first) * kTileRows,
        rows_steps * kTileRows, lanes_panel<kOperand>(n, b.scores, b.ds), 0, b.dq, kQueries,
        first == 0);
  }
  put_lanes(count, w.qk, b.dq, t.round, t.dq + (row * t.heads + head) * w.qk, t.heads * w.qk);
}

inline void put_row(int64_t n, const float* x, bool round, float* out) {
  for (int64_t i = 0; i < n; i += 16)
    store_some(out + i, n - i, maybe_bf16(load_some(x + i, n - i), round));
}

// dk_rope [rows, d_rope] of this head alone.
template <Operand kOperand>
inline void backward_segment(const AttentionTask& t, const Widths<kOperand>& w, int64_t head,
                             const Segment& s, const BackwardScratch& b, float* dk_rope) {
  const int64_t kv_width = t.d_nope + t.d_v, n = s.size(), padded = round_up(n, kTileRows);
  const int64_t steps = steps_of(kOperand, n);
  copy_keys(t, head, s, b.keys);
  pack_panels<kOperand>(n, w.qk, b.keys, w.qk, b.k);
  pack_panels<kOperand>(n, w.v, values_of(t, head, s.begin), t.heads * kv_width, b.v);
  pack_a_across<kOperand>(n, w.qk, b.keys, w.qk, b.k_across);
  pack_b_across<kOperand>(n, w.qk, t.q + (s.begin * t.heads + head) * w.qk, t.heads * w.qk, b.q,
                          steps);
  pack_b_across<kOperand>(n, w.v, t.dout + (s.begin * t.heads + head) * w.v, t.heads * w.v, b.dout,
                          steps);
  std::fill_n(b.dk, padded * w.qk32, 0.0f);
  std::fill_n(b.dv, padded * w.v32, 0.0f);
  for (int64_t query = 0; query < n; query += kQueries)
    backward_group(t, w, head, s, query, b);
  for (int64_t r = 0; r < n; ++r) {
    float* dkv = t.dkv + ((s.begin + r) * t.heads + head) * kv_width;
    put_row(t.d_nope, b.dk + r * w.qk32, t.round, dkv);
    put_row(t.d_v, b.dv + r * w.v32, t.round, dkv + t.d_nope);
    std::copy_n(b.dk + r * w.qk32 + t.d_nope, t.d_rope, dk_rope + (s.begin + r) * t.d_rope);
  }
}

template <Operand kOperand>
inline void attention_backward_as(const AttentionTask& t, TrainScratch& scratch, Workers& workers) {
  const Widths<kOperand> w(t);
  const int64_t rope_size = t.rows * t.d_rope;
  WordCursor cursor{reinterpret_cast<uint32_t*>(
      scratch.of(-1, bytes_of({t.rows * kSegmentWords, t.heads * rope_size})))};
  const auto found =
      find_segments(t, w, reinterpret_cast<Segment*>(cursor.take(t.rows * kSegmentWords)));
  float* const head_dk_rope = cursor.take_floats(t.heads * rope_size);
  int64_t longest = 0;
  for (const auto& s : found.list)
    longest = std::max(longest, s.size());
  const auto num_segments = static_cast<int64_t>(found.list.size());
  workers.parallel_for(t.heads * num_segments, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t u = begin; u < end; ++u) {
      const Segment& s = found.list[static_cast<size_t>(u / t.heads)];
      const BackwardScratch memory(scratch.of(worker, BackwardScratch::bytes(w, longest)), w,
                                   s.size());
      backward_segment(t, w, u % t.heads, s, memory, head_dk_rope + u % t.heads * rope_size);
    }
  });
  for_elements(rope_size, workers, [&](int64_t i, int64_t left) {
    V sum = zero();
    for (int64_t head = 0; head < t.heads; ++head)
      sum = sum + load_some(head_dk_rope + head * rope_size + i, left);
    store_some(t.dk_rope + i, left, maybe_bf16(sum, t.round));
  });
}

inline void attention_backward(const AttentionTask& t, TrainScratch& scratch, Workers& workers) {
  if (t.rows == 0)
    return;
  t.round ? attention_backward_as<kBf16Operand>(t, scratch, workers)
          : attention_backward_as<Operand::f32>(t, scratch, workers);
}

} // namespace troupe::TROUPE_SIMD
