// What a rank did when: spans of compute and of waiting for the wire, for a Chrome/Perfetto trace
// and for the test that looks for compute inside the waits. Thread-safe; bounded.
#pragma once

#include "config/clock.hpp"
#include "config/ids.hpp"

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace troupe {

struct Span {
  std::string name;
  const char* track; // "compute", "wire" or "op" (of a pipeline program), a literal
  Nanoseconds begin{0}, end{0};
  int64_t layer = -1;
  int64_t step = -1; // of training
};

class Trace {
public:
  explicit Trace(size_t max_spans = 1 << 20) : max_spans_(max_spans) {}
  void add(const Span& span) {
    const std::lock_guard lock{mutex_};
    if (spans_.size() < max_spans_)
      spans_.push_back(span);
  }
  [[nodiscard]] std::vector<Span> spans() const {
    const std::lock_guard lock{mutex_};
    return spans_;
  }

private:
  mutable std::mutex mutex_;
  std::vector<Span> spans_;
  size_t max_spans_;
};

// Chrome trace events (JSON), one process per rank.
[[nodiscard]] std::string to_chrome_trace(RankId rank, const std::vector<Span>& spans);

} // namespace troupe
