// What an attention rank computes for a step, piece by piece, between the points where it talks to
// others. No communication here: an actor starts these as jobs on its compute stream.
//
// A step is `StepRows`: rows of many requests, prefill and decode mixed. The residual stream `x`
// is [num_rows, hidden] in A. One layer goes
//
//   attention() ─(tp>1: exchange partials)─ finish_attention() ─ dense: dense_ffn() ─(tp>1: …)
//                                                              └ MoE: gate(), [dispatch],
//                                                              shared_ffn(),
//                                                                 [combine arrives], combine()
//
// Not thread-safe: one Trunk belongs to one compute stream, jobs run one at a time. All scratch is
// allocated by the constructor, for Limits::max_rows; a step allocates nothing. With
// fp8_activations the input of each Linear is quantized once, by whoever needs it first (trunk.cpp
// lists them).
#pragma once

#include "config/model_config.hpp"
#include "kernels/backend.hpp"
#include "kernels/rope_table.hpp"
#include "kernels/weights.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace troupe {

// The latent cache of all layers an actor owns, in pages of kPageTokens positions.
class LatentCache {
public:
  // Errc::out_of_memory, naming the bytes, when the machine has no room.
  [[nodiscard]] static caf::expected<std::unique_ptr<LatentCache>>
  make(const ModelConfig& config, DType a, int64_t num_layers, int64_t num_pages);
  [[nodiscard]] LatentCacheLayer layer(int64_t l) const;
  [[nodiscard]] int64_t num_pages() const { return num_pages_; }
  [[nodiscard]] int64_t bytes() const { return static_cast<int64_t>(memory_.size()); }
  // One page of one layer: kPageTokens rows, contiguous. What moves when a rank dies.
  [[nodiscard]] std::span<std::byte> page(int64_t layer, int64_t page) const;

private:
  MemoryBlock memory_;
  DType dtype_ = DType::f32;
  int64_t num_layers_ = 0, num_pages_ = 0, row_elements_ = 0;
};

struct StepRows {
  int64_t num_rows = 0;
  std::vector<int32_t> positions;   // [num_rows]
  std::vector<SequenceRows> prompt; // rows in the naive form
  std::vector<SequenceRows> answer; // rows in the absorbed form
  // Every row is in exactly one SequenceRows; a sequence may appear in both (a replay).
};

// One term of a row's combine: a single expert row with its gate weight, or a complete gate
// group's row (already weighted, summed and rounded). Terms of a row are ordered by group, then by
// top-k place.
struct CombineTerm {
  const void* row = nullptr; // [hidden] in the combine dtype
  float weight = 0;          // ignored for a complete group
  int32_t group = 0;
  bool complete = false;
};

// out = round(sum_i weight_i · row_i) over terms of ONE group in top-k order: acc = fma(w, row,
// acc).
void sum_group(std::span<const CombineTerm> terms, DType dtype, int64_t hidden, void* out);

// x = round(((sum over groups of group sums) + shared) + x): each group's sum rounded to the
// combine dtype first. row_terms[r] … row_terms[r + 1] are the terms of row r. shared: [num_rows,
// hidden] combine dtype or null.
struct CombineArgs {
  int64_t num_rows = 0, hidden = 0;
  DType dtype = DType::f32; // combine dtype = A
  std::span<const CombineTerm> terms;
  std::span<const int32_t> row_terms; // [num_rows + 1]
  Rows shared;
  MutableRows x; // residual in, result out
};
void combine(const CombineArgs& args, Workers& workers);

class Trunk {
public:
  struct Limits {
    int64_t max_rows = 0;    // rows of one step
    int64_t max_context = 0; // longest sequence
    int num_threads = 1;     // of the stream it runs on
  };
  // Throws std::bad_alloc when the machine has no room for the scratch.
  Trunk(const ModelConfig& config, const Arithmetic& arithmetic, const Backend& backend,
        std::shared_ptr<const TrunkWeights> weights, const TrunkShare& share, const Limits& limits);
  ~Trunk();

  // Rows of the embedding table, in A. Ids are valid (the caller checked).
  void embed(std::span<const int32_t> tokens, MutableRows x) const;
  void mtp_embed(int64_t module, std::span<const int32_t> tokens, MutableRows x) const;
  // x = eh_proj [enorm(embedding) ; hnorm(hidden)], both [num_rows, hidden] in A.
  void mtp_input(int64_t module, int64_t num_rows, Rows embedding, Rows hidden, MutableRows x,
                 Workers&);

  // Attention of a block on rows x. Writes the rows' latents to `cache`. With tp == 1 adds to x;
  // else leaves x alone and writes this rank's FP32 partial [num_rows, hidden].
  void attention(const BlockWeights& block, const LatentCacheLayer& cache, const StepRows& rows,
                 MutableRows x, float* partial, Workers&);
  // tp > 1: x = round(x + tree sum).
  void finish_attention(int64_t num_rows, std::span<const float* const> partials, MutableRows x,
                        Workers&);

  // Dense block: x = x + FFN(norm(x)); with block.ffn_is_cut it writes the FP32 partial instead,
  // which finish_attention adds up like attention's. An FFN that is not cut is computed whole by
  // each rank.
  void dense_ffn(const BlockWeights& block, int64_t num_rows, MutableRows x, float* partial,
                 Workers&);

  // MoE block: u = norm(x) in A (what is dispatched, and shared experts eat); the gate's choice.
  // With fp8_activations also the quantized rows (codes [num_rows, hidden], scales).
  struct GateOut {
    MutableRows u;
    uint8_t* codes = nullptr;
    float* scales = nullptr;
    int32_t* topk_idx = nullptr; // [num_rows, num_experts_per_tok]
    float* topk_weight = nullptr;
  };
  void gate(const BlockWeights& block, int64_t num_rows, Rows x, const GateOut& out, Workers&);
  // Shared experts on u (or its quantized form): out [num_rows, hidden] in the combine dtype, or
  // the FP32 partial when cut over TP ranks.
  void shared_ffn(const BlockWeights& block, int64_t num_rows, Rows u, QuantizedRows uq,
                  MutableRows out, float* partial, Workers&);
  void finish_shared(int64_t num_rows, std::span<const float* const> partials, MutableRows out,
                     Workers&);

  // h = final norm of x (A); logits [num_rows, vocab] FP32 from h.
  void final_norm(int64_t num_rows, Rows x, MutableRows h, Workers&);
  void logits(int64_t num_rows, Rows h, float* out, Workers&);
  void mtp_head_norm(int64_t module, int64_t num_rows, Rows x, MutableRows h, Workers&);
  void mtp_logits(int64_t module, int64_t num_rows, Rows h, float* out, Workers&);

  [[nodiscard]] const ModelConfig& config() const;
  [[nodiscard]] const TrunkWeights& weights() const;
  [[nodiscard]] int64_t scratch_bytes() const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The expert side: rows of one or several dispatches of one layer through their experts. A call
// with more than max_rows rows is cut into several, which changes no bit. The constructor allocates
// all scratch and throws std::bad_alloc when there is no room.
class ExpertCompute {
public:
  ExpertCompute(const ModelConfig& config, const Arithmetic& arithmetic, const Backend& backend,
                int64_t max_rows, int num_threads);
  ~ExpertCompute();
  // groups' rows lie in x (or xq); out: [sum of group rows, hidden] in the combine dtype.
  void run(std::span<const ExpertGroup> groups, Rows x, QuantizedRows xq, MutableRows out,
           Workers&);

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace troupe
