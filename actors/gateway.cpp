#include "actors/gateway.hpp"

#include "actors/exceptions.hpp"

#include <caf/send.hpp>

#include <algorithm>

namespace troupe {

int32_t choose_group(const std::vector<int64_t>& load) {
  return static_cast<int32_t>(std::min_element(load.begin(), load.end()) - load.begin());
}

namespace {

using Self = Gateway::stateful_pointer<GatewayState>;

RankId leader(const GatewayState& state, int32_t group) {
  return state.context->view->attention_rank(group, 0);
}

template <class T>
void pass_on(Self self, T& news) {
  const auto open = self->state.open.find(news.id);
  if (open != self->state.open.end())
    caf::anon_send(open->second.client, std::move(news));
}

// From the client of the request only: ids are easily guessed.
template <class T>
void pass_back(Self self, const T& message) {
  const auto open = self->state.open.find(message.id);
  if (open != self->state.open.end() && open->second.client == self->current_sender())
    self->state.context->postman->tell(leader(self->state, open->second.group), Route::attention,
                                       T{message});
}

bool has_open(const GatewayState& state, const caf::actor& client) {
  return std::any_of(state.open.begin(), state.open.end(),
                     [&](const auto& open) { return open.second.client == client; });
}

void close(Self self, RequestId id) {
  auto& state = self->state;
  const auto open = state.open.find(id);
  if (open == state.open.end())
    return;
  --state.load[static_cast<size_t>(open->second.group)];
  const auto client = std::move(open->second.client);
  state.open.erase(open);
  if (!has_open(state, client))
    self->demonitor(client.address());
}

RequestId submit(Self self, SubmitRequest& request) {
  auto& state = self->state;
  const RequestId id{state.next_id++};
  const int32_t group = choose_group(state.load);
  ++state.load[static_cast<size_t>(group)];
  if (!has_open(state, request.client))
    self->monitor(request.client);
  state.open.emplace(id, GatewayState::Open{request.client, group});
  state.context->postman->tell(leader(state, group), Route::attention,
                               RunRequest{id, state.context->self, std::move(request.spec)});
  return id;
}

void client_gone(Self self, const caf::actor_addr& client) {
  for (const auto& [id, open] : self->state.open)
    if (open.client.address() == client)
      self->state.context->postman->tell(leader(self->state, open.group), Route::attention,
                                         CancelRequest{id});
}

} // namespace

Gateway::behavior_type gateway(Self self, const RankContext* context, ClusterInfo info) {
  end_by_exceptions(self);
  auto& state = self->state;
  state.context = context;
  state.info = std::move(info);
  state.load.resize(static_cast<size_t>(context->view->num_attention_groups), 0);
  self->set_down_handler([=](const caf::down_msg& down) { client_gone(self, down.source); });
  return {
      [=](SubmitRequest& request) { return submit(self, request); },
      [=](TokensReady& news) { pass_on(self, news); },
      [=](RowsReady& news) { pass_on(self, news); },
      [=](RequestDone& news) {
        const RequestId id = news.id;
        pass_on(self, news);
        close(self, id);
      },
      [=](const RowsTaken& taken) { pass_back(self, taken); },
      [=](const CancelRequest& request) { pass_back(self, request); },
      [=](const GetClusterStats&) -> caf::result<ClusterStats> {
        auto& s = self->state;
        const uint64_t query = s.next_query++;
        auto promise = self->make_response_promise<ClusterStats>();
        s.queries.emplace(query, GatewayState::Query{promise, {}});
        for (const auto& m : s.context->view->members)
          s.context->postman->tell(m.rank, Route::supervisor, StatsQuery{query, s.context->self});
        return promise;
      },
      [=](const RankStats& stats) {
        auto& s = self->state;
        const auto query = s.queries.find(stats.query);
        if (query == s.queries.end())
          return;
        auto& ranks = query->second.stats.ranks;
        ranks.push_back(stats);
        if (ranks.size() < s.context->view->members.size())
          return;
        std::sort(ranks.begin(), ranks.end(),
                  [](const auto& a, const auto& b) { return a.rank < b.rank; });
        query->second.promise.deliver(std::move(query->second.stats));
        s.queries.erase(query);
      },
      [=](const GetClusterInfo&) { return self->state.info; },
  };
}

} // namespace troupe
