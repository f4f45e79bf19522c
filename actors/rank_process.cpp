#include "actors/rank_process.hpp"

#include "actors/client.hpp"
#include "actors/rank_host.hpp"
#include "transport/ucx_fabric.hpp"

#include <caf/scoped_actor.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <unistd.h>

#include <condition_variable>
#include <fstream>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

namespace troupe {

namespace {

// What the agent said so far; filled by the thread that listens to it.
struct AgentNews {
  std::mutex mutex;
  std::condition_variable changed;
  std::optional<std::string> seed;
  bool stop = false;
  RankHost* host = nullptr; // set while it serves
};

// Listens until the agent is gone; then this process has no business any more. Nor has it when it
// is told to stop before it serves: nobody waits for it, and joining or loading may take minutes.
void listen_to_agent(AgentChannel& agent, AgentNews& news, bool stops_cluster) {
  while (const auto line = agent.hear()) {
    const std::lock_guard lock{news.mutex};
    if (line->starts_with("seed "))
      news.seed = line->substr(5);
    if (*line == "stop") {
      news.stop = true;
      if (!news.host)
        _exit(0);
      auto& rank = news.host->rank();
      if (stops_cluster)
        rank.postman().tell(rank.context().self, Route::supervisor, StopCluster{});
      else
        rank.postman().tell(rank.context().self, Route::supervisor, StopRank{});
    }
    news.changed.notify_all();
  }
  _exit(1);
}

caf::expected<std::string> await_seed(AgentNews& news, std::chrono::milliseconds timeout) {
  std::unique_lock lock{news.mutex};
  news.changed.wait_for(lock, timeout, [&] { return news.seed || news.stop; });
  if (news.stop)
    return make_error(Errc::cancelled, "told to stop before the cluster formed");
  if (!news.seed)
    return make_error(Errc::timeout, "rank 0 did not open its control port in time");
  return *news.seed;
}

caf::expected<caf::actor> reach_seed(caf::actor_system& system, const std::string& seed,
                                     std::chrono::milliseconds timeout) {
  auto endpoint = parse_endpoint(seed);
  if (!endpoint)
    return endpoint.error();
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    auto handle = reach_port(system, endpoint->host, endpoint->port, left);
    if (handle)
      return std::move(*handle);
    if (std::chrono::steady_clock::now() >= deadline)
      return make_error(Errc::unreachable,
                        fmt::format("rank 0's control port {} can't be reached: {}", seed,
                                    text_of(handle.error())));
    std::this_thread::sleep_for(std::chrono::milliseconds{100});
  }
}

caf::expected<Welcome> join(RankHost& host, const caf::actor& port,
                            std::chrono::milliseconds timeout) {
  caf::expected<Welcome> answer{caf::error{}};
  caf::scoped_actor self{host.system()};
  // A little longer than the membership's own patience, whose reason is the better one.
  self->request(port, timeout + std::chrono::seconds{5}, host.rank().join_request())
      .receive([&](Welcome& welcome) { answer = std::move(welcome); },
               [&](caf::error& error) {
                 const bool told = code_of(error) != Errc::internal;
                 answer = told ? with_context("joining the cluster", error)
                               : make_error(Errc::peer_lost, "rank 0 went away before the cluster "
                                                             "had formed");
               });
  return answer;
}

constexpr auto kLinger = std::chrono::seconds{3};

// Tells membership and agent how loading gets on, a few times a second.
class LoadReport {
public:
  LoadReport(RankHost& host, AgentChannel& agent) : host_(host), agent_(agent) {}

  // `done` bytes of the part being loaded; a smaller number is the next part's. Thread-safe.
  void tell(int64_t done, std::chrono::steady_clock::time_point now) {
    const std::lock_guard lock{mutex_};
    if (done < last_)
      before_ += last_;
    last_ = done;
    if (now < next_)
      return;
    next_ = now + std::chrono::milliseconds{200};
    const auto bytes = before_ + last_;
    auto& rank = host_.rank();
    rank.postman().tell(RankId{0}, Route::membership, RankLoading{rank.context().self, bytes});
    agent_.say(fmt::format("loading {}", bytes));
  }

private:
  RankHost& host_;
  AgentChannel& agent_;
  std::mutex mutex_;
  int64_t before_ = 0, last_ = 0;
  std::chrono::steady_clock::time_point next_;
};

class RankProcess {
public:
  RankProcess(RankId self, const RankProcessOptions& options, AgentChannel& agent)
      : self_(self), options_(options), agent_(agent) {}

  caf::error run();
  // Tells the agent why this rank ends; the first cause counts.
  void confess(const caf::error& error);

private:
  caf::error make_host();
  [[nodiscard]] caf::expected<std::unique_ptr<Fabric>> make_fabric(size_t pool_bytes,
                                                                   size_t credit) const;
  caf::error adopt(caf::expected<std::unique_ptr<RankHost>> host);
  caf::expected<caf::actor> open_or_reach_port();
  caf::error serve();
  caf::error write_trace();

