#include "kernels/rope_table.hpp"

#include "kernels/math.hpp"

#include <algorithm>
#include <cmath>

namespace troupe {

namespace {

double mscale(double factor, double x) {
  return factor <= 1 ? 1.0 : 0.1 * x * log_f64(factor) + 1.0;
}

// The channel whose wavelength makes n turns over the original context.
double correction(const RopeScaling& s, double theta, double dim, double n) {
  constexpr double kTwoPi = 6.283185307179586;
  return dim * log_f64(static_cast<double>(s.original_max_position_embeddings) / (kTwoPi * n)) /
         (2.0 * log_f64(theta));
}

} // namespace

std::vector<double> rope_frequencies(const ModelConfig& config) {
  const auto dim = static_cast<double>(config.qk_rope_head_dim);
  const int64_t half = config.qk_rope_head_dim / 2;
  std::vector<double> f(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i)
    f[static_cast<size_t>(i)] =
        exp_f64(-2.0 * static_cast<double>(i) / dim * log_f64(config.rope_theta));
  if (!config.rope_scaling)
    return f;
  const auto& s = *config.rope_scaling;
  const double low = std::max(std::floor(correction(s, config.rope_theta, dim, s.beta_fast)), 0.0);
  double high = std::min(std::ceil(correction(s, config.rope_theta, dim, s.beta_slow)), dim - 1.0);
  if (low == high)
    high += 0.001;
  for (int64_t i = 0; i < half; ++i) {
    auto& x = f[static_cast<size_t>(i)];
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    x = x * (1.0 - ramp) + x / s.factor * ramp;
  }
  return f;
}

double rope_magnitude(const ModelConfig& config) {
  if (!config.rope_scaling)
    return 1.0;
  const auto& s = *config.rope_scaling;
  return mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim);
}

float softmax_scale(const ModelConfig& config) {
  double tau = 1.0 / std::sqrt(static_cast<double>(config.qk_head_dim()));
  if (config.rope_scaling && config.rope_scaling->mscale_all_dim != 0) {
    const double m = mscale(config.rope_scaling->factor, config.rope_scaling->mscale_all_dim);
    tau *= m * m;
  }
  return static_cast<float>(tau);
}

RopeTables::RopeTables(const ModelConfig& config, int64_t max_positions) {
  const auto f = rope_frequencies(config);
  const double magnitude = rope_magnitude(config);
  cos_.reserve(f.size() * static_cast<size_t>(max_positions));
  sin_.reserve(cos_.capacity());
  for (int64_t p = 0; p < max_positions; ++p)
    for (const double x : f) {
      const auto [s, c] = sin_cos_f64(static_cast<double>(p) * x);
      cos_.push_back(static_cast<float>(c * magnitude));
      sin_.push_back(static_cast<float>(s * magnitude));
    }
  table_ = {config.qk_rope_head_dim, max_positions, cos_.data(), sin_.data(),
            config.rope_interleave};
}

} // namespace troupe
