#include "actors/membership.hpp"

#include "actors/exceptions.hpp"

#include <fmt/format.h>

#include <utility>

namespace troupe {

namespace {

Forming fail(Forming group, std::string why) {
  group.phase = FormingPhase::failed;
  group.why = std::move(why);
  return group;
}

// What `request` and `first` disagree about; empty when they agree.
std::string disagreement(const JoinRequest& first, const JoinRequest& request) {
  const auto differ = [&](const char* what, const auto& a, const auto& b) {
    return fmt::format("ranks disagree about {}: rank {} has {}, rank {} has {}", what,
                       first.rank.value, a, request.rank.value, b);
  };
  if (request.version != first.version)
    return differ("the version of troupe", first.version, request.version);
  if (request.model_digest != first.model_digest)
    return differ("the model (digest of config, tensors and samples of data)",
                  fmt::format("{:016x}", first.model_digest),
                  fmt::format("{:016x}", request.model_digest));
  if (request.settings_digest != first.settings_digest)
    return differ("layout, limits and settings (digest)",
                  fmt::format("{:016x}", first.settings_digest),
                  fmt::format("{:016x}", request.settings_digest));
  if (request.arithmetic != first.arithmetic)
    return differ("the arithmetic", first.arithmetic, request.arithmetic);
  if (request.fingerprint != first.fingerprint)
    return differ("the bits their kernels give",
                  fmt::format("{} ({:016x})", first.backend, first.fingerprint),
                  fmt::format("{} ({:016x})", request.backend, request.fingerprint)) +
           "; start all ranks on a common --backend";
  return {};
}

} // namespace

Forming start_forming(View view) {
  Forming group;
  group.joined.resize(view.members.size());
  group.ready.resize(view.members.size(), false);
  group.view = std::move(view);
  return group;
}

Forming advance(Forming group, const JoinRequest& request, Nanoseconds now) {
  if (group.phase != FormingPhase::forming)
    return group;
  const auto r = static_cast<size_t>(request.rank.value);
  if (!request.rank.valid() || r >= group.joined.size())
    return fail(std::move(group), fmt::format("rank {} wants to join a cluster of {} ranks",
                                              request.rank.value, group.joined.size()));
  if (group.joined[r]) {
    if (group.joined[r]->address == request.address)
      return group;
    return fail(std::move(group),
                fmt::format("two processes want to be rank {}: one on {}, one on {}", r,
                            group.joined[r]->host, request.host));
  }
  for (const auto& other : group.joined) {
    if (!other)
      continue;
    auto why = disagreement(*other, request);
    if (!why.empty())
      return fail(std::move(group), std::move(why));
    break;
  }
  group.joined[r] = request;
  group.view.members[r].address = request.address;
  group.view.members[r].incarnation = request.incarnation;
  for (const auto& other : group.joined)
    if (!other)
      return group;
  group.phase = FormingPhase::loading;
  group.loaded.assign(group.joined.size(), 0);
  group.heard.assign(group.joined.size(), now);
  return group;
}

Forming advance(Forming group, const RankLoading& event, Nanoseconds now) {
  const auto r = static_cast<size_t>(event.rank.value);
  if (group.phase != FormingPhase::loading || !event.rank.valid() || r >= group.heard.size() ||
      event.bytes <= group.loaded[r])
    return group;
  group.loaded[r] = event.bytes;
  group.heard[r] = now;
  return group;
}

Forming check_loading(Forming group, Nanoseconds now, Nanoseconds patience) {
  if (group.phase != FormingPhase::loading)
    return group;
  for (size_t r = 0; r < group.ready.size(); ++r)
    if (!group.ready[r] && now - group.heard[r] >= patience)
      return fail(std::move(group), fmt::format("rank {} on {} does not get on with loading", r,
                                                group.joined[r] ? group.joined[r]->host : "?"));
  return group;
}

Forming advance(Forming group, const RankReady& event) {
  const auto r = static_cast<size_t>(event.rank.value);
  if (group.phase != FormingPhase::loading || !event.rank.valid() || r >= group.ready.size())
    return group;
  if (event.error_code != 0)
    return fail(std::move(group), fmt::format("rank {}: {}", r, event.error));
  group.ready[r] = true;
  for (const bool ready : group.ready)
    if (!ready)
      return group;
  group.phase = FormingPhase::running;
  return group;
}

Forming give_up(Forming group) {
  if (group.phase != FormingPhase::forming)
    return group;
  std::string missing;
  for (size_t r = 0; r < group.joined.size(); ++r)
    if (!group.joined[r])
      missing += (missing.empty() ? "" : ", ") + std::to_string(r);
  return fail(std::move(group), "not all ranks joined in time; missing: " + missing);
}

namespace {

using Self = Membership::stateful_pointer<MembershipState>;

// Longer than a network file system's worst hiccup: a rank of this host that is stopped or dead its
// agent names much sooner.
constexpr auto kLoadingPatience = std::chrono::seconds{60};
constexpr auto kLook = std::chrono::seconds{2};

// Acts on a change of phase.
void apply(Self self, Forming next) {
  auto& state = self->state;
  const auto before = std::exchange(state.group, std::move(next)).phase;
  if (state.group.phase == before)
    return;
  if (state.group.phase == FormingPhase::failed) {
    const auto error = make_error(Errc::mismatch, state.group.why);
    for (auto& promise : state.waiting)
      promise.deliver(error);
    state.waiting.clear();
    if (state.on_decided)
      std::exchange(state.on_decided, nullptr)(error);
    return;
  }
  for (auto& promise : state.waiting)
    promise.deliver(Welcome{state.group.view});
  state.waiting.clear();
  if (state.group.phase == FormingPhase::running && state.on_decided)
    std::exchange(state.on_decided, nullptr)(caf::error{});
}

} // namespace

Membership::behavior_type membership(Self self, std::string cluster_token, View view,
                                     std::chrono::milliseconds timeout,
                                     std::function<void(const caf::error&)> on_decided) {
  end_by_exceptions(self);
  using GiveUp = caf::atom_constant<caf::atom("giveup")>;
  using Look = caf::atom_constant<caf::atom("look")>;
  const auto now = [=] { return Nanoseconds{self->clock().now().time_since_epoch()}; };
  self->state.cluster_token = std::move(cluster_token);
  self->state.group = start_forming(std::move(view));
  self->state.on_decided = std::move(on_decided);
  if (timeout.count() > 0)
    self->delayed_send(self, timeout, GiveUp::value);
  return {
      [=](const JoinRequest& request) -> caf::result<Welcome> {
        auto& state = self->state;
        if (request.cluster_token != state.cluster_token)
          return make_error(Errc::mismatch, "the cluster token is wrong");
        if (state.group.phase == FormingPhase::failed)
          return make_error(Errc::mismatch, state.group.why);
        if (state.group.phase != FormingPhase::forming)
          return make_error(Errc::stale, "the cluster is complete");
        auto promise = self->make_response_promise<Welcome>();
        state.waiting.push_back(promise);
        apply(self, advance(state.group, request, now()));
        if (state.group.phase == FormingPhase::loading)
          self->delayed_send(self, kLook, Look::value);
        return promise;
      },
      [=](const RankLoading& event) { apply(self, advance(self->state.group, event, now())); },
      [=](const RankReady& event) { apply(self, advance(self->state.group, event)); },
      [=](GiveUp) { apply(self, give_up(self->state.group)); },
      [=](Look) {
        apply(self, check_loading(self->state.group, now(), kLoadingPatience));
        if (self->state.group.phase == FormingPhase::loading)
          self->delayed_send(self, kLook, Look::value);
      },
  };
}

} // namespace troupe
