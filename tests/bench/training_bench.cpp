// What the training kernels reach of what this machine can do, measured in one run: FMAs on
// registers are the ceiling, oneDNN's matmul with weights in its own format is the peer.
//
//   bench_training [reference|simd|avx2|avx512|avx512_bf16] [threads] [seconds per measurement]
//                  [products|attention|rows]
//
// Back of the envelope, two Zen 4 cores at 3.7 GHz: one 512-bit FMA a cycle is 237 GFLOP/s in F32,
// one vdpbf16ps a cycle 474 in BF16. Rows lie in F32 memory, so a BF16 product of 256 columns packs
// an element (a fifth of a nanosecond) for 512 FLOP (2.2 ns of one core): nine tenths at best, less
// where a micro-batch leaves an expert a few dozen rows.
//
// The machine may be shared: only ratios within a run mean anything.
#include "kernels/stream.hpp"
#include "kernels/train_ops.hpp"
#include "kernels/train_ops_simd.hpp"
#include "tests/bench/machine.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

using namespace troupe;
using namespace troupe::test;
using namespace troupe::bench;

namespace {

double g_seconds = 0.05;

// ---- ceilings
// -------------------------------------------------------------------------------------

constexpr int64_t kLoops = 20'000, kAccumulators = 20;

// Sixteen floats. The instructions are written out, so that no compiler merges or drops any.
using Register = float __attribute__((vector_size(64)));

__attribute__((target("avx512f"))) void multiply_f32(float* sink) {
  Register acc[kAccumulators] = {}, x = {};
  for (int64_t i = 0; i < kLoops; ++i) {
#pragma GCC unroll 20
    for (auto& a : acc) {
      Register sum = a;
      asm("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(x));
      a = sum;
    }
  }
  Register sum = {};
  for (const auto& a : acc)
    sum += a;
  *sink = sum[0];
}
__attribute__((target("avx512f,avx512bf16"))) void multiply_bf16(float* sink) {
  Register acc[kAccumulators] = {}, x = {};
  for (int64_t i = 0; i < kLoops; ++i) {
#pragma GCC unroll 20
    for (auto& a : acc) {
      Register sum = a;
      asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(x));
      a = sum;
    }
  }
  Register sum = {};
  for (const auto& a : acc)
    sum += a;
  *sink = sum[0];
}

// GFLOP/s of all threads on registers; 0 where the instruction is missing.
double ceiling(ComputeStream& stream, bool bf16) {
  if (!__builtin_cpu_supports("avx512f") || (bf16 && !__builtin_cpu_supports("avx512bf16")))
    return 0;
  const int threads = stream.num_threads();
  double time = 0;
  std::vector<float> sink(static_cast<size_t>(threads) * 64);
  on_stream(stream, [&](Workers& workers) {
    time = best_time(g_seconds, [&] {
      workers.parallel_for(16 * threads, 1, [&](int64_t, int64_t, int worker) {
        (bf16 ? multiply_bf16 : multiply_f32)(sink.data() + worker * 64);
      });
    });
  });
  return 16.0 * threads * kLoops * kAccumulators * (bf16 ? 64 : 32) / time * 1e-9;
}

// oneDNN's C = A·B, weights in the format it likes.
class OneDnn {
public:
  OneDnn(int64_t m, int64_t n, int64_t k, bool bf16) {
    using Memory = dnnl::memory;
    const auto type = bf16 ? Memory::data_type::bf16 : Memory::data_type::f32;
    const Memory::desc a{{m, k}, type, Memory::format_tag::ab};
    const Memory::desc b{{k, n}, type, Memory::format_tag::any};
    const Memory::desc c{{m, n}, Memory::data_type::f32, Memory::format_tag::ab};
    const dnnl::matmul::primitive_desc description{dnnl::matmul::desc{a, b, c}, engine_};
    a_ = Memory{description.src_desc(), engine_};
    b_ = Memory{description.weights_desc(), engine_};
    c_ = Memory{description.dst_desc(), engine_};
    matmul_ = dnnl::matmul{description};
  }
  double best() {
    return best_time(g_seconds, [&] {
      matmul_.execute(stream_, {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}});
      stream_.wait();
    });
  }

private:
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::memory a_, b_, c_;
  dnnl::matmul matmul_;
};

