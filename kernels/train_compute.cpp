#include "kernels/train_compute.hpp"

#include "config/dtype.hpp"
#include "kernels/reference_backward_moe.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace troupe {

namespace {

float bf16(float x) { return to_float(to_bf16(x)); }

reference::GateShape gate_shape(const ModelConfig& c) {
  return {c.n_routed_experts, c.n_group,     c.topk_group,    c.num_experts_per_tok,
          c.scoring_func,     c.topk_method, c.norm_topk_prob};
}

WeightProduct product(const TrainLinear& w, int64_t rows, Floats dy, Floats x) {
  return {w.precision, rows, w.n, w.k, std::move(dy), std::move(x), 0, w.n, 0, w.k, w.gradient};
}

} // namespace

Floats FloatPool::take(int64_t n) {
  const auto wanted = static_cast<uint64_t>(std::max<int64_t>(n, 64));
  const uint64_t step = std::bit_floor(wanted) / 8;
  const auto size = static_cast<int64_t>((wanted + step - 1) / step * step);
  std::unique_ptr<float[], Free> memory;
  {
    const std::lock_guard lock{mutex_};
    auto& kept = free_[size];
    if (!kept.empty()) {
      memory = std::move(kept.back());
      kept.pop_back();
    }
  }
  if (!memory)
    memory.reset(new (kAlignment) float[static_cast<size_t>(size)]);
  return {memory.release(), [pool = shared_from_this(), size](float* p) {
            const std::lock_guard lock{pool->mutex_};
            pool->free_[size].emplace_back(p);
          }};
}

MicroBatchRows without_last(const MicroBatchRows& rows, int64_t k) {
  MicroBatchRows out;
  const int64_t sequences = rows.num_sequences();
  out.seq_rows = std::max<int64_t>(rows.seq_rows - k, 0);
  out.rows = sequences * out.seq_rows;
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t i = 0; i < out.seq_rows; ++i) {
      const auto from = static_cast<size_t>(s * rows.seq_rows + i);
      out.positions.push_back(rows.positions[from]);
      out.first_key.push_back(rows.first_key[from] - static_cast<int32_t>(s * k));
    }
  for (const int64_t n : rows.padding)
    out.padding.push_back(std::min(n, out.seq_rows));
  return out;
}

TrainCompute::TrainCompute(const ModelConfig& config, TrainPrecision precision, bool recompute,
                           const TrainOps& ops, int64_t max_positions, int num_threads)
    : config_(config), precision_(precision), recompute_(recompute), ops_(ops),
      rope_(config, max_positions), tau_(softmax_scale(config)), scratch_(num_threads),
      pool_(std::make_shared<FloatPool>()) {}

// ---- pieces -----------------------------------------------------------------------------------

Floats TrainCompute::linear(const TrainLinear& w, int64_t rows, const float* x, int64_t stride,
                            Workers& workers) {
  auto y = take(rows * w.n);
  LinearTask task{rows, w.n, w.k, x, stride};
  task.weight = w.weight;
  task.out = y.get();
  task.out_stride = w.n;
  task.round = round();
  ops_.fprop(w.precision, {&task, 1}, scratch_, workers);
  return y;
}

Floats TrainCompute::dgrad(const TrainLinear& w, int64_t rows, const float* dy, int64_t stride,
                           Workers& workers) {
  auto dx = take(rows * w.k);
  LinearTask task{rows, w.n, w.k, dy, stride};
  task.weight = w.weight;
  task.out = dx.get();
  task.out_stride = w.k;
  task.round = round();
  ops_.dgrad(w.precision, {&task, 1}, scratch_, workers);
  return dx;
}

void TrainCompute::rotate(Floats& x, const MicroBatchRows& rows, int64_t heads, int64_t stride,
                          int64_t at, int64_t head_stride, bool inverse, Workers& workers) {
  RopeArgs args;
  args.num_rows = rows.rows;
  args.heads = heads;
  args.x = {x.get() + at, DType::f32, stride};
  args.head_stride = head_stride;
  args.positions = rows.positions.data();
  args.table = &rope_.table();
  ops_.rope(args, inverse, round(), workers);
}

