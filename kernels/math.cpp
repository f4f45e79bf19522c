#include "kernels/math.hpp"

#include <algorithm>

namespace troupe {

namespace {

// One body for every CPU: it consists of correctly rounded operations in a fixed order.
[[gnu::always_inline]] inline void sigmoid_body(std::span<const float> x, float* out) {
  for (size_t i = 0; i < x.size(); ++i)
    out[i] = sigmoid_f32(x[i]);
}

// The exponentials of a block side by side, their sum one after the other.
[[gnu::always_inline]] inline double sum_of_exp_body(std::span<const float> x, double max) {
  constexpr size_t kBlock = 64;
  double e[kBlock], sum = 0;
  for (size_t begin = 0; begin < x.size(); begin += kBlock) {
    const size_t n = std::min(kBlock, x.size() - begin);
    for (size_t i = 0; i < n; ++i)
      e[i] = exp_f64(static_cast<double>(x[begin + i]) - max);
    for (size_t i = 0; i < n; ++i)
      sum += e[i];
  }
  return sum;
}

[[gnu::always_inline]] inline void add_weighted_body(std::span<const float> x, float weight,
                                                     float* out) {
  for (size_t i = 0; i < x.size(); ++i)
    out[i] = std::fma(weight, x[i], out[i]);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define TROUPE_FMA_TARGET __attribute__((target("avx2,fma")))
TROUPE_FMA_TARGET void sigmoid_avx2(std::span<const float> x, float* out) { sigmoid_body(x, out); }
TROUPE_FMA_TARGET double sum_of_exp_avx2(std::span<const float> x, double max) {
  return sum_of_exp_body(x, max);
}
TROUPE_FMA_TARGET void add_weighted_avx2(std::span<const float> x, float weight, float* out) {
  add_weighted_body(x, weight, out);
}
bool has_fma() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#else
void sigmoid_avx2(std::span<const float> x, float* out) { sigmoid_body(x, out); }
double sum_of_exp_avx2(std::span<const float> x, double max) { return sum_of_exp_body(x, max); }
void add_weighted_avx2(std::span<const float> x, float weight, float* out) {
  add_weighted_body(x, weight, out);
}
bool has_fma() { return false; }
#endif

} // namespace

void sigmoid_f32(std::span<const float> x, float* out) {
  has_fma() ? sigmoid_avx2(x, out) : sigmoid_body(x, out);
}

void add_weighted(std::span<const float> x, float weight, float* out) {
  has_fma() ? add_weighted_avx2(x, weight, out) : add_weighted_body(x, weight, out);
}

double sum_of_exp(std::span<const float> x, double max) {
  return has_fma() ? sum_of_exp_avx2(x, max) : sum_of_exp_body(x, max);
}

} // namespace troupe
