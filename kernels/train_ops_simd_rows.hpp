// What works on rows or on single elements: norms, SwiGLU, RoPE, the loss, the optimizer. Included
// once per target. Lanes hold neighbouring elements; sums over a row are the reference's 16 lanes.
namespace troupe::TROUPE_SIMD {

// Rows a thread takes at once: about 64 KiB of them.
inline int64_t row_grain(int64_t n) {
  return std::max<int64_t>(1, 16'384 / std::max<int64_t>(n, 1));
}

// Σ f(i, elements left) in 16 lanes; f gives zeros beyond the end.
template <class Product>
TROUPE_INLINE float row_sum(int64_t n, Product add) {
  V sum = zero();
  for (int64_t i = 0; i < n; i += 16)
    sum = add(sum, i, n - i);
  return reduce_halves(sum);
}
// Lanes beyond the end stay as they are: a fused zero would turn -0 into +0.
TROUPE_INLINE V fma_some(int64_t n, V a, V b, V c) { return first_lanes(n, fma(a, b, c), c); }

inline float inverse_rms(int64_t n, float eps, const float* x) {
  const float squares = row_sum(n, [&](V sum, int64_t i, int64_t left) {
    const V v = load_some(x + i, left);
    return fma_some(left, v, v, sum);
  });
  return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
}

inline void rms_norm(const NormTask& t, Workers& workers) {
  workers.parallel_for(t.rows, row_grain(t.n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = t.x + row * t.x_stride;
      float* out = t.out + row * t.out_stride;
      const V r = set1(inverse_rms(t.n, t.eps, x));
      for (int64_t i = 0; i < t.n; i += 16) {
        const V y = load_some(t.weight + i, t.n - i) * (load_some(x + i, t.n - i) * r);
        store_some(out + i, t.n - i, maybe_bf16(y, t.round));
      }
    }
  });
}

TROUPE_INLINE V negate(V a) { return set1(-1.0f) * a; } // of zeros too

// dx of one row: fma(-x, along, r · (w · dy)).
inline void rms_norm_row_backward(const NormTask& t, int64_t row, float r, float along) {
  const float* x = t.x + row * t.x_stride;
  const float* dy = t.dy + row * t.n;
  float* out = t.out + row * t.out_stride;
  for (int64_t i = 0; i < t.n; i += 16) {
    const int64_t left = t.n - i;
    const V g = load_some(t.weight + i, left) * load_some(dy + i, left);
    V dx = fma(load_some(x + i, left), set1(-along), set1(r) * g);
    if (t.accumulate)
      dx = load_some(out + i, left) + dx;
    store_some(out + i, left, maybe_bf16(dx, t.round));
  }
}

// Three passes, because dx may overwrite dy: the factors of each row; dw, whose chains run over
// all rows, by columns; dx.
inline void rms_norm_backward(const NormTask& t, TrainScratch& scratch, Workers& workers) {
  struct Factors {
    float r, along;
  };
  auto* factors =
      reinterpret_cast<Factors*>(scratch.of(-1, static_cast<size_t>(t.rows) * sizeof(Factors)));
  const int64_t grain = row_grain(t.n);
  workers.parallel_for(t.rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = t.x + row * t.x_stride;
      const float* dy = t.dy + row * t.n;
      const float r = inverse_rms(t.n, t.eps, x);
      const float dot = row_sum(t.n, [&](V sum, int64_t i, int64_t left) {
        const V g = load_some(t.weight + i, left) * load_some(dy + i, left);
        return fma_some(left, g, load_some(x + i, left), sum);
      });
      factors[row] = {r, r * r * r / static_cast<float>(t.n) * dot};
    }
  });
  workers.parallel_for(ceil_div(t.n, 64), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * 64; i < std::min(end * 64, t.n); i += 16) {
      const int64_t left = t.n - i;
      V sum = load_some(t.dweight + i, left);
      for (int64_t row = 0; row < t.rows; ++row)
        sum = fma(load_some(t.dy + row * t.n + i, left),
                  load_some(t.x + row * t.x_stride + i, left) * set1(factors[row].r), sum);
      store_some(t.dweight + i, left, sum);
    }
  });
  workers.parallel_for(t.rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      rms_norm_row_backward(t, row, factors[row].r, factors[row].along);
  });
}

