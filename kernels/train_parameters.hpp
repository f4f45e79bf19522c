// The tensors that a rank trains, in F32: its masters, gradients and moments are arenas of one
// layout, so that what walks over all of them (norms, AdamW, reductions) walks over memory.
//
// Tensors have their published names. The copies of embedding and head inside MTP layers are no
// tensors of their own (specification §5.7), and e_score_correction_bias is kept here but is no
// parameter: no gradient, no decay, not in the norm.
#pragma once

#include "config/checkpoint.hpp"
#include "config/errors.hpp"
#include "config/parameters.hpp"
#include "kernels/weights.hpp"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

struct TrainTensor {
  TensorSpec spec;
  int64_t begin = 0; // first element in every arena; a multiple of 16
  int64_t size = 0;  // elements

  [[nodiscard]] bool is_parameter() const { return spec.role != TensorRole::router_bias; }
  // AdamW decays matrices (embedding, head and router included), not norms.
  [[nodiscard]] bool is_decayed() const { return is_parameter() && spec.shape.size() == 2; }
};

// Which tensors, and where they lie. Immutable.
class TrainLayout {
public:
  // Keeps the specs that `holds` accepts, in file order, without MTP copies.
  TrainLayout(const ModelConfig& config, int64_t num_mtp_layers,
              const std::function<bool(const TensorSpec&)>& holds);

  [[nodiscard]] std::span<const TrainTensor> tensors() const { return tensors_; }
  // nullptr where this rank does not hold it.
  [[nodiscard]] const TrainTensor* find(std::string_view name) const;
  [[nodiscard]] int64_t num_elements() const { return num_elements_; } // of an arena, with padding

private:
  std::vector<TrainTensor> tensors_;
  std::map<std::string, size_t, std::less<>> by_name_;
  int64_t num_elements_ = 0;
};

// F32 values of all tensors of a layout; zero at first. The padding between tensors stays zero.
class TrainArena {
public:
  // Errc::out_of_memory names the bytes.
  [[nodiscard]] static caf::expected<TrainArena> make(std::shared_ptr<const TrainLayout> layout);

  [[nodiscard]] const TrainLayout& layout() const { return *layout_; }
  [[nodiscard]] std::span<float> all() const;
  [[nodiscard]] std::span<float> of(const TrainTensor& tensor) const;

private:
  std::shared_ptr<const TrainLayout> layout_;
  MemoryBlock memory_;
};

// Masters of one tensor from a checkpoint: F32, BF16, F16, or E4M3 times its scales. Errors name
// it.
[[nodiscard]] caf::error load_master(const Checkpoint& checkpoint, const TensorSpec& spec,
                                     std::span<float> to);

// Random masters of one tensor, keyed by seed and name, whatever rank holds it: normal with `std`
// (cut at 3.5 of them), norms 1, biases 0 (specification §5.2).
void init_master(uint64_t seed, float std, const TensorSpec& spec, std::span<float> to);

// Σ g² in F64 of a block, in order. A tensor's sum adds its blocks of so many elements, in order
// (contract, Gradients on a grid).
inline constexpr int64_t kNormBlock = 65'536;
[[nodiscard]] double squared_norm(std::span<const float> block);

} // namespace troupe
