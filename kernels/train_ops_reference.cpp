// The reference table: the formulas of reference_backward*.hpp over rows, columns or heads.
#include "kernels/train_ops.hpp"

#include "config/dtype.hpp"
#include "kernels/reference_backward_attention.hpp"
#include "kernels/reference_backward_bf16.hpp"
#include "kernels/reference_backward_fp8.hpp"
#include "kernels/reference_backward_moe.hpp"

#include <algorithm>

namespace troupe {

namespace {

namespace ref = reference;
using ref::Grid;

float bf16(float x) { return to_float(to_bf16(x)); }
float maybe_bf16(float x, bool round) { return round ? bf16(x) : x; }

// ---- prepared weights: F32 [n, k] (rounded under bf16); under fp8 codes, then scales ------------

int64_t blocks(int64_t x) { return (x + ref::kFp8Block - 1) / ref::kFp8Block; }

size_t weight_bytes(TrainPrecision precision, int64_t n, int64_t k) {
  const auto elements = static_cast<size_t>(n * k);
  if (precision != TrainPrecision::fp8)
    return elements * sizeof(float);
  return (elements + 3) / 4 * 4 + static_cast<size_t>(blocks(n) * blocks(k)) * sizeof(float);
}

void prepare_weight(TrainPrecision precision, int64_t n, int64_t k, const float* master,
                    std::byte* out, Workers&) {
  if (precision == TrainPrecision::fp8) {
    const auto q = ref::quantize_weight(n, k, Grid<const float>{master, k});
    const auto bytes = std::as_bytes(std::span{q.scales});
    std::copy_n(reinterpret_cast<const std::byte*>(q.codes.data()), q.codes.size(), out);
    std::copy(bytes.begin(), bytes.end(), out + (q.codes.size() + 3) / 4 * 4);
    return;
  }
  auto* values = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < n * k; ++i)
    values[i] = precision == TrainPrecision::bf16 ? ref::bf16_operand(master[i]) : master[i];
}

ref::Fp8Matrix fp8_weight(const LinearTask& t) {
  ref::Fp8Matrix w{ref::kFp8Block, ref::kFp8Block, t.k, {}, {}};
  w.codes.resize(static_cast<size_t>(t.n * t.k));
  w.scales.resize(static_cast<size_t>(blocks(t.n) * blocks(t.k)));
  const auto bytes = std::as_writable_bytes(std::span{w.scales});
  std::copy_n(t.weight, w.codes.size(), reinterpret_cast<std::byte*>(w.codes.data()));
  std::copy_n(t.weight + (w.codes.size() + 3) / 4 * 4, bytes.size(), bytes.begin());
  return w;
}

ref::Fp8Scale scale_kind(bool power_of_two) {
  return power_of_two ? ref::Fp8Scale::power_of_two : ref::Fp8Scale::exact;
}

// acc + Σ a(i)·b(i), i < n, of F32 or BF16 operands.
template <class A, class B>
float product(TrainPrecision precision, float acc, int64_t n, A a, B b) {
  if (precision == TrainPrecision::bf16)
    return ref::bf16_chain(
        acc, n, [&](int64_t i) { return ref::bf16_operand(a(i)); },
        [&](int64_t i) { return ref::bf16_operand(b(i)); });
  for (int64_t i = 0; i < n; ++i)
    acc = std::fma(a(i), b(i), acc);
  return acc;
}

template <class Task>
void for_tasks(std::span<const LinearTask> tasks, Workers& workers, Task task) {
  workers.parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      task(tasks[static_cast<size_t>(i)]);
  });
}

void finish(const LinearTask& t, int64_t columns, const std::vector<float>& sums) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      t.out[r * t.out_stride + c] = maybe_bf16(sums[static_cast<size_t>(r * columns + c)], t.round);
}

