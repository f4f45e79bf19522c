// Which messages of the run at hand have been taken, so that a second copy and what is left of an
// older run are dropped. Remembers one run, however many there are.
#pragma once

#include "actors/expert_route.hpp"

#include <cstddef>
#include <cstdint>
#include <set>

namespace troupe {

class TakenMessages {
public:
  // The run has begun; an older one changes nothing.
  void begin(uint64_t run) {
    if (run <= run_)
      return;
    run_ = run;
    taken_.clear();
  }
  [[nodiscard]] uint64_t run() const { return run_; }
  // Whether it is the first of its kind. One of a newer run begins that.
  [[nodiscard]] bool take(const TrainMessageKey& key) {
    begin(std::get<1>(key));
    return !is_over(key) && taken_.insert(key).second;
  }
  // Whether it would be dropped.
  [[nodiscard]] bool contains(const TrainMessageKey& key) const {
    return is_over(key) || taken_.contains(key);
  }
  [[nodiscard]] size_t size() const { return taken_.size(); }

private:
  [[nodiscard]] bool is_over(const TrainMessageKey& key) const { return std::get<1>(key) < run_; }
  uint64_t run_ = 0;
  std::set<TrainMessageKey> taken_;
};

} // namespace troupe
