#include "apps/session.hpp"

#include "actors/agent.hpp"
#include "actors/in_process_cluster.hpp"
#include "actors/placement.hpp"
#include "actors/rank_process.hpp"
#include "apps/console.hpp"
#include "apps/option_checks.hpp"
#include "apps/tls_files.hpp"
#include "apps/token.hpp"
#include "config/cluster_spec.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>

namespace troupe {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

namespace {

// Memory this process and its children may still take: the machine's, its control group's, its own.
int64_t available_memory() {
  int64_t available = std::numeric_limits<int64_t>::max();
  std::ifstream meminfo{"/proc/meminfo"};
  for (std::string name, rest; meminfo >> name; std::getline(meminfo, rest))
    if (int64_t kib = 0; name == "MemAvailable:" && meminfo >> kib)
      available = kib * 1024;
  std::ifstream most{"/sys/fs/cgroup/memory.max"}, now{"/sys/fs/cgroup/memory.current"};
  if (int64_t limit = 0, used = 0; most >> limit && now >> used)
    available = std::min(available, std::max<int64_t>(limit - used, 0));
  rlimit address_space{};
  if (getrlimit(RLIMIT_AS, &address_space) == 0 && address_space.rlim_cur != RLIM_INFINITY)
    available = std::min(available, static_cast<int64_t>(address_space.rlim_cur));
  return available;
}

// The cache's pages are mapped at once but taken as they fill; what can never fit is refused here
// rather than killed later. In floating point, because kv_tokens may be anything.
caf::error check_cache_fits(const SessionOptions& o, const ModelConfig& config, int64_t modules,
                            DType dtype, int32_t local_ranks) {
  const auto layers = static_cast<double>(config.num_hidden_layers + modules);
  const auto row = static_cast<double>(config.kv_lora_rank + config.qk_rope_head_dim);
  const auto bytes = static_cast<double>(o.cluster.limits.kv_tokens) * layers * row *
                     static_cast<double>(size_of(dtype)) * local_ranks;
  const auto available = available_memory();
  if (bytes <= static_cast<double>(available))
    return {};
  return make_error(Errc::out_of_memory,
                    fmt::format("kv-tokens: a cache of {} positions takes {} on {} attention "
                                "rank(s) of this host, {} of memory are available",
                                with_commas(o.cluster.limits.kv_tokens),
                                bytes_text(static_cast<int64_t>(std::min(bytes, 9e18))),
                                local_ranks, bytes_text(available)));
}

std::atomic<bool> interrupt_wanted = false;

// Until the second signal, which ends the process.
void end_gently() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupt_wanted = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  for (const int s : {SIGINT, SIGTERM})
    sigaction(s, &action, nullptr);
}

// The least of what training takes; other live micro-batches and messages come on top.
caf::error check_training_fits(const TrainSetup& setup, const TrainPlan& plan,
                               int32_t local_ranks) {
  auto bytes = train_memory_bytes(setup, plan);
  std::ranges::sort(bytes); // which of them are local, a launcher decides
  bytes.resize(std::min(bytes.size(), static_cast<size_t>(local_ranks)));
  const auto needed = std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
  const auto available = available_memory();
  if (needed <= available)
    return {};
  return make_error(Errc::out_of_memory,
                    fmt::format("weights, gradients, optimizer and a micro-batch of {} rank(s) on "
                                "this host take at least {}, {} of memory are available",
                                local_ranks, bytes_text(needed), bytes_text(available)));
}

caf::error resolve_training(SessionOptions& o) {
  const auto& setup = *o.cluster.train;
  auto plan = plan_of(setup.config, setup.model);
  if (!plan)
    return plan.error();
  o.cluster.shape.num_ranks = setup.config.num_ranks();
  if (o.cluster.local_ranks == 0)
    o.cluster.local_ranks = o.cluster.shape.num_ranks;
  if (o.cluster.num_threads == 0) {
    const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    o.cluster.num_threads = std::max(1, cores / o.cluster.local_ranks);
  }
  return check_training_fits(setup, *plan, o.cluster.local_ranks);
}

// Everything that can be wrong is found here, once, before any process starts.
caf::error resolve(SessionOptions& o) {
  if (!o.trace.empty()) // rank 0's stands for all: they are neighbours
    if (auto error = check_writable(o.trace + ".0.json"))
      return with_context("trace", error);
  if (o.cluster.train)
    return resolve_training(o);
  if (o.ranks < 0)
    return make_error(Errc::invalid_argument,
                      fmt::format("ranks: {} given, at least 1 expected", o.ranks));
  if (o.dispatch != "direct" && o.dispatch != "two-hop")
    return make_error(
        Errc::invalid_argument,
        fmt::format("dispatch: \"{}\" given, expected \"direct\" or \"two-hop\"", o.dispatch));
  const auto seed = o.cluster.shape.placement_seed;
  auto shape = parse_shape(o.layout, o.ranks, o.tp, o.nodes);
  if (!shape)
    return shape.error();
  o.cluster.shape = *shape;
  o.cluster.shape.placement_seed = seed;
  o.cluster.shape.two_hop = o.dispatch == "two-hop";
  if (!o.compute.empty())
    o.cluster.compute = o.compute == "f32" ? DType::f32 : DType::bf16;
  if (!o.fp8.empty())
    o.cluster.fp8 = o.fp8;
  auto checkpoint = Checkpoint::open(o.cluster.model);
  if (!checkpoint)
    return checkpoint.error();
  auto arithmetic = choose_arithmetic(**checkpoint, o.cluster);
  if (!arithmetic)
    return arithmetic.error();
  const int64_t modules = o.cluster.limits.max_speculate > 0 ? (*checkpoint)->num_mtp_layers() : 0;
  if (o.cluster.limits.max_speculate > 0 && modules == 0)
    return make_error(Errc::unsupported, "speculate: the checkpoint has no MTP module");
  if (!find_backend(o.cluster.backend))
    return make_error(Errc::invalid_argument,
                      fmt::format("backend: \"{}\" is not available here", o.cluster.backend));
  const auto& config = (*checkpoint)->config();
  auto view = first_view(config, o.cluster.shape, modules);
  if (!view)
    return view.error();
  auto& kv_tokens = o.cluster.limits.kv_tokens;
  if (kv_tokens == 0) {
    kv_tokens = std::max<int64_t>(o.context + kPageTokens, 4096);
    if (config.max_position_embeddings > 0) // no position lies beyond
      kv_tokens = std::min(kv_tokens, config.max_position_embeddings + kPageTokens);
  }
  const auto& chosen = o.cluster.shape;
  if (o.cluster.local_ranks == 0)
    o.cluster.local_ranks = chosen.num_ranks;
  const int32_t holders = chosen.joint ? chosen.num_ranks : chosen.attention_ranks;
  return check_cache_fits(o, config, modules, arithmetic->activations,
                          std::min(holders, o.cluster.local_ranks));
}

std::string loading_text(int64_t bytes) { return "loading weights: " + bytes_text(bytes); }

// How far the ranks are, until they serve; then the terminal belongs to the answer.
class LoadingLine {
public:
  void show(int64_t bytes) {
    const std::lock_guard lock{mutex_};
    if (!over_)
      line_.show(loading_text(bytes));
  }
  void end() {
    const std::lock_guard lock{mutex_};
    over_ = true;
    line_.clear();
  }

private:
  std::mutex mutex_;
  ProgressLine line_{true};
  bool over_ = false;
};

// `patience`: how long the cluster may take to answer that it runs.
int run_client(const std::string& seed, const std::string& token, const TlsFiles& tls,
               std::chrono::milliseconds patience, LoadingLine& loading,
               const std::function<int(ClusterClient&)>& body) {
  auto endpoint = parse_endpoint(seed);
  if (!endpoint)
    return complain(endpoint.error());
  RankSystemConfig config{false, tls};
  caf::actor_system system{config};
  auto client = ClusterClient::connect(system, endpoint->host, endpoint->port, token,
                                       std::chrono::seconds{10});
  if (!client)
    return complain(client.error());
  auto info = (*client)->info(patience);
  loading.end();
  if (!info)
    return complain(info.error());
  return after_output(body(**client));
}

// The client under an agent: waits for the seed, ends when the agent does. What it complains about
// goes to the agent.
int client_main(AgentChannel& agent, const std::string& token, const TlsFiles& tls,
                const std::function<int(ClusterClient&)>& body) {
  std::optional<std::string> seed;
  while (!seed) {
    const auto line = agent.hear();
    if (!line || *line == "stop")
      return 1;
    if (*line == "interrupt")
      interrupt_wanted = true;
    if (line->starts_with("seed "))
      seed = line->substr(5);
  }
  divert_complaints([&agent](const caf::error& error) {
    agent.say((code_of(error) == Errc::peer_lost ? "lost " : "failed ") + text_of(error));
  });
  const auto loading = std::make_shared<LoadingLine>();
  std::thread{[&agent, loading] {
    while (const auto line = agent.hear())
      if (*line == "interrupt")
        interrupt_wanted = true;
      else if (line->starts_with("loading "))
        loading->show(std::strtoll(line->c_str() + 8, nullptr, 10));
    _exit(1);
  }}.detach();
  // However long loading takes: a rank that does not get on ends it with a better reason.
  return run_client(*seed, token, tls, std::chrono::hours{24}, *loading, body);
}

RankProcessOptions process_options(const SessionOptions& o) {
  RankProcessOptions p;
  p.cluster = o.cluster;
  p.join_timeout = std::chrono::seconds{o.join_timeout_s};
  p.trace_file = o.trace;
  p.cluster.trace = !o.trace.empty();
  return p;
}

// What TLS the flags ask for, or else the environment; errors name what is wrong there.
caf::error choose_tls(TlsFiles& tls) {
  TlsNames names{"--tls-certificate", "--tls-key", "--tls-ca"};
  if (tls.certificate.empty() && tls.key.empty() && tls.ca.empty()) {
    names = {"TROUPE_TLS_CERTIFICATE", "TROUPE_TLS_KEY", "TROUPE_TLS_CA"};
    tls = {environment("TROUPE_TLS_CERTIFICATE"), environment("TROUPE_TLS_KEY"),
           environment("TROUPE_TLS_CA")};
  }
  if (tls.certificate.empty() && tls.key.empty() && tls.ca.empty())
    return {};
  return check_tls_files(tls, names);
}

// Where the tasks of a launcher meet. Errors where nobody said.
caf::expected<std::string> meeting_point(const LauncherTask& task) {
  if (task.master_port != 0)
    return fmt::format("{}:{}", task.master_host, task.master_port);
  const auto port = 20000 + std::hash<std::string>{}(task.job) % 10000; // not of the ephemeral ones
  if (task.local_ranks == task.num_ranks)
    return fmt::format("127.0.0.1:{}", port);
  return make_error(Errc::unsupported,
                    fmt::format("{} started tasks on several hosts; set MASTER_ADDR, MASTER_PORT "
                                "and TROUPE_TOKEN for all of them",
                                task.launcher));
}

// What a launcher's tasks know each other by: what was given, or on one host a secret of the user.
caf::expected<std::string> tasks_token(const LauncherTask& task, const SessionOptions& o,
                                       const std::string& seed, bool loopback) {
  auto token = given_token(o.token, o.token_file);
  if (!token || !token->empty())
    return token;
  if (!loopback)
    return make_error(Errc::invalid_argument,
                      fmt::format("tasks meet at {}, where others can reach them: set TROUPE_TOKEN "
                                  "or TROUPE_TOKEN_FILE for all of them, a secret that no stranger "
                                  "can guess",
                                  seed));
  auto secret = user_secret();
  if (!secret)
    return with_context("set TROUPE_TOKEN for all tasks, or mend this", secret.error());
  return *secret + task.launcher + task.job;
}

int run_launched(const LauncherTask& task, SessionOptions o,
                 const std::function<int(ClusterClient&)>& body) {
  auto seed = meeting_point(task);
  if (!seed)
    return complain(seed.error());
  auto endpoint = parse_endpoint(*seed);
  if (!endpoint)
    return complain(endpoint.error());
  auto token = tasks_token(task, o, *seed, is_loopback(endpoint->host));
  if (!token)
    return complain(token.error());
  o.cluster.cluster_token = *token;
  if (auto error = choose_tls(o.cluster.tls))
    return complain(error);

  auto process = process_options(o);
  process.control_host = endpoint->host;
  process.control_port = endpoint->port;
  AgentOptions agent;
  agent.client_ends_run = o.cluster.train != nullptr;
  agent.ranks = {RankId{task.rank}};
  agent.seed = *seed;
  agent.rank_main = [&](RankId r, AgentChannel& c) { return rank_process_main(r, process, c); };
  if (task.rank == 0)
    agent.client_main = [&](AgentChannel& c) {
      return client_main(c, o.cluster.cluster_token, o.cluster.tls, [&](ClusterClient& client) {
        const int code = body(client);
        // The other tasks' agents end when their ranks have left.
        if (auto error = client.stop_cluster())
          return complain(error);
        return code;
      });
    };
  return run_agent(agent);
}

int run_attached(const SessionOptions& o, const std::function<int(ClusterClient&)>& body) {
  auto address = o.attach;
  auto tls = o.cluster.tls;
  if (auto error = choose_tls(tls))
    return wrong_usage(error);
  const auto given = given_token(o.token, o.token_file);
  if (!given)
    return complain(given.error());
  auto token = *given;
  if (std::filesystem::is_regular_file(o.attach)) {
    auto spec = load_cluster_spec(o.attach);
    if (!spec)
      return complain(spec.error());
    if (spec->control.port == 0)
      return wrong_usage(o.attach +
                         ": control.port: not fixed; attach to the HOST:PORT that launch printed");
    address = fmt::format("{}:{}", spec->control.host, spec->control.port);
    if (token.empty())
      token = spec->control.token;
    if (tls.empty()) {
      tls = tls_of(spec->control);
      if (auto error = check_tls(tls, o.attach))
        return complain(error);
    }
  } else if (auto endpoint = parse_endpoint(address); !endpoint) {
    return wrong_usage("attach: " + text_of(endpoint.error()) + " or a cluster file");
  }
  LoadingLine loading; // stays empty: the cluster's own terminal shows it
  return run_client(address, token, tls, std::chrono::minutes{30}, loading, body);
}

} // namespace

