// Who is in: collects the joining ranks on rank 0, checks that they run the same thing, and hands
// out the first view.
//
//   forming ──all joined──▶ loading ──all ready──▶ running
//      └── one that disagrees, or too late; one that can't load, or gets nowhere ──▶ failed
//          (every rank is told why)
//
// The decision is the pure function `advance`; the actor only answers. Later changes of the view go
// through agreement (actors/agreement.hpp).
#pragma once

#include "actors/messages.hpp"
#include "actors/view.hpp"
#include "config/clock.hpp"

#include <caf/typed_actor.hpp>
#include <caf/typed_event_based_actor.hpp>
#include <caf/typed_response_promise.hpp>

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

enum class FormingPhase : uint8_t {
  forming, // ranks are still joining
  loading, // all joined; they load their parts
  running, // all are ready
  failed,  // a rank disagrees or could not load
};

struct Forming {
  FormingPhase phase = FormingPhase::forming;
  View view;                                      // members' addresses are filled in as they join
  std::vector<std::optional<JoinRequest>> joined; // by rank
  std::vector<bool> ready;
  std::vector<int64_t> loaded;    // bytes, while loading; by rank
  std::vector<Nanoseconds> heard; // when that last grew
  std::string why;                // of `failed`
};

[[nodiscard]] Forming start_forming(View view);
// The group after a rank asks to join. A rank that disagrees with rank 0 (or, before rank 0
// joined, with the first one) about version, model, settings or arithmetic fails the group; the
// reason names both sides. A rank that joins twice with the same incarnation changes nothing.
// `now` is on the clock of whoever keeps the group.
[[nodiscard]] Forming advance(Forming group, const JoinRequest& request, Nanoseconds now = {});
[[nodiscard]] Forming advance(Forming group, const RankLoading& event, Nanoseconds now);
[[nodiscard]] Forming advance(Forming group, const RankReady& event);
// Fails a loading group of which a rank has not got on for `patience`; it is named.
[[nodiscard]] Forming check_loading(Forming group, Nanoseconds now, Nanoseconds patience);
// Time is up: whoever is missing is named.
[[nodiscard]] Forming give_up(Forming group);

using Membership = caf::typed_actor<caf::replies_to<JoinRequest>::with<Welcome>,
                                    caf::reacts_to<RankLoading>, caf::reacts_to<RankReady>,
                                    caf::reacts_to<caf::atom_constant<caf::atom("giveup")>>,
                                    caf::reacts_to<caf::atom_constant<caf::atom("look")>>>;

struct MembershipState {
  static inline const char* name = "membership";
  std::string cluster_token;
  Forming group;
  std::vector<caf::typed_response_promise<Welcome>> waiting;
  // Called once: without error when all ranks are ready, else with the reason.
  std::function<void(const caf::error&)> on_decided;
};

Membership::behavior_type membership(Membership::stateful_pointer<MembershipState> self,
                                     std::string cluster_token, View view,
                                     std::chrono::milliseconds timeout,
                                     std::function<void(const caf::error&)> on_decided);

} // namespace troupe
