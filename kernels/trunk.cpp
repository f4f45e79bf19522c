// The composition of §1.2, §2, §3 and §4.1 with its rounding points (contract, Dtypes).
//
// With fp8_activations each Linear input is quantized once: the normalized rows for q_a and kv_a
// (or q_proj), the normalized q latent for q_b, the attention output for o_proj, u for gate, up,
// the shared experts and the dispatch. kv_b takes latents as they lie in the cache in either form,
// and the router, eh_proj and the head take unquantized rows.
#include "kernels/trunk.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>

namespace troupe {

namespace {

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "troupe: bug in the caller of Trunk: %s\n", what);
  std::abort();
}

int64_t tiles_of(int64_t k) { return (k + 127) / 128; }

// Rows of one width in the trunk's scratch.
struct Buffer {
  std::byte* data = nullptr;
  DType dtype = DType::f32;
  int64_t width = 0;
  [[nodiscard]] Rows rows(int64_t column = 0) const {
    return {data + column * size_of(dtype), dtype, width};
  }
  [[nodiscard]] MutableRows out(int64_t column = 0) const {
    return {data + column * size_of(dtype), dtype, width};
  }
};

// Adds up what a step needs, then hands it out of one block.
class ScratchPlan {
public:
  size_t reserve(int64_t bytes) {
    const size_t offset = size_;
    size_ += (static_cast<size_t>(std::max<int64_t>(bytes, 0)) + 63) / 64 * 64;
    return offset;
  }
  [[nodiscard]] size_t size() const { return size_; }

private:
  size_t size_ = 0;
};

} // namespace

struct Trunk::Impl {
  Impl(const ModelConfig& c, const Arithmetic& a, const Backend& b,
       std::shared_ptr<const TrunkWeights> w, const TrunkShare& s, const Limits& l);

  // ---- pieces shared by several steps ----
  void check_rows(int64_t n) const {
    if (n < 0 || n > limits.max_rows)
      stop("more rows than Limits::max_rows");
  }
  void norm(int64_t n, int64_t width, Rows x, const float* weight, double eps, MutableRows out,
            Workers& workers) const;
  // The quantized form of x in the trunk's scratch; empty without fp8_activations.
  [[nodiscard]] QuantizedRows quantized(int64_t n, int64_t k, Rows x, Workers& workers) const;
  // out = W x (+ residual), on xq where there is one.
  void linear(int64_t n, const PackedMatrix& w, Rows x, const QuantizedRows& xq, MutableRows out,
              Rows residual, Workers& workers) const;
  void rotate(int64_t n, int64_t heads, MutableRows x, int64_t head_stride, const StepRows& rows,
              Workers& workers) const;
  void query(const AttentionWeights& w, int64_t n, const QuantizedRows& uq, const StepRows& rows,
             Workers& workers) const;
  void latents(const AttentionWeights& w, int64_t n, const QuantizedRows& uq, const StepRows& rows,
               const LatentCacheLayer& cache, Workers& workers) const;
  void store_latents(std::span<const SequenceRows> sequences, const LatentCacheLayer& cache) const;
  void attend(const AttentionWeights& w, const StepRows& rows, const LatentCacheLayer& cache,
              Workers& workers) const;
  void ffn(const FfnWeights& w, int64_t n, Rows u, const QuantizedRows& uq, MutableRows out,
           Rows residual, Workers& workers) const;
  void add_partials(int64_t n, std::span<const float* const> partials, Rows residual,
                    MutableRows out, Workers& workers) const;
  void copy_embedding(const std::byte* table, std::span<const int32_t> tokens, MutableRows x) const;

  const ModelConfig config;
  const Arithmetic arithmetic;
  const Backend& backend;
  const std::shared_ptr<const TrunkWeights> weights;
  const Limits limits;
  const int64_t hidden, heads;
  const bool cut_attention; // this rank holds only some heads
  MlaShape shape;
  RopeTables rope;

  MemoryBlock memory;
  Buffer u;           // normalized rows
  Buffer u_f32;       // the same in F32, for the router; u itself where A is F32
  Buffer q_latent;    // [q_lora_rank]
  Buffer q;           // [heads·(nope + rope)]
  Buffer kv;          // [c ; k_rope]
  Buffer attended;    // [heads·v]
  Buffer mtp_pair;    // [2·hidden], only with MTP modules
  Buffer gate_logits; // F32 [n_routed_experts]
  uint8_t* codes = nullptr;
  float* scales = nullptr;
  int64_t quantized_width = 0; // widest quantized row
  std::span<std::byte> kernel_scratch;
  std::vector<int32_t> all_rows; // 0, 1, 2, …: a grouped call with one group
};

