#include "actors/batching.hpp"
#include "actors/gateway.hpp"
#include "actors/stopping.hpp"

#include "config/random.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace troupe;

TEST_CASE("decoding goes first, prompts fill what is left of the chunk, oldest first") {
  const std::vector<BatchItem> items{
      {100, 100, 40, 0, false}, // a prompt half done
      {21, 20, 20, 2, false},   // decoding, two drafts
      {50, 50, 0, 0, false},    // a new prompt
      {30, 20, 29, 0, true},    // paused
  };
  const auto step = plan_batch(items, {8, 64});
  REQUIRE(step.size() == 3);
  CHECK(step[0].item == 1);
  CHECK(step[0].num_rows == 3);
  CHECK(step[0].num_drafts == 2);
  CHECK(step[1].item == 0);
  CHECK(step[1].num_rows == 60);
  CHECK(step[2].item == 2);
  CHECK(step[2].num_rows == 4);
}

TEST_CASE("steps keep their bounds and every request comes to its end") {
  KeyedStream random{5};
  for (int round = 0; round < 2000; ++round) {
    CAPTURE(round);
    const BatchLimits limits{1 + static_cast<int64_t>(random.below(5)),
                             1 + static_cast<int64_t>(random.below(40))};
    std::vector<BatchItem> items(random.below(8));
    for (auto& i : items) {
      i.prompt_length = 1 + static_cast<int64_t>(random.below(60));
      i.known = i.prompt_length;
    }
    int64_t left = 0;
    for (const auto& i : items)
      left += i.prompt_length;
    for (int guard = 0; left > 0 && guard < 10000; ++guard) {
      const auto step = plan_batch(items, limits);
      REQUIRE(!step.empty());
      CHECK(static_cast<int64_t>(step.size()) <= limits.max_sequences);
      int64_t rows = 0;
      for (const auto& s : step) {
        items[static_cast<size_t>(s.item)].computed += s.num_rows;
        CHECK(items[static_cast<size_t>(s.item)].computed <=
              items[static_cast<size_t>(s.item)].known);
        rows += s.num_rows;
      }
      CHECK(rows <= limits.prefill_chunk);
      left -= rows;
    }
    CHECK(left == 0);
    CHECK(plan_batch(items, limits).empty());
  }
}

TEST_CASE("two micro-batches share the rows once there are enough of them") {
  const auto sizes = [](const std::vector<BatchRows>& batch) {
    std::vector<int64_t> list;
    for (const auto& rows : batch)
      list.push_back(rows.num_rows);
    return list;
  };
  using Sizes = std::vector<int64_t>;
  const std::vector<BatchRows> decode{{0, 1, 0}, {1, 1, 0}, {2, 1, 0}, {3, 1, 0}, {4, 1, 0}};
  const std::vector<BatchRows> mixed{{0, 1, 0}, {1, 1, 0}, {2, 60, 0}};
  CHECK(sizes(take_micro_batch(decode, 0, 8)) == Sizes{1, 1, 1, 1, 1}); // too few: one step
  CHECK(take_micro_batch(decode, 2, 8).empty());                        // and nothing beside it
  CHECK(sizes(take_micro_batch(decode, 0, 4)) == Sizes{1, 1, 1});
  CHECK(sizes(take_micro_batch(decode, 3, 4)) == Sizes{1, 1, 1, 1});
  CHECK(sizes(take_micro_batch(decode, 0, 0)) == Sizes{1, 1, 1, 1, 1}); // off
  CHECK(take_micro_batch(decode, 3, 0).empty());
  CHECK(sizes(take_micro_batch(mixed, 0, 8)) == Sizes{1, 1}); // the long prompt is the other half
  CHECK(sizes(take_micro_batch({{2, 60, 0}}, 2, 8)) == Sizes{60});
  CHECK(take_micro_batch({}, 7, 4).empty());
}

TEST_CASE("a new request goes to the least loaded group") {
  CHECK(choose_group({3, 1, 2}) == 1);
  CHECK(choose_group({2, 2, 2}) == 0);
}

TEST_CASE("stop strings are found across pieces and held back until they are sure") {
  const std::vector<std::string> stops{"END", "\n\n"};
  std::string tail;
  CHECK(!meets_stop(tail, "the E", stops));
  CHECK(!meets_stop(tail, "N", stops));
  CHECK(meets_stop(tail, "D", stops));
  CHECK(before_stop("text END more\n\n", stops) == "text ");
  CHECK(before_stop("nothing", stops) == "nothing");
  CHECK(safe_length("abc EN", stops) == 4);
  CHECK(safe_length("abc\n", stops) == 3);
  CHECK(safe_length("abc", stops) == 3);
}
