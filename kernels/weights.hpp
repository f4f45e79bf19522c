// The weights one rank holds, packed from a checkpoint into memory of its own.
//
// How each is held: weight_source.hpp. The embedding is held in A.
// A rank reads only its own part of the files, once, and tells the kernel to forget the pages
// behind it, so that resident memory is the rank's share and not the checkpoint. All functions are
// callable from several threads for different parts.
#pragma once

#include "config/checkpoint.hpp"
#include "config/errors.hpp"
#include "config/ids.hpp"
#include "kernels/backend.hpp"

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace troupe {

// One arithmetic of the contract's table.
struct Arithmetic {
  DType activations = DType::bf16; // f32 or bf16: residual stream, dispatch, combine, KV cache
  bool fp8_weights = false;        // keep (or make) Linear weights of the blocks in E4M3
  bool fp8_activations = false;    // W8A8: rows quantized 1×128 before FP8 GEMMs; needs bf16
  bool fp8_power_of_two = false; // activation scales rounded up to powers of two (scale_fmt ue8m0)
};
// "f32", "bf16", "bf16+fp8-weights", …: for fingerprints, errors and the summary.
[[nodiscard]] std::string to_string(const Arithmetic& arithmetic);
// Defaults for a checkpoint: bf16 unless it is stored in F32; FP8 weights iff quantized.
[[nodiscard]] Arithmetic default_arithmetic(const ModelConfig& config, DType stored);

// Page-aligned anonymous memory, huge pages where the kernel offers them; zero-filled lazily.
class MemoryBlock {
public:
  MemoryBlock() = default;
  [[nodiscard]] static caf::expected<MemoryBlock> allocate(size_t bytes);
  // Blocks side by side, so that huge pages back those too that are smaller than one. Each is given
  // back alone; a huge page that two share is returned once the kernel has split it.
  [[nodiscard]] static caf::expected<std::vector<MemoryBlock>>
  allocate_together(std::span<const size_t> bytes);
  [[nodiscard]] std::byte* data() const { return data_.get(); }
  [[nodiscard]] size_t size() const { return data_ ? size_ : 0; }

private:
  struct Unmap {
    size_t size; // as mapped: whole pages
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Unmap> data_;
  size_t size_ = 0;
};

// One expert of one layer as a relocatable, checksummed block: a header (magic, layer, expert,
// weights version, shapes, dtypes, XXH3-64 of itself and of what follows), then gate, up and down
// packed. Loads and unloads at run time; the bytes can be sent to a peer and adopted there. The
// shared experts of a layer are its expert n_routed_experts (config/ids.hpp), always held whole.
class ExpertBlock {
public:
  [[nodiscard]] static caf::expected<ExpertBlock>
  load(const Checkpoint& checkpoint, const Arithmetic& arithmetic, int64_t layer, ExpertId expert);
  // A block received from a peer: validated (header, checksum, shapes for this config).
  [[nodiscard]] static caf::expected<ExpertBlock>
  adopt(const ModelConfig& config, const Arithmetic& arithmetic, std::span<const std::byte> bytes);
  [[nodiscard]] const FfnWeights& weights() const { return weights_; }
  [[nodiscard]] std::span<const std::byte> bytes() const {
    return {memory_.data(), memory_.size()};
  }
  [[nodiscard]] int64_t layer() const { return layer_; }
  [[nodiscard]] ExpertId expert() const { return expert_; }
  // The digest of the checkpoint it was packed from.
  [[nodiscard]] uint64_t weights_version() const { return weights_version_; }

private:
  friend class ExpertBlockLoader;
  MemoryBlock memory_;
  FfnWeights weights_; // point into memory_, which stays in place when the block is moved
  int64_t layer_ = -1;
  ExpertId expert_;
  uint64_t weights_version_ = 0;
};

// What part of the trunk a rank holds.
struct TrunkShare {
  int tp_rank = 0, tp = 1; // heads, dense and shared FFN columns (contract, Canonical sums)
  bool embedding = true;
  bool head = true;           // only the TP leader computes logits
  bool shared_experts = true; // false where the layout gives them to expert ranks
  bool main_layers = true;    // layers [0, num_hidden_layers)
  int64_t num_mtp_layers = 0; // how many MTP modules to load
};

// With E4M3 weights all forms of kv_b stay E4M3 with the published block scales, so W = Q·s holds
// in FP32 for the naive product, and for the absorbed ones too: w_uk_t is the transposed codes with
// the transposed blocks (a K-block of it is a row block of kv_b). Their activations are never
// quantized, also not with fp8_activations: kv_b reads latents as they lie in the cache.
struct AttentionWeights {            // one layer, this TP rank's heads
  const float* input_norm = nullptr; // [hidden]
  const float* q_a_norm = nullptr;   // [q_lora_rank], null without q_lora_rank
  const float* kv_a_norm = nullptr;  // [kv_lora_rank]
  const float* post_norm = nullptr;  // [hidden]
  PackedMatrix q_a;                  // [q_lora_rank, hidden]; n == 0 without q_lora_rank
  PackedMatrix q;                    // q_b [heads·qk, q_lora_rank] or q_proj [heads·qk, hidden]
  PackedMatrix kv_a;                 // [kv_lora_rank + rope, hidden]
  PackedMatrix kv_b;                 // [heads·(nope + v), kv_lora_rank]
  PackedMatrix o;                    // [hidden, heads·v], this rank's segments
  std::vector<PackedMatrix> w_uk_t;  // per head [kv_lora_rank, nope]
  std::vector<PackedMatrix> w_uv;    // per head [v, kv_lora_rank]; panels of kv_b where they fit
};

struct BlockWeights { // one transformer block without its routed experts
  AttentionWeights attention;
  bool moe = false;
  FfnWeights dense;                   // dense blocks
  FfnWeights shared;                  // MoE blocks that hold the shared experts; else n == 0
  bool ffn_is_cut = false;            // dense/shared carry only this TP rank's K-segments of down
  PackedMatrix router;                // [n_routed_experts, hidden], F32 or BF16 (never FP8)
  const float* router_bias = nullptr; // [n_routed_experts] or null
};

struct MtpWeights { // module k (0-based): layer num_hidden_layers + k
  const float* enorm = nullptr;
  const float* hnorm = nullptr;
  PackedMatrix eh_proj; // [hidden, 2·hidden]: columns [embedding | hidden]
  BlockWeights block;
  const float* head_norm = nullptr;     // shared_head.norm
  PackedMatrix head;                    // the main head where equal or absent in the checkpoint
  const std::byte* embedding = nullptr; // likewise
};

// The trunk share of one rank. Immutable after loading; freely shared between threads.
struct TrunkWeights {
  std::vector<MemoryBlock> memory;
  const std::byte* embedding = nullptr; // [vocab_size, hidden] in A (f32 or bf16)
  std::vector<BlockWeights> layers;
  const float* final_norm = nullptr;
  PackedMatrix head; // [vocab_size, hidden]; n == 0 where not held
  std::vector<MtpWeights> mtp;
  int64_t bytes = 0; // resident bytes of all of it
};

using LoadProgress = std::function<void(int64_t bytes_done, int64_t bytes_total)>;
// Refuses a `tp` that is not a power of two or exceeds o_proj's K-segments, and with
// fp8_activations one that cuts inside a 1×128 tile. An MTP copy of embedding or head that is
// absent or equal to the main one shares its memory.
[[nodiscard]] caf::expected<std::shared_ptr<const TrunkWeights>>
load_trunk(const Checkpoint& checkpoint, const Arithmetic& arithmetic, const TrunkShare& share,
           int num_threads, const LoadProgress& progress);
struct ExpertKey {
  int64_t layer = 0;
  ExpertId expert;
};
// Loads many experts with `num_threads` threads, reading in file order; blocks come back in the
// order of `keys`.
[[nodiscard]] caf::expected<std::vector<ExpertBlock>>
load_experts(const Checkpoint& checkpoint, const Arithmetic& arithmetic,
             std::span<const ExpertKey> keys, int num_threads, const LoadProgress& progress);

} // namespace troupe