// ---- products
// ---------------------------------------------------------------------------------------

struct Shape {
  const char* name;
  int64_t count, rows, n, k;
};

struct Layers {
  std::vector<float> x, dy, y, dx, dw;
  std::vector<std::byte> weights;
  std::vector<LinearTask> fprop, dgrad, wgrad;

  Layers(const TrainOps& ops, TrainPrecision precision, const Shape& s, Workers& workers) {
    Random random{3};
    const auto rows = static_cast<size_t>(s.count * s.rows), n = static_cast<size_t>(s.n),
               k = static_cast<size_t>(s.k), count = static_cast<size_t>(s.count);
    for (auto* v : {&x, &dx})
      v->resize(rows * k);
    for (auto* v : {&y, &dy})
      v->resize(rows * n);
    dw.resize(count * n * k);
    for (auto* v : {&x, &dy, &dw})
      for (float& f : *v)
        f = random.value();
    const size_t bytes = ops.weight_bytes(precision, s.n, s.k);
    weights.resize(bytes * count);
    for (size_t i = 0; i < count; ++i) {
      ops.prepare_weight(precision, s.n, s.k, dw.data() + i * n * k, weights.data() + i * bytes,
                         workers);
      const size_t row = i * static_cast<size_t>(s.rows);
      LinearTask t{s.rows, s.n, s.k, x.data() + row * k, s.k};
      t.weight = weights.data() + i * bytes;
      t.round = precision != TrainPrecision::f32;
      t.out = y.data() + row * n;
      t.out_stride = s.n;
      fprop.push_back(t);
      t.a = dy.data() + row * n;
      t.a_stride = s.n;
      t.out = dx.data() + row * k;
      t.out_stride = s.k;
      dgrad.push_back(t);
      t.b = x.data() + row * k;
      t.b_stride = s.k;
      t.out = dw.data() + i * n * k;
      t.round = false;
      wgrad.push_back(t);
    }
  }
};

void bench_products(const TrainOps& ops, ComputeStream& stream, TrainPrecision precision,
                    const Shape& s, double peak) {
  TrainScratch scratch{stream.num_threads()};
  double fprop = 1e30, dgrad = 1e30, wgrad = 1e30, prepare = 1e30, peer = 1e30;
  OneDnn rival(s.rows, s.n, s.k, precision == TrainPrecision::bf16);
  for (int round = 0; round < 3; ++round) { // in turn: the machine may be shared
    on_stream(stream, [&](Workers& workers) {
      Layers l(ops, precision, s, workers);
      fprop = std::min(
          fprop, best_time(g_seconds, [&] { ops.fprop(precision, l.fprop, scratch, workers); }));
      dgrad = std::min(
          dgrad, best_time(g_seconds, [&] { ops.dgrad(precision, l.dgrad, scratch, workers); }));
      wgrad = std::min(
          wgrad, best_time(g_seconds, [&] { ops.wgrad(precision, l.wgrad, scratch, workers); }));
      prepare = std::min(prepare, best_time(g_seconds, [&] {
                           ops.prepare_weight(precision, s.n, s.k, l.dw.data(), l.weights.data(),
                                              workers);
                         }));
    });
    peer = std::min(peer, rival.best());
  }
  const double gflop = 2e-9 * static_cast<double>(s.count * s.rows * s.n * s.k);
  std::printf("| %-4s | %-22s | %6.1f | %6.1f | %6.1f | %5.2f | %6.1f | %5.2f |\n",
              std::string(to_string(precision)).c_str(), s.name, gflop / fprop, gflop / dgrad,
              gflop / wgrad, 3 * gflop / (fprop + dgrad + wgrad) / peak,
              gflop / static_cast<double>(s.count) / peer,
              prepare * 1e9 / static_cast<double>(s.n * s.k));
  std::fflush(stdout);
}

// ---- attention
// ----------------------------------------------------------------------------------------

