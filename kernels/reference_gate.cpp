#include "kernels/reference_access.hpp"

namespace troupe::reference {

void gate(const GateArgs& a, Workers& workers) {
  const auto width = static_cast<size_t>(a.n_experts), k = static_cast<size_t>(a.top_k);
  workers.parallel_for(a.num_rows, 8, [&](int64_t begin, int64_t end, int) {
    Gate<float> gate(
        {a.n_experts, a.n_group, a.topk_group, a.top_k, a.scoring, a.method, a.norm_topk_prob});
    for (int64_t r = begin; r < end; ++r)
      gate.run({a.logits + r * a.n_experts, width}, a.bias, a.routed_scaling_factor,
               {a.topk_idx + r * a.top_k, k}, a.topk_weight + r * a.top_k);
  });
}

} // namespace troupe::reference
