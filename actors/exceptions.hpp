// What becomes of an exception that leaves a handler: the actor's end, with a reason that names it.
// The rank's supervisor monitors it and ends the rank with that reason. (CAF's own handler prints
// to stdout, where results go.)
#pragma once

#include "config/errors.hpp"

#include <caf/scheduled_actor.hpp>

#include <exception>
#include <new>
#include <string>

namespace troupe {

inline void end_by_exceptions(caf::scheduled_actor* self) {
  self->set_exception_handler([self](std::exception_ptr& thrown) -> caf::error {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
      return make_error(Errc::out_of_memory, std::string{self->name()} + ": no memory left");
    } catch (const std::exception& error) {
      return make_error(Errc::internal, std::string{self->name()} + ": " + error.what());
    } catch (...) {
      return make_error(Errc::internal, std::string{self->name()} + ": an unknown exception");
    }
  });
}

} // namespace troupe
