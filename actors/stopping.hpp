// When an answer ends. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

// Appends `text` to `tail` and looks for any of `stops`, also across pieces. True when one is
// there; the tail is otherwise cut to what a stop string could still begin in.
[[nodiscard]] bool meets_stop(std::string& tail, std::string_view text,
                              std::span<const std::string> stops);

// The text before the first stop string in it; all of it where none is.
[[nodiscard]] std::string_view before_stop(std::string_view text,
                                           std::span<const std::string> stops);

// How much of `text` can be shown now: no suffix of it may be the beginning of a stop string.
[[nodiscard]] size_t safe_length(std::string_view text, std::span<const std::string> stops);

} // namespace troupe