void TrainCompute::norm_into(const TrainNorm& norm, double eps, int64_t rows, const float* x,
                             int64_t x_stride, float* out, int64_t out_stride, Workers& workers) {
  NormTask task{rows, norm.n, static_cast<float>(eps), x, x_stride, norm.weight};
  task.out = out;
  task.out_stride = out_stride;
  task.round = round();
  ops_.rms_norm(task, workers);
}

void TrainCompute::norm_back(const TrainNorm& norm, double eps, int64_t rows, const float* x,
                             int64_t x_stride, const float* dy, float* dx, int64_t dx_stride,
                             bool accumulate, float* gradients, Workers& workers) {
  NormTask task{rows, norm.n, static_cast<float>(eps), x, x_stride, norm.weight, dy};
  task.out = dx;
  task.out_stride = dx_stride;
  task.dweight = gradients + norm.gradient;
  task.accumulate = accumulate;
  task.round = round();
  ops_.rms_norm_backward(task, scratch_, workers);
}

Floats TrainCompute::norm_forward(const TrainNorm& norm, int64_t rows, const float* x,
                                  Workers& workers) {
  auto u = take(rows * norm.n);
  norm_into(norm, config_.rms_norm_eps, rows, x, norm.n, u.get(), norm.n, workers);
  return u;
}

Floats TrainCompute::norm_backward(const TrainNorm& norm, int64_t rows, const float* x,
                                   const float* du, const float* dy, float* gradients,
                                   Workers& workers) {
  auto dx = take(rows * norm.n);
  if (dy != nullptr)
    std::copy_n(dy, rows * norm.n, dx.get());
  norm_back(norm, config_.rms_norm_eps, rows, x, norm.n, du, dx.get(), norm.n, dy != nullptr,
            gradients, workers);
  return dx;
}

void TrainCompute::add(int64_t n, float* a, const float* b, Workers& workers) const {
  workers.parallel_for(n, 1 << 14, [&](int64_t begin, int64_t end, int) {
    if (round())
      for (int64_t i = begin; i < end; ++i)
        a[i] = bf16(a[i] + b[i]);
    else
      for (int64_t i = begin; i < end; ++i)
        a[i] += b[i];
  });
}

void TrainCompute::run(const WeightWork& work, float* arena, Workers& workers) {
  // Runs of one precision go to the kernel together; their targets differ, but for a repetition,
  // which must come later.
  for (size_t begin = 0; begin < work.size();) {
    std::vector<LinearTask> tasks;
    size_t end = begin;
    for (; end < work.size() && work[end].precision == work[begin].precision; ++end) {
      const auto& w = work[end];
      float* out = arena + w.gradient;
      if (std::any_of(tasks.begin(), tasks.end(), [&](const auto& t) { return t.out == out; }))
        break;
      LinearTask task{w.rows,    w.n, w.k, w.dy.get() + w.dy_at, w.dy_stride, w.x.get() + w.x_at,
                      w.x_stride};
      task.out = out;
      task.out_stride = w.k;
      task.accumulate = true;
      task.power_of_two = w.dy_power_of_two;
      task.b_power_of_two = w.x_power_of_two;
      tasks.push_back(task);
    }
    ops_.wgrad(work[begin].precision, tasks, scratch_, workers);
    begin = end;
  }
}

// ---- attention --------------------------------------------------------------------------------

// h, (q_a, cq,) q from x.
void TrainCompute::queries(const TrainBlock& b, const MicroBatchRows& rows, AttentionSaved& s,
                           Workers& workers) {
  const int64_t n = rows.rows, heads = config_.num_attention_heads, d = config_.qk_head_dim();
  if (!s.h)
    s.h = norm_forward(b.input_norm, n, s.x.get(), workers);
  if (config_.q_lora_rank > 0) {
    if (!s.q_a)
      s.q_a = linear(b.q_a, n, s.h.get(), b.q_a.k, workers);
    s.cq = take(n * b.q_a.n);
    norm_into(b.q_a_norm, kLatentNormEps, n, s.q_a.get(), b.q_a.n, s.cq.get(), b.q_a.n, workers);
    s.q = linear(b.q_b, n, s.cq.get(), b.q_b.k, workers);
  } else {
    s.q = linear(b.q_b, n, s.h.get(), b.q_b.k, workers);
  }
  rotate(s.q, rows, heads, heads * d, config_.qk_nope_head_dim, d, false, workers);
}

