#include "kernels/train_fingerprint.hpp"

#include <xxhash.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace troupe {

namespace {

// Numbers of many magnitudes, both signs, no pattern.
std::vector<float> numbers(size_t n, uint32_t seed) {
  std::vector<float> list(n);
  uint32_t state = seed * 2654435761u + 1;
  for (auto& x : list) {
    state = state * 1664525u + 1013904223u;
    const float unit = static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
    x = unit * (state % 7 == 0 ? 16.0f : 1.0f);
  }
  return list;
}

class Hash {
public:
  void add(const std::vector<float>& values) {
    sum_ = XXH3_64bits_withSeed(values.data(), values.size() * sizeof(float), sum_);
  }
  [[nodiscard]] uint64_t sum() const { return sum_; }

private:
  uint64_t sum_ = 0;
};

// Products of a linear layer with ragged sizes.
void linear(const TrainOps& ops, TrainPrecision precision, TrainScratch& scratch, Workers& workers,
            Hash& hash) {
  constexpr int64_t rows = 19, n = 37, k = 143;
  const auto w = numbers(n * k, 1), x = numbers(rows * k, 2), dy = numbers(rows * n, 3);
  std::vector<std::byte> prepared(ops.weight_bytes(precision, n, k) + 64);
  void* place = prepared.data();
  size_t room = prepared.size();
  auto* weight = static_cast<std::byte*>(std::align(64, room - 63, place, room));
  ops.prepare_weight(precision, n, k, w.data(), weight, workers);
  LinearTask task{rows, n, k};
  task.weight = weight;
  std::vector<float> y(rows * n), dx(rows * k), dw(n * k, 0.25f);
  task.a = x.data();
  task.a_stride = k;
  task.out = y.data();
  task.out_stride = n;
  ops.fprop(precision, {&task, 1}, scratch, workers);
  task.a = dy.data();
  task.a_stride = n;
  task.out = dx.data();
  task.out_stride = k;
  ops.dgrad(precision, {&task, 1}, scratch, workers);
  task.b = x.data();
  task.b_stride = k;
  task.out = dw.data();
  ops.wgrad(precision, {&task, 1}, scratch, workers);
  for (const auto* values : {&y, &dx, &dw})
    hash.add(*values);
}

void rows(const TrainOps& ops, TrainScratch& scratch, Workers& workers, Hash& hash) {
  constexpr int64_t n = 21, width = 45;
  const auto x = numbers(n * width, 4), w = numbers(width, 5);
  std::vector<float> y(n * width), dx(n * width), dw(width);
  NormTask norm{n, width, 1e-6f, x.data(), width, w.data(), x.data()};
  norm.out = y.data();
  norm.out_stride = width;
  norm.dweight = dw.data();
  ops.rms_norm(norm, workers);
  norm.out = dx.data();
  ops.rms_norm_backward(norm, scratch, workers);
  std::vector<float> z(n * width), logits = x;
  SwigluTask swiglu{n, width, x.data(), y.data()};
  swiglu.z = z.data();
  ops.swiglu(swiglu, workers);
  std::vector<int32_t> targets(n, 7);
  std::vector<double> loss(n);
  ops.cross_entropy(n, width, targets.data(), 0.125f, logits.data(), loss.data(), workers);
  for (const auto* values : {&y, &dx, &dw, &z, &logits})
    hash.add(*values);
}

void attention(const TrainOps& ops, TrainScratch& scratch, Workers& workers, Hash& hash) {
  constexpr int64_t n = 23, heads = 2, nope = 24, rope = 8, v = 20;
  const auto q = numbers(n * heads * (nope + rope), 6), kv = numbers(n * heads * (nope + v), 7),
             k_rope = numbers(n * rope, 8), dout = numbers(n * heads * v, 9);
  const std::vector<int32_t> first_key(n, 0);
  std::vector<float> out(n * heads * v), lse(n * heads), dq(q.size()), dkv(kv.size()),
      dk_rope(k_rope.size());
  AttentionTask task{n, heads, nope, rope, v, 0.25f, first_key.data()};
  task.q = q.data();
  task.kv = kv.data();
  task.k_rope = k_rope.data();
  task.k_rope_stride = rope;
  task.out = out.data();
  task.lse = lse.data();
  ops.attention(task, scratch, workers);
  task.dout = dout.data();
  task.dq = dq.data();
  task.dkv = dkv.data();
  task.dk_rope = dk_rope.data();
  ops.attention_backward(task, scratch, workers);
  for (const auto* values : {&out, &lse, &dq, &dkv, &dk_rope})
    hash.add(*values);
}

} // namespace

uint64_t train_fingerprint(const TrainOps& ops) {
  InlineWorkers workers;
  TrainScratch scratch{1};
  Hash hash;
  for (const auto precision : {TrainPrecision::f32, TrainPrecision::bf16, TrainPrecision::fp8})
    linear(ops, precision, scratch, workers, hash);
  rows(ops, scratch, workers, hash);
  attention(ops, scratch, workers, hash);
  return hash.sum();
}

} // namespace troupe