void fprop(TrainPrecision precision, std::span<const LinearTask> tasks, TrainScratch&,
           Workers& workers) {
  for_tasks(tasks, workers, [&](const LinearTask& t) {
    std::vector<float> sums(static_cast<size_t>(t.rows * t.n));
    const Grid<const float> x{t.a, t.a_stride};
    const Grid<float> y{sums.data(), t.n};
    if (precision == TrainPrecision::fp8) {
      const auto q = ref::quantize_activations(t.rows, t.k, x, scale_kind(t.power_of_two));
      ref::fp8_fprop(t.rows, t.n, t.k, q, fp8_weight(t), y);
    } else {
      const Grid<const float> w{reinterpret_cast<const float*>(t.weight), t.k};
      for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t i = 0; i < t.n; ++i)
          y(r, i) = product(
              precision, 0.0f, t.k, [&](int64_t c) { return x(r, c); },
              [&](int64_t c) { return w(i, c); });
    }
    finish(t, t.n, sums);
  });
}

void dgrad(TrainPrecision precision, std::span<const LinearTask> tasks, TrainScratch&,
           Workers& workers) {
  for_tasks(tasks, workers, [&](const LinearTask& t) {
    std::vector<float> sums(static_cast<size_t>(t.rows * t.k));
    const Grid<const float> dy{t.a, t.a_stride};
    const Grid<float> dx{sums.data(), t.k};
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t c = 0; c < t.k; ++c)
        dx(r, c) = t.accumulate ? t.out[r * t.out_stride + c] : 0.0f;
    if (precision == TrainPrecision::fp8) {
      const auto q = ref::quantize_activations(t.rows, t.n, dy, scale_kind(t.power_of_two));
      ref::fp8_dgrad(t.rows, t.n, t.k, q, fp8_weight(t), dx);
    } else {
      const Grid<const float> w{reinterpret_cast<const float*>(t.weight), t.k};
      for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t c = 0; c < t.k; ++c)
          dx(r, c) = product(
              precision, dx(r, c), t.n, [&](int64_t i) { return dy(r, i); },
              [&](int64_t i) { return w(i, c); });
    }
    finish(t, t.k, sums);
  });
}

void wgrad(TrainPrecision precision, std::span<const LinearTask> tasks, TrainScratch&,
           Workers& workers) {
  for_tasks(tasks, workers, [&](const LinearTask& t) {
    const Grid<const float> dy{t.a, t.a_stride}, x{t.b, t.b_stride};
    const Grid<float> dw{t.out, t.out_stride};
    if (precision == TrainPrecision::fp8) {
      // What is kept between the passes are 1×128 codes; they are quantized again along tokens.
      const auto kept_dy = ref::quantize_activations(t.rows, t.n, dy, scale_kind(t.power_of_two));
      const auto kept_x = ref::quantize_activations(t.rows, t.k, x, scale_kind(t.b_power_of_two));
      ref::fp8_wgrad(t.rows, t.n, t.k, ref::quantize_along_tokens(t.rows, t.n, kept_dy),
                     ref::quantize_along_tokens(t.rows, t.k, kept_x), dw);
      return;
    }
    for (int64_t i = 0; i < t.n; ++i)
      for (int64_t c = 0; c < t.k; ++c)
        dw(i, c) = product(
            precision, dw(i, c), t.rows, [&](int64_t r) { return dy(r, i); },
            [&](int64_t r) { return x(r, c); });
  });
}

// ---- rows -------------------------------------------------------------------------------------

void rms_norm(const NormTask& t, Workers& workers) {
  workers.parallel_for(t.rows, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = t.x + r * t.x_stride;
      ref::rms_norm<float>(
          t.n, t.eps, [&](int64_t i) { return x[i]; }, [&](int64_t i) { return t.weight[i]; },
          [&](int64_t i, float y) { t.out[r * t.out_stride + i] = maybe_bf16(y, t.round); });
    }
  });
}