void add_cluster_options(CLI::App& command, SessionOptions& o) {
  const char* group = "Cluster";
  command.add_option("--ranks", o.ranks, "Number of ranks (default 1)")
      ->check(CLI::Range(1, 65536))
      ->group(group);
  command
      .add_option("--layout", o.layout,
                  "joint: every rank does attention and experts; A+E: the first A ranks do "
                  "attention, E others host experts")
      ->capture_default_str()
      ->group(group);
  command.add_option("--tp", o.tp, "Tensor-parallel ranks of an attention group")
      ->check(CLI::Range(1, 64))
      ->capture_default_str()
      ->group(group);
  command.add_option("--nodes", o.nodes, "How many nodes the ranks count as")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str()
      ->group(group);
  command.add_option("--dispatch", o.dispatch, "How tokens reach experts: direct or two-hop")
      ->check(CLI::IsMember({"direct", "two-hop"}))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--fabric", o.fabric,
                  "ucx: a process per rank; loopback: all ranks in this process")
      ->check(CLI::IsMember({"ucx", "loopback"}))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--placement-seed", o.cluster.shape.placement_seed,
                  "Random placement of experts; 0: by gate group")
      ->check(unsigned_number())
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--threads", o.cluster.num_threads,
                  "Compute threads of a rank (default: cores / local ranks, at least 2)")
      ->check(CLI::Range(1, 1024))
      ->group(group);
  command
      .add_option("--attach", o.attach, "Use the running cluster at HOST:PORT or of a cluster file")
      ->check(not_empty())
      ->group(group);
  auto* token = command
                    .add_option("--token", o.token,
                                "Secret of the cluster attached to, or of a launcher's tasks; the "
                                "list of processes shows it (or environment TROUPE_TOKEN)")
                    ->group(group);
  command
      .add_option("--token-file", o.token_file,
                  "File with that secret in its first line (or environment TROUPE_TOKEN_FILE)")
      ->check(not_empty())
      ->excludes(token)
      ->group(group);
  command
      .add_option(
          "--tls-certificate", o.cluster.tls.certificate,
          "PEM file to show a cluster attached to, or a launcher's other tasks, over mutual "
          "TLS (or environment TROUPE_TLS_CERTIFICATE)")
      ->group(group);
  command.add_option("--tls-key", o.cluster.tls.key, "Its private key (or TROUPE_TLS_KEY)")
      ->group(group);
  command
      .add_option("--tls-ca", o.cluster.tls.ca,
                  "PEM file with the authority of both sides (or TROUPE_TLS_CA)")
      ->group(group);
  command.add_option("--join-timeout", o.join_timeout_s, "Seconds to wait for all ranks")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--trace", o.trace, "Write a Chrome/Perfetto trace per rank: PREFIX.RANK.json")
      ->check(not_empty())
      ->group(group);

  const char* arithmetic = "Arithmetic and memory";
  command
      .add_option("--compute", o.compute,
                  "Activations in f32 or bf16 (default: bf16, or f32 "
                  "for a checkpoint stored in F32)")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->group(arithmetic);
  command
      .add_option("--fp8", o.fp8,
                  "weights: FP8 weights, full activations; activations: both "
                  "(W8A8)")
      ->check(CLI::IsMember({"weights", "activations"}))
      ->group(arithmetic);
  command
      .add_option("--backend", o.cluster.backend,
                  "Kernels: simd (the fastest here), reference, avx2, avx512, avx512_bf16")
      ->capture_default_str()
      ->group(arithmetic);
  command
      .add_option("--prefill-chunk", o.cluster.limits.prefill_chunk, "Prompt tokens of one step")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str()
      ->group(arithmetic);
  command
      .add_option(
          "--overlap-rows", o.cluster.limits.overlap_rows,
          "Cut steps of at least so many rows into two micro-batches in flight, where there "
          "is a wire to wait for; 0: never")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str()
      ->group(arithmetic);
  command.add_option("--batch", o.cluster.limits.batch, "Requests of one step (default 16)")
      ->check(CLI::Range(1, 4096))
      ->group(arithmetic);
  command
      .add_option("--kv-tokens", o.cluster.limits.kv_tokens,
                  "Positions the KV cache has room for (default: what is needed, at least "
                  "4096)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->group(arithmetic);
  // What a running cluster has decided already.
  auto* attach = command.get_option("--attach");
  for (const char* decided :
       {"--ranks", "--layout", "--tp", "--nodes", "--dispatch", "--fabric", "--placement-seed",
        "--threads", "--join-timeout", "--trace", "--compute", "--fp8", "--backend",
        "--prefill-chunk", "--overlap-rows", "--batch", "--kv-tokens"})
    attach->excludes(command.get_option(decided));
}

