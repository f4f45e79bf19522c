#include "config/errors.hpp"

#include <caf/atom.hpp>
#include <caf/deep_to_string.hpp>
#include <caf/make_message.hpp>
#include <caf/message.hpp>

namespace troupe {

namespace {
constexpr auto kCategory = caf::atom("troupe");
}

std::string_view name_of(Errc code) {
  switch (code) {
  case Errc::none:
    return "none";
  case Errc::invalid_argument:
    return "invalid argument";
  case Errc::not_found:
    return "not found";
  case Errc::malformed:
    return "malformed";
  case Errc::unsupported:
    return "unsupported";
  case Errc::io_error:
    return "I/O error";
  case Errc::out_of_memory:
    return "out of memory";
  case Errc::mismatch:
    return "mismatch";
  case Errc::unreachable:
    return "unreachable";
  case Errc::peer_lost:
    return "peer lost";
  case Errc::stale:
    return "stale";
  case Errc::timeout:
    return "timeout";
  case Errc::cancelled:
    return "cancelled";
  case Errc::overloaded:
    return "overloaded";
  case Errc::internal:
    return "internal error";
  }
  return "unknown error";
}

caf::error make_error(Errc code, std::string text) {
  return caf::error{static_cast<uint8_t>(code), kCategory, caf::make_message(std::move(text))};
}

Errc code_of(const caf::error& error) {
  if (!error)
    return Errc::none;
  if (error.category() != kCategory)
    return Errc::internal;
  return static_cast<Errc>(error.code());
}

std::string text_of(const caf::error& error) {
  if (!error)
    return {};
  const auto& context = error.context();
  if (context.match_elements<std::string>())
    return context.get_as<std::string>(0);
  return caf::to_string(error);
}

caf::error with_context(std::string_view context, const caf::error& error) {
  auto text = std::string{context} + ": " + text_of(error);
  return make_error(code_of(error), std::move(text));
}

} // namespace troupe
