// Settings that change over a run, as functions of the optimizer step (the first is 1). Pure.
#pragma once

#include "config/train_config.hpp"

#include <cstdint>

namespace troupe {

// Linear from 0 over warmup_steps (step s has s / warmup_steps of the peak), then constant; wsd:
// the last decay_steps fall to min_lr along a line, whose end is step `steps`; cosine: from the
// peak to min_lr at step `steps`.
[[nodiscard]] double learning_rate(const TrainConfig& config, int64_t step);
[[nodiscard]] double mtp_lambda(const TrainConfig& config, int64_t step);
[[nodiscard]] double bias_gamma(const TrainConfig& config, int64_t step);
// Sequences of a step.
[[nodiscard]] int64_t batch_size(const TrainConfig& config, int64_t step);
// Sequences of all steps before: the row a step begins with.
[[nodiscard]] int64_t first_row(const TrainConfig& config, int64_t step);

} // namespace troupe
