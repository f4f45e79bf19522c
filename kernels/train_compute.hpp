// What a training rank computes for one micro-batch of one layer, forward and backward, between the
// points where it talks to others. No communication here: actors start these as jobs.
//
//   attention_forward ─ MoE: gate_forward, [dispatch], ffn_forward (shared), [combine]
//                     └ dense: ffn_forward
//   ffn_backward, [dispatch of gradients], gate_backward, ffn_input_backward, attention_backward
//
// Rows are F32 memory [rows, width], dense. A backward function returns the gradient of its input
// and appends the products for weights to a list (`WeightWork`), so that they can run later
// (zero-bubble W). Gradients of norms and of the embedding, which cost little, are added at once.
//
// Bits: kernels/train_ops.hpp. With bf16 or fp8 every stored row is rounded to BF16.
// Threads: functions take the Workers of one running job; Floats may be dropped on any thread.
#pragma once

#include "config/model_config.hpp"
#include "kernels/rope_table.hpp"
#include "kernels/train_ops.hpp"
#include "kernels/train_stage.hpp"

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <vector>

namespace troupe {

// Memory for rows, kept for reuse: a micro-batch asks for the same sizes over and over, but for
// dispatched rows, whose number varies. So sizes are rounded up to classes, eight per power of two,
// and what is kept is bounded by what was ever in use at once, class by class.
using Floats = std::shared_ptr<float[]>;
class FloatPool : public std::enable_shared_from_this<FloatPool> {
public:
  // n elements, contents undefined, on a cache line's boundary. Throws std::bad_alloc. Callable
  // from any thread.
  [[nodiscard]] Floats take(int64_t n);

private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  std::mutex mutex_;
  std::map<int64_t, std::vector<std::unique_ptr<float[], Free>>> free_; // by size class
};

// dW += dyᵀ x, to be run in its turn.
struct WeightProduct {
  TrainPrecision precision = TrainPrecision::f32;
  int64_t rows = 0, n = 0, k = 0;
  Floats dy, x;
  int64_t dy_at = 0, dy_stride = 0; // dy.get() + dy_at is element (0, 0)
  int64_t x_at = 0, x_stride = 0;
  int64_t gradient = -1;                                // where in the arena
  bool dy_power_of_two = false, x_power_of_two = false; // fp8: what was dispatched
};
using WeightWork = std::vector<WeightProduct>;

// The rows of a micro-batch: sequences of seq_rows rows each.
struct MicroBatchRows {
  int64_t rows = 0, seq_rows = 0;
  std::vector<int32_t> positions; // [rows]
  std::vector<int32_t> first_key; // [rows], absolute row
  // [num_sequences]: so many rows at a sequence's end only fill it. They are computed, and count
  // neither as an expert's load nor in the balance loss. Empty: none anywhere.
  std::vector<int64_t> padding;
  [[nodiscard]] int64_t num_sequences() const { return seq_rows == 0 ? 0 : rows / seq_rows; }
  // The rows of sequence q before its padding.
  [[nodiscard]] int64_t text_rows(int64_t q) const {
    return seq_rows - (padding.empty() ? 0 : padding[static_cast<size_t>(q)]);
  }
};
// The first seq_rows - k rows of each sequence: what MTP module k sees. As row i takes in the token
// of row i + k, there are as many rows of padding as before.
[[nodiscard]] MicroBatchRows without_last(const MicroBatchRows& rows, int64_t k);

struct AttentionSaved {
  Floats x;             // input of the block
  Floats h, q_a, cq, q; // h, cq, q dropped when recomputing
  Floats kv_a, c, kv;   // [rows, latent_dim], rope part rotated; c, kv dropped when recomputing
  Floats out, lse;
};
struct FfnSaved {
  Floats u;       // input
  Floats a, b, z; // z dropped when recomputing
};
struct GateSaved {
  Floats scores;               // [rows, n_experts], before any bias
  std::vector<int32_t> idx;    // [rows, top_k]
  std::vector<float> weight;   // [rows, top_k]
  std::vector<int64_t> counts; // [n_experts], without padding
  double balance_loss = 0;     // already times alpha / batch
};

// Rows of one expert in a grouped call.
struct FfnGroup {
  const TrainFfn* weights = nullptr;
  int64_t row_begin = 0, rows = 0;
  friend bool operator==(const FfnGroup&, const FfnGroup&) = default;
};

class TrainCompute {
public:
  TrainCompute(const ModelConfig& config, TrainPrecision precision, bool recompute,
               const TrainOps& ops, int64_t max_positions, int num_threads);

  // x [rows, hidden] -> x + attention(norm(x)).
  [[nodiscard]] Floats attention_forward(const TrainBlock& b, const MicroBatchRows& rows, Floats x,
                                         AttentionSaved& saved, Workers&);
  // dy is of the block's middle (after the residual); returns the gradient of x.
  [[nodiscard]] Floats attention_backward(const TrainBlock& b, const MicroBatchRows& rows,
                                          AttentionSaved& saved, Floats dy, float* gradients,
                                          WeightWork& work, Workers&);
  // u = norm(x) of the block's middle, and the gradient of x: dy + the norm's share of du.
  [[nodiscard]] Floats norm_forward(const TrainNorm& norm, int64_t rows, const float* x, Workers&);
  [[nodiscard]] Floats norm_backward(const TrainNorm& norm, int64_t rows, const float* x,
                                     const float* du, const float* dy, float* gradients, Workers&);

