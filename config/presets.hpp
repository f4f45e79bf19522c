// Model shapes by name: tiny ones of each family for tests, `bench-1b` for benchmarks, and the
// published models (specification §1.1), which are for `inspect`.
#pragma once

#include "config/model_config.hpp"

#include <optional>
#include <string_view>
#include <vector>

namespace troupe {

// tiny-v3 tiny-v2 tiny-v2-lite tiny-moonlight tiny-kimi bench-1b v3 v2 v2-lite moonlight kimi-k2
[[nodiscard]] std::optional<ModelConfig> preset(std::string_view name);
[[nodiscard]] std::vector<std::string_view> preset_names();

} // namespace troupe
