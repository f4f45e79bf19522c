#include "kernels/reference_backward_fp8.hpp"

#include "tests/kernels/backward.hpp"

using namespace troupe;
using namespace troupe::test;
namespace ref = troupe::reference;

namespace {

std::vector<float> random_floats(Random& random, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x)
    v = random.value();
  return x;
}

ref::Grid<const float> grid(const std::vector<float>& x, int64_t columns) {
  return {x.data(), columns};
}

// Σ |a·b| of one element in F64: what rounding errors of its sum are measured by.
struct Exact {
  double sum = 0, magnitude = 0;
  void add(double a, double b) {
    sum += a * b;
    magnitude += std::abs(a * b);
  }
};
// A code times its scale is rounded nowhere in the products, so only the additions (at most 300)
// and a few roundings of scales differ from F64.
bool close(float value, const Exact& exact) {
  return std::abs(static_cast<double>(value) - exact.sum) <= 310 * 0x1p-24 * exact.magnitude;
}
double element(const ref::Fp8Matrix& m, int64_t row, int64_t column) {
  return static_cast<double>(m.code(row, column)) * static_cast<double>(m.scale(row, column));
}

} // namespace

TEST_CASE("the three FP8 products agree with F64 over the same codes, ragged blocks included") {
  Random random{5};
  for (const auto& [rows, n, k] : {std::array<int64_t, 3>{130, 5, 140}, {3, 257, 2}, {0, 2, 3}}) {
    CAPTURE(rows);
    const auto x = random_floats(random, rows * k), w = random_floats(random, n * k),
               dy = random_floats(random, rows * n);
    const auto xq = ref::quantize_activations(rows, k, grid(x, k));
    const auto dyq = ref::quantize_activations(rows, n, grid(dy, n));
    const auto wq = ref::quantize_weight(n, k, grid(w, k));
    const auto xt = ref::quantize_along_tokens(rows, k, xq);
    const auto dyt = ref::quantize_along_tokens(rows, n, grid(dy, n));
    std::vector<float> y(dy.size()), dx(x.size()), dw(w.size());
    ref::fp8_fprop(rows, n, k, xq, wq, {y.data(), n});
    ref::fp8_dgrad(rows, n, k, dyq, wq, {dx.data(), k});
    ref::fp8_wgrad(rows, n, k, dyt, xt, {dw.data(), k});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        Exact e;
        for (int64_t c = 0; c < k; ++c)
          e.add(element(xq, r, c), element(wq, i, c));
        CHECK(close(y[static_cast<size_t>(r * n + i)], e));
      }
      for (int64_t c = 0; c < k; ++c) {
        Exact e;
        for (int64_t i = 0; i < n; ++i)
          e.add(element(dyq, r, i), element(wq, i, c));
        CHECK(close(dx[static_cast<size_t>(r * k + c)], e));
      }
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < k; ++c) {
        Exact e;
        for (int64_t r = 0; r < rows; ++r)
          e.add(element(dyt, r, i), element(xt, r, c));
        CHECK(close(dw[static_cast<size_t>(i * k + c)], e));
      }
  }
}

TEST_CASE("an FP8 weight's gradient has the same bits when its rows come in blocks of 128") {
  Random random{6};
  const int64_t rows = 300, n = 3, k = 4;
  const auto x = random_floats(random, rows * k), dy = random_floats(random, rows * n);
  std::vector<float> whole(n * k), parts(n * k);
  const auto add = [&](int64_t first, int64_t count, std::vector<float>& dw) {
    const auto from = [first](auto g) {
      return [=](int64_t r, int64_t c) { return g(first + r, c); };
    };
    ref::fp8_wgrad(count, n, k, ref::quantize_along_tokens(count, n, from(grid(dy, n))),
                   ref::quantize_along_tokens(count, k, from(grid(x, k))), {dw.data(), k});
  };
  add(0, rows, whole);
  add(0, 128, parts);
  add(128, 128, parts);
  add(256, 44, parts);
  CHECK(whole == parts);
}

TEST_CASE("FP8 scales reach the largest value, clamp small tiles, and may be powers of two") {
  const std::vector<float> x = {3.0f, -448.0f, 1e-7f, 0.0f};
  const auto exact = ref::quantize_activations(2, 2, grid(x, 2));
  CHECK(exact.scale(0, 0) == 1.0f);
  CHECK(exact.code(0, 1) == -448.0f);
  CHECK(exact.scale(1, 0) == 1e-4f / 448.0f);
  CHECK(ref::fp8_scale(448.0f, ref::Fp8Scale::power_of_two) == 1.0f);
  CHECK(ref::fp8_scale(449.0f, ref::Fp8Scale::power_of_two) == 2.0f);
  CHECK(ref::fp8_scale(100.0f, ref::Fp8Scale::power_of_two) == 0.25f);
  const std::vector<float> zeros(4);
  const auto w = ref::quantize_weight(2, 2, grid(zeros, 2));
  CHECK(w.scale(0, 0) == 1.0f);
  CHECK(w(1, 1) == 0.0f);
}
