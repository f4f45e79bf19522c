// The elementary functions against the C library in higher precision.
#include "kernels/math.hpp"

#include "config/random.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

using namespace troupe;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kInfF = std::numeric_limits<float>::infinity();

class Uniform {
public:
  explicit Uniform(uint64_t seed) : stream_(seed) {}
  double between(double low, double high) {
    return low + (high - low) * static_cast<double>(stream_.next() >> 11) * 0x1p-53;
  }

private:
  KeyedStream stream_;
};

// Error in units of the last place of a number with `digits` binary digits.
double ulps(long double got, long double want, int digits) {
  return static_cast<double>(std::fabs(got - want) / std::fabs(want) *
                             std::ldexp(1.0L, digits - 1));
}

} // namespace

TEST_CASE("exp of a float is within two units, over the whole range") {
  Uniform random(1);
  for (int i = 0; i < 100000; ++i) {
    const auto x = static_cast<float>(random.between(-87, 88.7));
    CHECK(ulps(exp_f32(x), std::exp(static_cast<long double>(x)), 24) < 2);
  }
  CHECK(exp_f32(0.0f) == 1.0f);
  CHECK(exp_f32(-0.0f) == 1.0f);
}

TEST_CASE("exp ends in zero, in infinity and in NaN where it should") {
  CHECK(exp_f32(88.9f) == kInfF);
  CHECK(exp_f32(1e30f) == kInfF);
  CHECK(exp_f32(kInfF) == kInfF);
  CHECK(exp_f32(-104.0f) == 0.0f);
  CHECK(exp_f32(-kInfF) == 0.0f);
  CHECK(exp_f32(-103.5f) > 0.0f); // subnormal
  CHECK(std::isnan(exp_f32(std::numeric_limits<float>::quiet_NaN())));
  CHECK(exp_f64(709.78) < kInf);
  CHECK(exp_f64(709.79) == kInf);
  CHECK(exp_f64(kInf) == kInf);
  CHECK(exp_f64(-745.0) > 0);
  CHECK(exp_f64(-746.0) == 0);
  CHECK(exp_f64(-kInf) == 0);
  CHECK(std::isnan(exp_f64(std::numeric_limits<double>::quiet_NaN())));
}

TEST_CASE("exp falls by no more than a unit while its argument rises") {
  float before = 0;
  for (float x = -104; x < 89; x += 0.00037f) {
    const float e = exp_f32(x);
    if (e < before)
      CHECK(ulps(e, before, 24) < 1); // a unit of noise where two pieces of the polynomial meet
    before = e;
  }
}

TEST_CASE("exp and log of doubles are within two units") {
  Uniform random(2);
  for (int i = 0; i < 100000; ++i) {
    const double x = random.between(-700, 700);
    CHECK(ulps(exp_f64(x), std::exp(static_cast<long double>(x)), 53) < 2);
    const double y = std::exp(random.between(-300, 300));
    CHECK(ulps(log_f64(y), std::log(static_cast<long double>(y)), 53) < 2);
    const double near_one = 1 + random.between(-1e-3, 1e-3);
    if (near_one != 1)
      CHECK(ulps(log_f64(near_one), std::log(static_cast<long double>(near_one)), 53) < 2);
  }
}

TEST_CASE("a moment's correction is one minus beta to the step") {
  for (const double beta : {0.9, 0.95, 0.999, 0.9999})
    for (const int64_t step : {1, 2, 10, 1000, 100'000, 100'000'000}) {
      const auto power = std::pow(static_cast<long double>(beta), static_cast<long double>(step));
      CHECK(std::abs(static_cast<long double>(moment_correction(beta, step)) - (1 - power)) <
            4e-16L);
    }
  CHECK(moment_correction(0, 1) == 1);
}

TEST_CASE("log knows its special values") {
  CHECK(log_f64(1) == 0);
  CHECK(log_f64(0) == -kInf);
  CHECK(log_f64(-0.0) == -kInf);
  CHECK(log_f64(kInf) == kInf);
  CHECK(std::isnan(log_f64(-1)));
  CHECK(std::isnan(log_f64(std::numeric_limits<double>::quiet_NaN())));
  CHECK(log_f64(0x1p-1074) == doctest::Approx(-744.4400719213812));
}

TEST_CASE("sin and cos are exact to F64's last place, also of large angles") {
  Uniform random(3);
  for (int i = 0; i < 100000; ++i) {
    const double x = random.between(-1, 1) * (i % 2 ? 200000 : 0x1p30);
    const auto [s, c] = sin_cos_f64(x);
    CHECK(std::fabs(s - std::sin(static_cast<long double>(x))) < 0x1p-52L);
    CHECK(std::fabs(c - std::cos(static_cast<long double>(x))) < 0x1p-52L);
  }
  CHECK(sin_cos_f64(0).sin == 0);
  CHECK(sin_cos_f64(0).cos == 1);
}

TEST_CASE("sigmoid and silu follow from exp") {
  CHECK(sigmoid_f32(0) == 0.5f);
  CHECK(sigmoid_f32(-kInfF) == 0);
  CHECK(sigmoid_f32(kInfF) == 1);
  CHECK(sigmoid_f32(2.0f) == doctest::Approx(0.880797078).epsilon(1e-6));
  CHECK(silu_f32(2.0f) == doctest::Approx(2 * 0.880797078).epsilon(1e-6));
  CHECK(silu_f32(-200.0f) == 0);
}

TEST_CASE("arrays get the bits of single values, whatever their length") {
  Uniform random(4);
  for (const size_t n : {0, 1, 7, 8, 9, 63, 64, 65, 1000}) {
    std::vector<float> x(n), y(n, -1.0f);
    double sum = 0;
    for (float& v : x) {
      v = static_cast<float>(random.between(-30, 5));
      if (v < -29)
        v = -kInfF;
      sum += exp_f64(static_cast<double>(v) - 5);
    }
    sigmoid_f32(x, y.data());
    for (size_t i = 0; i < n; ++i)
      CHECK(y[i] == sigmoid_f32(x[i]));
    CHECK(sum_of_exp(x, 5) == sum);
  }
}

TEST_CASE("a weighted sum of arrays is an fma per element, for any length") {
  for (const size_t n : {size_t{0}, size_t{1}, size_t{7}, size_t{8}, size_t{33}}) {
    std::vector<float> x(n), out(n), wanted(n);
    for (size_t i = 0; i < n; ++i) {
      x[i] = 1.0f + 0x1p-23f * static_cast<float>(i);
      out[i] = -1.0f;
      wanted[i] = std::fma(1.0f - 0x1p-24f, x[i], -1.0f); // a rounded product would give another
    }
    add_weighted(x, 1.0f - 0x1p-24f, out.data());
    CHECK(out == wanted);
  }
}
