// What the CPU kernels reach of what this machine can do, measured in one run: oneDNN's matmul
// and the plain read rate of memory are the ceilings.
//
//   bench_kernel [backend] [threads] [seconds per measurement] [matmul|streaming|experts|attention]
//
// Back of the envelope, two Zen 4 cores at 3.7 GHz: a 512-bit vdpbf16ps a cycle is 64 FLOP, so
// 474 GFLOP/s in BF16 and half of that in F32. Two cores read about 45 GB/s; at one row a weight
// byte is used once, so decode can't be faster than that, and BF16 stays bound by memory up to
// about ten rows. Attention over a 512-token prompt: per head and block of 64 keys one projection
// (64 × 256 × 512) and on average 288 rows of 64 × 320: 2.1 M and 1.5 M cycles per head.
//
// The machine may be shared: only ratios within a run mean anything.
#include "kernels/backend.hpp"
#include "kernels/stream.hpp"
#include "tests/bench/machine.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

using namespace troupe;
using namespace troupe::test;
using namespace troupe::bench;

namespace {

double g_seconds = 0.1;

// Random bits that make sensible weights: BF16 and F32 of magnitude 2^-2 … 2, E4M3 without NaN.
void fill(std::byte* data, int64_t bytes, DType dtype) {
  uint64_t x = 88172645463325252u;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    uint64_t v = x & 0xbfbfbfbfbfbfbfbfu;
    if (dtype == DType::bf16)
      v = (x & 0x80ff80ff80ff80ffu) | 0x3f003f003f003f00u;
    if (dtype == DType::f32)
      v = (x & 0x80ffffff80ffffffu) | 0x3f0000003f000000u;
    std::memcpy(data + i, &v, sizeof v);
  }
}

// A packed matrix of random weights.
struct Matrix {
  PackedMatrix m;
  AlignedBytes memory;
  Matrix(int64_t n, int64_t k, DType dtype) {
    m.n = n;
    m.k = k;
    m.dtype = dtype;
    m.segments = whole_k(k);
    memory = AlignedBytes(packed_bytes(m));
    fill(memory.data(), packed_bytes(m), dtype);
    attach(m, memory.data());
    if (dtype == DType::f8_e4m3)
      std::fill_n(const_cast<float*>(m.scales), m.panels() * ((k + 127) / 128) * kPanelRows, 0.01f);
  }
};

struct Activations {
  DType dtype;
  int64_t stride;
  std::vector<std::byte> bytes;
  Activations(DType t, int64_t rows, int64_t columns)
      : dtype(t), stride(columns), bytes(static_cast<size_t>(rows * columns * size_of(t))) {
    fill(bytes.data(), static_cast<int64_t>(bytes.size()), t);
  }
  [[nodiscard]] Rows rows() const { return {bytes.data(), dtype, stride}; }
  [[nodiscard]] MutableRows out() { return {bytes.data(), dtype, stride}; }
};

// ---- matrix products ---------------------------------------------------------------------------

class DnnlMatmul {
public:
  DnnlMatmul(int64_t m, int64_t n, int64_t k, DType dtype)
      : cpu_(dnnl::engine::kind::cpu, 0), queue_(cpu_), plan_(plan(m, n, k, dtype)),
        src_(plan_.src_desc(), cpu_), weights_(plan_.weights_desc(), cpu_),
        dst_(plan_.dst_desc(), cpu_), product_(plan_) {
    fill(static_cast<std::byte*>(src_.get_data_handle()), m * k * size_of(dtype), dtype);
    fill(static_cast<std::byte*>(weights_.get_data_handle()), n * k * size_of(dtype), dtype);
  }
  double best() {
    return best_time(g_seconds, [&] {
      product_.execute(queue_,
                       {{DNNL_ARG_SRC, src_}, {DNNL_ARG_WEIGHTS, weights_}, {DNNL_ARG_DST, dst_}});
      queue_.wait();
    });
  }

private:
  dnnl::matmul::primitive_desc plan(int64_t m, int64_t n, int64_t k, DType dtype) {
    using dnnl::memory;
    const auto type = dtype == DType::f32 ? memory::data_type::f32 : memory::data_type::bf16;
    const memory::desc src({m, k}, type, memory::format_tag::ab);
    const memory::desc weights({k, n}, type, memory::format_tag::any); // it packs as it likes
    const memory::desc dst({m, n}, memory::data_type::f32, memory::format_tag::ab);
    return {dnnl::matmul::desc(src, weights, dst), cpu_};
  }

