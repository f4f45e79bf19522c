// What a whole rank reaches of what this machine can do: prefill against oneDNN's BF16 matmul,
// decode against the read rate of memory, both measured in the same run, in turn with the model.
//
//   bench_serving MODEL [threads]        MODEL: `troupe init bench-1b DIR --dtype bf16` (or fp8)
//
// Back of the envelope for bench-1b: a decoded token reads its active weights, 231 M without the
// embedding, once: 462 MB in BF16, so 95 tokens/s at 44 GB/s. A 512-token prompt is 2 · 512 · 231 M
// = 237 GFLOP without the head on all but one row, a quarter of a second at 1 TFLOP/s.
//
// The machine may be shared: only ratios within a run mean anything, and medians of five.
#include "actors/in_process_cluster.hpp"
#include "config/parameters.hpp"
#include "config/random.hpp"

#include <fmt/format.h>
#include <oneapi/dnnl/dnnl.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

using namespace troupe;

namespace {

constexpr int kRepeats = 5;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

[[noreturn]] void fail(const std::string& text) {
  fmt::print(stderr, "bench_serving: {}\n", text);
  std::exit(1);
}

// Bytes per second at which `threads` threads read a gigabyte of random data.
class MemoryReader {
public:
  explicit MemoryReader(int threads) : threads_(threads), data_(size_t{1} << 27) {
    KeyedStream random{1};
    for (auto& v : data_)
      v = random.next();
  }
  double rate() {
    std::vector<std::thread> team;
    std::atomic<uint64_t> sink{0};
    const double start = now();
    for (int t = 0; t < threads_; ++t)
      team.emplace_back([&, t] {
        const size_t n = data_.size() / static_cast<size_t>(threads_);
        const uint64_t* p = data_.data() + static_cast<size_t>(t) * n;
        uint64_t a[32] = {};
        for (size_t i = 0; i + 32 <= n; i += 32)
          for (size_t j = 0; j < 32; ++j)
            a[j] ^= p[i + j];
        uint64_t all = 0;
        for (const auto v : a)
          all ^= v;
        sink ^= all;
      });
    for (auto& t : team)
      t.join();
    return static_cast<double>(data_.size() * 8) / (now() - start);
  }

private:
  int threads_;
  std::vector<uint64_t> data_;
};

// FLOP per second of oneDNN's BF16 matmul [512, k] x [k, n].
class OneDnnGemm {
public:
  double rate() {
    const double start = now();
    int calls = 0;
    for (; calls < 3 || now() - start < 0.2; ++calls) {
      matmul_.execute(stream_, arguments_);
      stream_.wait();
    }
    return 2.0 * kM * kN * kK * calls / (now() - start);
  }

private:
  using Memory = dnnl::memory;
  static constexpr int64_t kM = 512, kN = 2048, kK = 2048;
  static Memory::desc desc(int64_t r, int64_t c, Memory::data_type t) {
    return {{r, c}, t, Memory::format_tag::ab};
  }
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul::primitive_desc description_{
      dnnl::matmul::desc{desc(kM, kK, Memory::data_type::bf16),
                         Memory::desc{{kK, kN}, Memory::data_type::bf16, Memory::format_tag::any},
                         desc(kM, kN, Memory::data_type::f32)},
      engine_};
  Memory a_{description_.src_desc(), engine_}, b_{description_.weights_desc(), engine_},
      c_{description_.dst_desc(), engine_};
  dnnl::matmul matmul_{description_};
  std::unordered_map<int, Memory> arguments_{
      {DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}};
};

ClusterOptions options_of(const std::string& model, int ranks, int threads) {
  ClusterOptions o;
  o.model = model;
  o.compute = DType::bf16;
  o.shape.num_ranks = ranks;
  o.local_ranks = ranks;
  o.num_threads = std::max(1, threads / ranks);
  o.limits.batch = 32;
  o.limits.kv_tokens = 8192;
  o.cluster_token = "bench";
  return o;
}

struct Rates {
  double prefill = 0, decode = 0; // tokens per second, of all requests together
};

// `batch` requests of `prompt` tokens, `answer` answer tokens each.
Rates run(ClusterClient& client, int64_t vocab, int batch, int prompt, int answer, uint64_t seed) {
  KeyedStream random{seed};
  double prefill_end = 0;
  const double start = now();
  for (int i = 0; i < batch; ++i) {
    RequestSpec spec;
    for (int t = 0; t < prompt; ++t)
      spec.prompt.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
    spec.max_tokens = answer;
    spec.ignore_eos = true;
    if (auto id = client.submit(std::move(spec)); !id)
      fail(text_of(id.error()));
  }
  std::map<RequestId, int> answered;
  int in_decode = 0, decoded = 0;
  RequestHandlers handlers;
  handlers.on_tokens = [&](const TokensReady& news) {
    for (size_t i = 0; i < news.tokens.size(); ++i)
      if (++answered[news.id] == 1) {
        if (++in_decode == batch)
          prefill_end = now();
      } else if (in_decode == batch) {
        ++decoded; // counted only once everybody decodes
      }
  };
  for (int i = 0; i < batch; ++i)
    if (auto done = client.wait(handlers); !done)
      fail(text_of(done.error()));
  const double end = now();
  return {batch * prompt / (prefill_end - start), decoded / (end - prefill_end)};
}

} // namespace

