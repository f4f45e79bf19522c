#include "actors/trace.hpp"

#include <fmt/format.h>

#include <iterator>

namespace troupe {

std::string to_chrome_trace(RankId rank, const std::vector<Span>& spans) {
  std::string json = "[\n";
  const char* separator = "";
  for (const auto& s : spans) {
    const auto us = [](Nanoseconds t) { return static_cast<double>(t.count()) / 1000.0; };
    fmt::format_to(std::back_inserter(json),
                   "{}{{\"name\":\"{}\",\"cat\":\"{}\",\"ph\":\"X\",\"ts\":{:.3f},\"dur\":{:.3f},"
                   "\"pid\":{},\"tid\":\"{}\",\"args\":{{\"layer\":{},\"step\":{}}}}}",
                   separator, s.name, s.track, us(s.begin), us(s.end - s.begin), rank.value,
                   s.track, s.layer, s.step);
    separator = ",\n";
  }
  return json + "\n]\n";
}

} // namespace troupe
