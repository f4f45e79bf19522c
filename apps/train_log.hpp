// Reads the JSON-lines log of `troupe train`: an object for each optimizer step, and one for each
// evaluation of held-out data.
#pragma once

#include "config/errors.hpp"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace troupe {

struct TrainLogLine {
  int64_t number = 0; // of the line, from 1
  int64_t step = 0;
  bool evaluated = false;
  double main_loss = 0;
  std::vector<double> mtp_loss;          // per depth; empty without MTP
  std::vector<double> max_vio;           // per MoE layer
  std::vector<std::vector<double>> load; // per MoE layer, per expert; empty unless asked for
};

// Calls `take` with every line in turn. Errors name FILE:LINE and the field. A log without lines is
// one; so is a line without `load`, where loads are asked for and it is no evaluation.
[[nodiscard]] caf::error read_train_log(const std::string& path, bool with_load,
                                        const std::function<void(const TrainLogLine&)>& take);

} // namespace troupe