void need_context(SessionOptions& o, int64_t tokens, int32_t speculate) {
  o.context = tokens;
  o.cluster.limits.max_speculate = std::max<int64_t>(o.cluster.limits.max_speculate, speculate);
}

// A client that finds its cluster gone says so; what ended the cluster is the better answer.
static int in_process(InProcessCluster& cluster, const std::function<int(ClusterClient&)>& body) {
  caf::error complaint;
  divert_complaints([&](const caf::error& error) { complaint = error; });
  const int code = body(cluster.client());
  divert_complaints({});
  if (!complaint)
    return code;
  const auto cause = code_of(complaint) == Errc::peer_lost ? cluster.failure() : caf::error{};
  complain(cause ? cause : complaint);
  return code;
}

// What ranks of this process did when, a file each, as rank processes write them.
static int write_traces(InProcessCluster& cluster, const std::string& prefix) {
  if (prefix.empty())
    return 0;
  for (size_t r = 0; r < cluster.num_ranks(); ++r) {
    auto& rank = cluster.host(r).rank();
    const auto path = fmt::format("{}.{}.json", prefix, r);
    std::ofstream file{path};
    file << to_chrome_trace(rank.context().self, rank.trace().spans());
    file.close();
    if (!file)
      return complain(path + ": can't be written");
  }
  return 0;
}

