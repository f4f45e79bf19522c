// What whole ranks reach of what this machine can do: prefill against oneDNN's BF16 matmul, decode
// against the read rate of memory, loading against reading, residents against what must be held;
// all measured in the same run, in turn with the model. Ranks are processes on UCX, as users start
// them, and the client is one, too.
//
//   bench_serving MODEL [MODEL_FP8] [--threads N]      troupe init bench-1b MODEL --dtype bf16
//                                                      troupe init bench-1b MODEL_FP8 --dtype fp8
//
// Back of the envelope for bench-1b: a decoded token reads its active weights, 231 M without the
// embedding, once: 462 MB in BF16, so 95 tokens/s at 44 GB/s. A 512-token prompt is 2 · 512 · 231 M
// = 237 GFLOP without the head on all but one row, a quarter of a second at 1 TFLOP/s. Of 4 ranks
// each holds attention, dense and shared experts, embedding and head (0.2 B) and a quarter of the
// 1.1 B in routed ones: 0.95 GB.
//
// The machine may be shared: only ratios mean anything. Each is the median of five, whose two sides
// were measured one right after the other; the first line says how busy others kept the machine.
#include "actors/agent.hpp"
#include "actors/client.hpp"
#include "actors/in_process_cluster.hpp"
#include "actors/rank_process.hpp"
#include "config/parameters.hpp"
#include "config/random.hpp"
#include "tests/bench/machine.hpp"

#include <fmt/format.h>

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

using namespace troupe;
using namespace troupe::bench;