  RankId self_;
  const RankProcessOptions& options_;
  AgentChannel& agent_;
  AgentNews news_;
  bool confessed_ = false;
  std::unique_ptr<RankHost> host_;
};

caf::error RankProcess::make_host() {
  if (const auto& setup = options_.cluster.train) {
    auto fabric = make_fabric(train_pool_bytes(*setup), train_credit_bytes(*setup));
    if (!fabric)
      return fabric.error();
    return adopt(RankHost::make_training(self_, options_.cluster, setup, std::move(*fabric)));
  }
  auto checkpoint = Checkpoint::open(options_.cluster.model);
  if (!checkpoint)
    return checkpoint.error();
  const auto& config = (*checkpoint)->config();
  auto fabric = make_fabric(buffer_pool_bytes(config, options_.cluster.limits),
                            credit_bytes(config, options_.cluster.limits));
  if (!fabric)
    return fabric.error();
  return adopt(RankHost::make(self_, options_.cluster, std::move(*checkpoint), std::move(*fabric)));
}

caf::expected<std::unique_ptr<Fabric>> RankProcess::make_fabric(size_t pool_bytes,
                                                                size_t credit) const {
  FabricOptions fabric_options;
  fabric_options.self = self_;
  fabric_options.incarnation = 1;
  fabric_options.cluster_token = options_.cluster.cluster_token;
  fabric_options.pool = BufferPool::make(pool_bytes);
  fabric_options.credit_bytes = credit;
  return make_ucx_fabric(fabric_options);
}

caf::error RankProcess::adopt(caf::expected<std::unique_ptr<RankHost>> host) {
  if (!host)
    return host.error();
  host_ = std::move(*host);
  return host_->start_fabric();
}

caf::expected<caf::actor> RankProcess::open_or_reach_port() {
  if (self_ != RankId{0}) {
    auto seed = await_seed(news_, options_.join_timeout);
    if (!seed)
      return seed.error();
    return reach_seed(host_->system(), *seed, options_.join_timeout);
  }
  auto port = host_->open_control_port(options_.join_timeout);
  auto number = publish_port(host_->system(), port, options_.control_host, options_.control_port);
  if (!number)
    return number.error();
  const bool everywhere = options_.control_host == "0.0.0.0" || options_.control_host == "::";
  agent_.say(fmt::format("port {}:{}", everywhere ? "127.0.0.1" : options_.control_host, *number));
  return port;
}

caf::error RankProcess::serve() {
  auto port = open_or_reach_port();
  if (!port)
    return port.error();
  auto welcome = join(*host_, *port, options_.join_timeout);
  if (!welcome)
    return welcome.error();
  LoadReport report{*host_, agent_};
  const auto loaded = host_->rank().start(*welcome, [&](int64_t done, int64_t) {
    report.tell(done, std::chrono::steady_clock::now());
  });
  host_->report_ready(loaded);
  if (loaded)
    return loaded;
  if (self_ == RankId{0})
    if (auto error = host_->await_cluster())
      return error;
  {
    const std::lock_guard lock{news_.mutex};
    news_.host = host_.get();
  }
  agent_.say("ready");
  return host_->await_end();
}

caf::error RankProcess::write_trace() {
  if (options_.trace_file.empty())
    return {};
  const auto path = fmt::format("{}.{}.json", options_.trace_file, self_.value);
  std::ofstream file{path};
  file << to_chrome_trace(self_, host_->rank().trace().spans());
  file.close();
  return file ? caf::error{} : make_error(Errc::io_error, path + ": can't be written");
}

void RankProcess::confess(const caf::error& error) {
  if (!std::exchange(confessed_, true))
    agent_.say((code_of(error) == Errc::peer_lost ? "lost " : "failed ") + text_of(error));
}

caf::error RankProcess::run() {
  const bool stops_cluster = options_.several_hosts && self_ == RankId{0};
  std::thread{[this, stops_cluster] { listen_to_agent(agent_, news_, stops_cluster); }}.detach();
  if (auto error = make_host())
    return error;
  auto error = serve();
  const bool cluster_stopped = !error;
  bool told = false;
  {
    const std::lock_guard lock{news_.mutex};
    news_.host = nullptr;
    told = news_.stop;
  }
  if (told)
    error = {}; // being told to stop is no failure, whatever it interrupted
  if (auto trouble = write_trace(); trouble && !error)
    error = trouble;
  if (error) // before the ports close: those who lose us then have a cause that came first
    confess(error);
  // Tasks of a launcher come one by one: who joins late must still be told why there is no cluster.
  if (self_ == RankId{0} && options_.control_port != 0 && code_of(error) == Errc::mismatch)
    std::this_thread::sleep_for(kLinger);
  // Goodbye is said only when the whole cluster was told to stop; a rank whose own host stops it
  // is lost to the others.
  host_->shut_down(cluster_stopped && !told);
  return error;
}

} // namespace

int rank_process_main(RankId self, const RankProcessOptions& options, AgentChannel& agent) {
  RankProcess process{self, options, agent};
  const auto error = process.run();
  if (!error)
    return 0;
  process.confess(error);
  return 1;
}

} // namespace troupe
