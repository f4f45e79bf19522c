// The reference backend: the specification in plain loops, in exactly the documented order. Written
// to be read and compared with, not to be fast.
#include "kernels/backend.hpp"

#include "kernels/math.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace troupe {

namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

float get(const Rows& x, int64_t row, int64_t i) {
  if (x.dtype == DType::f32)
    return static_cast<const float*>(x.data)[row * x.stride + i];
  return to_float(static_cast<const BF16*>(x.data)[row * x.stride + i]);
}

Rows readable(const MutableRows& x) { return {x.data, x.dtype, x.stride}; }

void put(const MutableRows& x, int64_t row, int64_t i, float value) {
  if (x.dtype == DType::f32)
    static_cast<float*>(x.data)[row * x.stride + i] = value;
  else
    static_cast<BF16*>(x.data)[row * x.stride + i] = to_bf16(value);
}

float rounded(DType a, float value) {
  return a == DType::bf16 ? to_float(to_bf16(value)) : value;
}

// ---- linear -----------------------------------------------------------------------------------

// Reads a packed matrix element by element.
class PackedReader {
 public:
  explicit PackedReader(const PackedMatrix& m) : m_(m) {
    for (int s = 0; s < m.segments.count; ++s) {
      start_[s] = stored_;
      stored_ += (m.segments.begin[s + 1] - m.segments.begin[s] + 1) / 2 * 2;
    }
  }
  // Element (row, column begin[s] + i), codes of E4M3 unscaled.
  [[nodiscard]] float at(int64_t row, int s, int64_t i) const {
    const int64_t panel = row / kPanelRows, lane = row % kPanelRows;
    const int64_t k = start_[s] + i;
    if (m_.dtype == DType::f32)
      return reinterpret_cast<const float*>(m_.data)[(panel * stored_ + k) * kPanelRows + lane];
    const int64_t e = ((panel * stored_ + k / 2 * 2) * kPanelRows) + lane * 2 + k % 2;
    if (m_.dtype == DType::bf16)
      return to_float(reinterpret_cast<const BF16*>(m_.data)[e]);
    return e4m3_to_float(static_cast<uint8_t>(m_.data[e]));
  }
  [[nodiscard]] float scale(int64_t row, int64_t block) const {
    const int64_t blocks = (m_.k0 + m_.k - 1) / m_.block_k - m_.k0 / m_.block_k + 1;
    return m_.scales[(row / kPanelRows * blocks + block) * kPanelRows + row % kPanelRows];
  }

 private:
  const PackedMatrix& m_;
  int64_t start_[kMaxSegments] = {};
  int64_t stored_ = 0;
};

// Σ over columns [begin, end) of one segment, a chain of fmas from +0. `x(k)` reads column k.
template <class X>
float chain(const PackedReader& w, int64_t row, int s, int64_t first, int64_t begin, int64_t end,
            X x) {
  float sum = 0;
  for (int64_t k = begin; k < end; ++k)
    sum = std::fma(x(k), w.at(row, s, k - first), sum);
  return sum;
}

// One segment of one output element. `x_scale(block)` is 1 for plain rows.
template <class X, class XScale>
float segment_sum(const PackedMatrix& m, const PackedReader& w, int64_t row, int s, X x,
                  XScale x_scale) {
  const int64_t first = m.segments.begin[s], last = m.segments.begin[s + 1];
  if (m.dtype != DType::f8_e4m3)
    return chain(w, row, s, first, first, last, x);
  float sum = 0;
  for (int64_t k = first; k < last;) {
    const int64_t block = (m.k0 + k) / m.block_k - m.k0 / m.block_k;
    const int64_t end = std::min(last, ((m.k0 + k) / m.block_k + 1) * m.block_k - m.k0);
    const float part = chain(w, row, s, first, k, end, x);
    sum = std::fma(x_scale(k) * w.scale(row, block), part, sum);
    k = end;
  }
  return sum;
}

float tree(float* parts, int n) {
  for (; n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i)
      parts[i] = parts[2 * i] + parts[2 * i + 1];
  return parts[0];
}

