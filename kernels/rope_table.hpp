// RoPE angles and YaRN (specification §2.4, §2.5). Frequencies and angles are computed in F64 with
// functions of our own and rounded once: F32 angles would be off by 1e-3 at V3's longest position.
#pragma once

#include "config/model_config.hpp"
#include "kernels/backend.hpp"

#include <vector>

namespace troupe {

// Rotation frequency of each pair, YaRN applied; [qk_rope_head_dim / 2].
[[nodiscard]] std::vector<double> rope_frequencies(const ModelConfig& config);
// What cos and sin are multiplied with: ms(mscale) / ms(mscale_all_dim), 1 without YaRN.
[[nodiscard]] double rope_magnitude(const ModelConfig& config);
// τ: (nope + rope)^-1/2, times ms(mscale_all_dim)² under YaRN.
[[nodiscard]] float softmax_scale(const ModelConfig& config);

// The tables and the memory behind them.
class RopeTables {
public:
  RopeTables(const ModelConfig& config, int64_t max_positions);
  RopeTables(const RopeTables&) = delete;
  RopeTables& operator=(const RopeTables&) = delete;
  [[nodiscard]] const RopeTable& table() const { return table_; }

private:
  std::vector<float> cos_, sin_;
  RopeTable table_;
};

} // namespace troupe
