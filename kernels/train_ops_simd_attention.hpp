// Attention of training. Included once per target.
//
// The rows of a sample and head are a segment. Lanes are queries, 32 neighbouring ones of a segment
// (a group); so a query's softmax and all chains over keys run in the reference's order without a
// sum across lanes, and every product is a tile of kernels/train_ops_simd_tile.hpp:
//
//   scoresᵀ [keys, 32] = K · Qᵀ            outᵀ [d_v, 32] = Vᵀ · P
//   dPᵀ = V · dOutᵀ      dQᵀ += Kᵀ · dS    dK += dSᵀ · Q    dV += Pᵀ · dOut
//
// A masked weight is 0 and adds nothing. Forward: units are groups, after all keys are packed.
// Backward: units are segments, whose groups run in order because dK and dV sum over queries.
namespace troupe::TROUPE_SIMD {

inline constexpr int64_t kKeys = 64, kQueries = 32;
static_assert(kKeys == kPageTokens && kKeys % kTileRows == 0 && kQueries == kTileColumns);

// Rows [begin, end) that see their first one, in units of the sample.
struct Segment {
  int64_t begin, end;
  [[nodiscard]] int64_t size() const { return end - begin; }
  [[nodiscard]] int64_t groups() const { return ceil_div(size(), kQueries); }
};
// Segments of a call in order; returns how many.
inline int64_t find_segments(const AttentionTask& t, Segment* out) {
  int64_t n = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    if (n > 0 && t.first_key[r] == out[n - 1].begin)
      out[n - 1].end = r + 1;
    else
      out[n++] = {t.first_key[r], r + 1};
  }
  return n;
}

struct Widths {
  int64_t qk, v;             // elements
  int64_t qk8, v8;           // whole panels of a
  int64_t qk32, v32;         // whole panels of b
  int64_t qk_panel, v_panel; // words of a panel of 8 keys along
  explicit Widths(const AttentionTask& t)
      : qk(t.d_nope + t.d_rope), v(t.d_v), qk8(round_up(qk, kTileRows)), v8(round_up(v, kTileRows)),
        qk32(round_up(qk, kTileColumns)), v32(round_up(v, kTileColumns)),
        qk_panel(round_up(qk, kAlongSteps) * kTileRows),
        v_panel(round_up(v, kAlongSteps) * kTileRows) {}
};

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

