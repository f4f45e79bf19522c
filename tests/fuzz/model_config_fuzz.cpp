// Any bytes as config.json: refused with a text, or a config that is written and read back equal
// and whose parameters can be counted.
#include "config/model_config.hpp"
#include "config/parameters.hpp"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text{reinterpret_cast<const char*>(data), size};
  const auto config = troupe::parse_model_config(text, "input");
  if (!config) {
    if (troupe::text_of(config.error()).empty())
      std::abort();
    return 0;
  }
  const auto written = troupe::to_json(*config);
  const auto again = troupe::parse_model_config(written, "written");
  if (!again || troupe::to_json(*again) != written)
    std::abort();
  constexpr int64_t kQuickToCount = 10'000; // experts; more would only cost time
  const int64_t layers = config->num_hidden_layers + config->num_nextn_predict_layers;
  if (layers * config->n_routed_experts < kQuickToCount &&
      troupe::count_parameters(*config).active <= 0)
    std::abort();
  return 0;
}