template <class X, class XScale>
float product(const PackedMatrix& m, const PackedReader& w, int64_t row, X x, XScale x_scale) {
  float parts[kMaxSegments] = {};
  for (int s = 0; s < m.segments.count; ++s)
    parts[s] = segment_sum(m, w, row, s, x, x_scale);
  return tree(parts, m.segments.count);
}

// A row of plain or quantized input times one row of weights.
float row_product(const PackedMatrix& m, const PackedReader& w, int64_t n, const Rows& x,
                  const QuantizedRows& xq, int64_t r) {
  if (xq.codes == nullptr)
    return product(
      m, w, n, [&](int64_t k) { return get(x, r, k); }, [](int64_t) { return 1.0f; });
  return product(
    m, w, n, [&](int64_t k) { return e4m3_to_float(xq.codes[r * xq.code_stride + k]); },
    [&](int64_t k) { return xq.scales[r * xq.scale_stride + k / 128]; });
}

void linear(const LinearArgs& a, Workers& workers) {
  const PackedReader w{*a.w};
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t n = 0; n < a.w->n; ++n) {
        float sum = row_product(*a.w, w, n, a.x, a.xq, r);
        if (a.residual.data)
          sum = get(a.residual, r, n) + sum;
        put(a.out, r, n, sum);
      }
  });
}

void add_partials(const AddPartialsArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> parts(a.partials.size());
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < a.n; ++i) {
        for (size_t p = 0; p < parts.size(); ++p)
          parts[p] = a.partials[p][r * a.n + i];
        float sum = tree(parts.data(), static_cast<int>(parts.size()));
        if (a.residual.data)
          sum = get(a.residual, r, i) + sum;
        put(a.out, r, i, sum);
      }
  });
}

// ---- rows -------------------------------------------------------------------------------------

// Σ f(i) over 16 lanes, then in halves; `add(sum, i)` folds element i into a lane's sum.
template <class Add>
float lanes(int64_t n, Add add) {
  std::array<float, 16> lane{};
  for (int64_t i = 0; i < n; ++i)
    lane[static_cast<size_t>(i % 16)] = add(lane[static_cast<size_t>(i % 16)], i);
  for (size_t half = 8; half > 0; half /= 2)
    for (size_t l = 0; l < half; ++l)
      lane[l] += lane[l + half];
  return lane[0];
}

void rms_norm(const RmsNormArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float sum = lanes(a.n, [&](float s, int64_t i) {
        const float v = get(a.x, r, i);
        return std::fma(v, v, s);
      });
      const float scale = 1.0f / std::sqrt(sum / static_cast<float>(a.n) + a.eps);
      for (int64_t i = 0; i < a.n; ++i)
        put(a.out, r, i, a.weight[i] * (get(a.x, r, i) * scale));
    }
  });
}

void rope(const RopeArgs& a, Workers& workers) {
  const int64_t half = a.table->dim / 2;
  workers.parallel_for(a.num_rows, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* cos = a.table->cos + a.positions[r] * half;
      const float* sin = a.table->sin + a.positions[r] * half;
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t i = 0; i < half; ++i) {
          const int64_t base = h * a.head_stride;
          const int64_t first = base + (a.table->interleaved ? 2 * i : i);
          const int64_t second = base + (a.table->interleaved ? 2 * i + 1 : i + half);
          const float x = get(readable(a.x), r, first), y = get(readable(a.x), r, second);
          put(a.x, r, first, std::fma(x, cos[i], -(y * sin[i])));
          put(a.x, r, second, std::fma(x, sin[i], y * cos[i]));
        }
    }
  });
}

void quantize(const QuantizeArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t t = 0; t * 128 < a.k; ++t) {
        const int64_t last = std::min(a.k, (t + 1) * 128);
        float amax = 1e-4f;
        for (int64_t i = t * 128; i < last; ++i)
          amax = std::max(amax, std::fabs(get(a.x, r, i)));
        float scale = amax / 448.0f;
        if (a.power_of_two)
          scale = std::bit_cast<float>((std::bit_cast<uint32_t>(scale) + 0x7fffffu) & 0xff800000u);
        a.scales[r * a.scale_stride + t] = scale;
        for (int64_t i = t * 128; i < last; ++i)
          a.codes[r * a.code_stride + i] = float_to_e4m3(get(a.x, r, i) / scale);
      }
  });
}

