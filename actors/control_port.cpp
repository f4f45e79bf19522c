#include "actors/control_port.hpp"

#include "actors/exceptions.hpp"

#include <caf/actor_cast.hpp>
#include <caf/response_promise.hpp>
#include <caf/result.hpp>
#include <caf/send.hpp>

namespace troupe {

namespace {

using Self = caf::stateful_actor<ControlPortState>*;

caf::error wrong_token() { return make_error(Errc::mismatch, "the cluster token is wrong"); }

// Hands a client's question to the gateway, now or when there is one.
template <class T>
caf::result<caf::message> ask_gateway(Self self, T& question) {
  auto& state = self->state;
  if (question.cluster_token != state.cluster_token)
    return wrong_token();
  if (state.closed)
    return state.closed;
  auto promise = self->make_response_promise();
  if (state.gateway)
    promise.delegate(state.gateway, std::move(question));
  else
    state.waiting.push_back({caf::make_message(std::move(question)), promise});
  return caf::delegated<caf::message>{};
}

template <class T>
void pass_on(Self self, const T& message) {
  if (self->state.gateway)
    caf::send_as(caf::actor_cast<caf::actor>(self->current_sender()), self->state.gateway, message);
}

} // namespace

caf::behavior control_port(Self self, std::string cluster_token, caf::actor membership,
                           caf::actor supervisor) {
  end_by_exceptions(self);
  auto& state = self->state;
  state.cluster_token = std::move(cluster_token);
  state.membership = std::move(membership);
  state.supervisor = std::move(supervisor);
  self->set_default_handler(
      [](caf::scheduled_actor*, caf::message_view&) -> caf::result<caf::message> {
        return make_error(Errc::malformed, "the control port does not know this message");
      });
  return {
      [=](JoinRequest& request) -> caf::result<caf::message> {
        if (request.cluster_token != self->state.cluster_token)
          return wrong_token();
        auto promise = self->make_response_promise();
        promise.delegate(self->state.membership, std::move(request));
        return caf::delegated<caf::message>{};
      },
      [=](SubmitRequest& request) { return ask_gateway(self, request); },
      [=](GetClusterInfo& query) { return ask_gateway(self, query); },
      [=](GetClusterStats& query) { return ask_gateway(self, query); },
      [=](StartTraining& command) { return ask_gateway(self, command); },
      // No token here: the gateway takes these from the request's own client only.
      [=](const RowsTaken& taken) { pass_on(self, taken); },
      [=](const CancelRequest& request) { pass_on(self, request); },
      [=](const StopTraining& command) -> caf::result<caf::unit_t> {
        if (command.cluster_token != self->state.cluster_token)
          return wrong_token();
        pass_on(self, command);
        return caf::unit;
      },
      [=](const StopCluster& command) -> caf::result<caf::unit_t> {
        if (command.cluster_token != self->state.cluster_token)
          return wrong_token();
        caf::anon_send(self->state.supervisor, command);
        return caf::unit;
      },
      [=](const OpenControlPort& open) {
        auto& s = self->state;
        s.gateway = open.gateway;
        s.closed = open.why;
        for (auto& w : s.waiting) {
          if (s.gateway)
            w.promise.delegate(s.gateway, w.question);
          else
            w.promise.deliver(s.closed);
        }
        s.waiting.clear();
      },
  };
}

} // namespace troupe
