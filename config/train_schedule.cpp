#include "config/train_schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace troupe {

double learning_rate(const TrainConfig& c, int64_t step) {
  if (step <= c.warmup_steps)
    return c.lr * static_cast<double>(step) / static_cast<double>(c.warmup_steps);
  switch (c.lr_schedule) {
  case LrSchedule::constant:
    return c.lr;
  case LrSchedule::wsd: {
    const int64_t begin = c.steps - c.decay_steps;
    if (step <= begin)
      return c.lr;
    const double done = static_cast<double>(step - begin) / static_cast<double>(c.decay_steps);
    return c.lr + (c.min_lr - c.lr) * std::min(done, 1.0);
  }
  case LrSchedule::cosine: {
    const auto length = static_cast<double>(std::max<int64_t>(c.steps - c.warmup_steps, 1));
    const double done = std::min(static_cast<double>(step - c.warmup_steps) / length, 1.0);
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + std::cos(std::numbers::pi * done));
  }
  }
  return c.lr;
}

double mtp_lambda(const TrainConfig& c, int64_t step) { return c.mtp_lambda.at(step); }
double bias_gamma(const TrainConfig& c, int64_t step) { return c.bias_gamma.at(step); }

int64_t batch_size(const TrainConfig& c, int64_t step) { return std::llround(c.batch.at(step)); }

int64_t first_row(const TrainConfig& c, int64_t step) {
  int64_t row = 0, from = 1;
  double batch = c.batch.first;
  for (const auto& [at, next] : c.batch.changes) {
    if (at >= step)
      break;
    row += (at - from) * std::llround(batch);
    from = at;
    batch = next;
  }
  return row + (step - from) * std::llround(batch);
}

} // namespace troupe
