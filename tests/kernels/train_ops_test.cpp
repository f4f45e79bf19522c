#include "kernels/train_ops.hpp"

#include "kernels/reference_backward_bf16.hpp"
#include "kernels/train_ops_simd.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

using namespace troupe;
using namespace troupe::test;

namespace {

using Floats = std::vector<float>;

// Cuts work as a team of `num_threads` would, on one thread; workers take turns.
class TeamOf final : public Workers {
public:
  explicit TeamOf(int num_threads) : num_threads_(num_threads) {}
  [[nodiscard]] int num_threads() const override { return num_threads_; }
  void parallel_for(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> f) override {
    for (int64_t i = 0, chunk = 0; i < n; i += grain, ++chunk)
      f(i, std::min(n, i + grain), static_cast<int>(chunk % num_threads_));
  }

private:
  int num_threads_;
};

struct Variant {
  std::string name;
  const TrainOps* ops;
};
std::vector<Variant> variants() {
  std::vector<Variant> found;
  for (const auto& [name, ops] :
       {Variant{"avx2", avx2_train_ops()}, Variant{"avx512", avx512_train_ops()},
        Variant{"avx512_bf16", avx512_bf16_train_ops()}})
    if (ops != nullptr)
      found.push_back({name, ops});
  return found;
}

// Calls check(ops, team) for every table of this CPU and one to three threads.
template <class Check>
void for_variants(Check check) {
  for (const auto& [name, ops] : variants())
    for (const int threads : {1, 2, 3}) {
      CAPTURE(name);
      CAPTURE(threads);
      TeamOf team{threads};
      TrainScratch scratch{threads};
      check(*ops, scratch, team);
    }
}

// What the reference leaves, and its memory.
struct Reference {
  const TrainOps& ops = reference_train_ops();
  TeamOf team{1};
  TrainScratch scratch{1};
};

// Values of many magnitudes, zeros of both signs and (where asked for) denormals among them.
float odd_value(Random& random, bool denormals) {
  const float v = random.value();
  switch (random.between(0, 15)) {
  case 0:
    return 0.0f;
  case 1:
    return -0.0f;
  case 2:
    return v * 0x1p-20f;
  case 3:
    return v * 0x1p12f;
  case 4:
    return denormals ? v * 0x1p-126f : v;
  case 5:
    return denormals ? v * 0x1p-63f : v;
  default:
    return v;
  }
}
Floats random_floats(Random& random, int64_t n, bool denormals = false) {
  Floats x(static_cast<size_t>(n));
  for (float& v : x)
    v = odd_value(random, denormals);
  return x;
}
Floats plain_floats(Random& random, int64_t n) {
  Floats x(static_cast<size_t>(n));
  for (float& v : x)
    v = random.value();
  return x;
}

bool same_bits(const Floats& a, const Floats& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y);
  });
}

struct Linear {
  int64_t rows, n, k;
};
// Empty ones, single elements, pairs without partner, ragged tiles and scale blocks, more than one
// stretch of the contraction in each direction.
const std::vector<Linear> kLinears = {
    {0, 3, 5},       {1, 1, 1},     {3, 0, 4},      {4, 5, 0},     {13, 33, 7},
    {24, 64, 64},    {250, 40, 9},  {9, 530, 70},   {7, 12, 701},  {40, 130, 257},
    {129, 256, 128}, {5, 1100, 33}, {11, 34, 1100}, {1030, 17, 40}};

std::vector<std::byte> prepared(const TrainOps& ops, TrainPrecision precision, const Linear& l,
                                const Floats& master, Workers& team) {
  std::vector<std::byte> out(ops.weight_bytes(precision, l.n, l.k));
  ops.prepare_weight(precision, l.n, l.k, master.data(), out.data(), team);
  return out;
}

// The tasks of one call and their memory: inputs have padded rows, outputs a frame that must stay.
struct LinearCall {
  std::vector<Linear> shapes;
  std::vector<Floats> x, dy, w, before_y, before_dx, before_dw;
  std::vector<uint32_t> flags;