  dnnl::engine cpu_;
  dnnl::stream queue_;
  dnnl::matmul::primitive_desc plan_;
  dnnl::memory src_, weights_, dst_;
  dnnl::matmul product_;
};

void bench_matmul(const Backend& backend, ComputeStream& stream, int64_t m, int64_t n, int64_t k,
                  DType dtype) {
  const Matrix w(n, k, dtype);
  const Activations x(dtype, m, k);
  Activations out(DType::f32, m, n);
  const LinearArgs args{m, x.rows(), {}, &w.m, out.out(), {}};
  DnnlMatmul rival(m, n, k, dtype);
  double ours = 1e30, peer = 1e30;
  const auto measure = [&] {
    on_stream(stream, [&](Workers& workers) {
      ours = std::min(ours, best_time(g_seconds, [&] { backend.linear(args, workers); }));
    });
  };
  const double gflop =
      2e-9 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  for (int round = 0; round < 3; ++round) { // in turn: the machine may be shared
    measure();
    peer = std::min(peer, rival.best());
  }
  std::printf("| %s | %4ld | %5ld | %5ld | %9.1f | %7.1f | %7.1f | %5.2f |\n",
              dtype == DType::f32 ? "F32 " : "BF16", m, n, k, ours * 1e6, gflop / ours,
              gflop / peer, peer / ours);
  std::fflush(stdout);
}

// ---- streaming weights -------------------------------------------------------------------------

uint64_t sum_words(const std::byte* p, int64_t bytes) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64)
    for (int j = 0; j < 8; ++j) {
      uint64_t v;
      std::memcpy(&v, p + i + 8 * j, sizeof v);
      sums[j] += v;
    }
  uint64_t total = 0;
  for (const uint64_t s : sums)
    total += s;
  return total;
}

double read_rate(ComputeStream& stream, const std::byte* p, int64_t bytes) {
  std::atomic<uint64_t> sink{0}; // so that the reads are not optimized away
  double time = 0;
  on_stream(stream, [&](Workers& workers) {
    time = best_time(g_seconds, [&] {
      workers.parallel_for(bytes >> 20, 4, [&](int64_t begin, int64_t end, int) {
        sink += sum_words(p + (begin << 20), (end - begin) << 20);
      });
    });
  });
  return static_cast<double>(bytes) / time * 1e-9;
}

void bench_streaming(const Backend& backend, ComputeStream& stream, DType dtype) {
  const int64_t k = 7168, bytes = int64_t{512} << 20;
  const Matrix w(bytes / k / size_of(dtype) / kPanelRows * kPanelRows, k, dtype);
  const auto size = static_cast<double>(w.m.n * k * size_of(dtype));
  for (const int64_t m : {1, 2, 4, 8, 16}) {
    const Activations x(DType::bf16, m, k);
    Activations out(DType::f32, m, w.m.n);
    const LinearArgs args{m, x.rows(), {}, &w.m, out.out(), {}};
    double rate = 0, ceiling = read_rate(stream, w.memory.data(), bytes / 2);
    on_stream(stream, [&](Workers& workers) {
      rate = size / best_time(g_seconds, [&] { backend.linear(args, workers); }) * 1e-9;
    });
    ceiling = std::max(ceiling, read_rate(stream, w.memory.data(), bytes / 2));
    std::printf("| %s | %4ld | %7.1f | %7.1f | %5.2f |\n", dtype == DType::bf16 ? "BF16" : "E4M3",
                m, rate, ceiling, rate / ceiling);
    std::fflush(stdout);
  }
}

