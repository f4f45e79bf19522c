#include "actors/client.hpp"

#include "actors/tls.hpp"

#include <caf/sec.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <charconv>
#include <optional>
#include <thread>

namespace troupe {

namespace {

constexpr auto kAnswerTimeout = std::chrono::seconds{60};
constexpr auto kPollPeriod = std::chrono::milliseconds{200};

// A refusal in the cluster's own words, or CAF's word for a silent or vanished peer in ours.
caf::error refusal(const std::string& what, const caf::error& error) {
  if (code_of(error) != Errc::internal)
    return error;
  if (error == caf::sec::request_timeout)
    return make_error(Errc::timeout, what + ": the cluster did not answer in time");
  return make_error(Errc::peer_lost, what + ": the cluster went away");
}

} // namespace

caf::expected<Endpoint> parse_endpoint(const std::string& text) {
  const auto colon = text.rfind(':');
  int port = 0;
  if (colon != std::string::npos) {
    const char* first = text.data() + colon + 1;
    const auto [end, error] = std::from_chars(first, text.data() + text.size(), port);
    if (error != std::errc{} || end != text.data() + text.size())
      port = 0;
  }
  if (colon == 0 || port < 1 || port > 65535)
    return make_error(Errc::invalid_argument,
                      fmt::format("\"{}\" is not an address, expected HOST:PORT", text));
  return Endpoint{text.substr(0, colon), static_cast<uint16_t>(port)};
}

ClusterClient::ClusterClient(caf::actor_system& system, caf::actor port, std::string token)
    : self_(system), port_(std::move(port)), token_(std::move(token)) {
  self_->monitor(port_);
}

caf::expected<std::unique_ptr<ClusterClient>>
ClusterClient::connect(caf::actor_system& system, const std::string& host, uint16_t port,
                       std::string token, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    auto handle = reach_port(system, host, port, left);
    if (handle)
      return std::unique_ptr<ClusterClient>{
          new ClusterClient{system, std::move(*handle), std::move(token)}};
    if (code_of(handle.error()) == Errc::not_found || std::chrono::steady_clock::now() >= deadline)
      return make_error(
          Errc::unreachable,
          fmt::format("no cluster answers at {}:{}{}: {}", host, port,
                      !speaks_tls(system) ? "" : ", or it does not take this certificate",
                      text_of(handle.error())));
    std::this_thread::sleep_for(std::chrono::milliseconds{50});
  }
}

std::unique_ptr<ClusterClient> ClusterClient::local(caf::actor_system& system,
                                                    caf::actor control_port, std::string token) {
  return std::unique_ptr<ClusterClient>{
      new ClusterClient{system, std::move(control_port), std::move(token)}};
}

caf::expected<ClusterInfo> ClusterClient::info(std::chrono::milliseconds timeout) {
  caf::expected<ClusterInfo> answer{caf::error{}};
  self_->request(port_, timeout, GetClusterInfo{token_})
      .receive([&](ClusterInfo& info) { answer = std::move(info); },
               [&](caf::error& error) { answer = refusal("asking the cluster", error); });
  return answer;
}

caf::expected<RequestId> ClusterClient::submit(RequestSpec spec) {
  caf::expected<RequestId> answer{caf::error{}};
  SubmitRequest request{token_, std::move(spec), caf::actor_cast<caf::actor>(self_)};
  self_->request(port_, kAnswerTimeout, std::move(request))
      .receive(
          [&](RequestId id) {
            answer = id;
            open_.insert(id);
          },
          [&](caf::error& error) { answer = refusal("submitting the request", error); });
  return answer;
}

caf::expected<RequestDone> ClusterClient::wait(const RequestHandlers& handlers,
                                               const Interrupted& interrupted) {
  std::optional<RequestDone> done;
  bool cancelled = false;
  while (!done && !down_) {
    self_->receive(
        [&](TokensReady& news) {
          if (handlers.on_tokens)
            handlers.on_tokens(news);
        },
        [&](RowsReady& news) {
          if (handlers.on_rows)
            handlers.on_rows(news);
          self_->send(port_, RowsTaken{news.id, static_cast<int64_t>(news.bytes.size())});
        },
        [&](RequestDone& news) { done = std::move(news); },
        [&](const caf::down_msg&) { down_ = true; }, caf::after(kPollPeriod) >> [] {});
    if (interrupted && !cancelled && interrupted()) {
      cancelled = true;
      for (const auto id : open_)
        cancel(id);
    }
  }
  if (!done)
    return make_error(Errc::peer_lost, "the cluster went away");
  open_.erase(done->id);
  return std::move(*done);
}

void ClusterClient::cancel(RequestId id) { self_->send(port_, CancelRequest{id}); }

caf::expected<TrainingDone>
ClusterClient::train(const std::function<void(const TrainRecord&)>& on_record,
                     const Interrupted& interrupted) {
  caf::error refused;
  self_->request(port_, kAnswerTimeout, StartTraining{token_, caf::actor_cast<caf::actor>(self_)})
      .receive([] {}, [&](caf::error& error) { refused = refusal("starting the run", error); });
  if (refused)
    return refused;
  std::optional<TrainingDone> done;
  bool told = false;
  while (!done && !down_) {
    self_->receive([&](TrainRecord& record) { on_record(record); },
                   [&](TrainingDone& news) { done = std::move(news); },
                   [&](const caf::down_msg&) { down_ = true; }, caf::after(kPollPeriod) >> [] {});
    if (!told && interrupted && interrupted()) {
      told = true;
      self_->send(port_, StopTraining{token_});
    }
  }
  if (!done)
    return make_error(Errc::peer_lost, "the cluster went away");
  return std::move(*done);
}

caf::expected<ClusterStats> ClusterClient::stats() {
  caf::expected<ClusterStats> answer{caf::error{}};
  self_->request(port_, kAnswerTimeout, GetClusterStats{token_})
      .receive([&](ClusterStats& stats) { answer = std::move(stats); },
               [&](caf::error& error) { answer = refusal("asking for statistics", error); });
  return answer;
}

caf::error ClusterClient::stop_cluster() {
  caf::error answer;
  self_->request(port_, kAnswerTimeout, StopCluster{token_})
      .receive([] {}, [&](caf::error& error) { answer = refusal("stopping", error); });
  return answer;
}

} // namespace troupe