Trunk::Impl::Impl(const ModelConfig& c, const Arithmetic& a, const Backend& b,
                  std::shared_ptr<const TrunkWeights> w, const TrunkShare& s, const Limits& l)
    : config(c), arithmetic(a), backend(b), weights(std::move(w)), limits(l), hidden(c.hidden_size),
      heads(c.num_attention_heads / s.tp),
      cut_attention(s.tp > 1), shape{heads,        c.qk_nope_head_dim, c.qk_rope_head_dim,
                                     c.v_head_dim, c.kv_lora_rank,     softmax_scale(c)},
      rope(c, l.max_context), all_rows(static_cast<size_t>(l.max_rows)) {
  const int64_t n = limits.max_rows;
  const DType act = arithmetic.activations;
  std::iota(all_rows.begin(), all_rows.end(), 0);
  ScratchPlan plan;
  std::vector<std::pair<Buffer*, size_t>> places;
  const auto buffer = [&](Buffer& out, DType dtype, int64_t width) {
    out = {nullptr, dtype, width};
    places.emplace_back(&out, plan.reserve(n * width * size_of(dtype)));
  };
  buffer(u, act, hidden);
  buffer(u_f32, DType::f32, act == DType::f32 ? 0 : hidden);
  buffer(q_latent, act, config.q_lora_rank);
  buffer(q, act, heads * config.qk_head_dim());
  buffer(kv, act, config.latent_dim());
  buffer(attended, act, heads * config.v_head_dim);
  buffer(mtp_pair, act, weights->mtp.empty() ? 0 : 2 * hidden);
  buffer(gate_logits, DType::f32, config.n_routed_experts);
  if (arithmetic.fp8_activations)
    quantized_width = std::max({hidden, config.q_lora_rank, attended.width});
  const size_t codes_at = plan.reserve(n * quantized_width);
  const size_t scales_at = plan.reserve(n * tiles_of(quantized_width) * 4);
  const int64_t width = std::max(config.intermediate_size,
                                 config.shared_intermediate_size()); // cut ones are narrower
  const int64_t kernel_bytes =
      std::max(mla_scratch_bytes(shape, act, n, limits.max_context, limits.num_threads),
               ffn_scratch_bytes(width, hidden, n, limits.num_threads));
  const size_t kernel_at = plan.reserve(kernel_bytes);

  auto block = MemoryBlock::allocate(plan.size());
  if (!block)
    throw std::bad_alloc{};
  memory = std::move(*block);
  for (const auto& [out, offset] : places)
    out->data = memory.data() + offset;
  codes = reinterpret_cast<uint8_t*>(memory.data() + codes_at);
  scales = reinterpret_cast<float*>(memory.data() + scales_at);
  kernel_scratch = {memory.data() + kernel_at, static_cast<size_t>(kernel_bytes)};
}

void Trunk::Impl::norm(int64_t n, int64_t width, Rows x, const float* weight, double eps,
                       MutableRows out, Workers& workers) const {
  RmsNormArgs args;
  args.num_rows = n;
  args.n = width;
  args.x = x;
  args.weight = weight;
  args.eps = static_cast<float>(eps);
  args.out = out;
  backend.rms_norm(args, workers);
}

QuantizedRows Trunk::Impl::quantized(int64_t n, int64_t k, Rows x, Workers& workers) const {
  if (!arithmetic.fp8_activations)
    return {};
  QuantizeArgs args;
  args.num_rows = n;
  args.k = k;
  args.x = x;
  args.power_of_two = arithmetic.fp8_power_of_two;
  args.codes = codes;
  args.scales = scales;
  args.code_stride = k;
  args.scale_stride = tiles_of(k);
  backend.quantize(args, workers);
  return {codes, scales, args.code_stride, args.scale_stride};
}

void Trunk::Impl::linear(int64_t n, const PackedMatrix& w, Rows x, const QuantizedRows& xq,
                         MutableRows out, Rows residual, Workers& workers) const {
  LinearArgs args;
  args.num_rows = n;
  args.xq = xq;
  if (xq.codes == nullptr)
    args.x = x;
  args.w = &w;
  args.out = out;
  args.residual = residual;
  backend.linear(args, workers);
}

