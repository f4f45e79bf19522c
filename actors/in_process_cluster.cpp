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
    FabricOptions fabric;
    fabric.self = RankId{r};
    fabric.incarnation = 1;
    fabric.cluster_token = options.cluster_token;
    fabric.heartbeat_period_ms = 0; // ranks of one process live and die together
    fabric.pool = BufferPool::make(buffer_pool_bytes((*checkpoint)->config(), options.limits));
    fabric.credit_bytes = credit_bytes((*checkpoint)->config(), options.limits);
    auto endpoint = cluster->hub_->loopback->endpoint(fabric);
    if (!endpoint)
      return endpoint.error();
    auto host = RankHost::make(RankId{r}, options, *checkpoint, std::move(*endpoint));
    if (!host)
      return host.error();
    if (auto error = (*host)->start_fabric())
      return error;
    cluster->hosts_.push_back(std::move(*host));
  }
  auto group = start_forming(cluster->hosts_[0]->rank().planned_view());
  for (auto& host : cluster->hosts_)
    group = advance(std::move(group), host->rank().join_request());
  if (group.phase != FormingPhase::loading)
    return make_error(Errc::mismatch, group.why);
  for (auto& host : cluster->hosts_)
    if (auto error = host->rank().start(Welcome{group.view}, {}))
      return with_context("rank " + std::to_string(host->rank().context().self.value), error);
  auto& first = *cluster->hosts_[0];
  const auto port = first.open_local_control_port(first.rank().open_gateway());
  cluster->client_ = ClusterClient::local(first.system(), port, options.cluster_token);
  for (size_t r = 0; r < cluster->hosts_.size(); ++r)
    cluster->hosts_[r]->watch([hub = cluster->hub_.get(), port, r](const caf::error& why) {
      {
        const std::lock_guard lock{hub->mutex};
        if (!hub->failure)
          hub->failure = with_context(fmt::format("rank {} failed", r), why);
      }
      caf::anon_send_exit(port, caf::exit_reason::user_shutdown); // the client learns of it
    });
  return cluster;
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
