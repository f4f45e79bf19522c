#include "config/random.hpp"
#include "kernels/trunk.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

using namespace troupe;

namespace {

// Runs the chunks backwards and pretends to have three threads.
class BackwardWorkers final : public Workers {
public:
  [[nodiscard]] int num_threads() const override { return 3; }
  void parallel_for(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> f) override {
    for (int64_t chunk = (n + grain - 1) / grain; chunk-- > 0;)
      f(chunk * grain, std::min(n, (chunk + 1) * grain), static_cast<int>(chunk % 3));
  }
};

float get(DType dtype, const std::byte* row, int64_t i) {
  if (dtype == DType::f32) {
    float value = 0;
    std::memcpy(&value, row + 4 * i, 4);
    return value;
  }
  BF16 value;
  std::memcpy(&value, row + 2 * i, 2);
  return to_float(value);
}
void set(DType dtype, std::byte* row, int64_t i, float value) {
  const BF16 half = to_bf16(value);
  if (dtype == DType::f32)
    std::memcpy(row + 4 * i, &value, 4);
  else
    std::memcpy(row + 2 * i, &half, 2);
}
float round_to(DType dtype, float value) {
  return dtype == DType::f32 ? value : to_float(to_bf16(value));
}

struct Case {
  DType dtype = DType::f32;
  int64_t num_rows = 0, hidden = 0;
  std::vector<std::byte> data; // expert rows
  std::vector<std::byte> shared, x;
  std::vector<CombineTerm> terms;
  std::vector<int32_t> row_terms{0};

  [[nodiscard]] size_t row_bytes() const { return static_cast<size_t>(hidden * size_of(dtype)); }
  CombineArgs args() {
    CombineArgs a;
    a.num_rows = num_rows;
    a.hidden = hidden;
    a.dtype = dtype;
    a.terms = terms;
    a.row_terms = row_terms;
    if (!shared.empty())
      a.shared = {shared.data(), dtype, hidden};
    a.x = {x.data(), dtype, hidden};
    return a;
  }
};

Case random_case(KeyedStream& random, DType dtype, int64_t num_rows, int64_t hidden) {
  Case c;
  c.dtype = dtype;
  c.num_rows = num_rows;
  c.hidden = hidden;
  constexpr int kPlaces = 8;
  const auto fill = [&](std::vector<std::byte>& bytes, int64_t rows) {
    bytes.resize(static_cast<size_t>(rows) * c.row_bytes());
    for (int64_t i = 0; i < rows * hidden; ++i)
      set(dtype, bytes.data(), i, 8 * uniform_open(static_cast<uint32_t>(random.next())) - 4);
  };
  fill(c.data, num_rows * kPlaces);
  fill(c.x, num_rows);
  if (random.below(4) != 0)
    fill(c.shared, num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto count = static_cast<int64_t>(random.below(kPlaces + 1)); // none is allowed
    int32_t group = 0;
    for (int64_t i = 0; i < count; ++i) {
      group += static_cast<int32_t>(random.below(2));
      c.terms.push_back({c.data.data() + static_cast<size_t>(r * kPlaces + i) * c.row_bytes(),
                         uniform_open(static_cast<uint32_t>(random.next())), group, false});
    }
    c.row_terms.push_back(static_cast<int32_t>(c.terms.size()));
  }
  return c;
}

// The contract's sentence, one element at a time.
std::vector<std::byte> by_hand(const Case& c) {
  auto x = c.x;
  for (int64_t r = 0; r < c.num_rows; ++r)
    for (int64_t i = 0; i < c.hidden; ++i) {
      float total = 0;
      auto t = static_cast<size_t>(c.row_terms[static_cast<size_t>(r)]);
      const auto end = static_cast<size_t>(c.row_terms[static_cast<size_t>(r) + 1]);
      while (t < end) {
        const int32_t group = c.terms[t].group;
        float sum = 0;
        for (; t < end && c.terms[t].group == group; ++t)
          sum = std::fma(c.terms[t].weight,
                         get(c.dtype, static_cast<const std::byte*>(c.terms[t].row), i), sum);
        total += round_to(c.dtype, sum);
      }
      const int64_t at = r * c.hidden + i;
      if (!c.shared.empty())
        total += get(c.dtype, c.shared.data(), at);
      set(c.dtype, x.data(), at, total + get(c.dtype, c.x.data(), at));
    }
  return x;
}

} // namespace

TEST_CASE("combine adds groups, shared experts and residual in the contract's order") {
  KeyedStream random{17};
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t hidden : {1, 7, 64, 256, 300, 1023}) {
      CAPTURE(hidden);
      auto c = random_case(random, dtype, 9, hidden);
      const auto expected = by_hand(c);
      BackwardWorkers workers;
      combine(c.args(), workers);
      CHECK(c.x == expected);
    }
}

TEST_CASE("a complete group's row gives the bits of its single rows") {
  KeyedStream random{18};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    auto c = random_case(random, dtype, 33, 264);
    const auto expected = by_hand(c);
    // Every other group is summed beforehand, as a forwarder would.
    std::vector<std::vector<std::byte>> sums;
    std::vector<CombineTerm> terms;
    std::vector<int32_t> row_terms{0};
    sums.reserve(c.terms.size());
    size_t groups = 0;
    for (size_t r = 0; r + 1 < c.row_terms.size(); ++r) {
      auto t = static_cast<size_t>(c.row_terms[r]);
      const auto end = static_cast<size_t>(c.row_terms[r + 1]);
      while (t < end) {
        size_t last = t;
        while (last < end && c.terms[last].group == c.terms[t].group)
          ++last;
        const auto group = std::span{c.terms}.subspan(t, last - t);
        if (groups++ % 2 == 0) {
          auto& sum = sums.emplace_back(c.row_bytes());
          sum_group(group, dtype, c.hidden, sum.data());
          // The weight of a complete group is not looked at.
          terms.push_back(
              {sum.data(), std::numeric_limits<float>::quiet_NaN(), group[0].group, true});
        } else {
          terms.insert(terms.end(), group.begin(), group.end());
        }
        t = last;
      }
      row_terms.push_back(static_cast<int32_t>(terms.size()));
    }
    REQUIRE(sums.size() > 30);
    c.terms = terms;
    c.row_terms = row_terms;
    BackwardWorkers workers;
    combine(c.args(), workers);
    CHECK(c.x == expected);
  }
}

TEST_CASE("a row without terms and without shared experts keeps its residual") {
  Case c;
  c.dtype = DType::bf16;
  c.num_rows = 1;
  c.hidden = 20;
  c.x.resize(c.row_bytes());
  for (int64_t i = 0; i < c.hidden; ++i)
    set(c.dtype, c.x.data(), i, static_cast<float>(i));
  c.row_terms = {0, 0};
  const auto before = c.x;
  BackwardWorkers workers;
  combine(c.args(), workers);
  CHECK(c.x == before);
}