void Trunk::Impl::rotate(int64_t n, int64_t num_heads, MutableRows x, int64_t head_stride,
                         const StepRows& rows, Workers& workers) const {
  RopeArgs args;
  args.num_rows = n;
  args.heads = num_heads;
  args.x = x;
  args.head_stride = head_stride;
  args.positions = rows.positions.data();
  args.table = &rope.table();
  backend.rope(args, workers);
}

// q = [q_nope ; rotated q_rope] per head, from u.
void Trunk::Impl::query(const AttentionWeights& w, int64_t n, const QuantizedRows& uq,
                        const StepRows& rows, Workers& workers) const {
  if (config.q_lora_rank > 0) {
    const int64_t d_q = config.q_lora_rank;
    linear(n, w.q_a, u.rows(), uq, q_latent.out(), {}, workers);
    norm(n, d_q, q_latent.rows(), w.q_a_norm, kLatentNormEps, q_latent.out(), workers);
    linear(n, w.q, q_latent.rows(), quantized(n, d_q, q_latent.rows(), workers), q.out(), {},
           workers);
  } else {
    linear(n, w.q, u.rows(), uq, q.out(), {}, workers);
  }
  rotate(n, heads, q.out(config.qk_nope_head_dim), config.qk_head_dim(), rows, workers);
}

// [c ; k_rope] of every row, from u into the cache. Only c passes through the norm.
void Trunk::Impl::latents(const AttentionWeights& w, int64_t n, const QuantizedRows& uq,
                          const StepRows& rows, const LatentCacheLayer& cache,
                          Workers& workers) const {
  const int64_t d_c = config.kv_lora_rank;
  linear(n, w.kv_a, u.rows(), uq, kv.out(), {}, workers);
  norm(n, d_c, kv.rows(), w.kv_a_norm, kLatentNormEps, kv.out(), workers);
  rotate(n, 1, kv.out(d_c), config.qk_rope_head_dim, rows, workers);
  store_latents(rows.prompt, cache);
  store_latents(rows.answer, cache);
}

void Trunk::Impl::store_latents(std::span<const SequenceRows> sequences,
                                const LatentCacheLayer& cache) const {
  const auto row_bytes = static_cast<size_t>(kv.width * size_of(kv.dtype));
  for (const auto& sequence : sequences)
    for (int64_t i = 0; i < sequence.num_rows; ++i) {
      const int64_t position = sequence.first_position + i;
      const int64_t place =
          int64_t{sequence.pages[position / kPageTokens]} * kPageTokens + position % kPageTokens;
      std::memcpy(cache.base + static_cast<size_t>(place) * row_bytes,
                  kv.data + static_cast<size_t>(sequence.row_begin + i) * row_bytes, row_bytes);
    }
}

void Trunk::Impl::attend(const AttentionWeights& w, const StepRows& rows,
                         const LatentCacheLayer& cache, Workers& workers) const {
  if (!rows.prompt.empty()) {
    MlaNaiveArgs args;
    args.shape = shape;
    args.sequences = rows.prompt;
    args.q = q.rows();
    args.cache = cache;
    args.kv_b = &w.kv_b;
    args.out = attended.out();
    args.scratch = kernel_scratch;
    backend.mla_naive(args, workers);
  }
  if (!rows.answer.empty()) {
    MlaAbsorbedArgs args;
    args.shape = shape;
    args.sequences = rows.answer;
    args.q = q.rows();
    args.cache = cache;
    args.w_uk_t = w.w_uk_t;
    args.w_uv = w.w_uv;
    args.out = attended.out();
    args.scratch = kernel_scratch;
    backend.mla_absorbed(args, workers);
  }
}

void Trunk::Impl::ffn(const FfnWeights& w, int64_t n, Rows rows_u, const QuantizedRows& uq,
                      MutableRows out, Rows residual, Workers& workers) const {
  ExpertGroup group;
  group.weights = &w;
  group.row_of_x = std::span{all_rows}.first(static_cast<size_t>(n));
  GroupedFfnArgs args;
  args.groups = {&group, 1};
  args.xq = uq;
  args.power_of_two = arithmetic.fp8_power_of_two;
  if (uq.codes == nullptr)
    args.x = rows_u;
  args.out = out;
  args.residual = residual;
  args.scratch = kernel_scratch;
  args.hidden = hidden;
  backend.grouped_ffn(args, workers);
}