  LinearCall(Random& random, std::vector<Linear> s, bool denormals) : shapes(std::move(s)) {
    for (const auto& [rows, n, k] : shapes) {
      x.push_back(random_floats(random, rows * (k + 3), denormals));
      dy.push_back(random_floats(random, rows * (n + 2), denormals));
      w.push_back(random_floats(random, n * k, denormals));
      before_y.push_back(random_floats(random, rows * (n + 1), denormals));
      before_dx.push_back(random_floats(random, rows * (k + 2), denormals));
      before_dw.push_back(random_floats(random, n * (k + 1), denormals));
      flags.push_back(static_cast<uint32_t>(random.between(0, 15)));
    }
  }

  struct Results {
    std::vector<Floats> y, dx, dw;
    bool operator==(const Results& o) const {
      const auto same = [](const auto& a, const auto& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), same_bits);
      };
      return same(y, o.y) && same(dx, o.dx) && same(dw, o.dw);
    }
  };

  Results run(const TrainOps& ops, TrainPrecision precision, TrainScratch& scratch,
              Workers& team) const {
    Results r{before_y, before_dx, before_dw};
    std::vector<std::vector<std::byte>> weights;
    std::vector<LinearTask> fprop, dgrad, wgrad;
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto& [rows, n, k] = shapes[i];
      weights.push_back(prepared(ops, precision, shapes[i], w[i], team));
      LinearTask t{rows, n, k, x[i].data(), k + 3};
      t.weight = weights.back().data();
      t.out = r.y[i].data();
      t.out_stride = n + 1;
      t.round = (flags[i] & 1) != 0;
      t.power_of_two = (flags[i] & 2) != 0;
      fprop.push_back(t);
      t.a = dy[i].data();
      t.a_stride = n + 2;
      t.out = r.dx[i].data();
      t.out_stride = k + 2;
      t.accumulate = (flags[i] & 4) != 0;
      dgrad.push_back(t);
      t.b = x[i].data();
      t.b_stride = k + 3;
      t.out = r.dw[i].data();
      t.out_stride = k + 1;
      t.round = false;
      t.accumulate = true;
      t.b_power_of_two = (flags[i] & 8) != 0;
      wgrad.push_back(t);
    }
    ops.fprop(precision, fprop, scratch, team);
    ops.dgrad(precision, dgrad, scratch, team);
    ops.wgrad(precision, wgrad, scratch, team);
    return r;
  }
};

void check_linear(TrainPrecision precision, bool denormals) {
  Random random{11};
  std::vector<std::vector<Linear>> calls;
  for (const auto& l : kLinears)
    calls.push_back({l});
  calls.push_back({{3, 20, 40}, {0, 20, 40}, {130, 20, 40}, {1, 20, 40}, {60, 70, 33}});
  for (const auto& shapes : calls) {
    CAPTURE(shapes[0].rows);
    CAPTURE(shapes[0].n);
    CAPTURE(shapes[0].k);
    const LinearCall call(random, shapes, denormals);
    Reference reference;
    const auto wanted = call.run(reference.ops, precision, reference.scratch, reference.team);
    for_variants([&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
      const auto found = call.run(ops, precision, scratch, team);
      for (size_t i = 0; i < shapes.size(); ++i) {
        CAPTURE(i);
        CHECK(same_bits(found.y[i], wanted.y[i]));
        CHECK(same_bits(found.dx[i], wanted.dx[i]));
        CHECK(same_bits(found.dw[i], wanted.dw[i]));
      }
    });
  }
}

} // namespace

TEST_CASE("F32 products have the reference's bits for any shape and team") {
  check_linear(TrainPrecision::f32, true);
}
TEST_CASE("BF16 products have the reference's bits, denormals and odd rows included") {
  check_linear(TrainPrecision::bf16, true);
}
TEST_CASE("FP8 products have the reference's bits for any shape and kind of scale") {
  check_linear(TrainPrecision::fp8, false);
}