void rms_norm_backward(const NormTask& t, TrainScratch&, Workers&) {
  std::vector<float> dx(static_cast<size_t>(t.rows * t.n));
  ref::rms_norm_backward<float>(t.rows, t.n, t.eps, {t.x, t.x_stride}, t.weight, {t.dy, t.n},
                                {dx.data(), t.n}, t.dweight);
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t i = 0; i < t.n; ++i) {
      float& out = t.out[r * t.out_stride + i];
      const float value = dx[static_cast<size_t>(r * t.n + i)];
      out = maybe_bf16(t.accumulate ? out + value : value, t.round);
    }
}

void swiglu(const SwigluTask& t, Workers& workers) {
  workers.parallel_for(t.rows, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * t.n; i < end * t.n; ++i)
      t.z[i] = maybe_bf16(ref::silu(t.a[i]) * t.b[i], t.round);
  });
}

void swiglu_backward(const SwigluTask& t, Workers& workers) {
  workers.parallel_for(t.rows, 4, [&](int64_t begin, int64_t end, int) {
    const int64_t at = begin * t.n;
    ref::swiglu_backward<float>(end - begin, t.n, {t.a + at, t.n}, {t.b + at, t.n},
                                {t.dz + at, t.n}, {t.da + at, t.n}, {t.db + at, t.n});
    for (int64_t i = at; i < end * t.n && t.round; ++i) {
      t.da[i] = bf16(t.da[i]);
      t.db[i] = bf16(t.db[i]);
    }
  });
}

void expert_weight_backward(const ExpertWeightTask& t, Workers& workers) {
  workers.parallel_for(t.rows, 4, [&](int64_t begin, int64_t end, int) {
    const int64_t at = begin * t.n;
    ref::expert_weight_backward<float>(end - begin, t.n, {t.z + at, t.n}, t.weight + begin,
                                       {t.dz + at, t.n}, t.dweight + begin);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = r * t.n; i < (r + 1) * t.n; ++i) {
        t.z[i] = maybe_bf16(t.z[i] * t.weight[r], t.round);
        t.dz[i] = maybe_bf16(t.dz[i], t.round);
      }
  });
}

void rope(const RopeArgs& args, bool inverse, bool round, Workers& workers) {
  const auto& table = *args.table;
  const int64_t half = table.dim / 2;
  workers.parallel_for(args.num_rows, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t head = 0; head < args.heads; ++head) {
        float* x = static_cast<float*>(args.x.data) + r * args.x.stride + head * args.head_stride;
        const float* cos = table.cos + args.positions[r] * half;
        const float* sin = table.sin + args.positions[r] * half;
        for (int64_t i = 0; i < half; ++i) {
          float& first = x[table.interleaved ? 2 * i : i];
          float& second = x[table.interleaved ? 2 * i + 1 : i + half];
          const auto [u, v] = ref::rotate(first, second, cos[i], inverse ? -sin[i] : sin[i]);
          first = maybe_bf16(u, round);
          second = maybe_bf16(v, round);
        }
      }
  });
}

// ---- attention --------------------------------------------------------------------------------

// kv_b's rows taken apart.
struct KeysAndValues {
  std::vector<float> k_nope, v;
};
KeysAndValues split(const AttentionTask& t) {
  KeysAndValues parts;
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t head = 0; head < t.heads; ++head) {
      const float* row = t.kv + (r * t.heads + head) * (t.d_nope + t.d_v);
      parts.k_nope.insert(parts.k_nope.end(), row, row + t.d_nope);
      parts.v.insert(parts.v.end(), row + t.d_nope, row + t.d_nope + t.d_v);
    }
  return parts;
}

ref::AttentionShape shape_of(const AttentionTask& t) {
  return {t.rows, t.heads, t.d_nope, t.d_rope, t.d_v, kPageTokens, t.first_key};
}

