#include "actors/exceptions.hpp"
#include "actors/rank.hpp"

#include <caf/event_based_actor.hpp>
#include <caf/scoped_actor.hpp>
#include <caf/stateful_actor.hpp>

#include <doctest/doctest.h>

#include <stdexcept>

using namespace troupe;

namespace {

struct State {
  static inline const char* name = "clumsy";
};

caf::behavior clumsy(caf::stateful_actor<State>* self) {
  end_by_exceptions(self);
  return {[](int32_t kind) {
    if (kind == 1)
      throw std::bad_alloc{};
    if (kind == 2)
      throw 5;
    throw std::runtime_error{"stumbled"};
  }};
}

} // namespace

TEST_CASE("an exception ends its actor with a reason that names it") {
  RankSystemConfig config;
  caf::actor_system system{config};
  const auto reason = [&](int32_t kind) {
    caf::scoped_actor self{system};
    const auto actor = self->spawn<caf::monitored>(clumsy);
    self->send(actor, kind);
    caf::error why;
    self->receive([&](caf::down_msg& down) { why = std::move(down.reason); });
    return why;
  };
  CHECK(text_of(reason(0)) == "clumsy: stumbled");
  CHECK(code_of(reason(1)) == Errc::out_of_memory);
  CHECK(text_of(reason(1)) == "clumsy: no memory left");
  CHECK(text_of(reason(2)) == "clumsy: an unknown exception");
}