// Rows of n elements as [rows, padded], zeros behind them.
inline void copy_rows(int64_t rows, int64_t n, const float* x, int64_t stride, float* out,
                      int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(out + r * padded, x + r * stride, static_cast<size_t>(n) * sizeof(float));
    std::fill(out + r * padded + n, out + (r + 1) * padded, 0.0f);
  }
}
// A head's keys, nope beside rope, as [rows, padded].
inline void copy_keys(const AttentionTask& t, int64_t head, Segment s, float* out, int64_t padded) {
  const int64_t kv_row = t.heads * (t.d_nope + t.d_v);
  for (int64_t r = s.begin; r < s.end; ++r, out += padded) {
    const float* nope = t.kv + r * kv_row + head * (t.d_nope + t.d_v);
    std::memcpy(out, nope, static_cast<size_t>(t.d_nope) * sizeof(float));
    std::memcpy(out + t.d_nope, t.k_rope + r * t.k_rope_stride,
                static_cast<size_t>(t.d_rope) * sizeof(float));
    std::fill(out + t.d_nope + t.d_rope, out + padded, 0.0f);
  }
}
inline const float* values_of(const AttentionTask& t, int64_t head, int64_t row) {
  return t.kv + (row * t.heads + head) * (t.d_nope + t.d_v) + t.d_nope;
}
inline void pack_panels(int64_t rows, int64_t n, const float* x, int64_t stride, uint32_t* out,
                        int64_t panel) {
  for (int64_t r = 0; r < rows; r += kTileRows, out += panel)
    pack_along<Operand::f32>(std::min(kTileRows, rows - r), n, x + r * stride, stride, out);
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

// Scores of `keys` keys from panels of `panel` words against 32 queries.
inline void score_tiles(int64_t keys, int64_t n, const uint32_t* a, int64_t panel,
                        const uint32_t* queries, float* out) {
  for (int64_t j = 0; j < keys; j += kTileRows)
    tile<false, true>(n, a + j / kTileRows * panel, kTileRows * kAlongSteps, queries, kTileColumns,
                      out + j * kQueries, kQueries, true, false);
}

// ---- forward
// --------------------------------------------------------------------------------------

struct KeysForward {     // of one head and the call's rows, each segment on its own
  uint32_t* k = nullptr; // panels along, [segment rows / 8]
  float* v = nullptr;    // [rows, v8]
};
struct ForwardScratch {
  uint32_t* queries;          // [qk][32]
  float *scores, *part, *out; // [64][32], [v8][32] twice
  ForwardScratch(std::byte* memory, const Widths& w) {
    WordCursor cursor{reinterpret_cast<uint32_t*>(memory)};
    queries = cursor.take(w.qk * kQueries);
    scores = cursor.take_floats(kKeys * kQueries);
    part = cursor.take_floats(w.v8 * kQueries);
    out = cursor.take_floats(w.v8 * kQueries);
  }
  static size_t bytes(const Widths& w) {
    return bytes_of({w.qk * kQueries, kKeys * kQueries, w.v8 * kQueries, w.v8 * kQueries});
  }
};
struct SoftmaxLanes {
  V max, sum;
};

// One block of n keys for 16 queries: scores become weights. Lanes before `first_lane(j)` do not
// see key j: key `first + j` of the segment against query `query` + lane of it.
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

inline void forward_group(const AttentionTask& t, const Widths& w, int64_t head, Segment s,
                          int64_t query, const KeysForward& keys, const ForwardScratch& scratch) {
  const int64_t count = std::min(kQueries, s.size() - query), row = s.begin + query;
  pack_b_along<Operand::f32>(w.qk, count, t.q + (row * t.heads + head) * w.qk, t.heads * w.qk,
                             scratch.queries, w.qk);
  std::fill_n(scratch.out, w.v8 * kQueries, 0.0f);
  SoftmaxLanes lanes[2];
  for (auto& l : lanes)
    l = {set1(-std::numeric_limits<float>::infinity()), zero()};
  for (int64_t first = 0; first < query + count; first += kKeys) {
    const int64_t n = std::min(kKeys, query + count - first);
    score_tiles(n, w.qk, keys.k + first / kTileRows * w.qk_panel, w.qk_panel, scratch.queries,
                scratch.scores);
    V rescale[2];
    for (int64_t h = 0; h < 2; ++h)
      rescale[h] =
          softmax_block(n, first, query + h * 16, t.tau, scratch.scores + h * 16, lanes[h]);
    for (int64_t i = 0; i < w.v8; i += kTileRows)
      tile<false, false>(n, reinterpret_cast<const uint32_t*>(keys.v + first * w.v8 + i), w.v8,
                         reinterpret_cast<const uint32_t*>(scratch.scores), kQueries,
                         scratch.part + i * kQueries, kQueries, true, false);
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

inline void attention(const AttentionTask& t, TrainScratch& scratch, Workers& workers) {
  if (t.rows == 0)
    return;
  const Widths w(t);
  // Segments are as many as rows at most, and so are panels of 8 keys and groups.
  const int64_t segment_words = static_cast<int64_t>(sizeof(Segment) / sizeof(uint32_t));
  const size_t list = bytes_of({t.rows * segment_words});
  auto* segments = reinterpret_cast<Segment*>(scratch.of(-1, list));
  int64_t panels = 0;
  const int64_t num_segments = find_segments(t, segments);
  for (int64_t i = 0; i < num_segments; ++i)
    panels += ceil_div(segments[i].size(), kTileRows);
  // Memory asked for again is new memory: the list is made anew in it.
  WordCursor cursor{reinterpret_cast<uint32_t*>(
      scratch.of(-1, list + bytes_of({t.heads * panels * w.qk_panel, t.heads * t.rows * w.v8})))};
  segments = reinterpret_cast<Segment*>(cursor.take(t.rows * segment_words));
  static_cast<void>(find_segments(t, segments));
  uint32_t* const all_k = cursor.take(t.heads * panels * w.qk_panel);
  float* const all_v = cursor.take_floats(t.heads * t.rows * w.v8);
  // Calls f(segment, its first panel, its first group) up to the one that holds `group`.
  const auto locate = [&](int64_t group, auto f) {
    int64_t panel = 0, first_group = 0;
    for (int64_t i = 0; i < num_segments; ++i) {
      if (group < first_group + segments[i].groups())
        return f(segments[i], panel, first_group);
      panel += ceil_div(segments[i].size(), kTileRows);
      first_group += segments[i].groups();
    }
  };
  int64_t groups = 0;
  for (int64_t i = 0; i < num_segments; ++i)
    groups += segments[i].groups();
  const auto keys_at = [&](int64_t head, Segment s, int64_t panel) {
    return KeysForward{all_k + (head * panels + panel) * w.qk_panel,
                       all_v + (head * t.rows + s.begin) * w.v8};
  };
  workers.parallel_for(t.heads, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t head = begin; head < end; ++head) {
      auto* plain = reinterpret_cast<float*>(
          scratch.of(worker, static_cast<size_t>(t.rows * w.qk) * sizeof(float)));
      int64_t panel = 0;
      for (int64_t i = 0; i < num_segments; ++i) {
        const Segment s = segments[i];
        const auto keys = keys_at(head, s, panel);
        copy_keys(t, head, s, plain, w.qk);
        pack_panels(s.size(), w.qk, plain, w.qk, keys.k, w.qk_panel);
        copy_rows(s.size(), w.v, values_of(t, head, s.begin), t.heads * (t.d_nope + t.d_v), keys.v,
                  w.v8);
        panel += ceil_div(s.size(), kTileRows);
      }
    }
  });
  // Late groups see the most keys and go first.
  workers.parallel_for(t.heads * groups, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t head = u % t.heads, group = groups - 1 - u / t.heads;
      const ForwardScratch memory(scratch.of(worker, ForwardScratch::bytes(w)), w);
      locate(group, [&](Segment s, int64_t panel, int64_t first_group) {
        forward_group(t, w, head, s, (group - first_group) * kQueries, keys_at(head, s, panel),
                      memory);
      });
    }
  });
}

