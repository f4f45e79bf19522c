#include "apps/option_checks.hpp"

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace troupe {

// Without names: help shows the options' own types.

CLI::Validator not_empty() {
  return {[](std::string& value) {
            return value.empty() ? std::string{"empty, a value expected"} : std::string{};
          },
          ""};
}

CLI::Validator unsigned_number() {
  return {[](std::string& value) {
            uint64_t number = 0;
            const char* last = value.data() + value.size();
            const auto [end, error] = std::from_chars(value.data(), last, number);
            return error == std::errc{} && end == last
                       ? std::string{}
                       : "\"" + value +
                             "\" given, a number from 0 to 18446744073709551615 expected";
          },
          ""};
}

CLI::Validator real_number() {
  return {[](std::string& value) {
            char* end = nullptr;
            static_cast<void>(std::strtod(value.c_str(), &end));
            return !value.empty() && *end == '\0' ? std::string{}
                                                  : "\"" + value + "\" given, a number expected";
          },
          ""};
}

} // namespace troupe
