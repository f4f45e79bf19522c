// A pipeline stage's weights and gradients in training: a run of consecutive layers, the first
// stage with the embedding, the last with final norm, head and MTP modules.
//
// Gradients follow the contract's grid: one arena per (direction, lane) for dense tensors, one per
// (direction, group) for experts. A tensor with several uses (embedding, head) has an accumulator
// per use: 0 is the main model, k the MTP module of depth k.
#pragma once

#include "config/checkpoint.hpp"
#include "config/errors.hpp"
#include "config/parameters.hpp"
#include "kernels/train_ops.hpp"
#include "kernels/weights.hpp"

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

// Tensors with several uses.
inline constexpr std::string_view kEmbeddingName = "model.embed_tokens.weight";
inline constexpr std::string_view kHeadName = "lm_head.weight";

// Which part of the model: layers [first_layer, last_layer).
struct StageShare {
  int64_t first_layer = 0, last_layer = 0;
  bool first = true, last = true; // has the embedding; has head and MTP modules
  int64_t num_mtp_layers = 0;
  // Routed experts [first_expert, last_expert) of every layer.
  int64_t first_expert = 0, last_expert = 0;
};
// The equal cut of num_hidden_layers over stages; the first ones get the rest.
[[nodiscard]] StageShare stage_share(const ModelConfig& config, int64_t num_mtp_layers,
                                     int32_t stage, int32_t num_stages);

struct StageTensor {
  TensorSpec spec;
  int64_t begin = 0; // in the arena of values; a multiple of 16 elements
  [[nodiscard]] int64_t size() const { return spec.num_elements(); }
  [[nodiscard]] bool is_expert() const { return spec.expert >= 0; }
};
// One accumulator: of the dense arenas, or of the expert ones.
struct StageGradient {
  size_t tensor = 0; // index into tensors()
  int32_t use = 0;
  bool expert = false;
  int64_t begin = 0;
};

class StageLayout {
public:
  StageLayout(const ModelConfig& config, const StageShare& share);
  [[nodiscard]] const StageShare& share() const { return share_; }
  [[nodiscard]] std::span<const StageTensor> tensors() const { return tensors_; }
  [[nodiscard]] std::span<const StageGradient> gradients() const { return gradients_; }
  [[nodiscard]] const StageTensor* find(std::string_view name) const;
  // -1: none.
  [[nodiscard]] int64_t gradient_of(std::string_view name, int32_t use = 0) const;
  [[nodiscard]] int64_t num_values() const { return num_values_; }
  [[nodiscard]] int64_t num_dense() const { return num_dense_; }
  [[nodiscard]] int64_t num_expert() const { return num_expert_; }

private:
  void add(const TensorSpec& spec, std::span<const int32_t> uses);
  StageShare share_;
  std::vector<StageTensor> tensors_;
  std::vector<StageGradient> gradients_;
  std::map<std::string, size_t, std::less<>> by_name_;
  std::map<std::pair<std::string, int32_t>, int64_t, std::less<>> gradient_begin_;
  int64_t num_values_ = 0, num_dense_ = 0, num_expert_ = 0;
};

// A linear layer as the kernels see it.
struct TrainLinear {
  int64_t n = 0, k = 0;
  TrainPrecision precision = TrainPrecision::f32;
  const std::byte* weight = nullptr; // prepared
  int64_t gradient = -1;             // where its accumulator begins
};
struct TrainNorm {
  int64_t n = 0;
  const float* weight = nullptr;
  int64_t gradient = -1;
};
struct TrainFfn {
  TrainLinear gate, up, down;
};
struct TrainBlock {
  int64_t layer = 0;
  bool moe = false;
  TrainNorm input_norm, post_norm, q_a_norm, kv_a_norm;
  TrainLinear q_a, q_b, kv_a, kv_b, o; // q_a.n == 0: q_b is q_proj
  TrainFfn ffn;                        // dense, or the shared experts (gate.n == 0: none)
  TrainLinear router;
  const float* router_bias = nullptr; // null where the gate has none
  std::vector<TrainFfn> experts;      // of the share, first_expert first
};
struct TrainMtp {
  TrainNorm enorm, hnorm, head_norm;
  TrainLinear eh_proj;
  TrainBlock block;
};

// Values and their prepared forms. Values change between steps only, by one writer.
class StageWeights {
public:
  // Errc::out_of_memory names the bytes.
  [[nodiscard]] static caf::expected<std::shared_ptr<StageWeights>> make(const ModelConfig& config,
                                                                         const StageShare& share,
                                                                         TrainPrecision precision,
                                                                         const TrainOps& ops);

  [[nodiscard]] const StageLayout& layout() const { return layout_; }
  [[nodiscard]] std::span<float> values(const StageTensor& tensor) const;
  // After values have changed.
  void prepare(Workers& workers);

  [[nodiscard]] std::span<const TrainBlock> blocks() const { return blocks_; }
  [[nodiscard]] std::span<const TrainMtp> mtp() const { return mtp_; }
  [[nodiscard]] const float* embedding() const { return embedding_; } // [vocab, hidden]
  [[nodiscard]] const TrainNorm& final_norm() const { return final_norm_; }
  [[nodiscard]] const TrainLinear& head() const { return head_; }

private:
  StageWeights(const ModelConfig& config, const StageShare& share, TrainPrecision precision,
               const TrainOps& ops)
      : config_(config), layout_(config, share), precision_(precision), ops_(ops) {}
  caf::error allocate();
  void bind();
  [[nodiscard]] TrainNorm norm(const std::string& name) const;
  [[nodiscard]] TrainLinear linear(const std::string& name) const;
  [[nodiscard]] TrainFfn ffn(const std::string& prefix) const;
  [[nodiscard]] TrainBlock block(int64_t layer) const;

  ModelConfig config_;
  StageLayout layout_;
  TrainPrecision precision_;
  const TrainOps& ops_;
  MemoryBlock values_, prepared_;
  std::map<std::string, std::pair<size_t, TrainPrecision>, std::less<>> prepared_at_; // by name
  std::vector<TrainBlock> blocks_;
  std::vector<TrainMtp> mtp_;
  const float* embedding_ = nullptr;
  TrainNorm final_norm_;
  TrainLinear head_;
};

// What a linear layer computes in: router always F32; embedding, head and eh_proj never FP8
// (specification §5.5).
[[nodiscard]] TrainPrecision precision_of(TensorRole role, TrainPrecision compute);

} // namespace troupe