void bench_attention(const TrainOps& ops, ComputeStream& stream, const char* name, int64_t samples,
                     int64_t length, int64_t heads, int64_t d_nope, int64_t d_rope, int64_t d_v,
                     bool round, double peak) {
  Random random{4};
  const int64_t rows = samples * length;
  const auto floats = [&](int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& f : v)
      f = random.value();
    return v;
  };
  std::vector<int32_t> first;
  for (int64_t r = 0; r < rows; ++r)
    first.push_back(static_cast<int32_t>(r / length * length));
  auto q = floats(rows * heads * (d_nope + d_rope)), kv = floats(rows * heads * (d_nope + d_v)),
       rope = floats(rows * d_rope), out = floats(rows * heads * d_v), lse = floats(rows * heads),
       dout = out, dq = q, dkv = kv, dk_rope = rope;
  AttentionTask t{rows,         heads,    d_nope,      d_rope,      d_v,        0.1f,
                  first.data(), q.data(), kv.data(),   rope.data(), d_rope,     out.data(),
                  lse.data(),   round,    dout.data(), dq.data(),   dkv.data(), dk_rope.data()};
  TrainScratch scratch{stream.num_threads()};
  double forward = 0, backward = 0;
  on_stream(stream, [&](Workers& workers) {
    forward = best_time(g_seconds, [&] { ops.attention(t, scratch, workers); });
    backward = best_time(g_seconds, [&] { ops.attention_backward(t, scratch, workers); });
  });
  // Useful work only: each pair of a query and a key it sees, twice one and five times.
  const double pairs = static_cast<double>(samples * heads) * static_cast<double>(length) *
                       static_cast<double>(length + 1) / 2;
  const auto qk = static_cast<double>(d_nope + d_rope), v = static_cast<double>(d_v);
  const double f = 2e-9 * pairs * (qk + v), b = 2e-9 * pairs * (3 * qk + 2 * v);
  std::printf("| %s, %-26s | %8.0f | %6.1f | %8.0f | %6.1f | %5.2f |\n", round ? "BF16" : "F32 ",
              name, forward * 1e6, f / forward, backward * 1e6, b / backward,
              (f + b) / (forward + backward) / peak);
  std::fflush(stdout);
}

// ---- rows
// ---------------------------------------------------------------------------------------------

void bench_rows(const TrainOps& ops, ComputeStream& stream, int64_t rows, int64_t n,
                int64_t vocab) {
  Random random{5};
  const auto floats = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& f : v)
      f = random.value();
    return v;
  };
  auto x = floats(rows * n), y = x, z = x, u = x, dw = floats(n);
  const auto w = floats(n), cos = floats(rows * 16), sin = cos;
  auto logits = floats(rows * vocab);
  std::vector<double> loss(static_cast<size_t>(rows));
  std::vector<int32_t> targets(static_cast<size_t>(rows), 1);
  std::vector<int32_t> positions;
  for (int64_t r = 0; r < rows; ++r)
    positions.push_back(static_cast<int32_t>(r));
  const int64_t parameters = 4'000'000;
  auto g = floats(parameters), theta = g, m = g, v = std::vector<float>(g.size(), 0.5f);
  TrainScratch scratch{stream.num_threads()};
  const auto row = [&](const char* name, int64_t elements,
                       const std::function<void(Workers&)>& call) {
    double time = 0;
    on_stream(stream,
              [&](Workers& workers) { time = best_time(g_seconds, [&] { call(workers); }); });
    std::printf("| %-24s | %9.1f | %6.3f |\n", name, time * 1e6,
                time * 1e9 / static_cast<double>(elements));
    std::fflush(stdout);
  };
  NormTask norm{rows, n, 1e-6f, x.data(), n, w.data(), y.data()};
  norm.out = z.data();
  norm.out_stride = n;
  norm.dweight = dw.data();
  norm.round = true;
  row("rms_norm", rows * n, [&](Workers& k) { ops.rms_norm(norm, k); });
  row("rms_norm_backward", rows * n, [&](Workers& k) { ops.rms_norm_backward(norm, scratch, k); });
  SwigluTask swiglu{rows, n, x.data(), y.data(), z.data(), u.data(), z.data(), u.data(), true};
  row("swiglu", rows * n, [&](Workers& k) { ops.swiglu(swiglu, k); });
  row("swiglu_backward", rows * n, [&](Workers& k) { ops.swiglu_backward(swiglu, k); });
  RopeTable table;
  table.cos = cos.data();
  table.sin = sin.data();
  table.dim = 32;
  table.interleaved = true;
  RopeArgs rope;
  rope.num_rows = rows;
  rope.heads = n / 32;
  rope.x = {x.data(), DType::f32, n};
  rope.head_stride = 32;
  rope.positions = positions.data();
  rope.table = &table;
  row("rope", rows * n, [&](Workers& k) { ops.rope(rope, false, true, k); });
  row("cross_entropy", rows * vocab, [&](Workers& k) {
    ops.cross_entropy(rows, vocab, targets.data(), 0.01f, logits.data(), loss.data(), k);
  });
  const AdamWTask adamw{parameters, 1e-3f, 0.9f,     0.95f,        1e-8f,    0.1f,    1.0f,
                        5,          false, g.data(), theta.data(), m.data(), v.data()};
  row("adamw", parameters, [&](Workers& k) { ops.adamw(adamw, k); });
}