TEST_CASE("a BF16 pair adds the odd product first, rounds twice and knows no denormals") {
  const auto pair = [](float acc, float a0, float b0, float a1, float b1) {
    const std::array<float, 2> a{a0, a1}, b{b0, b1};
    return reference::bf16_chain(
        acc, 2, [&](int64_t i) { return a[static_cast<size_t>(i)]; },
        [&](int64_t i) { return b[static_cast<size_t>(i)]; });
  };
  CHECK(pair(0x1p24f, 1.0f, 1.0f, -0x1p24f, 1.0f) == 1.0f); // even first: 0
  CHECK(pair(0.0f, 1.0f, 0x1p-127f, 0.0f, 0.0f) == 0.0f);
  CHECK(std::signbit(pair(0.0f, 0.0f, 0.0f, 0x1p-70f, -0x1p-70f)) == false); // -0 + 0·0
  CHECK(std::signbit(pair(0.0f, 0x1p-70f, -0x1p-70f, 0.0f, 0.0f)) == true);
  CHECK(pair(0x1p-126f, -0x1p-75f, 0x1p-75f, 0.0f, 0.0f) == 0.0f); // 2^-126 in 23 bits only
  CHECK(pair(0x1p-126f, -0x1p-75f, 0x1p-76f, 0.0f, 0.0f) == 0x1p-126f);
  CHECK(pair(0x1p-126f, -0x1p-75f, 0x1.02p-76f, 0.0f, 0.0f) == 0.0f);
}

TEST_CASE("BF16 sums at the edge of the denormals have the reference's bits") {
  Random random{12};
  // Accumulators and products between 2^-150 and 2^-120: nearly every step may be flushed.
  const int64_t rows = 16, n = 40, k = 2;
  for (int round = 0; round < 40; ++round) {
    Floats dy(rows * n), w(n * k), before(rows * k);
    const auto tiny = [&](int low, int high) {
      return std::ldexp(random.value(), static_cast<int>(random.between(low, high)));
    };
    for (float& v : dy)
      v = tiny(-75, -62);
    for (float& v : w)
      v = tiny(-72, -60);
    for (float& v : before)
      v = tiny(-128, -123);
    const auto run = [&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
      Floats out = before;
      const auto weight = prepared(ops, TrainPrecision::bf16, {rows, n, k}, w, team);
      LinearTask t{rows, n, k, dy.data(), n};
      t.weight = weight.data();
      t.out = out.data();
      t.out_stride = k;
      t.accumulate = true;
      ops.dgrad(TrainPrecision::bf16, {&t, 1}, scratch, team);
      return out;
    };
    Reference reference;
    const auto wanted = run(reference.ops, reference.scratch, reference.team);
    for_variants([&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
      CHECK(same_bits(run(ops, scratch, team), wanted));
    });
  }
}

TEST_CASE("a weight's gradient does not depend on how even or scaled rows are cut into calls") {
  Random random{13};
  const Linear l{640, 33, 50};
  const auto x = random_floats(random, l.rows * l.k), dy = random_floats(random, l.rows * l.n),
             before = random_floats(random, l.n * l.k);
  for (const auto& [precision, multiple] :
       {std::pair{TrainPrecision::f32, int64_t{1}}, std::pair{TrainPrecision::bf16, int64_t{2}},
        std::pair{TrainPrecision::fp8, int64_t{128}}}) {
    for_variants([&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
      const auto run = [&](std::vector<int64_t> cuts) {
        Floats dw = before;
        cuts.push_back(l.rows);
        int64_t first = 0;
        for (const int64_t end : cuts) {
          LinearTask t{end - first, l.n, l.k, dy.data() + first * l.n, l.n, x.data() + first * l.k,
                       l.k};
          t.out = dw.data();
          t.out_stride = l.k;
          ops.wgrad(precision, {&t, 1}, scratch, team);
          first = end;
        }
        return dw;
      };
      CHECK(same_bits(run({}), run({multiple, 3 * multiple, 512})));
    });
  }
}

TEST_CASE("norms have the reference's bits, forward and backward, in place too") {
  Random random{14};
  for (const auto& [rows, n] :
       {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {3, 16}, {7, 100}, {65, 256}, {5, 1003}})
    for (const bool accumulate : {false, true})
      for (const bool round : {false, true}) {
        CAPTURE(rows);
        CAPTURE(n);
        CAPTURE(accumulate);
        const auto x = random_floats(random, rows * (n + 2)), w = random_floats(random, n),
                   dy = random_floats(random, rows * n), before = random_floats(random, rows * n),
                   dw = random_floats(random, n);
        struct Results {
          Floats y, dx, in_place, dw;
        };
        const auto run = [&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
          Results r{before, before, dy, dw};
          NormTask t{rows, n, 1e-6f, x.data(), n + 2, w.data(), dy.data()};
          t.round = round;
          t.out_stride = n;
          t.out = r.y.data();
          ops.rms_norm(t, team);
          t.accumulate = accumulate;
          t.out = r.dx.data();
          t.dweight = r.dw.data();
          ops.rms_norm_backward(t, scratch, team);
          t.accumulate = false;
          t.dy = t.out = r.in_place.data();
          ops.rms_norm_backward(t, scratch, team);
          return r;
        };
        Reference reference;
        const auto wanted = run(reference.ops, reference.scratch, reference.team);
        for_variants([&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
          const auto found = run(ops, scratch, team);
          CHECK(same_bits(found.y, wanted.y));
          CHECK(same_bits(found.dx, wanted.dx));
          CHECK(same_bits(found.in_place, wanted.in_place));
          CHECK(same_bits(found.dw, wanted.dw));
        });
      }
}