// c and kv from kv_a.
void TrainCompute::keys(const TrainBlock& b, const MicroBatchRows& rows, AttentionSaved& s,
                        Workers& workers) {
  const int64_t n = rows.rows, lora = config_.kv_lora_rank;
  s.c = take(n * lora);
  norm_into(b.kv_a_norm, kLatentNormEps, n, s.kv_a.get(), config_.latent_dim(), s.c.get(), lora,
            workers);
  s.kv = linear(b.kv_b, n, s.c.get(), lora, workers);
}

AttentionTask TrainCompute::attention_task(const MicroBatchRows& rows,
                                           const AttentionSaved& s) const {
  AttentionTask task;
  task.rows = rows.rows;
  task.heads = config_.num_attention_heads;
  task.d_nope = config_.qk_nope_head_dim;
  task.d_rope = config_.qk_rope_head_dim;
  task.d_v = config_.v_head_dim;
  task.tau = tau_;
  task.first_key = rows.first_key.data();
  task.q = s.q.get();
  task.kv = s.kv.get();
  task.k_rope = s.kv_a.get() + config_.kv_lora_rank;
  task.k_rope_stride = config_.latent_dim();
  task.out = s.out.get();
  task.lse = s.lse.get();
  task.round = round();
  return task;
}

Floats TrainCompute::attention_forward(const TrainBlock& b, const MicroBatchRows& rows, Floats x,
                                       AttentionSaved& s, Workers& workers) {
  const int64_t n = rows.rows, heads = config_.num_attention_heads;
  s.x = std::move(x);
  queries(b, rows, s, workers);
  s.kv_a = linear(b.kv_a, n, s.h.get(), b.kv_a.k, workers);
  rotate(s.kv_a, rows, 1, config_.latent_dim(), config_.kv_lora_rank, config_.qk_rope_head_dim,
         false, workers);
  keys(b, rows, s, workers);
  s.out = take(n * heads * config_.v_head_dim);
  s.lse = take(n * heads);
  ops_.attention(attention_task(rows, s), scratch_, workers);
  auto y = linear(b.o, n, s.out.get(), b.o.k, workers);
  add(n * config_.hidden_size, y.get(), s.x.get(), workers);
  if (recompute_)
    s.h = s.cq = s.q = s.c = s.kv = nullptr;
  return y;
}

