// Time comes to decisions only through this interface, so that a simulated cluster can run on
// virtual time. No value that a token depends on may read it (determinism contract, 1.6).
#pragma once

#include <chrono>
#include <cstdint>

namespace troupe {

using Nanoseconds = std::chrono::nanoseconds;

class Clock {
public:
  virtual ~Clock() = default;
  // Since an arbitrary start; never goes back. Callable from any thread.
  [[nodiscard]] virtual Nanoseconds now() const = 0;
};

class SteadyClock final : public Clock {
public:
  [[nodiscard]] Nanoseconds now() const override {
    return std::chrono::steady_clock::now().time_since_epoch();
  }
};

// Advanced by hand; single-threaded.
class VirtualClock final : public Clock {
public:
  [[nodiscard]] Nanoseconds now() const override { return now_; }
  void advance_to(Nanoseconds t) {
    if (t > now_)
      now_ = t;
  }

private:
  Nanoseconds now_{0};
};

} // namespace troupe