bool interrupted() { return interrupt_wanted; }

caf::expected<std::optional<LauncherTask>> this_task(const std::string& fabric) {
  if (fabric == "loopback")
    return std::optional<LauncherTask>{};
  return detect_launcher(environment);
}

int with_cluster(SessionOptions o, const std::function<int(ClusterClient&)>& body) {
  if (!o.attach.empty())
    return run_attached(o, body);
  const auto detected = this_task(o.fabric);
  if (!detected)
    return complain(detected.error());
  const auto& task = *detected;
  o.cluster.local_ranks = task ? task->local_ranks : 0;
  if (task) {
    if (o.ranks != 0 && o.ranks != task->num_ranks)
      return complain(fmt::format("ranks: {} given, but {} started {} tasks", o.ranks,
                                  task->launcher, task->num_ranks));
    if (o.layout == "joint")
      o.ranks = task->num_ranks;
  }
  if (auto error = resolve(o))
    return complain(error);
  if (task && o.cluster.shape.num_ranks != task->num_ranks)
    return complain(fmt::format("{}: {} ranks, but {} started {} tasks",
                                o.cluster.train ? std::string{"pp · ep · dp"}
                                                : fmt::format("layout: \"{}\"", o.layout),
                                o.cluster.shape.num_ranks, task->launcher, task->num_ranks));
  auto token = random_token();
  if (!token)
    return complain(token.error());
  o.cluster.cluster_token = *token;
  if (o.fabric == "loopback") {
    if (o.cluster.train)
      end_gently();
    o.cluster.trace = !o.trace.empty();
    auto cluster = o.cluster.train ? InProcessCluster::start_training(o.cluster)
                                   : InProcessCluster::start(o.cluster);
    if (!cluster)
      return complain(cluster.error());
    const int code = in_process(**cluster, body);
    return code == 0 ? write_traces(**cluster, o.trace) : code;
  }
  if (task)
    return run_launched(*task, o, body);
  const auto process = process_options(o);
  AgentOptions agent;
  agent.client_ends_run = o.cluster.train != nullptr;
  for (int32_t r = 0; r < o.cluster.shape.num_ranks; ++r)
    agent.ranks.push_back(RankId{r});
  agent.rank_main = [&](RankId r, AgentChannel& c) { return rank_process_main(r, process, c); };
  agent.client_main = [&](AgentChannel& c) {
    return client_main(c, o.cluster.cluster_token, o.cluster.tls, body);
  };
  return run_agent(agent);
}