// ---- backward
// -------------------------------------------------------------------------------------

// What a thread holds of one segment of `rows` rows.
struct BackwardScratch {
  uint32_t *k, *v;              // panels of 8 keys along
  float* keys;                  // [rows, qk8]
  float *q, *dout;              // [rows, qk32], [rows, v32]
  float *dk, *dv;               // [rows to 8, qk32], [rows to 8, v32]
  uint32_t *queries, *douts;    // of a group: [qk][32], [v][32]
  float *scores, *dp;           // [64][32]
  uint32_t *p_along, *ds_along; // 8 panels [2][8][16]
  float* dq;                    // [qk8][32]
  BackwardScratch(std::byte* memory, const Widths& w, int64_t rows) {
    WordCursor c{reinterpret_cast<uint32_t*>(memory)};
    const int64_t panels = ceil_div(rows, kTileRows), padded = panels * kTileRows;
    k = c.take(panels * w.qk_panel);
    v = c.take(panels * w.v_panel);
    keys = c.take_floats(rows * w.qk8);
    q = c.take_floats(rows * w.qk32);
    dout = c.take_floats(rows * w.v32);
    dk = c.take_floats(padded * w.qk32);
    dv = c.take_floats(padded * w.v32);
    queries = c.take(w.qk * kQueries);
    douts = c.take(w.v * kQueries);
    scores = c.take_floats(kKeys * kQueries);
    dp = c.take_floats(kKeys * kQueries);
    p_along = c.take(kKeys * kQueries);
    ds_along = c.take(kKeys * kQueries);
    dq = c.take_floats(w.qk8 * kQueries);
  }
  static size_t bytes(const Widths& w, int64_t rows) {
    const int64_t panels = ceil_div(rows, kTileRows), padded = panels * kTileRows;
    return bytes_of({panels * w.qk_panel, panels * w.v_panel, rows * w.qk8, rows * w.qk32,
                     rows * w.v32, padded * w.qk32, padded * w.v32, w.qk * kQueries, w.v * kQueries,
                     kKeys * kQueries, kKeys * kQueries, kKeys * kQueries, kKeys * kQueries,
                     w.qk8 * kQueries});
  }
};

