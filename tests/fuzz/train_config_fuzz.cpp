// Any bytes as a training config: refused with a text, or settings that are in their ranges at
// every step.
#include "config/train_config.hpp"
#include "config/train_schedule.hpp"

#include <cmath>
#include <cstdlib>

namespace {

bool sound_at(const troupe::TrainConfig& c, int64_t step) {
  const double lr = learning_rate(c, step);
  return std::isfinite(lr) && lr >= 0 && lr <= c.lr * (1 + 1e-9) && batch_size(c, step) >= 1 &&
         batch_size(c, step) % c.micro_batch == 0 && mtp_lambda(c, step) >= 0 &&
         bias_gamma(c, step) >= 0;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text{reinterpret_cast<const char*>(data), size};
  const auto c = troupe::parse_train_config(text, "input", "/folder", {});
  if (!c) {
    if (troupe::text_of(c.error()).empty())
      std::abort();
    return 0;
  }
  const int sources = int{!c->data.empty()} + int{!c->tokens.empty()} + int{!c->chat.empty()};
  bool sound = sources == 1 && c->model.empty() != c->init.empty() && c->steps >= 1 &&
               c->num_ranks() >= 1 && c->grad_lanes >= 1 && c->grad_groups >= 1 &&
               (c->sequence_length || !c->tokens.empty());
  for (const int64_t step : {int64_t{1}, int64_t{2}, c->warmup_steps + 1, c->steps / 2 + 1,
                             std::max<int64_t>(c->steps - c->decay_steps, 1), c->steps})
    sound = sound && sound_at(*c, step);
  if (!sound)
    std::abort();
  return 0;
}