// Decode of an MoE layer: `experts` experts of one row each.
void bench_experts(const Backend& backend, ComputeStream& stream, const char* model,
                   int64_t experts, int64_t hidden, int64_t width, DType dtype) {
  std::vector<Matrix> matrices;
  for (int64_t e = 0; e < experts; ++e) {
    matrices.emplace_back(width, hidden, dtype);
    matrices.emplace_back(width, hidden, dtype);
    matrices.emplace_back(hidden, width, dtype);
  }
  std::vector<FfnWeights> weights;
  std::vector<ExpertGroup> groups;
  const std::vector<int32_t> row{0};
  for (size_t e = 0; e < static_cast<size_t>(experts); ++e)
    weights.push_back({matrices[3 * e].m, matrices[3 * e + 1].m, matrices[3 * e + 2].m});
  for (int64_t e = 0; e < experts; ++e)
    groups.push_back({&weights[static_cast<size_t>(e)], row, e});
  const Activations x(DType::bf16, 1, hidden);
  Activations out(DType::bf16, experts, hidden);
  std::vector<std::byte> scratch(
      static_cast<size_t>(ffn_scratch_bytes(width, hidden, experts, stream.num_threads())));
  double time = 0;
  on_stream(stream, [&](Workers& workers) {
    time = best_time(g_seconds, [&] {
      backend.grouped_ffn({groups, x.rows(), {}, out.out(), {}, scratch, hidden}, workers);
    });
  });
  const double bytes = 3.0 * static_cast<double>(experts * width * hidden * size_of(dtype));
  const int64_t buffer_bytes = int64_t{256} << 20; // of its own: no cache holds it
  const AlignedBytes buffer(buffer_bytes);
  fill(buffer.data(), buffer_bytes, DType::f8_e4m3);
  const double rate = bytes / time * 1e-9, ceiling = read_rate(stream, buffer.data(), buffer_bytes);
  std::printf("| %s, %ld experts of one row, %s | %9.1f | %7.1f | %7.1f | %5.2f |\n", model,
              experts, dtype == DType::bf16 ? "BF16" : "E4M3", time * 1e6, rate, ceiling,
              rate / ceiling);
  std::fflush(stdout);
}

// ---- attention ---------------------------------------------------------------------------------

struct Attention {
  MlaShape shape;
  int64_t tokens;
  Matrix kv_b;
  std::vector<Matrix> absorbed;
  std::vector<PackedMatrix> w_uk_t, w_uv;
  Activations cache, q, out;
  std::vector<int32_t> pages;
  std::vector<std::byte> scratch;

  Attention(const MlaShape& s, int64_t n, int threads)
      : shape(s), tokens(n),
        kv_b(s.heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank, DType::bf16),
        cache(DType::bf16, (n + 63) / 64 * 64, s.kv_lora_rank + s.qk_rope_head_dim),
        q(DType::bf16, n, s.heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)),
        out(DType::bf16, n, s.heads * s.v_head_dim),
        scratch(static_cast<size_t>(mla_scratch_bytes(s, DType::bf16, n, n, threads))) {
    for (int64_t h = 0; h < s.heads; ++h) {
      absorbed.emplace_back(s.kv_lora_rank, s.qk_nope_head_dim, DType::bf16);
      absorbed.emplace_back(s.v_head_dim, s.kv_lora_rank, DType::bf16);
    }
    for (size_t h = 0; h < absorbed.size(); h += 2) {
      w_uk_t.push_back(absorbed[h].m);
      w_uv.push_back(absorbed[h + 1].m);
    }
    for (int32_t p = 0; p * 64 < n; ++p)
      pages.push_back(p);
  }
  [[nodiscard]] LatentCacheLayer layer() {
    return {cache.bytes.data(), DType::bf16, shape.kv_lora_rank + shape.qk_rope_head_dim};
  }
};

