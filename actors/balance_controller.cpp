#include "actors/balance_controller.hpp"

#include "actors/exceptions.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace troupe {

std::vector<float> updated_bias(std::span<const float> bias, std::span<const int64_t> counts,
                                double gamma) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const auto experts = static_cast<int64_t>(counts.size());
  std::vector<float> updated{bias.begin(), bias.end()};
  for (size_t e = 0; e < updated.size() && e < counts.size(); ++e) {
    const int64_t below = total - counts[e] * experts; // sign of mean − c
    updated[e] += static_cast<float>(gamma) * static_cast<float>((below > 0) - (below < 0));
  }
  return updated;
}

double max_vio(std::span<const int64_t> counts) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (total == 0)
    return 0;
  const auto largest = static_cast<double>(*std::max_element(counts.begin(), counts.end()));
  return largest * static_cast<double>(counts.size()) / static_cast<double>(total) - 1;
}

BalanceController::behavior_type
balance_controller(BalanceController::stateful_pointer<BalanceControllerState> self,
                   std::vector<LayerBias> biases) {
  end_by_exceptions(self);
  for (auto& [layer, bias] : biases)
    self->state.biases.emplace(layer, std::move(bias));
  return {
      [=](const LoadReport& report) {
        BiasUpdate update;
        update.step = report.step;
        for (const auto& [layer, counts] : report.loads) {
          update.max_vio.push_back(max_vio(counts));
          const auto found = self->state.biases.find(layer);
          if (found == self->state.biases.end())
            continue;
          found->second = updated_bias(found->second, counts, report.gamma);
          update.biases.push_back({layer, found->second});
        }
        return update;
      },
  };
}

} // namespace troupe