void Trunk::Impl::add_partials(int64_t n, std::span<const float* const> partials, Rows residual,
                               MutableRows out, Workers& workers) const {
  AddPartialsArgs args;
  args.num_rows = n;
  args.n = hidden;
  args.partials = partials;
  args.residual = residual;
  args.out = out;
  backend.add_partials(args, workers);
}

void Trunk::Impl::copy_embedding(const std::byte* table, std::span<const int32_t> tokens,
                                 MutableRows x) const {
  if (table == nullptr)
    stop("this rank does not hold the embedding");
  const auto element = static_cast<size_t>(size_of(arithmetic.activations));
  const auto row_bytes = static_cast<size_t>(hidden) * element;
  auto* out = static_cast<std::byte*>(x.data);
  for (const int32_t token : tokens) {
    if (token < 0 || token >= config.vocab_size)
      stop("a token id outside the vocabulary");
    std::memcpy(out, table + static_cast<size_t>(token) * row_bytes, row_bytes);
    out += static_cast<size_t>(x.stride) * element;
  }
}

Trunk::Trunk(const ModelConfig& config, const Arithmetic& arithmetic, const Backend& backend,
             std::shared_ptr<const TrunkWeights> weights, const TrunkShare& share,
             const Limits& limits)
    : impl_(
          std::make_unique<Impl>(config, arithmetic, backend, std::move(weights), share, limits)) {}
Trunk::~Trunk() = default;

void Trunk::embed(std::span<const int32_t> tokens, MutableRows x) const {
  impl_->copy_embedding(impl_->weights->embedding, tokens, x);
}

void Trunk::mtp_embed(int64_t module, std::span<const int32_t> tokens, MutableRows x) const {
  impl_->copy_embedding(impl_->weights->mtp[static_cast<size_t>(module)].embedding, tokens, x);
}

void Trunk::mtp_input(int64_t module, int64_t num_rows, Rows embedding, Rows hidden, MutableRows x,
                      Workers& workers) {
  auto& t = *impl_;
  t.check_rows(num_rows);
  const auto& mtp = t.weights->mtp[static_cast<size_t>(module)];
  const double eps = t.config.rms_norm_eps;
  t.norm(num_rows, t.hidden, embedding, mtp.enorm, eps, t.mtp_pair.out(), workers);
  t.norm(num_rows, t.hidden, hidden, mtp.hnorm, eps, t.mtp_pair.out(t.hidden), workers);
  t.linear(num_rows, mtp.eh_proj, t.mtp_pair.rows(), {}, x, {}, workers);
}

void Trunk::attention(const BlockWeights& block, const LatentCacheLayer& cache,
                      const StepRows& rows, MutableRows x, float* partial, Workers& workers) {
  auto& t = *impl_;
  const int64_t n = rows.num_rows;
  t.check_rows(n);
  const auto& w = block.attention;
  const Rows residual{x.data, x.dtype, x.stride};
  t.norm(n, t.hidden, residual, w.input_norm, t.config.rms_norm_eps, t.u.out(), workers);
  // uq lies in the one scratch for quantized rows, so all who read it come before the next use.
  const auto uq = t.quantized(n, t.hidden, t.u.rows(), workers);
  t.latents(w, n, uq, rows, cache, workers);
  t.query(w, n, uq, rows, workers);
  t.attend(w, rows, cache, workers);
  const auto attended = t.quantized(n, t.attended.width, t.attended.rows(), workers);
  if (t.cut_attention)
    t.linear(n, w.o, t.attended.rows(), attended, {partial, DType::f32, t.hidden}, {}, workers);
  else
    t.linear(n, w.o, t.attended.rows(), attended, x, residual, workers);
}

void Trunk::finish_attention(int64_t num_rows, std::span<const float* const> partials,
                             MutableRows x, Workers& workers) {
  impl_->add_partials(num_rows, partials, {x.data, x.dtype, x.stride}, x, workers);
}

void Trunk::dense_ffn(const BlockWeights& block, int64_t num_rows, MutableRows x, float* partial,
                      Workers& workers) {
  auto& t = *impl_;
  t.check_rows(num_rows);
  const Rows residual{x.data, x.dtype, x.stride};
  t.norm(num_rows, t.hidden, residual, block.attention.post_norm, t.config.rms_norm_eps, t.u.out(),
         workers);
  const auto uq = t.quantized(num_rows, t.hidden, t.u.rows(), workers);
  if (block.ffn_is_cut)
    t.ffn(block.dense, num_rows, t.u.rows(), uq, {partial, DType::f32, t.hidden}, {}, workers);
  else
    t.ffn(block.dense, num_rows, t.u.rows(), uq, x, residual, workers);
}