int main(int argc, char** argv) {
  if (argc < 2)
    fail("usage: bench_serving MODEL [threads]");
  const std::string model = argv[1];
  const int threads =
      argc > 2 ? std::atoi(argv[2]) : static_cast<int>(std::thread::hardware_concurrency());
  auto checkpoint = Checkpoint::open(model);
  if (!checkpoint)
    fail(text_of(checkpoint.error()));
  const auto config = (*checkpoint)->config();
  const auto counts = count_parameters(config);
  const double width = config.quantization ? 1.0 : 2.0;
  // The head stays BF16 in an FP8 checkpoint.
  const auto head = static_cast<double>(config.vocab_size * config.hidden_size);
  const double decode_bytes =
      static_cast<double>(counts.active_without_embedding_and_head) * width + head * 2;
  const double prefill_flop =
      2.0 * 512 * static_cast<double>(counts.active_without_embedding_and_head);

  MemoryReader memory{threads};
  OneDnnGemm gemm;
  std::vector<double> read, matmul, prefill, decode, decode32, busy, four_prefill, four_decode;
  {
    auto cluster = InProcessCluster::start(options_of(model, 1, threads));
    if (!cluster)
      fail(text_of(cluster.error()));
    auto& client = (*cluster)->client();
    run(client, config.vocab_size, 1, 64, 4, 99);
    for (int i = 0; i < kRepeats; ++i) {
      read.push_back(memory.rate());
      matmul.push_back(gemm.rate());
      const auto one = run(client, config.vocab_size, 1, 512, 48, static_cast<uint64_t>(i));
      prefill.push_back(one.prefill);
      decode.push_back(one.decode);
      decode32.push_back(
          run(client, config.vocab_size, 32, 16, 24, static_cast<uint64_t>(i)).decode);
      // Beside a process's worth of threads that keep every core busy.
      std::atomic<bool> stop{false};
      std::vector<std::thread> hogs;
      for (int t = 0; t < threads; ++t)
        hogs.emplace_back([&] {
          while (!stop.load(std::memory_order_relaxed)) {
          }
        });
      busy.push_back(run(client, config.vocab_size, 1, 16, 24, static_cast<uint64_t>(i)).decode);
      stop = true;
      for (auto& t : hogs)
        t.join();
    }
  }
  {
    auto cluster = InProcessCluster::start(options_of(model, 4, threads));
    if (!cluster)
      fail(text_of(cluster.error()));
    run((*cluster)->client(), config.vocab_size, 1, 64, 4, 99);
    for (int i = 0; i < kRepeats; ++i) {
      const auto one =
          run((*cluster)->client(), config.vocab_size, 1, 512, 48, static_cast<uint64_t>(i));
      four_prefill.push_back(one.prefill);
      four_decode.push_back(one.decode);
    }
  }
  const double read_rate = median(read), gemm_rate = median(matmul);
  const double decode_rate = median(decode);
  fmt::print("{} threads; medians of {}; memory read {:.1f} GB/s; oneDNN BF16 {:.0f} GFLOP/s\n",
             threads, kRepeats, read_rate * 1e-9, gemm_rate * 1e-9);
  const auto row = [](const char* what, double value, const char* unit, double ratio,
                      const char* of) {
    fmt::print("{:<34} {:>9.1f} {:<9} {:>6.2f} of {}\n", what, value, unit, ratio, of);
  };
  row("prefill 512", median(prefill), "tokens/s", median(prefill) / 512 * prefill_flop / gemm_rate,
      "oneDNN's GEMM rate");
  row("decode, batch 1", decode_rate, "tokens/s", decode_rate * decode_bytes / read_rate,
      "the memory read rate");
  row("decode, batch 32", median(decode32), "tokens/s", median(decode32) / decode_rate, "batch 1");
  row("decode beside busy cores", median(busy), "tokens/s", median(busy) / decode_rate,
      "the quiet rate");
  row("4 ranks, prefill 512", median(four_prefill), "tokens/s",
      median(four_prefill) / median(prefill), "1 rank");
  row("4 ranks, decode", median(four_decode), "tokens/s", median(four_decode) / decode_rate,
      "1 rank");
}