// Calls f(i, left) over [0, n) for every 16 elements, on all threads.
template <class Element>
inline void for_elements(int64_t n, Workers& workers, Element f) {
  workers.parallel_for(ceil_div(n, 16), 1024, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * 16; i < std::min(end * 16, n); i += 16)
      f(i, n - i);
  });
}

TROUPE_INLINE V sigmoid(V x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

inline void swiglu(const SwigluTask& t, Workers& workers) {
  for_elements(t.rows * t.n, workers, [&](int64_t i, int64_t left) {
    const V z = silu(load_some(t.a + i, left)) * load_some(t.b + i, left);
    store_some(t.z + i, left, maybe_bf16(z, t.round));
  });
}

inline void swiglu_backward(const SwigluTask& t, Workers& workers) {
  for_elements(t.rows * t.n, workers, [&](int64_t i, int64_t left) {
    const V g = load_some(t.dz + i, left), gate = load_some(t.a + i, left);
    const V up = load_some(t.b + i, left), s = sigmoid(gate), one = set1(1.0f);
    store_some(t.da + i, left, maybe_bf16(g * up * (s * (one + gate * (one - s))), t.round));
    store_some(t.db + i, left, maybe_bf16(g * (gate * s), t.round));
  });
}

inline void expert_weight_backward(const ExpertWeightTask& t, Workers& workers) {
  workers.parallel_for(t.rows, row_grain(t.n), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float *z = t.z + r * t.n, *dz = t.dz + r * t.n;
      const V weight = set1(t.weight[r]);
      t.dweight[r] = row_sum(t.n, [&](V sum, int64_t i, int64_t left) {
        const V a = load_some(dz + i, left), b = load_some(z + i, left);
        store_some(z + i, left, maybe_bf16(b * weight, t.round));
        store_some(dz + i, left, maybe_bf16(a * weight, t.round));
        return fma_some(left, a, b, sum);
      });
    }
  });
}

// Pairs (2i, 2i+1): each lane is fma(first, p, second · q) with p = cos, q = -sin in even lanes and
// p = sin, q = cos in odd ones.
inline void rotate_interleaved(int64_t dim, const float* p, const float* q, bool round, float* x) {
  for (int64_t i = 0; i < dim; i += 16) {
    const V v = load_some(x + i, dim - i);
    const V y =
        fma(even_twice(v), load_some(p + i, dim - i), odd_twice(v) * load_some(q + i, dim - i));
    store_some(x + i, dim - i, maybe_bf16(y, round));
  }
}
// Pairs (i, i + dim/2).
inline void rotate_halves(int64_t half, const float* cos, const float* sin, bool inverse,
                          bool round, float* x) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    const V c = load_some(cos + i, left), s0 = load_some(sin + i, left);
    const V s = inverse ? negate(s0) : s0;
    const V u = load_some(x + i, left), v = load_some(x + half + i, left);
    const V first = fma(u, c, negate(v * s)), second = fma(u, s, v * c);
    store_some(x + i, left, maybe_bf16(first, round));
    store_some(x + half + i, left, maybe_bf16(second, round));
  }
}

inline constexpr int64_t kRopePart = 256; // elements of a head whose factors are expanded at once