void Trunk::gate(const BlockWeights& block, int64_t num_rows, Rows x, const GateOut& out,
                 Workers& workers) {
  auto& t = *impl_;
  t.check_rows(num_rows);
  const auto& c = t.config;
  t.norm(num_rows, t.hidden, x, block.attention.post_norm, c.rms_norm_eps, out.u, workers);
  Rows u{out.u.data, out.u.dtype, out.u.stride};
  if (t.arithmetic.fp8_activations && out.codes != nullptr) {
    QuantizeArgs args;
    args.num_rows = num_rows;
    args.k = t.hidden;
    args.x = u;
    args.power_of_two = t.arithmetic.fp8_power_of_two;
    args.codes = out.codes;
    args.scales = out.scales;
    args.code_stride = t.hidden;
    args.scale_stride = tiles_of(t.hidden);
    t.backend.quantize(args, workers);
  }
  if (u.dtype == DType::bf16) { // the router multiplies in F32 on every backend
    workers.parallel_for(num_rows, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const auto* from = static_cast<const BF16*>(u.data) + r * u.stride;
        auto* to = reinterpret_cast<float*>(t.u_f32.data) + r * t.u_f32.width;
        std::transform(from, from + t.hidden, to, [](BF16 v) { return to_float(v); });
      }
    });
    u = t.u_f32.rows();
  }
  t.linear(num_rows, block.router, u, {}, t.gate_logits.out(), {}, workers);
  GateArgs args;
  args.num_rows = num_rows;
  args.n_experts = c.n_routed_experts;
  args.n_group = c.n_group;
  args.topk_group = c.topk_group;
  args.top_k = c.num_experts_per_tok;
  args.scoring = c.scoring_func;
  args.method = c.topk_method;
  args.norm_topk_prob = c.norm_topk_prob;
  args.routed_scaling_factor = static_cast<float>(c.routed_scaling_factor);
  args.logits = reinterpret_cast<const float*>(t.gate_logits.data);
  args.bias = block.router_bias;
  args.topk_idx = out.topk_idx;
  args.topk_weight = out.topk_weight;
  t.backend.gate(args, workers);
}

void Trunk::shared_ffn(const BlockWeights& block, int64_t num_rows, Rows u, QuantizedRows uq,
                       MutableRows out, float* partial, Workers& workers) {
  auto& t = *impl_;
  t.check_rows(num_rows);
  if (t.arithmetic.fp8_activations && uq.codes == nullptr)
    uq = t.quantized(num_rows, t.hidden, u, workers);
  if (block.ffn_is_cut)
    out = {partial, DType::f32, t.hidden};
  t.ffn(block.shared, num_rows, u, uq, out, {}, workers);
}

void Trunk::finish_shared(int64_t num_rows, std::span<const float* const> partials, MutableRows out,
                          Workers& workers) {
  impl_->add_partials(num_rows, partials, {}, out, workers);
}

void Trunk::final_norm(int64_t num_rows, Rows x, MutableRows h, Workers& workers) {
  impl_->norm(num_rows, impl_->hidden, x, impl_->weights->final_norm, impl_->config.rms_norm_eps, h,
              workers);
}

void Trunk::logits(int64_t num_rows, Rows h, float* out, Workers& workers) {
  impl_->linear(num_rows, impl_->weights->head, h, {}, {out, DType::f32, impl_->config.vocab_size},
                {}, workers);
}

void Trunk::mtp_head_norm(int64_t module, int64_t num_rows, Rows x, MutableRows h,
                          Workers& workers) {
  const auto& mtp = impl_->weights->mtp[static_cast<size_t>(module)];
  impl_->norm(num_rows, impl_->hidden, x, mtp.head_norm, impl_->config.rms_norm_eps, h, workers);
}

void Trunk::mtp_logits(int64_t module, int64_t num_rows, Rows h, float* out, Workers& workers) {
  const auto& mtp = impl_->weights->mtp[static_cast<size_t>(module)];
  impl_->linear(num_rows, mtp.head, h, {}, {out, DType::f32, impl_->config.vocab_size}, {},
                workers);
}

const ModelConfig& Trunk::config() const { return impl_->config; }
const TrunkWeights& Trunk::weights() const { return *impl_->weights; }
int64_t Trunk::scratch_bytes() const { return static_cast<int64_t>(impl_->memory.size()); }

} // namespace troupe
