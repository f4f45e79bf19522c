#include "actors/rank_host.hpp"

#include "actors/control_port.hpp"
#include "actors/membership.hpp"

#include <caf/actor_cast.hpp>
#include <caf/send.hpp>

#include <algorithm>
#include <thread>

namespace troupe {

int compute_threads(const ClusterOptions& options) {
  if (options.num_threads > 0)
    return options.num_threads;
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  // A rank that has work alone, as attention does between a lone request's dispatches, must not
  // leave all but one core idle.
  return std::max(cores / std::max(1, options.local_ranks), std::min(cores, 2));
}

size_t buffer_pool_bytes(const ModelConfig& config, const RankLimits& limits) {
  const auto rows = static_cast<size_t>(std::max<int64_t>(limits.max_rows(), 1024));
  const auto top_k = static_cast<size_t>(std::max<int64_t>(config.num_experts_per_tok, 1));
  const auto row = static_cast<size_t>(config.hidden_size) * sizeof(float);
  // Dispatches out and in, their answers, and siblings' partials; memory is taken only when used.
  return (size_t{256} << 20) + 16 * rows * top_k * row;
}

size_t credit_bytes(const ModelConfig& config, const RankLimits& limits) {
  const auto rows = static_cast<size_t>(std::max<int64_t>(limits.max_rows(), 1024));
  const auto top_k = static_cast<size_t>(std::max<int64_t>(config.num_experts_per_tok, 1));
  const auto row = static_cast<size_t>(config.hidden_size) * sizeof(float);
  // Two micro-batches and an MTP pass; of each a dispatch, two partials, combined rows, and to the
  // peer's the answers. Half as much again, because receivers return credit late.
  return (size_t{64} << 20) + 3 * rows * (4 + top_k) * row * 3 / 2;
}

caf::expected<std::unique_ptr<RankHost>>
RankHost::make(RankId self, const ClusterOptions& options,
               std::shared_ptr<const Checkpoint> checkpoint, std::unique_ptr<Fabric> fabric) {
  std::unique_ptr<RankHost> host{new RankHost{options, std::move(fabric)}};
  auto rank = Rank::make(self, options, std::move(checkpoint), host->environment());
  if (!rank)
    return rank.error();
  host->rank_ = std::move(*rank);
  return host;
}

caf::expected<std::unique_ptr<RankHost>>
RankHost::make_training(RankId self, const ClusterOptions& options,
                        std::shared_ptr<const TrainSetup> setup, std::unique_ptr<Fabric> fabric) {
  std::unique_ptr<RankHost> host{new RankHost{options, std::move(fabric)}};
  host->background_ = make_cpu_stream(1);
  auto rank = Rank::make_training(self, options, std::move(setup), host->environment());
  if (!rank)
    return rank.error();
  host->rank_ = std::move(*rank);
  return host;
}

RankHost::RankHost(const ClusterOptions& options, std::unique_ptr<Fabric> fabric)
    : config_(false, options.tls), system_(std::make_unique<caf::actor_system>(config_)),
      fabric_(std::move(fabric)), stream_(make_cpu_stream(compute_threads(options))),
      token_(options.cluster_token) {}

RankEnvironment RankHost::environment() const {
  return {system_.get(), fabric_.get(), stream_.get(), &clock_, background_.get()};
}

RankHost::~RankHost() { shut_down(false); }

void RankHost::end(const caf::error& why) {
  std::function<void(const caf::error&)> on_failure;
  {
    const std::lock_guard lock{mutex_};
    if (ended_)
      return;
    ended_ = why;
    if (why)
      on_failure.swap(on_failure_);
    changed_.notify_all();
  }
  if (on_failure)
    on_failure(why);
}

void RankHost::watch(std::function<void(const caf::error&)> on_failure) {
  std::optional<caf::error> already;
  {
    const std::lock_guard lock{mutex_};
    already = ended_;
    if (!already)
      on_failure_ = std::move(on_failure);
  }
  if (already && *already)
    on_failure(*already);
}

caf::error RankHost::await_end() {
  std::unique_lock lock{mutex_};
  changed_.wait(lock, [&] { return ended_.has_value(); });
  return *ended_;
}

caf::error RankHost::start_fabric() {
  rank_->supervise([this](const caf::error& why) { end(why); });
  return fabric_->start(&rank_->postman());
}

caf::actor RankHost::open_control_port(std::chrono::milliseconds join_timeout) {
  const auto on_decided = [this](const caf::error& why) {
    const std::lock_guard lock{mutex_};
    decided_ = why;
    changed_.notify_all();
  };
  membership_ = caf::actor_cast<caf::actor>(
      system_->spawn(membership, token_, rank_->planned_view(), join_timeout, on_decided));
  rank_->postman().set_route(Route::membership, membership_);
  control_port_ =
      system_->spawn(control_port, token_, membership_, rank_->postman().route(Route::supervisor));
  return control_port_;
}

caf::actor RankHost::open_local_control_port(const caf::actor& gateway) {
  control_port_ =
      system_->spawn(control_port, token_, caf::actor{}, rank_->postman().route(Route::supervisor));
  caf::anon_send(control_port_, OpenControlPort{gateway, {}});
  return control_port_;
}

caf::error RankHost::await_cluster() {
  {
    std::unique_lock lock{mutex_};
    changed_.wait(lock, [&] { return decided_.has_value() || ended_.has_value(); });
    if (!decided_)
      return *ended_;
  }
  if (*decided_) {
    caf::anon_send(control_port_, OpenControlPort{{}, *decided_});
    return *decided_;
  }
  auto gateway = rank_->open_gateway();
  if (!gateway)
    return gateway.error();
  caf::anon_send(control_port_, OpenControlPort{*gateway, {}});
  return {};
}

void RankHost::report_ready(const caf::error& error) {
  RankReady ready{rank_->context().self, static_cast<uint8_t>(code_of(error)), text_of(error)};
  rank_->postman().tell(RankId{0}, Route::membership, std::move(ready));
}

void RankHost::shut_down(bool clean) {
  if (!system_)
    return;
  if (rank_)
    rank_->stop();
  for (auto* actor : {&control_port_, &membership_})
    if (*actor) {
      caf::anon_send_exit(*actor, caf::exit_reason::user_shutdown);
      *actor = nullptr;
    }
  system_->await_all_actors_done(); // from here on nobody starts a job or sends
  stream_.reset();                  // jobs under way end here; their news finds nobody
  background_.reset();
  if (fabric_)
    fabric_->stop(clean, 1000);
  rank_.reset();
  fabric_.reset();
  system_.reset();
}

} // namespace troupe