Floats TrainCompute::attention_backward(const TrainBlock& b, const MicroBatchRows& rows,
                                        AttentionSaved& s, Floats dy, float* gradients,
                                        WeightWork& work, Workers& workers) {
  const int64_t n = rows.rows, heads = config_.num_attention_heads, d = config_.qk_head_dim(),
                lora = config_.kv_lora_rank, latent = config_.latent_dim();
  if (recompute_) {
    queries(b, rows, s, workers);
    keys(b, rows, s, workers);
  }
  const auto dout = dgrad(b.o, n, dy.get(), b.o.n, workers);
  work.push_back(product(b.o, n, dy, s.out));

  auto dq = take(n * heads * d), dkv = take(n * b.kv_b.n),
       dk_rope = take(n * config_.qk_rope_head_dim);
  auto task = attention_task(rows, s);
  task.dout = dout.get();
  task.dq = dq.get();
  task.dkv = dkv.get();
  task.dk_rope = dk_rope.get();
  ops_.attention_backward(task, scratch_, workers);
  rotate(dq, rows, heads, heads * d, config_.qk_nope_head_dim, d, true, workers);
  rotate(dk_rope, rows, 1, config_.qk_rope_head_dim, 0, config_.qk_rope_head_dim, true, workers);

  // Keys and values: through kv_b and the latent norm, beside the rope key.
  auto dkv_a = take(n * latent);
  const auto dc = dgrad(b.kv_b, n, dkv.get(), b.kv_b.n, workers);
  work.push_back(product(b.kv_b, n, dkv, s.c));
  norm_back(b.kv_a_norm, kLatentNormEps, n, s.kv_a.get(), latent, dc.get(), dkv_a.get(), latent,
            false, gradients, workers);
  for (int64_t r = 0; r < n; ++r)
    std::copy_n(dk_rope.get() + r * config_.qk_rope_head_dim, config_.qk_rope_head_dim,
                dkv_a.get() + r * latent + lora);

  // Queries.
  Floats dq_a = dq;
  const TrainLinear& first = config_.q_lora_rank > 0 ? b.q_a : b.q_b;
  if (config_.q_lora_rank > 0) {
    const auto dcq = dgrad(b.q_b, n, dq.get(), b.q_b.n, workers);
    work.push_back(product(b.q_b, n, dq, s.cq));
    dq_a = take(n * b.q_a.n);
    norm_back(b.q_a_norm, kLatentNormEps, n, s.q_a.get(), b.q_a.n, dcq.get(), dq_a.get(), b.q_a.n,
              false, gradients, workers);
  }
  work.push_back(product(first, n, dq_a, s.h));
  work.push_back(product(b.kv_a, n, dkv_a, s.h));

  // Both meet at the normalized input: one chain, rounded once.
  auto dh = take(n * config_.hidden_size);
  LinearTask q_task{n, first.n, first.k, dq_a.get(), first.n};
  q_task.weight = first.weight;
  q_task.out = dh.get();
  q_task.out_stride = first.k;
  ops_.dgrad(first.precision, {&q_task, 1}, scratch_, workers);
  LinearTask kv_task{n, b.kv_a.n, b.kv_a.k, dkv_a.get(), latent};
  kv_task.weight = b.kv_a.weight;
  kv_task.out = dh.get();
  kv_task.out_stride = b.kv_a.k;
  kv_task.accumulate = true;
  kv_task.round = round();
  ops_.dgrad(b.kv_a.precision, {&kv_task, 1}, scratch_, workers);
  auto dx = norm_backward(b.input_norm, n, s.x.get(), dh.get(), dy.get(), gradients, workers);
  s = {};
  return dx;
}

// ---- FFN --------------------------------------------------------------------------------------

Floats TrainCompute::ffn_forward(std::span<const FfnGroup> groups, int64_t rows, Floats u,
                                 FfnSaved& s, bool dispatched, Workers& workers) {
  if (groups.empty())
    return take(0);
  const auto& shape = groups.front().weights->gate;
  const int64_t hidden = shape.k, width = shape.n;
  s.u = std::move(u);
  s.a = take(rows * width);
  s.b = take(rows * width);
  std::vector<LinearTask> tasks;
  for (const auto& g : groups)
    for (const auto& [w, out] :
         {std::pair{&g.weights->gate, s.a.get()}, std::pair{&g.weights->up, s.b.get()}}) {
      LinearTask task{g.rows, width, hidden, s.u.get() + g.row_begin * hidden, hidden};
      task.weight = w->weight;
      task.out = out + g.row_begin * width;
      task.out_stride = width;
      task.round = round();
      task.power_of_two = dispatched;
      tasks.push_back(task);
    }
  ops_.fprop(shape.precision, tasks, scratch_, workers);
  s.z = take(rows * width);
  SwigluTask swiglu{rows, width, s.a.get(), s.b.get()};
  swiglu.z = s.z.get();
  swiglu.round = round();
  ops_.swiglu(swiglu, workers);
  auto y = take(rows * hidden);
  tasks.clear();
  for (const auto& g : groups) {
    LinearTask task{g.rows, hidden, width, s.z.get() + g.row_begin * width, width};
    task.weight = g.weights->down.weight;
    task.out = y.get() + g.row_begin * hidden;
    task.out_stride = hidden;
    task.round = round();
    tasks.push_back(task);
  }
  ops_.fprop(shape.precision, tasks, scratch_, workers);
  if (recompute_)
    s.z = nullptr;
  return y;
}