ref::AttentionInputs<const float> inputs(const AttentionTask& t, const KeysAndValues& parts) {
  return {{t.q, t.heads * (t.d_nope + t.d_rope)},
          {parts.k_nope.data(), t.heads * t.d_nope},
          {t.k_rope, t.k_rope_stride},
          {parts.v.data(), t.heads * t.d_v}};
}

void attention(const AttentionTask& t, TrainScratch&, Workers&) {
  const auto parts = split(t);
  const auto run = [&](auto forward) {
    forward(shape_of(t), t.tau, inputs(t, parts), Grid<float>{t.out, t.heads * t.d_v},
            Grid<float>{t.lse, t.heads});
  };
  if (!t.round)
    return run(ref::attention_forward<float>);
  run(ref::attention_forward<float, ref::Bf16Sum>);
  for (int64_t i = 0; i < t.rows * t.heads * t.d_v; ++i)
    t.out[i] = bf16(t.out[i]);
}

void attention_backward(const AttentionTask& t, TrainScratch&, Workers&) {
  const auto parts = split(t);
  auto grads = parts; // of the same sizes
  const auto backward = t.round ? ref::attention_backward_bf16 : ref::attention_backward<float>;
  backward(shape_of(t), t.tau, inputs(t, parts), {t.out, t.heads * t.d_v}, {t.lse, t.heads},
           {t.dout, t.heads * t.d_v},
           {{t.dq, t.heads * (t.d_nope + t.d_rope)},
            {grads.k_nope.data(), t.heads * t.d_nope},
            {t.dk_rope, t.d_rope},
            {grads.v.data(), t.heads * t.d_v}});
  const float *k = grads.k_nope.data(), *v = grads.v.data();
  for (float* out = t.dkv; out < t.dkv + t.rows * t.heads * (t.d_nope + t.d_v);) {
    out = std::copy_n(k, t.d_nope, out);
    out = std::copy_n(v, t.d_v, out);
    k += t.d_nope;
    v += t.d_v;
  }
  if (!t.round)
    return;
  const auto round_all = [](float* x, int64_t n) { std::transform(x, x + n, x, bf16); };
  round_all(t.dq, t.rows * t.heads * (t.d_nope + t.d_rope));
  round_all(t.dkv, t.rows * t.heads * (t.d_nope + t.d_v));
  round_all(t.dk_rope, t.rows * t.d_rope);
}

// ---- loss and optimizer -----------------------------------------------------------------------

void cross_entropy(int64_t rows, int64_t vocab, const int32_t* targets, float weight, float* logits,
                   double* loss, Workers& workers) {
  workers.parallel_for(rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const Grid<float> row{logits + r * vocab, vocab};
      float lse = 0;
      loss[r] = ref::cross_entropy<float>(1, vocab, row, targets + r, &lse);
      ref::cross_entropy_backward<float>(1, vocab, row, targets + r, &lse, weight, row);
    }
  });
}

void adamw(const AdamWTask& t, Workers& workers) {
  constexpr int64_t kPiece = 16'384;
  const ref::AdamW<float> o{t.lr, t.beta1, t.beta2, t.eps, t.weight_decay, t.step};
  workers.parallel_for(t.n, kPiece, [&](int64_t begin, int64_t end, int) {
    ref::adamw<float>(o, end - begin, t.clip, t.g + begin, t.theta + begin, t.m + begin,
                      t.v + begin, [&](float x) { return maybe_bf16(x, t.round_moments); });
  });
}

} // namespace

const TrainOps& reference_train_ops() {
  static constexpr TrainOps ops{"reference",
                                weight_bytes,
                                prepare_weight,
                                fprop,
                                dgrad,
                                wgrad,
                                rms_norm,
                                rms_norm_backward,
                                swiglu,
                                swiglu_backward,
                                expert_weight_backward,
                                rope,
                                attention,
                                attention_backward,
                                cross_entropy,
                                adamw};
  return ops;
}

} // namespace troupe
