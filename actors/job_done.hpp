// How the end of a job comes back to the actor that started it.
#pragma once

#include "actors/messages.hpp"

#include <caf/actor_cast.hpp>
#include <caf/send.hpp>

#include <cstdint>
#include <functional>

namespace troupe {

// Sends JobDone to an actor for as long as it lives; callable from any thread.
template <class Self>
[[nodiscard]] std::function<void(uint64_t ticket)> job_done_to(Self* self) {
  return [handle = caf::actor_cast<caf::weak_actor_ptr>(self)](uint64_t ticket) {
    if (const auto alive = caf::actor_cast<caf::actor>(handle))
      caf::anon_send(alive, JobDone{ticket});
  };
}

} // namespace troupe