Floats TrainCompute::ffn_backward(std::span<const FfnGroup> groups, int64_t rows, FfnSaved& s,
                                  Floats dy, const float* weight, float* dweight, bool dispatched,
                                  WeightWork& work, Workers& workers) {
  if (groups.empty())
    return take(0);
  const auto& shape = groups.front().weights->gate;
  const int64_t hidden = shape.k, width = shape.n;
  if (recompute_) {
    s.z = take(rows * width);
    SwigluTask swiglu{rows, width, s.a.get(), s.b.get()};
    swiglu.z = s.z.get();
    swiglu.round = round();
    ops_.swiglu(swiglu, workers);
  }
  auto dz = take(rows * width);
  std::vector<LinearTask> tasks;
  for (const auto& g : groups) {
    LinearTask task{g.rows, hidden, width, dy.get() + g.row_begin * hidden, hidden};
    task.weight = g.weights->down.weight;
    task.out = dz.get() + g.row_begin * width;
    task.out_stride = width;
    task.round = round();
    task.power_of_two = dispatched;
    tasks.push_back(task);
  }
  ops_.dgrad(shape.precision, tasks, scratch_, workers);
  if (weight != nullptr)
    ops_.expert_weight_backward({rows, width, weight, s.z.get(), dz.get(), dweight, round()},
                                workers);
  auto da = take(rows * width), db = take(rows * width);
  SwigluTask swiglu{rows, width, s.a.get(), s.b.get(), dz.get()};
  swiglu.da = da.get();
  swiglu.db = db.get();
  swiglu.round = round();
  ops_.swiglu_backward(swiglu, workers);

  auto dx = take(rows * hidden);
  for (const bool second : {false, true}) {
    tasks.clear();
    for (const auto& g : groups) {
      const auto& w = second ? g.weights->up : g.weights->gate;
      LinearTask task{g.rows, width, hidden, (second ? db : da).get() + g.row_begin * width, width};
      task.weight = w.weight;
      task.out = dx.get() + g.row_begin * hidden;
      task.out_stride = hidden;
      task.accumulate = second;
      task.round = second && round();
      tasks.push_back(task);
    }
    ops_.dgrad(shape.precision, tasks, scratch_, workers);
  }
  for (const auto& g : groups) {
    const auto add_product = [&](const TrainLinear& w, const Floats& d, const Floats& x) {
      auto& p = work.emplace_back(product(w, g.rows, d, x));
      p.dy_at = g.row_begin * w.n;
      p.x_at = g.row_begin * w.k;
      // What was dispatched: the gradient that enters down, the rows that entered gate and up.
      p.dy_power_of_two = dispatched && &w == &g.weights->down;
      p.x_power_of_two = dispatched && &w != &g.weights->down;
    };
    add_product(g.weights->down, dy, s.z);
    add_product(g.weights->gate, da, s.u);
    add_product(g.weights->up, db, s.u);
  }
  s = {};
  return dx;
}

// ---- gate -------------------------------------------------------------------------------------

