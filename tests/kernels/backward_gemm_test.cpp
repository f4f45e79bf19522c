#include "kernels/training_gemm.hpp"

#include "tests/kernels/backward.hpp"

#include <array>

using namespace troupe;
using namespace troupe::test;
namespace ref = troupe::reference;

namespace {

// Cuts work as a team of `num_threads` would, on one thread.
class TeamOf final : public Workers {
public:
  explicit TeamOf(int num_threads) : num_threads_(num_threads) {}
  [[nodiscard]] int num_threads() const override { return num_threads_; }
  void parallel_for(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> f) override {
    for (int64_t i = 0; i < n; i += grain)
      f(i, std::min(n, i + grain), static_cast<int>(i) % num_threads_);
  }

private:
  int num_threads_;
};

std::vector<float> random_floats(Random& random, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x)
    v = random.value();
  return x;
}

} // namespace

TEST_CASE("the products of training have the reference's bits for any shape and team") {
  Random random{8};
  using Shape = std::array<int64_t, 3>; // rows, n, k: empty, ragged, beyond one block each way
  for (const auto& [rows, n, k] : {Shape{0, 3, 5},
                                   {1, 1, 1},
                                   {3, 0, 4},
                                   {4, 5, 0},
                                   {13, 33, 7},
                                   {24, 64, 321},
                                   {250, 40, 9},
                                   {9, 530, 70},
                                   {7, 12, 700},
                                   {330, 18, 33}}) {
    CAPTURE(rows);
    CAPTURE(n);
    CAPTURE(k);
    const auto x = random_floats(random, rows * k), w = random_floats(random, n * k),
               dy = random_floats(random, rows * n), before = random_floats(random, n * k);
    std::vector<float> y(dy.size()), dx(x.size()), dw = before;
    ref::linear_fprop<float>(rows, n, k, ref::Grid<const float>{x.data(), k},
                             ref::Grid<const float>{w.data(), k}, ref::Grid<float>{y.data(), n});
    ref::linear_dgrad<float>(rows, n, k, ref::Grid<const float>{dy.data(), n},
                             ref::Grid<const float>{w.data(), k}, ref::Grid<float>{dx.data(), k});
    ref::linear_wgrad<float>(rows, n, k, ref::Grid<const float>{dy.data(), n},
                             ref::Grid<const float>{x.data(), k}, ref::Grid<float>{dw.data(), k});
    for (const int threads : {1, 2, 7}) {
      TeamOf team{threads};
      std::vector<float> y2(y.size(), 9.0f), dx2(dx.size(), 9.0f), dw2 = before;
      gemm_f32(fprop_gemm(rows, n, k, x.data(), w.data(), y2.data()), team);
      gemm_f32(dgrad_gemm(rows, n, k, dy.data(), w.data(), dx2.data()), team);
      const int64_t half = rows / 3; // an uneven cut of the rows into two calls
      gemm_f32(wgrad_gemm(half, n, k, dy.data(), x.data(), dw2.data()), team);
      gemm_f32(wgrad_gemm(rows - half, n, k, dy.data() + half * n, x.data() + half * k, dw2.data()),
               team);
      CHECK(y == y2);
      CHECK(dx == dx2);
      CHECK(dw == dw2);
    }
  }
}