// Log-sum-exps and Σ dout·out of a group's queries.
struct QueryLanes {
  alignas(64) float lse[kQueries] = {}, delta[kQueries] = {};
};

// Weights and their gradients of a block of n keys, from scores and dp: as panels along the
// queries, and the gradients in place of the scores too.
inline void weights_block(const AttentionTask& t, int64_t n, int64_t first, int64_t query,
                          int64_t count, const QueryLanes& lanes, const BackwardScratch& b) {
  const V tau = set1(t.tau);
  for (int64_t j = 0; j < round_up(n, kTileRows); ++j)
    for (int64_t h = 0; h < 2; ++h) {
      float* score = b.scores + j * kQueries + h * 16;
      V p = exp(tau * load(score) - load(lanes.lse + h * 16));
      V ds = tau * (p * (load(b.dp + j * kQueries + h * 16) - load(lanes.delta + h * 16)));
      // Lanes before the key's own query don't see it; lanes from `count` on are no queries.
      const int64_t before = first + j - query - h * 16, there = j < n ? count - h * 16 : 0;
      p = first_lanes(there, first_lanes(before, zero(), p), zero());
      ds = first_lanes(there, first_lanes(before, zero(), ds), zero());
      const int64_t at = ((j / kTileRows * 2 + h) * kTileRows + j % kTileRows) * kAlongSteps;
      store_words(b.p_along + at, p);
      store_words(b.ds_along + at, ds);
      store(score, ds);
    }
}

// out [keys, width] += weights · rows of the group.
inline void add_to_keys(int64_t keys, int64_t count, const uint32_t* weights, const float* rows,
                        int64_t width, float* out) {
  constexpr int64_t kPanel = kQueries * kTileRows;
  for (int64_t c = 0; c < width; c += kTileColumns)
    for (int64_t j = 0; j < keys; j += kTileRows)
      tile<false, true>(count, weights + j / kTileRows * kPanel, kTileRows * kAlongSteps,
                        reinterpret_cast<const uint32_t*>(rows + c), width, out + j * width + c,
                        width, false, false);
}

inline void backward_group(const AttentionTask& t, const Widths& w, int64_t head, Segment s,
                           int64_t query, const BackwardScratch& b) {
  const int64_t count = std::min(kQueries, s.size() - query), row = s.begin + query;
  const float* dout = t.dout + (row * t.heads + head) * w.v;
  const float* out = t.out + (row * t.heads + head) * w.v;
  pack_b_along<Operand::f32>(w.qk, count, t.q + (row * t.heads + head) * w.qk, t.heads * w.qk,
                             b.queries, w.qk);
  pack_b_along<Operand::f32>(w.v, count, dout, t.heads * w.v, b.douts, w.v);
  QueryLanes lanes;
  for (int64_t l = 0; l < count; ++l) {
    lanes.lse[l] = t.lse[(row + l) * t.heads + head];
    const int64_t at = l * t.heads * w.v;
    lanes.delta[l] = row_sum(w.v, [&](V sum, int64_t i, int64_t left) {
      return fma_some(left, load_some(dout + at + i, left), load_some(out + at + i, left), sum);
    });
  }
  std::fill_n(b.dq, w.qk8 * kQueries, 0.0f);
  for (int64_t first = 0; first < query + count; first += kKeys) {
    const int64_t n = std::min(kKeys, query + count - first), panel = first / kTileRows;
    score_tiles(n, w.qk, b.k + panel * w.qk_panel, w.qk_panel, b.queries, b.scores);
    score_tiles(n, w.v, b.v + panel * w.v_panel, w.v_panel, b.douts, b.dp);
    weights_block(t, n, first, query, count, lanes, b);
    add_to_keys(n, count, b.p_along, b.dout + query * w.v32, w.v32, b.dv + first * w.v32);
    add_to_keys(n, count, b.ds_along, b.q + query * w.qk32, w.qk32, b.dk + first * w.qk32);
    for (int64_t i = 0; i < w.qk8; i += kTileRows)
      tile<false, false>(n, reinterpret_cast<const uint32_t*>(b.keys + first * w.qk8 + i), w.qk8,
                         reinterpret_cast<const uint32_t*>(b.scores), kQueries, b.dq + i * kQueries,
                         kQueries, false, false);
  }
  put_lanes(count, w.qk, b.dq, t.round, t.dq + (row * t.heads + head) * w.qk, t.heads * w.qk);
}