// ---- gate -------------------------------------------------------------------------------------

// The k best of `score`, best first, ties to the lower index; NaN counts as -inf.
template <class Score>
void top(int64_t n, int64_t k, Score score, int32_t* out) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i)
    order[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  const auto value = [&](int32_t i) {
    const float v = score(i);
    return v != v ? kMinusInf : v;
  };
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
    const float va = value(a), vb = value(b);
    return va > vb || (va == vb && a < b);
  });
  std::copy_n(order.begin(), k, out);
}

void scores_of(const GateArgs& a, const float* logits, std::vector<float>& scores) {
  if (a.scoring == ScoringFunc::sigmoid) {
    for (int64_t e = 0; e < a.n_experts; ++e)
      scores[static_cast<size_t>(e)] = sigmoid_f32(logits[e]);
    return;
  }
  float max = kMinusInf;
  for (int64_t e = 0; e < a.n_experts; ++e)
    max = logits[e] > max ? logits[e] : max;
  float sum = 0;
  for (int64_t e = 0; e < a.n_experts; ++e)
    sum += scores[static_cast<size_t>(e)] = exp_f32(logits[e] - max);
  for (auto& s : scores)
    s /= sum;
}

// Which groups stay: by the sum of the two best (noaux_tc) or the best (group_limited_greedy).
void keep_groups(const GateArgs& a, std::vector<float>& selection) {
  const int64_t size = a.n_experts / a.n_group;
  std::vector<float> group(static_cast<size_t>(a.n_group));
  for (int64_t g = 0; g < a.n_group; ++g) {
    float first = kMinusInf, second = kMinusInf;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const float v = selection[static_cast<size_t>(e)];
      if (v > first) {
        second = first;
        first = v;
      } else if (v > second) {
        second = v;
      }
    }
    const bool pair = a.method == TopkMethod::noaux_tc && size > 1;
    group[static_cast<size_t>(g)] = pair ? first + second : first;
  }
  std::vector<int32_t> kept(static_cast<size_t>(a.topk_group));
  top(a.n_group, a.topk_group, [&](int32_t g) { return group[static_cast<size_t>(g)]; },
      kept.data());
  for (int64_t e = 0; e < a.n_experts; ++e)
    if (std::find(kept.begin(), kept.end(), static_cast<int32_t>(e / size)) == kept.end())
      selection[static_cast<size_t>(e)] = kMinusInf;
}

void gate_row(const GateArgs& a, int64_t r) {
  std::vector<float> scores(static_cast<size_t>(a.n_experts));
  scores_of(a, a.logits + r * a.n_experts, scores);
  auto selection = scores;
  if (a.bias)
    for (int64_t e = 0; e < a.n_experts; ++e)
      selection[static_cast<size_t>(e)] += a.bias[e];
  if (a.method != TopkMethod::greedy && a.n_group > 1)
    keep_groups(a, selection);
  int32_t* idx = a.topk_idx + r * a.top_k;
  float* weight = a.topk_weight + r * a.top_k;
  // A dropped group's experts stand below even a NaN of a kept one: all else being -inf, the lower
  // index wins.
  top(a.n_experts, a.top_k, [&](int32_t e) { return selection[static_cast<size_t>(e)]; }, idx);
  float sum = 0;
  for (int64_t k = 0; k < a.top_k; ++k)
    sum += scores[static_cast<size_t>(idx[k])];
  for (int64_t k = 0; k < a.top_k; ++k) {
    float w = scores[static_cast<size_t>(idx[k])];
    if (a.norm_topk_prob && a.top_k > 1)
      w /= sum + 1e-20f;
    weight[k] = w * a.routed_scaling_factor;
  }
}

void gate(const GateArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      gate_row(a, r);
  });
}

// ---- attention --------------------------------------------------------------------------------