TEST_CASE("SwiGLU has the reference's bits, forward and backward, in place too") {
  Random random{15};
  for (const auto& [rows, n] :
       {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {3, 16}, {7, 100}, {300, 67}})
    for (const bool round : {false, true}) {
      CAPTURE(rows);
      CAPTURE(n);
      auto a = random_floats(random, rows * n);
      const auto b = random_floats(random, rows * n), dz = random_floats(random, rows * n);
      for (size_t i = 0; i < a.size(); i += 7)
        a[i] *= 100; // beyond the range of exp
      const auto run = [&](const TrainOps& ops, Workers& team) {
        std::array<Floats, 4> r{b, b, b, dz};
        SwigluTask t{rows,        n,           a.data(),    b.data(), dz.data(),
                     r[0].data(), r[1].data(), r[2].data(), round};
        ops.swiglu(t, team);
        ops.swiglu_backward(t, team);
        t.dz = t.da = r[3].data();
        ops.swiglu_backward(t, team);
        return r;
      };
      Reference reference;
      const auto wanted = run(reference.ops, reference.team);
      for_variants([&](const TrainOps& ops, TrainScratch&, Workers& team) {
        const auto found = run(ops, team);
        for (size_t i = 0; i < found.size(); ++i)
          CHECK(same_bits(found[i], wanted[i]));
      });
    }
}

TEST_CASE("an expert's gate weights have the reference's bits") {
  Random random{20};
  for (const auto& [rows, n] : {std::pair<int64_t, int64_t>{0, 5}, {1, 1}, {3, 16}, {70, 100}})
    for (const bool round : {false, true}) {
      CAPTURE(rows);
      CAPTURE(n);
      const auto z = random_floats(random, rows * n), dz = random_floats(random, rows * n),
                 weight = random_floats(random, rows);
      const auto run = [&](const TrainOps& ops, Workers& team) {
        std::array<Floats, 3> r{z, dz, weight};
        ops.expert_weight_backward(
            {rows, n, weight.data(), r[0].data(), r[1].data(), r[2].data(), round}, team);
        return r;
      };
      Reference reference;
      const auto wanted = run(reference.ops, reference.team);
      for_variants([&](const TrainOps& ops, TrainScratch&, Workers& team) {
        const auto found = run(ops, team);
        for (size_t i = 0; i < found.size(); ++i)
          CHECK(same_bits(found[i], wanted[i]));
      });
    }
}

TEST_CASE("rotations have the reference's bits both ways and in both layouts") {
  Random random{16};
  for (const int64_t dim : {2, 6, 16, 64, 520})
    for (const bool interleaved : {false, true})
      for (const bool inverse : {false, true})
        for (const bool round : {false, true}) {
          CAPTURE(dim);
          CAPTURE(interleaved);
          const int64_t rows = random.between(0, 35), heads = random.between(1, 3);
          const int64_t head_stride = dim + 3, stride = heads * head_stride + 5;
          const auto cos = random_floats(random, 10 * (dim / 2)),
                     sin = random_floats(random, 10 * (dim / 2));
          const auto x = random_floats(random, rows * stride);
          std::vector<int32_t> positions(static_cast<size_t>(rows));
          for (int32_t& p : positions)
            p = static_cast<int32_t>(random.between(0, 9));
          RopeTable table;
          table.cos = cos.data();
          table.sin = sin.data();
          table.dim = dim;
          table.interleaved = interleaved;
          const auto run = [&](const TrainOps& ops, Workers& team) {
            Floats out = x;
            RopeArgs args;
            args.num_rows = rows;
            args.heads = heads;
            args.x = {out.data(), DType::f32, stride};
            args.head_stride = head_stride;
            args.positions = positions.data();
            args.table = &table;
            ops.rope(args, inverse, round, team);
            return out;
          };
          Reference reference;
          const auto wanted = run(reference.ops, reference.team);
          for_variants([&](const TrainOps& ops, TrainScratch&, Workers& team) {
            CHECK(same_bits(run(ops, team), wanted));
          });
        }
}

