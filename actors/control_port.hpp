// The one actor that strangers can reach: it checks the cluster token and hands on what joining
// ranks and clients ask. Published on rank 0's control port. Clients that come before the cluster
// runs wait for their answer until it does.
#pragma once

#include "actors/gateway.hpp"
#include "actors/membership.hpp"
#include "actors/messages.hpp"
#include "actors/train_messages.hpp"

#include <caf/event_based_actor.hpp>
#include <caf/stateful_actor.hpp>

#include <string>
#include <vector>

namespace troupe {

// Command, local: the cluster runs (with a gateway) or never will (with an error).
struct OpenControlPort {
  caf::actor gateway;
  caf::error why;
};
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, OpenControlPort& x) {
  return f(caf::meta::type_name("OpenControlPort"), x.gateway, x.why);
}

struct ControlPortState {
  static inline const char* name = "control_port";
  std::string cluster_token;
  caf::actor membership, gateway, supervisor;
  caf::error closed; // why the cluster will never run
  struct Waiting {
    caf::message question;
    caf::response_promise promise;
  };
  std::vector<Waiting> waiting;
};

// Untyped, because remote proxies of typed actors would tie clients to the whole interface.
// Understands JoinRequest, SubmitRequest, RowsTaken, CancelRequest, GetClusterInfo,
// GetClusterStats, StartTraining, StopTraining, StopCluster and, locally, OpenControlPort.
caf::behavior control_port(caf::stateful_actor<ControlPortState>* self, std::string cluster_token,
                           caf::actor membership, caf::actor supervisor);

} // namespace troupe

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::OpenControlPort)