// The online softmax over blocks of 64 keys. score(j) of key j; value(j, i) element i of its value.
template <class Score, class Value>
void attend(int64_t num_keys, int64_t width, DType a, float tau, Score score, Value value,
            std::vector<float>& out) {
  out.assign(static_cast<size_t>(width), 0.0f);
  float max = kMinusInf, sum = 0;
  std::array<float, kPageTokens> p{};
  for (int64_t block = 0; block < num_keys; block += kPageTokens) {
    const int64_t n = std::min(kPageTokens, num_keys - block);
    float block_max = kMinusInf;
    for (int64_t j = 0; j < n; ++j) {
      p[static_cast<size_t>(j)] = tau * score(block + j);
      block_max = std::max(block_max, p[static_cast<size_t>(j)]);
    }
    const float new_max = std::max(max, block_max);
    const float shrink = exp_f32(max - new_max);
    max = new_max;
    sum *= shrink;
    float block_sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      p[static_cast<size_t>(j)] = exp_f32(p[static_cast<size_t>(j)] - max);
      block_sum += p[static_cast<size_t>(j)];
    }
    sum += block_sum;
    for (int64_t i = 0; i < width; ++i) {
      float part = 0;
      for (int64_t j = 0; j < n; ++j)
        part = std::fma(rounded(a, p[static_cast<size_t>(j)]), value(block + j, i), part);
      out[static_cast<size_t>(i)] = out[static_cast<size_t>(i)] * shrink + part;
    }
  }
  const float inverse = 1.0f / sum;
  for (auto& v : out)
    v *= inverse;
}

// Row p of a sequence in the cache.
struct Latents {
  const LatentCacheLayer& cache;
  const int32_t* pages;
  [[nodiscard]] float at(int64_t position, int64_t i) const {
    const int64_t row = int64_t{pages[position / kPageTokens]} * kPageTokens + position % kPageTokens;
    return get(Rows{cache.base, cache.dtype, cache.row_elements}, row, i);
  }
};

void mla_naive(const MlaNaiveArgs& a, Workers& workers) {
  const auto& s = a.shape;
  const int64_t qk = s.qk_nope_head_dim + s.qk_rope_head_dim;
  const int64_t per_head = s.qk_nope_head_dim + s.v_head_dim;
  const PackedReader w{*a.kv_b};
  for (const auto& seq : a.sequences) {
    const Latents latents{a.cache, seq.pages};
    const int64_t num_keys = seq.first_position + seq.num_rows;
    workers.parallel_for(s.heads, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t h = begin; h < end; ++h) {
        // k_nope and v of every key, rounded to A.
        std::vector<float> kv(static_cast<size_t>(num_keys * per_head));
        for (int64_t j = 0; j < num_keys; ++j)
          for (int64_t i = 0; i < per_head; ++i)
            kv[static_cast<size_t>(j * per_head + i)] =
              rounded(a.out.dtype, product(
                                     *a.kv_b, w, h * per_head + i,
                                     [&](int64_t k) { return latents.at(j, k); },
                                     [](int64_t) { return 1.0f; }));
        std::vector<float> out;
        for (int64_t r = 0; r < seq.num_rows; ++r) {
          const int64_t row = seq.row_begin + r;
          const auto score = [&](int64_t j) {
            float sum = 0;
            for (int64_t i = 0; i < s.qk_nope_head_dim; ++i)
              sum = std::fma(get(a.q, row, h * qk + i), kv[static_cast<size_t>(j * per_head + i)], sum);
            for (int64_t i = 0; i < s.qk_rope_head_dim; ++i)
              sum = std::fma(get(a.q, row, h * qk + s.qk_nope_head_dim + i),
                             latents.at(j, s.kv_lora_rank + i), sum);
            return sum;
          };
          attend(
            seq.first_position + r + 1, s.v_head_dim, a.out.dtype, s.tau, score,
            [&](int64_t j, int64_t i) {
              return kv[static_cast<size_t>(j * per_head + s.qk_nope_head_dim + i)];
            },
            out);
          for (int64_t i = 0; i < s.v_head_dim; ++i)
            put(a.out, row, h * s.v_head_dim + i, out[static_cast<size_t>(i)]);
        }
      }
    });
  }
}