TEST_CASE("attention has the reference's bits, forward and backward, for samples of any length") {
  Random random{17};
  struct Case {
    std::vector<int64_t> samples;
    int64_t heads, d_nope, d_rope, d_v;
  };
  for (const auto& c : {Case{{}, 1, 4, 2, 3}, Case{{1}, 1, 1, 2, 1}, Case{{5, 1, 70}, 3, 9, 4, 11},
                        Case{{130}, 2, 16, 16, 32}, Case{{64, 31, 1, 33}, 1, 40, 8, 24},
                        Case{{200}, 1, 24, 10, 40}})
    for (const bool round : {false, true}) {
      CAPTURE(c.samples.size());
      CAPTURE(c.d_nope);
      CAPTURE(round);
      AttentionTask t;
      std::vector<int32_t> first_key;
      for (const int64_t n : c.samples)
        first_key.insert(first_key.end(), static_cast<size_t>(n),
                         static_cast<int32_t>(first_key.size()));
      t.rows = static_cast<int64_t>(first_key.size());
      t.heads = c.heads;
      t.d_nope = c.d_nope;
      t.d_rope = c.d_rope;
      t.d_v = c.d_v;
      t.tau = 0.7f;
      t.first_key = first_key.data();
      t.round = round;
      const auto q = plain_floats(random, t.rows * t.heads * (t.d_nope + t.d_rope)),
                 kv = plain_floats(random, t.rows * t.heads * (t.d_nope + t.d_v)),
                 rope = plain_floats(random, t.rows * (t.d_rope + 3)),
                 dout = plain_floats(random, t.rows * t.heads * t.d_v);
      const auto run = [&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
        std::array<Floats, 5> r{dout, Floats(static_cast<size_t>(t.rows * t.heads)), q, kv,
                                Floats(static_cast<size_t>(t.rows * t.d_rope))};
        auto task = t;
        task.q = q.data();
        task.kv = kv.data();
        task.k_rope = rope.data();
        task.k_rope_stride = t.d_rope + 3;
        task.out = r[0].data();
        task.lse = r[1].data();
        task.dout = dout.data();
        task.dq = r[2].data();
        task.dkv = r[3].data();
        task.dk_rope = r[4].data();
        ops.attention(task, scratch, team);
        ops.attention_backward(task, scratch, team);
        return r;
      };
      Reference reference;
      const auto wanted = run(reference.ops, reference.scratch, reference.team);
      for_variants([&](const TrainOps& ops, TrainScratch& scratch, Workers& team) {
        const auto found = run(ops, scratch, team);
        for (size_t i = 0; i < found.size(); ++i) {
          CAPTURE(i);
          CHECK(same_bits(found[i], wanted[i]));
        }
      });
    }
}

