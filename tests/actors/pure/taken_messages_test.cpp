#include "actors/taken_messages.hpp"

#include <doctest/doctest.h>

using namespace troupe;

namespace {

TrainMessageKey key(uint64_t run, uint64_t micro_batch) {
  return {WireKind::dispatch, run, micro_batch, 3, 0, RankId{1}};
}

} // namespace

TEST_CASE("a message is taken once, and none of a run that is over") {
  TakenMessages taken;
  CHECK(taken.take(key(1, 0)));
  CHECK(taken.take(key(1, 1)));
  CHECK_FALSE(taken.take(key(1, 0)));
  CHECK(taken.contains(key(1, 0)));
  CHECK_FALSE(taken.contains(key(2, 0)));
  CHECK(taken.take(key(2, 0))); // a rank that is ahead has begun the next
  CHECK(taken.run() == 2);
  CHECK_FALSE(taken.take(key(1, 2)));
  CHECK(taken.contains(key(1, 2)));
  taken.begin(2); // what came early stays taken
  CHECK_FALSE(taken.take(key(2, 0)));
  taken.begin(1);
  CHECK(taken.run() == 2);
}

TEST_CASE("only one run's messages are remembered, whether it is told or seen to begin") {
  TakenMessages taken;
  for (uint64_t run = 1; run <= 100; ++run) {
    if (run % 2 == 0)
      taken.begin(run);
    for (uint64_t j = 0; j < 10; ++j)
      CHECK(taken.take(key(run, j)));
    CHECK(taken.size() == 10);
  }
}
