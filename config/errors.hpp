// The error codes of Troupe. One exists where some caller acts differently on it.
//
// Expected trouble travels as caf::error / caf::expected<T>. The text is made where the error is
// first decided and names the file, line or field and what was expected; those above may add
// context with `with_context`, nobody rewrites it.
#pragma once

#include <caf/error.hpp>
#include <caf/expected.hpp>

#include <cstdint>
#include <string>
#include <string_view>

namespace troupe {

enum class Errc : uint8_t {
  none = 0,
  invalid_argument, // a flag, field or request makes no sense
  not_found,        // a file, tensor or model is absent
  malformed,        // a file or message does not follow its format
  unsupported,      // well-formed, but Troupe can't do it
  io_error,         // the operating system refused
  out_of_memory,    // a bounded pool or the machine has no room
  mismatch,         // two things that must agree do not (ranks, model, arithmetic)
  unreachable,      // a peer or port could not be reached
  peer_lost,        // a rank died or was cut off
  stale,            // belongs to an earlier epoch, step or slot version
  timeout,
  cancelled,
  overloaded, // refused at the door
  internal,   // a broken invariant that was caught before it did harm
};

// "invalid argument", "not found", …
[[nodiscard]] std::string_view name_of(Errc code);

[[nodiscard]] caf::error make_error(Errc code, std::string text);
[[nodiscard]] Errc code_of(const caf::error& error); // none for no error, internal for foreign ones
// The text alone, as a person should read it.
[[nodiscard]] std::string text_of(const caf::error& error);
// The same error with "context: " before its text.
[[nodiscard]] caf::error with_context(std::string_view context, const caf::error& error);

} // namespace troupe