void TrainCompute::gate_forward(const TrainBlock& b, const MicroBatchRows& rows, const float* u,
                                float balance_scale, GateSaved& s, Workers& workers) {
  const auto shape = gate_shape(config_);
  const int64_t n = rows.rows, experts = shape.n_experts, top_k = shape.top_k;
  auto logits = take(n * experts);
  LinearTask task{n, experts, b.router.k, u, b.router.k};
  task.weight = b.router.weight;
  task.out = logits.get();
  task.out_stride = experts;
  ops_.fprop(b.router.precision, {&task, 1}, scratch_, workers);
  s.scores = take(n * experts);
  s.idx.resize(static_cast<size_t>(n * top_k));
  s.weight.resize(static_cast<size_t>(n * top_k));
  const auto factor = static_cast<float>(config_.routed_scaling_factor);
  workers.parallel_for(n, 8, [&](int64_t begin, int64_t end, int) {
    reference::Gate<float> gate{shape};
    for (int64_t r = begin; r < end; ++r) {
      const std::span<const float> row{logits.get() + r * experts, static_cast<size_t>(experts)};
      reference::gate_scores(shape, row.data(), s.scores.get() + r * experts);
      const auto at = static_cast<size_t>(r * top_k);
      gate.run(row, b.router_bias, factor, {s.idx.data() + at, static_cast<size_t>(top_k)},
               s.weight.data() + at);
    }
  });
  s.counts.assign(static_cast<size_t>(experts), 0);
  for (int64_t q = 0; q < rows.num_sequences(); ++q) {
    const auto first = s.idx.begin() + q * rows.seq_rows * top_k;
    std::for_each(first, first + rows.text_rows(q) * top_k,
                  [&](int32_t e) { ++s.counts[static_cast<size_t>(e)]; });
  }
  s.balance_loss = 0;
  if (balance_scale == 0)
    return;
  std::vector<float> f(static_cast<size_t>(experts)), none(static_cast<size_t>(experts));
  for (int64_t q = 0; q < rows.num_sequences(); ++q) {
    const int64_t first = q * rows.seq_rows, length = rows.text_rows(q);
    reference::balance_fractions<float>(shape, length, s.idx.data() + first * top_k, f.data());
    double sum = 0; // reference::balance_loss without its gradient
    for (int64_t r = first; r < first + length; ++r) {
      const float* scores = s.scores.get() + r * experts;
      float total = 0, dot = 0;
      for (int64_t e = 0; e < experts; ++e)
        total += scores[e];
      for (int64_t e = 0; e < experts; ++e)
        dot = std::fma(f[static_cast<size_t>(e)], scores[e] / total, dot);
      sum += static_cast<double>(dot);
    }
    if (length > 0)
      s.balance_loss += static_cast<double>(balance_scale) * sum / static_cast<double>(length);
  }
}

Floats TrainCompute::gate_backward(const TrainBlock& b, const MicroBatchRows& rows, Floats u,
                                   const GateSaved& s, const float* dweight, float balance_scale,
                                   WeightWork& work, Workers& workers) {
  const auto shape = gate_shape(config_);
  const int64_t n = rows.rows, experts = shape.n_experts, top_k = shape.top_k;
  auto dlogits = take(n * experts);
  std::fill_n(dlogits.get(), n * experts, 0.0f);
  const auto factor = static_cast<float>(config_.routed_scaling_factor);
  std::vector<float> f(static_cast<size_t>(rows.num_sequences() * experts));
  if (balance_scale != 0)
    for (int64_t q = 0; q < rows.num_sequences(); ++q)
      reference::balance_fractions<float>(shape, rows.text_rows(q),
                                          s.idx.data() + q * rows.seq_rows * top_k,
                                          f.data() + q * experts);
  workers.parallel_for(n, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float* scores = s.scores.get() + r * experts;
      float* d = dlogits.get() + r * experts;
      reference::gate_weights_backward<float>(
          shape, factor, scores, {s.idx.data() + r * top_k, static_cast<size_t>(top_k)},
          dweight + r * top_k, d);
      const int64_t q = r / rows.seq_rows, length = rows.text_rows(q);
      if (balance_scale != 0 && r % rows.seq_rows < length) {
        // One row's share: the mean over the sequence's rows is in the scale.
        static_cast<void>(reference::balance_loss<float>(
            shape, 1, balance_scale / static_cast<float>(length), f.data() + q * experts,
            {scores, experts}, {d, experts}));
      }
      reference::gate_scores_backward(shape, scores, d, d);
    }
  });
  auto du = take(n * b.router.k);
  LinearTask task{n, experts, b.router.k, dlogits.get(), experts};
  task.weight = b.router.weight;
  task.out = du.get();
  task.out_stride = b.router.k;
  ops_.dgrad(b.router.precision, {&task, 1}, scratch_, workers);
  work.push_back(product(b.router, n, dlogits, std::move(u)));
  return du;
}

// ---- ends of the model --------------------------------------------------------------------------

Floats TrainCompute::embed(const float* table, std::span<const int32_t> ids, Workers& workers) {
  const int64_t hidden = config_.hidden_size;
  auto x = take(static_cast<int64_t>(ids.size()) * hidden);
  workers.parallel_for(static_cast<int64_t>(ids.size()), 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = table + ids[static_cast<size_t>(r)] * hidden;
      float* to = x.get() + r * hidden;
      if (round())
        std::transform(from, from + hidden, to, bf16);
      else
        std::copy_n(from, hidden, to);
    }
  });
  return x;
}