const TrainOps* find_table(std::string_view name) {
  if (name == "avx2")
    return avx2_train_ops();
  if (name == "avx512")
    return avx512_train_ops();
  if (name == "avx512_bf16")
    return avx512_bf16_train_ops();
  return find_train_ops(name);
}

} // namespace

int main(int argc, char** argv) {
  const TrainOps* ops = find_table(argc > 1 ? argv[1] : "simd");
  const int threads = argc > 2 ? std::max(1, std::atoi(argv[2])) : 2;
  g_seconds = argc > 3 ? std::atof(argv[3]) : g_seconds;
  const std::string only = argc > 4 ? argv[4] : "";
  const auto wanted = [&](const char* section) { return only.empty() || only == section; };
  if (ops == nullptr) {
    std::fprintf(stderr, "bench_training: no table '%s' here\n", argv[1]);
    return 2;
  }
  setenv("OMP_NUM_THREADS", std::to_string(threads).c_str(), 1); // before its first use
  const auto stream = make_cpu_stream(threads);
  const double f32 = ceiling(*stream, false), bf16 = ceiling(*stream, true);
  std::printf("%d threads; FMAs on registers: %.0f GFLOP/s in F32, %.0f in BF16\n", threads, f32,
              bf16);
  if (wanted("products")) {
    std::printf("\nGFLOP/s; share: all three of the ceiling; prepare: ns per weight\n\n"
                "| type | product                | fprop  | dgrad  | wgrad  | share | oneDNN | "
                "prep. |\n| ---- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (const auto precision : {TrainPrecision::f32, TrainPrecision::bf16, TrainPrecision::fp8})
      for (const Shape& s :
           {Shape{"512 x 256 x 256", 1, 512, 256, 256}, Shape{"512 x 96 x 256", 1, 512, 96, 256},
            Shape{"512 x 1024 x 256", 1, 512, 1024, 256},
            Shape{"16 of 64 x 128 x 256", 16, 64, 128, 256},
            Shape{"16 of 64 x 256 x 128", 16, 64, 256, 128},
            Shape{"16 of 20 x 128 x 256", 16, 20, 128, 256},
            Shape{"512 x 8192 x 256", 1, 512, 8192, 256},
            Shape{"1024 x 1024 x 1024", 1, 1024, 1024, 1024}})
        bench_products(*ops, *stream, precision, s, precision == TrainPrecision::f32 ? f32 : bf16);
  }
  if (wanted("attention")) {
    std::printf("\n| attention                  | forward µs | GFLOP/s | backward µs | GFLOP/s | "
                "share |\n| --- | --- | --- | --- | --- | --- |\n");
    for (const bool round : {false, true}) {
      const double peak = round ? bf16 : f32;
      const auto run = [&](const char* name, int64_t samples, int64_t length, int64_t heads,
                           int64_t d_nope, int64_t d_rope, int64_t d_v) {
        bench_attention(*ops, *stream, name, samples, length, heads, d_nope, d_rope, d_v, round,
                        peak);
      };
      run("2 of 256, 8 heads 32+16/32", 2, 256, 8, 32, 16, 32);
      run("4 of 128, 4 heads 48+16/64", 4, 128, 4, 48, 16, 64);
      run("1 of 1024, 4 heads 128+64/128", 1, 1024, 4, 128, 64, 128);
    }
  }
  if (wanted("rows")) {
    std::printf("\n| rows of 512 x 256, vocabulary 8192 | µs | ns per element |\n"
                "| --- | --- | --- |\n");
    bench_rows(*ops, *stream, 512, 256, 8192);
  }
}
