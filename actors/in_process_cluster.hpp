// A whole cluster inside this process (`--fabric loopback`): every rank has its own actor system
// and compute stream, messages go by reference, and the checkpoint is mapped once.
#pragma once

#include "actors/client.hpp"
#include "actors/rank_host.hpp"

#include <memory>
#include <string>
#include <vector>

namespace troupe {

class InProcessCluster {
public:
  [[nodiscard]] static caf::expected<std::unique_ptr<InProcessCluster>>
  start(const ClusterOptions& options);
  // The run of options.train.
  [[nodiscard]] static caf::expected<std::unique_ptr<InProcessCluster>>
  start_training(const ClusterOptions& options);
  ~InProcessCluster();
  [[nodiscard]] ClusterClient& client() { return *client_; }
  [[nodiscard]] RankHost& host(size_t rank) { return *hosts_.at(rank); }
  [[nodiscard]] size_t num_ranks() const { return hosts_.size(); }
  // Why the first rank that failed did so; the client then finds the cluster gone.
  [[nodiscard]] caf::error failure() const;

private:
  InProcessCluster() = default;
  caf::error form(const ClusterOptions& options);
  struct Hub;
  std::unique_ptr<Hub> hub_;
  std::vector<std::unique_ptr<RankHost>> hosts_;
  std::unique_ptr<ClusterClient> client_;
};

} // namespace troupe
