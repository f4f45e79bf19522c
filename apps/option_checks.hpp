// What an option's value has to be, where the parser itself would take too much: "" for a number or
// a name (as of a variable of the shell that is not set), -1 for an unsigned one.
#pragma once

#include <CLI/CLI.hpp>

namespace troupe {

[[nodiscard]] CLI::Validator not_empty();
[[nodiscard]] CLI::Validator unsigned_number(); // 0 to 2⁶⁴ − 1, in digits
[[nodiscard]] CLI::Validator real_number();     // as strtod takes it; ranges are the command's

} // namespace troupe