  // SwiGLU FFNs over groups of rows of u: y [rows, hidden], rounded.
  [[nodiscard]] Floats ffn_forward(std::span<const FfnGroup> groups, int64_t rows, Floats u,
                                   FfnSaved& saved, bool dispatched, Workers&);
  // dy [rows, hidden]. weight and dweight [rows]: gate weights of an expert's rows and their
  // gradients, ⟨W_downᵀ dy, z⟩; null for dense and shared FFNs.
  [[nodiscard]] Floats ffn_backward(std::span<const FfnGroup> groups, int64_t rows, FfnSaved& saved,
                                    Floats dy, const float* weight, float* dweight, bool dispatched,
                                    WeightWork& work, Workers&);

  // Chooses experts. balance_scale is alpha / sequences of the step.
  void gate_forward(const TrainBlock& b, const MicroBatchRows& rows, const float* u,
                    float balance_scale, GateSaved& saved, Workers&);
  // dweight [rows, top_k]; returns the router's share of du [rows, hidden].
  [[nodiscard]] Floats gate_backward(const TrainBlock& b, const MicroBatchRows& rows, Floats u,
                                     const GateSaved& saved, const float* dweight,
                                     float balance_scale, WeightWork& work, Workers&);

  // Rows of the table. ids [rows].
  [[nodiscard]] Floats embed(const float* table, std::span<const int32_t> ids, Workers&);
  void embed_backward(std::span<const int32_t> ids, const float* dy, float* gradient, Workers&);
  // Cross-entropy of head(h); weight multiplies the gradient. Returns Σ loss in F64, rows in order;
  // dlogits [rows, vocab] for head_backward.
  [[nodiscard]] double head_forward(const TrainLinear& head, int64_t rows, const float* h,
                                    std::span<const int32_t> targets, float weight, Floats& dlogits,
                                    Workers&);
  [[nodiscard]] Floats head_backward(const TrainLinear& head, int64_t rows, Floats h,
                                     Floats dlogits, int64_t gradient, WeightWork& work, Workers&);
  // x = eh_proj [enorm(e) ; hnorm(h)]
  struct MtpSaved {
    Floats e, h, pair; // pair dropped when recomputing
  };
  [[nodiscard]] Floats mtp_forward(const TrainMtp& mtp, int64_t rows, Floats e, Floats h,
                                   MtpSaved& saved, Workers&);
  // Returns the gradients of e and h.
  [[nodiscard]] std::pair<Floats, Floats> mtp_backward(const TrainMtp& mtp, int64_t rows,
                                                       MtpSaved& saved, Floats dx, float* gradients,
                                                       WeightWork& work, Workers&);
  // out = round(a + b), rows in place of a.
  void add(int64_t n, float* a, const float* b, Workers&) const;

  // Runs products in order, each once.
  void run(const WeightWork& work, float* arena, Workers&);

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] const TrainOps& ops() const { return ops_; }
  [[nodiscard]] TrainPrecision precision() const { return precision_; }
  [[nodiscard]] bool round() const { return precision_ != TrainPrecision::f32; }
  [[nodiscard]] Floats take(int64_t n) { return pool_->take(n); }

private:
  [[nodiscard]] Floats linear(const TrainLinear& w, int64_t rows, const float* x, int64_t stride,
                              Workers&);
  [[nodiscard]] Floats dgrad(const TrainLinear& w, int64_t rows, const float* dy, int64_t stride,
                             Workers&);
  void rotate(Floats& x, const MicroBatchRows& rows, int64_t heads, int64_t stride, int64_t at,
              int64_t head_stride, bool inverse, Workers&);
  void queries(const TrainBlock& b, const MicroBatchRows& rows, AttentionSaved& s, Workers&);
  void keys(const TrainBlock& b, const MicroBatchRows& rows, AttentionSaved& s, Workers&);
  void norm_into(const TrainNorm& norm, double eps, int64_t rows, const float* x, int64_t x_stride,
                 float* out, int64_t out_stride, Workers&);
  void norm_back(const TrainNorm& norm, double eps, int64_t rows, const float* x, int64_t x_stride,
                 const float* dy, float* dx, int64_t dx_stride, bool accumulate, float* gradients,
                 Workers&);
  [[nodiscard]] AttentionTask attention_task(const MicroBatchRows& rows,
                                             const AttentionSaved& s) const;

  ModelConfig config_;
  TrainPrecision precision_;
  bool recompute_;
  const TrainOps& ops_;
  RopeTables rope_;
  float tau_;
  TrainScratch scratch_;
  std::shared_ptr<FloatPool> pool_;
};

} // namespace troupe
