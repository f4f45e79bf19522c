// Finite differences for the backward formulas, in F64.
#pragma once

#include "kernels/reference_backward.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <vector>

namespace troupe::test {

using Vector = std::vector<double>;

inline Vector random_vector(Random& random, int64_t n, double scale = 1) {
  Vector x(static_cast<size_t>(n));
  for (double& v : x)
    v = scale * static_cast<double>(random.value());
  return x;
}

inline reference::Grid<double> grid(Vector& x, int64_t columns) { return {x.data(), columns}; }
inline reference::Grid<const double> grid(const Vector& x, int64_t columns) {
  return {x.data(), columns};
}

inline double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += a[i] * b[i];
  return sum;
}

// Central differences of `loss` in every element of x against `gradient`. With steps of 1e-5,
// truncation (h²) and cancellation (1e-16/h) each stay near 1e-10 of values around one; 1e-7 of
// the largest gradient leaves room for long sums, and no wrong formula passes.
inline void check_gradient(Vector& x, const Vector& gradient, const std::function<double()>& loss) {
  REQUIRE(x.size() == gradient.size());
  constexpr double kStep = 1e-5;
  double largest = 1e-2;
  for (const double g : gradient)
    largest = std::max(largest, std::abs(g));
  for (size_t i = 0; i < x.size(); ++i) {
    CAPTURE(i);
    const double at = x[i];
    x[i] = at + kStep;
    const double above = loss();
    x[i] = at - kStep;
    const double below = loss();
    x[i] = at;
    CHECK(std::abs((above - below) / (2 * kStep) - gradient[i]) <= 1e-7 * largest);
  }
}

// Values printed with nine decimals.
inline bool agrees(double value, double printed) { return std::abs(value - printed) <= 1e-8; }

} // namespace troupe::test
