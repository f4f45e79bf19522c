#include "actors/batching.hpp"

#include <algorithm>

namespace troupe {

std::vector<BatchRows> plan_batch(std::span<const BatchItem> items, const BatchLimits& limits) {
  std::vector<BatchRows> step;
  const auto has_room = [&] { return static_cast<int64_t>(step.size()) < limits.max_sequences; };
  for (size_t i = 0; i < items.size() && has_room(); ++i) {
    const auto& item = items[i];
    if (item.paused || item.computed < item.prompt_length || item.computed >= item.known)
      continue;
    step.push_back(
        {static_cast<int32_t>(i), item.known - item.computed + item.drafts, item.drafts});
  }
  int64_t room = limits.prefill_chunk;
  for (size_t i = 0; i < items.size() && has_room() && room > 0; ++i) {
    const auto& item = items[i];
    if (item.paused || item.computed >= item.prompt_length)
      continue;
    const int64_t rows = std::min(room, item.prompt_length - item.computed);
    step.push_back({static_cast<int32_t>(i), rows, 0});
    room -= rows;
  }
  return step;
}

} // namespace troupe