void TrainCompute::embed_backward(std::span<const int32_t> ids, const float* dy, float* gradient,
                                  Workers& workers) {
  const int64_t hidden = config_.hidden_size;
  workers.parallel_for(hidden, 64, [&](int64_t begin, int64_t end, int) {
    reference::embedding_backward<float>(static_cast<int64_t>(ids.size()), end - begin, ids.data(),
                                         {dy + begin, hidden}, {gradient + begin, hidden});
  });
}

double TrainCompute::head_forward(const TrainLinear& head, int64_t rows, const float* h,
                                  std::span<const int32_t> targets, float weight, Floats& dlogits,
                                  Workers& workers) {
  dlogits = take(rows * head.n);
  LinearTask task{rows, head.n, head.k, h, head.k};
  task.weight = head.weight;
  task.out = dlogits.get();
  task.out_stride = head.n;
  ops_.fprop(head.precision, {&task, 1}, scratch_, workers);
  std::vector<double> losses(static_cast<size_t>(rows));
  ops_.cross_entropy(rows, head.n, targets.data(), weight, dlogits.get(), losses.data(), workers);
  double sum = 0;
  for (const double loss : losses)
    sum += loss;
  return sum;
}

Floats TrainCompute::head_backward(const TrainLinear& head, int64_t rows, Floats h, Floats dlogits,
                                   int64_t gradient, WeightWork& work, Workers& workers) {
  auto dh = dgrad(head, rows, dlogits.get(), head.n, workers);
  auto p = product(head, rows, std::move(dlogits), std::move(h));
  p.gradient = gradient;
  work.push_back(std::move(p));
  return dh;
}

Floats TrainCompute::mtp_forward(const TrainMtp& mtp, int64_t rows, Floats e, Floats h, MtpSaved& s,
                                 Workers& workers) {
  const int64_t hidden = config_.hidden_size;
  s.pair = take(rows * 2 * hidden);
  norm_into(mtp.enorm, config_.rms_norm_eps, rows, e.get(), hidden, s.pair.get(), 2 * hidden,
            workers);
  norm_into(mtp.hnorm, config_.rms_norm_eps, rows, h.get(), hidden, s.pair.get() + hidden,
            2 * hidden, workers);
  auto x = linear(mtp.eh_proj, rows, s.pair.get(), 2 * hidden, workers);
  s.e = std::move(e);
  s.h = std::move(h);
  if (recompute_)
    s.pair = nullptr;
  return x;
}

std::pair<Floats, Floats> TrainCompute::mtp_backward(const TrainMtp& mtp, int64_t rows, MtpSaved& s,
                                                     Floats dx, float* gradients, WeightWork& work,
                                                     Workers& workers) {
  const int64_t hidden = config_.hidden_size;
  if (recompute_) {
    s.pair = take(rows * 2 * hidden);
    norm_into(mtp.enorm, config_.rms_norm_eps, rows, s.e.get(), hidden, s.pair.get(), 2 * hidden,
              workers);
    norm_into(mtp.hnorm, config_.rms_norm_eps, rows, s.h.get(), hidden, s.pair.get() + hidden,
              2 * hidden, workers);
  }
  const auto dpair = dgrad(mtp.eh_proj, rows, dx.get(), hidden, workers);
  work.push_back(product(mtp.eh_proj, rows, std::move(dx), s.pair));
  auto half = take(rows * hidden);
  const auto side = [&](const TrainNorm& norm, const float* x, int64_t at) {
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(dpair.get() + r * 2 * hidden + at, hidden, half.get() + r * hidden);
    auto d = take(rows * hidden);
    norm_back(norm, config_.rms_norm_eps, rows, x, hidden, half.get(), d.get(), hidden, false,
              gradients, workers);
    return d;
  };
  auto de = side(mtp.enorm, s.e.get(), 0);
  auto dh = side(mtp.hnorm, s.h.get(), hidden);
  s = {};
  return {std::move(de), std::move(dh)};
}

} // namespace troupe