namespace {

constexpr int kRepeats = 5;

[[noreturn]] void fail(const std::string& text) {
  fmt::print(stderr, "bench_serving: {}\n", text);
  std::exit(1);
}

// ---- what is measured through a client ----------------------------------------------------------

// `batch` requests of `prompt` tokens, `answer` answer tokens each.
struct Work {
  int batch = 1, prompt = 1, answer = 1;
  uint64_t seed = 0;
};

struct Rates {
  double prefill = 0, decode = 0; // tokens per second, of all requests together
  // Of the rank that holds the most beyond its weights and cache.
  double resident = 0, weights = 0, cache = 0;
};

caf::expected<Rates> run_work(ClusterClient& client, int64_t vocab, const Work& work) {
  KeyedStream random{work.seed};
  double prefill_end = 0;
  const double start = now();
  for (int i = 0; i < work.batch; ++i) {
    RequestSpec spec;
    for (int t = 0; t < work.prompt; ++t)
      spec.prompt.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
    spec.max_tokens = work.answer;
    spec.ignore_eos = true;
    if (auto id = client.submit(std::move(spec)); !id)
      return id.error();
  }
  std::map<RequestId, int> answered;
  int in_decode = 0, decoded = 0;
  RequestHandlers handlers;
  handlers.on_tokens = [&](const TokensReady& news) {
    for (size_t i = 0; i < news.tokens.size(); ++i)
      if (++answered[news.id] == 1) {
        if (++in_decode == work.batch)
          prefill_end = now();
      } else if (in_decode == work.batch) {
        ++decoded; // counted only once everybody decodes
      }
  };
  for (int i = 0; i < work.batch; ++i)
    if (auto done = client.wait(handlers); !done)
      return done.error();
  const double end = now();
  auto stats = client.stats();
  if (!stats)
    return stats.error();
  Rates rates{work.batch * work.prompt / (prefill_end - start), decoded / (end - prefill_end)};
  double most = 0;
  for (const auto& r : stats->ranks) {
    const auto own = static_cast<double>(r.weight_bytes + r.kv_bytes);
    if (const double ratio = static_cast<double>(r.resident_bytes) / own; ratio > most) {
      most = ratio;
      rates.resident = static_cast<double>(r.resident_bytes);
      rates.weights = static_cast<double>(r.weight_bytes);
      rates.cache = static_cast<double>(r.kv_bytes);
    }
  }
  return rates;
}

// ---- clusters of processes ----------------------------------------------------------------------

ClusterOptions options_of(const std::string& model, int ranks, int threads) {
  ClusterOptions o;
  o.model = model;
  o.compute = DType::bf16;
  o.shape.num_ranks = ranks;
  o.local_ranks = ranks;
  o.num_threads = ranks == 1 ? threads : 0; // the default shares the cores
  o.limits.batch = 32;
  o.limits.kv_tokens = 8192;
  o.cluster_token = "bench";
  return o;
}

bool write_all(int fd, const void* data, size_t size) {
  return ::write(fd, data, size) == static_cast<ssize_t>(size); // far less than a pipe takes
}
bool read_all(int fd, void* data, size_t size) {
  auto* at = static_cast<char*>(data);
  while (size > 0) {
    const auto n = ::read(fd, at, size);
    if (n <= 0)
      return false;
    at += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

// An agent with its ranks and a client that does the work it is sent. To be started before this
// process has threads; ends when the pipe to the client closes.
class ProcessCluster {
public:
  ProcessCluster(const ClusterOptions& options, int64_t vocab) {
    std::array<int, 2> work{}, rates{};
    if (pipe2(work.data(), O_CLOEXEC) != 0 || pipe2(rates.data(), O_CLOEXEC) != 0)
      fail("pipe");
    pid_ = fork();
    if (pid_ == 0) {
      close(work[1]);
      close(rates[0]);
      for (const int fd : to_close_)
        close(fd);
      _exit(agent(options, vocab, work[0], rates[1]));
    }
    close(work[0]);
    close(rates[1]);
    work_ = work[1];
    rates_ = rates[0];
    to_close_.push_back(work_); // another agent's copy would keep the pipe open
    (void)run({1, 64, 4, 99});  // waits until it is up, and warms it
  }
  ProcessCluster(const ProcessCluster&) = delete;
  ProcessCluster& operator=(const ProcessCluster&) = delete;
  ~ProcessCluster() {
    close(work_);
    close(rates_);
    waitpid(pid_, nullptr, 0);
  }
  Rates run(const Work& work) {
    Rates rates;
    if (!write_all(work_, &work, sizeof work) || !read_all(rates_, &rates, sizeof rates))
      fail("a cluster has ended");
    return rates;
  }

private:
  static int agent(const ClusterOptions& cluster, int64_t vocab, int work, int rates) {
    RankProcessOptions process;
    process.cluster = cluster;
    AgentOptions o;
    for (int32_t r = 0; r < cluster.shape.num_ranks; ++r)
      o.ranks.push_back(RankId{r});
    o.rank_main = [&](RankId r, AgentChannel& c) {
      close(work);
      close(rates);
      return rank_process_main(r, process, c);
    };
    o.client_main = [&](AgentChannel& c) {
      const auto error = serve(c, vocab, work, rates);
      if (error)
        c.say("failed " + text_of(error));
      return error ? 1 : 0;
    };
    return run_agent(o);
  }
  static caf::error serve(AgentChannel& channel, int64_t vocab, int work, int rates) {
    std::optional<std::string> line;
    do
      line = channel.hear();
    while (line && !line->starts_with("seed "));
    if (!line)
      return make_error(Errc::peer_lost, "the agent is gone");
    auto endpoint = parse_endpoint(line->substr(5));
    if (!endpoint)
      return endpoint.error();
    RankSystemConfig config;
    caf::actor_system system{config};
    auto client = ClusterClient::connect(system, endpoint->host, endpoint->port, "bench",
                                         std::chrono::seconds{10});
    if (!client)
      return client.error();
    if (auto info = (*client)->info(std::chrono::minutes{5}); !info)
      return info.error();
    for (Work ask; read_all(work, &ask, sizeof ask);) {
      auto measured = run_work(**client, vocab, ask);
      if (!measured)
        return measured.error();
      if (!write_all(rates, &*measured, sizeof *measured))
        break;
    }
    return {};
  }

  static inline std::vector<int> to_close_;
  pid_t pid_ = -1;
  int work_ = -1, rates_ = -1;
};

// Processes that keep every core busy while they live.
class BusyProcesses {
public:
  explicit BusyProcesses(int count) {
    for (int i = 0; i < count; ++i)
      if (const pid_t pid = fork(); pid == 0) {
        for (volatile uint64_t spin = 0;;)
          spin = spin + 1;
      } else {
        pids_.push_back(pid);
      }
  }
  BusyProcesses(const BusyProcesses&) = delete;
  BusyProcesses& operator=(const BusyProcesses&) = delete;
  ~BusyProcesses() {
    for (const pid_t pid : pids_) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
  }

private:
  std::vector<pid_t> pids_;
};

// ---- rows ---------------------------------------------------------------------------------------

// A value and its ratio to a ceiling or a peer, several times.
class Row {
public:
  Row(const char* what, const char* unit, const char* of) : what_(what), unit_(unit), of_(of) {}
  void add(double value, double ratio) {
    values_.push_back(value);
    ratios_.push_back(ratio);
  }
  void print() const {
    fmt::print("{:<36} {:>9.1f} {:<9} {:>6.2f} of {}\n", what_, median(values_), unit_,
               median(ratios_), of_);
    std::fflush(stdout);
  }

private:
  const char *what_, *unit_, *of_;
  std::vector<double> values_, ratios_;
};

struct Model {
  std::string path;
  ModelConfig config;
  std::vector<std::filesystem::path> files;
  double decode_bytes = 0, prefill_flop_per_token = 0;

  explicit Model(const std::string& folder) : path(folder) {
    auto checkpoint = Checkpoint::open(folder);
    if (!checkpoint)
      fail(text_of(checkpoint.error()));
    config = (*checkpoint)->config();
    files = (*checkpoint)->files();
    const auto counts = count_parameters(config);
    const auto active = static_cast<double>(counts.active_without_embedding_and_head);
    // The head stays BF16 in an FP8 checkpoint.
    decode_bytes = active * (config.quantization ? 1 : 2) +
                   static_cast<double>(config.vocab_size * config.hidden_size) * 2;
    prefill_flop_per_token = 2 * active;
  }
};

// Loading a whole model into one rank, page cache dropped first, against reading its files once.
void bench_loading(const Model& model, int threads) {
  Row loading{"loading, page cache dropped", "s", "reading the files once"};
  for (int i = 0; i < 3; ++i) {
    drop_cached(model.files);
    const double read = seconds_to_read(model.files);
    if (read < 0)
      fail("the checkpoint can't be read");
    drop_cached(model.files);
    const double start = now();
    if (auto cluster = InProcessCluster::start(options_of(model.path, 1, threads)); !cluster)
      fail(text_of(cluster.error()));
    const double load = now() - start;
    loading.add(load, load / read);
  }
  loading.print();
}

void bench_decode(const char* what, const Model& model, ProcessCluster& cluster,
                  MemoryReader& memory) {
  Row decode{what, "tokens/s", "the memory read rate"};
  for (int i = 0; i < kRepeats; ++i) {
    const double before = memory.rate();
    const double rate = cluster.run({1, 16, 48, static_cast<uint64_t>(i)}).decode;
    decode.add(rate, rate * model.decode_bytes / ((before + memory.rate()) / 2));
  }
  decode.print();
}

void bench_prefill(const Model& model, ProcessCluster& cluster, OneDnnGemm& gemm) {
  Row prefill{"prefill 512", "tokens/s", "oneDNN's GEMM rate"};
  for (int i = 0; i < kRepeats; ++i) {
    const double before = gemm.rate();
    const double rate = cluster.run({1, 512, 2, static_cast<uint64_t>(i)}).prefill;
    prefill.add(rate, rate * model.prefill_flop_per_token / ((before + gemm.rate()) / 2));
  }
  prefill.print();
}

void bench_batch_and_company(ProcessCluster& cluster, int threads) {
  Row batch{"decode, batch 32", "tokens/s", "batch 1"};
  Row busy{"decode beside busy processes", "tokens/s", "the quiet rate"};
  for (int i = 0; i < kRepeats; ++i) {
    const Work work{1, 16, 32, static_cast<uint64_t>(i)};
    const double alone = cluster.run(work).decode;
    const double together = cluster.run({32, 16, 24, static_cast<uint64_t>(i)}).decode;
    batch.add(together, together / alone);
    const BusyProcesses others{threads};
    const double beside = cluster.run(work).decode;
    busy.add(beside, beside / alone);
  }
  batch.print();
  busy.print();
}

void bench_ranks(ProcessCluster& one, ProcessCluster& four) {
  Row prefill{"4 ranks, prefill 512", "tokens/s", "1 rank"};
  Row decode{"4 ranks, decode", "tokens/s", "1 rank"};
  Row resident_one{"1 rank, resident", "MB", "weights and cache"};
  Row resident_four{"4 ranks, resident, the worst of them", "MB", "weights and cache"};
  for (int i = 0; i < kRepeats; ++i) {
    const Work work{1, 512, 48, static_cast<uint64_t>(i)};
    const auto a = one.run(work), b = four.run(work);
    prefill.add(b.prefill, b.prefill / a.prefill);
    decode.add(b.decode, b.decode / a.decode);
    resident_one.add(a.resident * 1e-6, a.resident / (a.weights + a.cache));
    resident_four.add(b.resident * 1e-6, b.resident / (b.weights + b.cache));
  }
  for (const auto* row : {&prefill, &decode, &resident_one, &resident_four})
    row->print();
}

struct Arguments {
  std::string model, model_fp8;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
};

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--threads" && i + 1 < argc)
      a.threads = std::atoi(argv[++i]);
    else
      (a.model.empty() ? a.model : a.model_fp8) = word;
  }
  if (a.model.empty() || a.threads < 1)
    fail("usage: bench_serving MODEL [MODEL_FP8] [--threads N]");
  return a;
}

} // namespace

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN); // a cluster that ended is told of by name
  const auto arguments = parse(argc, argv);
  const int threads = arguments.threads;
  const Model model{arguments.model};
  const auto vocab = model.config.vocab_size;

  // Processes before threads.
  ProcessCluster one{options_of(model.path, 1, threads), vocab};
  ProcessCluster four{options_of(model.path, 4, threads), vocab};
  std::optional<Model> fp8;
  std::optional<ProcessCluster> one_fp8;
  if (!arguments.model_fp8.empty()) {
    fp8.emplace(arguments.model_fp8);
    one_fp8.emplace(options_of(fp8->path, 1, threads), fp8->config.vocab_size);
  }

  const double others = busy_cores();
  MemoryReader memory{threads};
  OneDnnGemm gemm;
  fmt::print(
      "{} threads; others keep {:.1f} cores busy; memory read {:.1f} GB/s; oneDNN BF16 {:.0f} "
      "GFLOP/s\n",
      threads, others, memory.rate() * 1e-9, gemm.rate() * 1e-9);
  bench_prefill(model, one, gemm);
  bench_decode("decode, batch 1", model, one, memory);
  if (fp8)
    bench_decode("decode, batch 1, FP8 weights", *fp8, *one_fp8, memory);
  bench_batch_and_company(one, threads);
  bench_ranks(one, four);
  bench_loading(model, threads);
  return 0;
}
