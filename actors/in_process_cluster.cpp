#include "actors/in_process_cluster.hpp"

#include "actors/membership.hpp"
#include "transport/loopback_fabric.hpp"

#include <caf/send.hpp>

#include <fmt/format.h>

#include <mutex>

namespace troupe {

struct InProcessCluster::Hub {
  std::shared_ptr<LoopbackHub> loopback;
  std::mutex mutex;
  caf::error failure; // the first rank's

  [[nodiscard]] caf::expected<std::unique_ptr<Fabric>>
  endpoint(RankId self, const ClusterOptions& options, size_t pool_bytes, size_t credit) const {
    FabricOptions fabric;
    fabric.self = self;
    fabric.incarnation = 1;
    fabric.cluster_token = options.cluster_token;
    fabric.heartbeat_period_ms = 0; // ranks of one process live and die together
    fabric.pool = BufferPool::make(pool_bytes);
    fabric.credit_bytes = credit;
    return loopback->endpoint(fabric);
  }
};

caf::expected<std::unique_ptr<InProcessCluster>>
InProcessCluster::start(const ClusterOptions& options) {
  auto checkpoint = Checkpoint::open(options.model);
  if (!checkpoint)
    return checkpoint.error();
  std::unique_ptr<InProcessCluster> cluster{new InProcessCluster};
  cluster->hub_ = std::make_unique<Hub>();
  cluster->hub_->loopback = LoopbackHub::threaded(options.shape.num_ranks);
  for (int32_t r = 0; r < options.shape.num_ranks; ++r) {
    const auto& config = (*checkpoint)->config();
    auto endpoint =
        cluster->hub_->endpoint(RankId{r}, options, buffer_pool_bytes(config, options.limits),
                                credit_bytes(config, options.limits));
    if (!endpoint)
      return endpoint.error();
    auto host = RankHost::make(RankId{r}, options, *checkpoint, std::move(*endpoint));
    if (!host)
      return host.error();
    if (auto error = (*host)->start_fabric())
      return error;
    cluster->hosts_.push_back(std::move(*host));
  }
  if (auto error = cluster->form(options))
    return error;
  return cluster;
}

caf::expected<std::unique_ptr<InProcessCluster>>
InProcessCluster::start_training(const ClusterOptions& options) {
  const auto& setup = options.train;
  std::unique_ptr<InProcessCluster> cluster{new InProcessCluster};
  cluster->hub_ = std::make_unique<Hub>();
  const int32_t ranks = setup->config.num_ranks();
  cluster->hub_->loopback = LoopbackHub::threaded(ranks);
  for (int32_t r = 0; r < ranks; ++r) {
    auto endpoint = cluster->hub_->endpoint(RankId{r}, options, train_pool_bytes(*setup),
                                            train_credit_bytes(*setup));
    if (!endpoint)
      return endpoint.error();
    auto host = RankHost::make_training(RankId{r}, options, setup, std::move(*endpoint));
    if (!host)
      return host.error();
    if (auto error = (*host)->start_fabric())
      return error;
    cluster->hosts_.push_back(std::move(*host));
  }
  if (auto error = cluster->form(options))
    return error;
  return cluster;
}

// Joins the ranks to a group, loads, and opens the control port.
caf::error InProcessCluster::form(const ClusterOptions& options) {
  auto group = start_forming(hosts_[0]->rank().planned_view());
  for (auto& host : hosts_)
    group = advance(std::move(group), host->rank().join_request());
  if (group.phase != FormingPhase::loading)
    return make_error(Errc::mismatch, group.why);
  for (auto& host : hosts_)
    if (auto error = host->rank().start(Welcome{group.view}, {}))
      return with_context("rank " + std::to_string(host->rank().context().self.value), error);
  auto& first = *hosts_[0];
  auto gateway = first.rank().open_gateway();
  if (!gateway)
    return gateway.error();
  const auto port = first.open_local_control_port(*gateway);
  client_ = ClusterClient::local(first.system(), port, options.cluster_token);
  for (size_t r = 0; r < hosts_.size(); ++r)
    hosts_[r]->watch([hub = hub_.get(), port, r](const caf::error& why) {
      {
        const std::lock_guard lock{hub->mutex};
        if (!hub->failure)
          hub->failure = with_context(fmt::format("rank {} failed", r), why);
      }
      caf::anon_send_exit(port, caf::exit_reason::user_shutdown); // the client learns of it
    });
  return {};
}

caf::error InProcessCluster::failure() const {
  const std::lock_guard lock{hub_->mutex};
  return hub_->failure;
}

InProcessCluster::~InProcessCluster() {
  client_.reset();
  for (auto& host : hosts_)
    host->shut_down(false);
}

} // namespace troupe