inline void rope(const RopeArgs& args, bool inverse, bool round, Workers& workers) {
  const auto& table = *args.table;
  const int64_t half = table.dim / 2;
  workers.parallel_for(args.num_rows, 16, [&](int64_t begin, int64_t end, int) {
    alignas(64) float p[kRopePart], q[kRopePart];
    for (int64_t r = begin; r < end; ++r) {
      float* row = static_cast<float*>(args.x.data) + r * args.x.stride;
      const float* cos = table.cos + args.positions[r] * half;
      const float* sin = table.sin + args.positions[r] * half;
      if (!table.interleaved) {
        for (int64_t head = 0; head < args.heads; ++head)
          rotate_halves(half, cos, sin, inverse, round, row + head * args.head_stride);
        continue;
      }
      for (int64_t first = 0; first < table.dim; first += kRopePart) {
        const int64_t dim = std::min(kRopePart, table.dim - first);
        for (int64_t i = 0; i < dim / 2; ++i) {
          const float c = cos[first / 2 + i], s0 = sin[first / 2 + i], s = inverse ? -s0 : s0;
          p[2 * i] = q[2 * i + 1] = c;
          p[2 * i + 1] = s;
          q[2 * i] = -s;
        }
        for (int64_t head = 0; head < args.heads; ++head)
          rotate_interleaved(dim, p, q, round, row + head * args.head_stride + first);
      }
    }
  });
}

// ---- loss --------------------------------------------------------------------------------------

// max + log Σ exp(x - max), exponentials in F32, their sum in F64.
inline double log_sum_exp(int64_t n, const float* x) {
  const V minus_inf = set1(-std::numeric_limits<float>::infinity());
  V top = minus_inf;
  for (int64_t i = 0; i < n; i += 16)
    top = max(first_lanes(n - i, load_some(x + i, n - i), minus_inf), top);
  const float largest = max_lane(top);
  F64Lanes sum;
  for (int64_t i = 0; i < n; i += 16)
    sum.add(first_lanes(n - i, exp(load_some(x + i, n - i) - set1(largest)), zero()));
  return static_cast<double>(largest) + log_f64(sum.reduce());
}

inline void cross_entropy(int64_t rows, int64_t vocab, const int32_t* targets, float weight,
                          float* logits, double* loss, Workers& workers) {
  workers.parallel_for(rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = logits + r * vocab;
      const int32_t target = targets[r];
      if (target == -1) { // no target: no loss, no gradient
        loss[r] = 0;
        std::fill_n(row, vocab, 0.0f);
        continue;
      }
      const double whole = log_sum_exp(vocab, row);
      loss[r] = whole - static_cast<double>(row[target]);
      const V lse = set1(static_cast<float>(whole));
      const float of_target = exp_f32(row[target] - static_cast<float>(whole)) - 1.0f;
      for (int64_t i = 0; i < vocab; i += 16)
        store_some(row + i, vocab - i, set1(weight) * exp(load_some(row + i, vocab - i) - lse));
      row[target] = weight * of_target;
    }
  });
}

// ---- optimizer ---------------------------------------------------------------------------------

inline void adamw(const AdamWTask& t, Workers& workers) {
  const auto correction = [&](float beta) {
    return set1(static_cast<float>(moment_correction(static_cast<double>(beta), t.step)));
  };
  const V correct_m = correction(t.beta1), correct_v = correction(t.beta2);
  const V lr = set1(t.lr), decay = set1(t.lr * t.weight_decay), eps = set1(t.eps);
  const V beta1 = set1(t.beta1), rest1 = set1(1.0f - t.beta1);
  const V beta2 = set1(t.beta2), rest2 = set1(1.0f - t.beta2), clip = set1(t.clip);
  for_elements(t.n, workers, [&](int64_t i, int64_t left) {
    const V gradient = load_some(t.g + i, left) * clip, theta = load_some(t.theta + i, left);
    const V m = beta1 * load_some(t.m + i, left) + rest1 * gradient;
    const V v = beta2 * load_some(t.v + i, left) + rest2 * gradient * gradient;
    const V decayed = theta - decay * theta;
    const V step = lr * (m / correct_m) / (sqrt(v / correct_v) + eps);
    store_some(t.theta + i, left, decayed - step);
    store_some(t.m + i, left, maybe_bf16(m, t.round_moments));
    store_some(t.v + i, left, maybe_bf16(v, t.round_moments));
  });
}

} // namespace troupe::TROUPE_SIMD