inline void put_row(int64_t n, const float* x, bool round, float* out) {
  for (int64_t i = 0; i < n; i += 16)
    store_some(out + i, n - i, maybe_bf16(load_some(x + i, n - i), round));
}

// dk_rope [rows, d_rope] of this head alone.
inline void backward_segment(const AttentionTask& t, const Widths& w, int64_t head, Segment s,
                             const BackwardScratch& b, float* dk_rope) {
  const int64_t kv_width = t.d_nope + t.d_v, padded = round_up(s.size(), kTileRows);
  copy_keys(t, head, s, b.keys, w.qk8);
  pack_panels(s.size(), w.qk, b.keys, w.qk8, b.k, w.qk_panel);
  pack_panels(s.size(), w.v, values_of(t, head, s.begin), t.heads * kv_width, b.v, w.v_panel);
  copy_rows(s.size(), w.qk, t.q + (s.begin * t.heads + head) * w.qk, t.heads * w.qk, b.q, w.qk32);
  copy_rows(s.size(), w.v, t.dout + (s.begin * t.heads + head) * w.v, t.heads * w.v, b.dout, w.v32);
  std::fill_n(b.dk, padded * w.qk32, 0.0f);
  std::fill_n(b.dv, padded * w.v32, 0.0f);
  for (int64_t query = 0; query < s.size(); query += kQueries)
    backward_group(t, w, head, s, query, b);
  for (int64_t r = 0; r < s.size(); ++r) {
    float* dkv = t.dkv + ((s.begin + r) * t.heads + head) * kv_width;
    put_row(t.d_nope, b.dk + r * w.qk32, t.round, dkv);
    put_row(t.d_v, b.dv + r * w.v32, t.round, dkv + t.d_nope);
    std::memcpy(dk_rope + (s.begin + r) * t.d_rope, b.dk + r * w.qk32 + t.d_nope,
                static_cast<size_t>(t.d_rope) * sizeof(float));
  }
}

inline void attention_backward(const AttentionTask& t, TrainScratch& scratch, Workers& workers) {
  if (t.rows == 0)
    return;
  const Widths w(t);
  const int64_t segment_words = static_cast<int64_t>(sizeof(Segment) / sizeof(uint32_t));
  const int64_t rope_size = t.rows * t.d_rope;
  WordCursor cursor{reinterpret_cast<uint32_t*>(
      scratch.of(-1, bytes_of({t.rows * segment_words, t.heads * rope_size})))};
  auto* segments = reinterpret_cast<Segment*>(cursor.take(t.rows * segment_words));
  float* const head_dk_rope = cursor.take_floats(t.heads * rope_size);
  const int64_t num_segments = find_segments(t, segments);
  int64_t longest = 0;
  for (int64_t i = 0; i < num_segments; ++i)
    longest = std::max(longest, segments[i].size());
  workers.parallel_for(t.heads * num_segments, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t u = begin; u < end; ++u) {
      const Segment s = segments[u / t.heads];
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

} // namespace troupe::TROUPE_SIMD
