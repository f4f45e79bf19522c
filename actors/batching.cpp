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

std::vector<BatchRows> take_micro_batch(std::vector<BatchRows> batch, int64_t rows_in_flight,
                                        int64_t overlap_rows) {
  int64_t total = rows_in_flight;
  for (const auto& rows : batch)
    total += rows.num_rows;
  if (overlap_rows == 0 || total < overlap_rows) {
    if (rows_in_flight > 0)
      batch.clear();
    return batch;
  }
  const int64_t target = (total + 1) / 2;
  int64_t taken = 0;
  size_t count = 0;
  while (count < batch.size() && (count == 0 || taken + batch[count].num_rows <= target))
    taken += batch[count++].num_rows;
  batch.resize(count);
  return batch;
}

} // namespace troupe
