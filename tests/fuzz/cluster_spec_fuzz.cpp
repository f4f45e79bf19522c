// Any bytes as a cluster file: refused with a text, or a spec whose numbers are in their ranges.
#include "config/cluster_spec.hpp"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text{reinterpret_cast<const char*>(data), size};
  const auto spec = troupe::parse_cluster_spec(text, "input", "/folder");
  if (!spec) {
    if (troupe::text_of(spec.error()).empty())
      std::abort();
    return 0;
  }
  const auto& layout = spec->layout;
  const bool sound = layout.num_ranks >= 1 && layout.num_ranks <= troupe::kMaxRanks &&
                     layout.attention_ranks % layout.tp == 0 &&
                     layout.num_ranks % layout.nodes == 0 && spec->batch >= 1 &&
                     spec->kv_tokens >= 1 && spec->prefill_chunk >= 1 &&
                     spec->control.token.size() >= 8 && !spec->model.empty();
  if (!sound)
    std::abort();
  return 0;
}
