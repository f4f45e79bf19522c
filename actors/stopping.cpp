#include "actors/stopping.hpp"

#include <algorithm>

namespace troupe {

bool meets_stop(std::string& tail, std::string_view text, std::span<const std::string> stops) {
  tail += text;
  size_t longest = 0;
  for (const auto& stop : stops) {
    if (!stop.empty() && tail.find(stop) != std::string::npos)
      return true;
    longest = std::max(longest, stop.size());
  }
  const size_t keep = longest == 0 ? 0 : longest - 1;
  if (tail.size() > keep)
    tail.erase(0, tail.size() - keep);
  return false;
}

std::string_view before_stop(std::string_view text, std::span<const std::string> stops) {
  size_t end = text.size();
  for (const auto& stop : stops)
    if (!stop.empty())
      end = std::min(end, text.find(stop));
  return text.substr(0, end);
}

size_t safe_length(std::string_view text, std::span<const std::string> stops) {
  size_t safe = text.size();
  for (const auto& stop : stops)
    for (size_t n = std::min(stop.size(), text.size()); n > 0; --n)
      if (text.substr(text.size() - n) == std::string_view{stop}.substr(0, n)) {
        safe = std::min(safe, text.size() - n);
        break;
      }
  return safe;
}

} // namespace troupe