static std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "127.0.0.1";
}

TlsFiles tls_of(const ControlSpec& control) {
  return {control.certificate.string(), control.key.string(), control.ca.string()};
}

caf::error check_tls(const TlsFiles& tls, const std::string& file) {
  if (tls.empty())
    return {};
  return with_context(file,
                      check_tls_files(tls, {"control.certificate", "control.key", "control.ca"}));
}

int run_cluster(SessionOptions o, const std::string& control_host, uint16_t control_port,
                const LocalPart& part, bool json) {
  const bool all = part.host.empty();
  o.cluster.local_ranks = all ? 0 : part.num_ranks;
  if (auto error = resolve(o))
    return complain(error);
  auto token = given_token(o.cluster.cluster_token, "");
  if (!token)
    return complain(token.error());
  const bool made_token = token->empty();
  if (made_token)
    token = random_token();
  if (!token)
    return complain(token.error());
  o.cluster.cluster_token = *token;
  auto process = process_options(o);
  process.control_host = control_host;
  process.control_port = control_port;
  process.several_hosts = !all;
  AgentOptions agent;
  const int32_t first = all ? 0 : part.first_rank;
  for (int32_t r = 0; r < (all ? o.cluster.shape.num_ranks : part.num_ranks); ++r)
    agent.ranks.push_back(RankId{first + r});
  if (first != 0)
    agent.seed = fmt::format("{}:{}", control_host, control_port);
  agent.rank_main = [&](RankId r, AgentChannel& c) { return rank_process_main(r, process, c); };
  LoadingLine loading;
  agent.on_loading = [&](int64_t bytes) { loading.show(bytes); };
  agent.on_ready = [&](const std::string& port) {
    loading.end();
    // The seed is where the ranks of this host meet: its port, but maybe not the address bound.
    const bool everywhere = control_host == "0.0.0.0" || control_host == "::";
    const auto seed = (everywhere ? host_name() : control_host) + port.substr(port.rfind(':'));
    if (json) {
      boost::json::object ready{
          {"attach", seed}, {"ranks", agent.ranks.size()}, {"model", o.cluster.model}};
      if (!all)
        ready["host"] = part.host;
      if (made_token)
        ready["token"] = o.cluster.cluster_token;
      fmt::print("{}\n", boost::json::serialize(ready));
      std::fflush(stdout);
      return;
    }
    if (!all)
      fmt::print("Host {}: ranks {} to {} of {}.\n", part.host, first, first + part.num_ranks - 1,
                 o.cluster.shape.num_ranks);
    fmt::print("{} ranks serve {}. Attach with:\n  troupe generate MODEL --attach {}{} --prompt …\n"
               "Ctrl-C stops the cluster.\n",
               agent.ranks.size(), o.cluster.model, seed,
               made_token ? " --token " + o.cluster.cluster_token : "");
    std::fflush(stdout);
  };
  return run_agent(agent);
}

} // namespace troupe