void mla_absorbed(const MlaAbsorbedArgs& a, Workers& workers) {
  const auto& s = a.shape;
  const int64_t qk = s.qk_nope_head_dim + s.qk_rope_head_dim;
  for (const auto& seq : a.sequences) {
    const Latents latents{a.cache, seq.pages};
    workers.parallel_for(s.heads, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t h = begin; h < end; ++h) {
        const PackedReader uk{a.w_uk_t[static_cast<size_t>(h)]}, uv{a.w_uv[static_cast<size_t>(h)]};
        std::vector<float> query(static_cast<size_t>(s.kv_lora_rank + s.qk_rope_head_dim)), out;
        for (int64_t r = 0; r < seq.num_rows; ++r) {
          const int64_t row = seq.row_begin + r;
          const auto one = [](int64_t) { return 1.0f; };
          for (int64_t c = 0; c < s.kv_lora_rank; ++c)
            query[static_cast<size_t>(c)] = rounded(
              a.out.dtype, product(
                             a.w_uk_t[static_cast<size_t>(h)], uk, c,
                             [&](int64_t k) { return get(a.q, row, h * qk + k); }, one));
          for (int64_t i = 0; i < s.qk_rope_head_dim; ++i)
            query[static_cast<size_t>(s.kv_lora_rank + i)] =
              get(a.q, row, h * qk + s.qk_nope_head_dim + i);
          attend(
            seq.first_position + r + 1, s.kv_lora_rank, a.out.dtype, s.tau,
            [&](int64_t j) {
              return lanes(s.kv_lora_rank + s.qk_rope_head_dim, [&](float sum, int64_t i) {
                return std::fma(query[static_cast<size_t>(i)], latents.at(j, i), sum);
              });
            },
            [&](int64_t j, int64_t i) { return latents.at(j, i); }, out);
          for (auto& v : out)
            v = rounded(a.out.dtype, v);
          for (int64_t i = 0; i < s.v_head_dim; ++i)
            put(a.out, row, h * s.v_head_dim + i,
                product(
                  a.w_uv[static_cast<size_t>(h)], uv, i,
                  [&](int64_t k) { return out[static_cast<size_t>(k)]; }, one));
        }
      }
    });
  }
}

// ---- experts ----------------------------------------------------------------------------------

void ffn_row(const GroupedFfnArgs& a, const FfnWeights& w, int64_t x_row, int64_t out_row) {
  const PackedReader gate{w.gate}, up{w.up}, down{w.down};
  const DType act = a.x.data ? a.x.dtype : DType::bf16;
  std::vector<float> product_row(static_cast<size_t>(w.gate.n));
  for (int64_t i = 0; i < w.gate.n; ++i) {
    const float g = row_product(w.gate, gate, i, a.x, a.xq, x_row);
    const float u = row_product(w.up, up, i, a.x, a.xq, x_row);
    product_row[static_cast<size_t>(i)] = rounded(act, silu_f32(g) * u);
  }
  const Rows z{product_row.data(), DType::f32, w.gate.n};
  QuantizedRows zq;
  std::vector<uint8_t> codes(static_cast<size_t>(w.gate.n));
  std::vector<float> scales(static_cast<size_t>((w.gate.n + 127) / 128));
  if (a.xq.codes) {
    InlineWorkers inline_workers;
    quantize({1, w.gate.n, z, false, codes.data(), scales.data(), w.gate.n, std::ssize(scales)},
             inline_workers);
    zq = {codes.data(), scales.data(), w.gate.n, std::ssize(scales)};
  }
  for (int64_t i = 0; i < w.down.n; ++i) {
    float sum = row_product(w.down, down, i, z, zq, 0);
    if (a.residual.data)
      sum = get(a.residual, out_row, i) + sum;
    put(a.out, out_row, i, sum);
  }
}

void grouped_ffn(const GroupedFfnArgs& a, Workers& workers) {
  for (const auto& group : a.groups)
    workers.parallel_for(std::ssize(group.row_of_x), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        ffn_row(a, *group.weights, group.row_of_x[static_cast<size_t>(i)], group.out_begin + i);
    });
}

} // namespace

const Backend& reference_backend() {
  static const Backend table{.name = "reference",
                             .linear = linear,
                             .add_partials = add_partials,
                             .rms_norm = rms_norm,
                             .rope = rope,
                             .mla_naive = mla_naive,
                             .mla_absorbed = mla_absorbed,
                             .gate = gate,
                             .grouped_ffn = grouped_ffn,
                             .quantize = quantize};
  return table;
}

} // namespace troupe
