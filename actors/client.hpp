// A client of a cluster: submits requests and reads the news about them. Blocking, for programs
// such as `generate` and `score`; one thread at a time.
#pragma once

#include "actors/messages.hpp"
#include "actors/train_messages.hpp"

#include <caf/actor_system.hpp>
#include <caf/scoped_actor.hpp>

#include <chrono>
#include <functional>
#include <memory>
#include <set>
#include <string>

namespace troupe {

// What a request's news do. Unset ones are ignored. Called on the thread that waits.
struct RequestHandlers {
  std::function<void(const TokensReady&)> on_tokens;
  std::function<void(const RowsReady&)> on_rows;
};

// Polled a few times a second while a client waits.
using Interrupted = std::function<bool()>;

class ClusterClient {
public:
  // Connects to a control port, trying until `timeout` has passed. Errc::unreachable with the
  // address; Errc::mismatch for a wrong token.
  [[nodiscard]] static caf::expected<std::unique_ptr<ClusterClient>>
  connect(caf::actor_system& system, const std::string& host, uint16_t port, std::string token,
          std::chrono::milliseconds timeout);
  // A control port of this process.
  [[nodiscard]] static std::unique_ptr<ClusterClient>
  local(caf::actor_system& system, caf::actor control_port, std::string token);

  // Waits until the cluster runs.
  [[nodiscard]] caf::expected<ClusterInfo> info(std::chrono::milliseconds timeout);
  [[nodiscard]] caf::expected<RequestId> submit(RequestSpec spec);
  // Runs until one of the open requests is done; rows are acknowledged after their handler
  // returns. Errc::peer_lost when the cluster goes away. `interrupted` is polled a few times a
  // second; when it says true all open requests are cancelled.
  [[nodiscard]] caf::expected<RequestDone> wait(const RequestHandlers& handlers,
                                                const Interrupted& interrupted = {});
  // Asks for an early end of one of this client's requests; its `wait` tells of it.
  void cancel(RequestId id);
  // Training runs: starts one and waits for its end, telling `on_record` of its steps. When
  // `interrupted` says true, the run is told to finish its step, save and end.
  [[nodiscard]] caf::expected<TrainingDone>
  train(const std::function<void(const TrainRecord&)>& on_record, const Interrupted& interrupted);
  [[nodiscard]] caf::expected<ClusterStats> stats();
  [[nodiscard]] caf::error stop_cluster();
  [[nodiscard]] const caf::actor& port() const { return port_; }

private:
  ClusterClient(caf::actor_system& system, caf::actor port, std::string token);
  caf::scoped_actor self_;
  caf::actor port_;
  std::string token_;
  bool down_ = false;
  std::set<RequestId> open_;
};

// "host:port"; the port 1 … 65535.
struct Endpoint {
  std::string host;
  uint16_t port = 0;
};
[[nodiscard]] caf::expected<Endpoint> parse_endpoint(const std::string& text);

} // namespace troupe