TEST_CASE("attention in BF16 is attention in F32 up to its operands' rounding") {
  Random random{21};
  const int64_t rows = 90, heads = 2, d_nope = 12, d_rope = 4, d_v = 20;
  std::vector<int32_t> first_key(static_cast<size_t>(rows), 0);
  std::fill(first_key.begin() + 70, first_key.end(), 70);
  const auto q = plain_floats(random, rows * heads * (d_nope + d_rope)),
             kv = plain_floats(random, rows * heads * (d_nope + d_v)),
             rope = plain_floats(random, rows * d_rope),
             dout = plain_floats(random, rows * heads * d_v);
  const auto run = [&](bool round) {
    Reference reference;
    std::array<Floats, 5> r{dout, Floats(static_cast<size_t>(rows * heads)), q, kv, rope};
    AttentionTask t;
    t.rows = rows;
    t.heads = heads;
    t.d_nope = d_nope;
    t.d_rope = d_rope;
    t.d_v = d_v;
    t.tau = 0.4f;
    t.first_key = first_key.data();
    t.q = q.data();
    t.kv = kv.data();
    t.k_rope = rope.data();
    t.k_rope_stride = d_rope;
    t.out = r[0].data();
    t.lse = r[1].data();
    t.round = round;
    t.dout = dout.data();
    t.dq = r[2].data();
    t.dkv = r[3].data();
    t.dk_rope = r[4].data();
    reference.ops.attention(t, reference.scratch, reference.team);
    reference.ops.attention_backward(t, reference.scratch, reference.team);
    return r;
  };
  const auto exact = run(false), rounded = run(true);
  for (size_t i = 0; i < exact.size(); ++i) {
    CAPTURE(i);
    // An operand is off by 2^-9 of itself, a weight's gradient by a few times that; 1/64 of the
    // largest element leaves room for sums of some dozen terms, and no wrong formula passes.
    float largest = 0, off = 0;
    for (size_t e = 0; e < exact[i].size(); ++e) {
      largest = std::max(largest, std::abs(exact[i][e]));
      off = std::max(off, std::abs(exact[i][e] - rounded[i][e]));
    }
    CHECK(off <= largest / 64);
    CHECK(off > 0);
  }
}

TEST_CASE("the loss and its gradient have the reference's bits, rows without target included") {
  Random random{18};
  for (const auto& [rows, vocab] :
       {std::pair<int64_t, int64_t>{0, 7}, {1, 1}, {5, 23}, {9, 32}, {4, 1001}}) {
    CAPTURE(vocab);
    auto logits = random_floats(random, rows * vocab);
    for (float& v : logits)
      v *= 20;
    std::vector<int32_t> targets(static_cast<size_t>(rows));
    for (int32_t& target : targets)
      target = static_cast<int32_t>(random.between(-1, vocab - 1));
    const auto run = [&](const TrainOps& ops, Workers& team) {
      std::pair<Floats, std::vector<double>> r{logits, std::vector<double>(targets.size(), -1)};
      ops.cross_entropy(rows, vocab, targets.data(), 0.37f, r.first.data(), r.second.data(), team);
      return r;
    };
    Reference reference;
    const auto wanted = run(reference.ops, reference.team);
    for_variants([&](const TrainOps& ops, TrainScratch&, Workers& team) {
      const auto found = run(ops, team);
      CHECK(same_bits(found.first, wanted.first));
      CHECK(found.second == wanted.second);
    });
  }
}

TEST_CASE("an AdamW step has the reference's bits with moments in F32 and BF16") {
  Random random{19};
  for (const int64_t n : {0, 1, 15, 16, 100, 40'003})
    for (const bool round : {false, true}) {
      CAPTURE(n);
      const auto g = random_floats(random, n), theta = random_floats(random, n),
                 m = random_floats(random, n);
      auto v = random_floats(random, n);
      for (float& x : v)
        x = std::abs(x);
      const auto run = [&](const TrainOps& ops, Workers& team) {
        std::array<Floats, 3> r{theta, m, v};
        const AdamWTask t{n, 3e-3f, 0.9f,     0.95f,       1e-8f,       0.1f,       0.83f,
                          7, round, g.data(), r[0].data(), r[1].data(), r[2].data()};
        ops.adamw(t, team);
        return r;
      };
      Reference reference;
      const auto wanted = run(reference.ops, reference.team);
      for_variants([&](const TrainOps& ops, TrainScratch&, Workers& team) {
        const auto found = run(ops, team);
        for (size_t i = 0; i < found.size(); ++i)
          CHECK(same_bits(found[i], wanted[i]));
      });
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
TEST_CASE("a CPU with the instructions has the table") {
  CHECK((avx2_train_ops() != nullptr) ==
        (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
  CHECK((avx512_train_ops() != nullptr) == bool(__builtin_cpu_supports("avx512dq")));
  // Also a statement about the CPU: its vdpbf16ps rounds as the reference does.
  CHECK((avx512_bf16_train_ops() != nullptr) == bool(__builtin_cpu_supports("avx512bf16")));
}
#endif

TEST_CASE("there is a table of every name, and none of another") {
  CHECK(find_train_ops("reference") == &reference_train_ops());
  CHECK(find_train_ops("simd") == &simd_train_ops());
  CHECK(find_train_ops("fast") == nullptr);
}