void bench_attention(const Backend& backend, ComputeStream& stream, const char* model,
                     const MlaShape& s, int64_t tokens) {
  Attention a(s, tokens, stream.num_threads());
  const SequenceRows prompt{0, tokens, 0, a.pages.data()};
  const SequenceRows answer{0, 1, static_cast<int32_t>(tokens - 1), a.pages.data()};
  double naive = 0, absorbed = 0;
  on_stream(stream, [&](Workers& workers) {
    naive = best_time(g_seconds, [&] {
      backend.mla_naive({s, {&prompt, 1}, a.q.rows(), a.layer(), &a.kv_b.m, a.out.out(), a.scratch},
                        workers);
    });
    absorbed = best_time(g_seconds, [&] {
      backend.mla_absorbed(
          {s, {&answer, 1}, a.q.rows(), a.layer(), a.w_uk_t, a.w_uv, a.out.out(), a.scratch},
          workers);
    });
  });
  const auto heads = static_cast<double>(s.heads), n = static_cast<double>(tokens);
  const auto d_c = static_cast<double>(s.kv_lora_rank);
  const auto nope = static_cast<double>(s.qk_nope_head_dim), v = static_cast<double>(s.v_head_dim);
  const auto rope = static_cast<double>(s.qk_rope_head_dim);
  // Useful work only: each pair of a query and a key it may see once.
  const double project = 2 * n * heads * (nope + v) * d_c;
  const double pairs = n * (n + 1) / 2 * heads * 2 * (nope + rope + v);
  const double decode = heads * (n * 2 * (2 * d_c + rope) + 2 * d_c * (nope + v));
  std::printf("| %s prefill %5ld | %9.1f | %7.1f |\n", model, tokens, naive * 1e6,
              (project + pairs) / naive * 1e-9);
  std::printf("| %s decode at %5ld | %9.1f | %7.1f |\n", model, tokens, absorbed * 1e6,
              decode / absorbed * 1e-9);
  std::fflush(stdout);
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name"))
      return line.substr(line.find(':') + 2);
  return "unknown CPU";
}

} // namespace

int main(int argc, char** argv) {
  const Backend* backend = argc > 1 ? find_backend(argv[1]) : &best_backend();
  const int threads = argc > 2 ? std::max(1, std::atoi(argv[2])) : 2;
  g_seconds = argc > 3 ? std::atof(argv[3]) : g_seconds;
  const std::string only = argc > 4 ? argv[4] : "";
  const auto wanted = [&](const char* section) { return only.empty() || only == section; };
  if (!backend) {
    std::fprintf(stderr, "bench_kernel: no backend '%s' here\n", argv[1]);
    return 2;
  }
  setenv("OMP_NUM_THREADS", std::to_string(threads).c_str(), 1); // before its first use
  const auto stream = make_cpu_stream(threads);
  std::printf("%s, %d threads, backend %s\n\n", cpu_name().c_str(), threads, backend->name);

  if (wanted("matmul")) {
    std::printf("| type |    M |     N |     K |        µs | GFLOP/s |  oneDNN | ratio |\n");
    std::printf("| ---- | ---- | ----- | ----- | --------- | ------- | ------- | ----- |\n");
    // bench-1b: q_b, dense up, expert up; V3: kv_a, expert up, expert down.
    const std::vector<std::pair<int64_t, int64_t>> shapes{{3072, 768}, {4096, 1024}, {512, 1024},
                                                          {576, 7168}, {2048, 7168}, {7168, 2048}};
    for (const DType dtype : {DType::bf16, DType::f32})
      for (const auto& [n, k] : shapes)
        for (const int64_t m : {1, 8, 48, 64, 512})
          bench_matmul(*backend, *stream, m, n, k, dtype);
  }
  if (wanted("streaming")) {
    std::printf("\n| weights | rows | GB/s | read GB/s | ratio |\n");
    std::printf("| --- | --- | --- | --- | --- |\n");
    for (const DType dtype : {DType::bf16, DType::f8_e4m3})
      bench_streaming(*backend, *stream, dtype);
  }
  if (wanted("experts")) {
    std::printf("\n| experts | µs | GB/s | read GB/s | ratio |\n");
    std::printf("| --- | --- | --- | --- | --- |\n");
    bench_experts(*backend, *stream, "bench-1b", 64, 1024, 512, DType::bf16);
    bench_experts(*backend, *stream, "V3", 8, 7168, 2048, DType::f8_e4m3);
  }
  if (wanted("attention")) {
    std::printf("\n| attention | µs | GFLOP/s |\n| --- | --- | --- |\n");
    bench_attention(*backend, *stream, "bench-1b", {16, 128, 64, 128, 512, 0.07f}, 512);
    bench_attention(*backend, *stream, "V3", {128, 128, 64, 128, 512, 0.13f}, 512);
    bench_attention(*backend, *stream, "V3", {128, 128, 64, 128, 512, 0.13f}, 2048);
  }
}
