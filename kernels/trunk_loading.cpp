// Loading a trunk takes two rounds over the tensors: the first finds them and reserves their places
// in one block of memory, the second, run as a LoadPlan, fills the places. MTP's copies of the
// embedding and the head come last: they are converted into scratch and compared with what the main
// ones became, and get memory of their own only where they differ.
#include "kernels/kv_b_forms.hpp"
#include "kernels/load_plan.hpp"
#include "kernels/weight_source.hpp"
#include "kernels/weights.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace troupe {

namespace {

// out[i] = src[i] as F32, or rounded to BF16; src may be unaligned and is F32, BF16 or F16.
void convert(const std::byte* src, DType from, int64_t n, DType to, std::byte* out) {
  if (from == to) {
    std::memcpy(out, src, static_cast<size_t>(n * size_of(from)));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    float value = 0;
    if (from == DType::f32) {
      std::memcpy(&value, src + 4 * i, 4);
    } else {
      uint16_t bits = 0;
      std::memcpy(&bits, src + 2 * i, 2);
      value = from == DType::bf16 ? to_float(BF16{bits}) : f16_to_float(bits);
    }
    if (to == DType::f32)
      std::memcpy(out + 4 * i, &value, 4);
    else if (const BF16 rounded = to_bf16(value); true)
      std::memcpy(out + 2 * i, &rounded, 2);
  }
}

int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }
int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class TrunkLoader {
public:
  TrunkLoader(const Checkpoint& checkpoint, const Arithmetic& arithmetic, const TrunkShare& share)
      : checkpoint_(checkpoint), config_(checkpoint.config()), arithmetic_(arithmetic),
        share_(share), sources_(checkpoint, arithmetic), plan_(checkpoint) {}

  caf::error load(int num_threads, const LoadProgress& progress);
  std::shared_ptr<const TrunkWeights> take() { return std::move(weights_); }

private:
  using Place = std::function<void(std::byte*)>;

  caf::error check_share() const;
  void describe();
  void describe_layer(int64_t layer, BlockWeights& block);
  void describe_attention(const std::string& prefix, AttentionWeights& attention);
  void describe_kv_b(const std::string& name, AttentionWeights& attention);
  void describe_ffn(const std::string& prefix, int64_t width, BlockWeights& block, FfnWeights& ffn);
  void describe_mtp(int64_t module, MtpWeights& mtp);
  caf::error fill(int num_threads, const LoadProgress& progress);
  caf::error share_copies(int num_threads, const LoadProgress& progress);

  // A place of `bytes` in the trunk's memory; `place` is called with it once it exists.
  void reserve(int64_t bytes, Place place);
  void vector(const std::string& name, int64_t n, const float*& out);
  void optional_vector(const std::string& name, int64_t n, const float*& out);
  void table(const std::string& name, const std::byte*& out);
  void matrix(const MatrixPart& part, PackedMatrix& out);
  static void pack_in_jobs(LoadPlan& plan, const WeightSources::Matrix& m, std::byte* memory);

  struct Copy; // of the embedding or head in an MTP module
  void compare_embedding(LoadPlan& plan, Copy& copy);
  void compare_head(LoadPlan& plan, Copy& copy);
  caf::error load_copy(Copy& copy, int num_threads);

  [[nodiscard]] std::string main_head() const {
    return config_.tie_word_embeddings ? "model.embed_tokens" : "lm_head";
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const Arithmetic arithmetic_;
  const TrunkShare share_;
  WeightSources sources_;
  LoadPlan plan_;
  std::shared_ptr<TrunkWeights> weights_ = std::make_shared<TrunkWeights>();
  std::vector<std::pair<size_t, Place>> places_;
  size_t reserved_ = 0;
};

// A tensor of an MTP module that is normally equal to a main one.
struct TrunkLoader::Copy {
  std::string name;
  MtpWeights* mtp = nullptr;
  bool head = false;
  std::atomic<bool> equal{true};
};

caf::error TrunkLoader::check_share() const {
  if (auto error = check_arithmetic(config_, arithmetic_))
    return error;
  if (share_.tp < 1 || share_.tp_rank < 0 || share_.tp_rank >= share_.tp)
    return make_error(Errc::invalid_argument,
                      fmt::format("no tensor-parallel rank {} of {}", share_.tp_rank, share_.tp));
  if (share_.num_mtp_layers < 0 || share_.num_mtp_layers > checkpoint_.num_mtp_layers())
    return make_error(Errc::invalid_argument,
                      fmt::format("the checkpoint holds {} MTP modules, {} asked for",
                                  checkpoint_.num_mtp_layers(), share_.num_mtp_layers));
  const auto segments = head_segments(config_.num_attention_heads, config_.v_head_dim);
  if (segments.count % share_.tp != 0)
    return make_error(Errc::invalid_argument,
                      fmt::format("tensor parallelism {}: with {} attention heads it must be a "
                                  "power of two up to {}",
                                  share_.tp, config_.num_attention_heads, segments.count));
  const auto mine = slice(segments, share_.tp_rank, share_.tp);
  if (arithmetic_.fp8_activations && share_.tp > 1 &&
      (mine.begin[mine.count] - mine.begin[0]) % 128 != 0)
    return make_error(Errc::invalid_argument,
                      fmt::format("tensor parallelism {} cuts o_proj every {} columns, inside a "
                                  "1×128 tile of FP8 activations",
                                  share_.tp, mine.begin[mine.count] - mine.begin[0]));
  return {};
}

void TrunkLoader::reserve(int64_t bytes, Place place) {
  places_.emplace_back(reserved_, std::move(place));
  reserved_ += static_cast<size_t>(round_up(bytes, 64));
}

void TrunkLoader::vector(const std::string& name, int64_t n, const float*& out) {
  const auto* view = sources_.tensor(name, {n});
  if (view == nullptr)
    return;
  reserve(n * 4, [this, view, n, &out](std::byte* memory) {
    out = reinterpret_cast<const float*>(memory);
    plan_.add({{view, 0, static_cast<int64_t>(view->bytes.size())}}, [=]() -> caf::error {
      convert(view->bytes.data(), view->dtype, n, DType::f32, memory);
      return {};
    });
  });
}

void TrunkLoader::optional_vector(const std::string& name, int64_t n, const float*& out) {
  if (sources_.has(name))
    vector(name, n, out);
}

// Calls f(first row, rows) for runs of rows of about kJobBytes.
template <class F>
void for_row_runs(int64_t rows, int64_t row_bytes, int64_t granule, F f) {
  const int64_t run =
      std::max(round_down(LoadPlan::kJobBytes / std::max<int64_t>(row_bytes, 1), granule), granule);
  for (int64_t row = 0; row < rows; row += run)
    f(row, std::min(run, rows - row));
}

void TrunkLoader::table(const std::string& name, const std::byte*& out) {
  const int64_t rows = config_.vocab_size, cols = config_.hidden_size;
  const auto* view = sources_.tensor(name, {rows, cols});
  if (view == nullptr)
    return;
  const DType a = arithmetic_.activations;
  reserve(rows * cols * size_of(a), [=, this, &out](std::byte* memory) {
    out = memory;
    const int64_t row_bytes = cols * size_of(view->dtype);
    for_row_runs(rows, row_bytes, 1, [&](int64_t row, int64_t count) {
      plan_.add({{view, row * row_bytes, count * row_bytes}}, [=]() -> caf::error {
        convert(view->bytes.data() + row * row_bytes, view->dtype, count * cols, a,
                memory + row * cols * size_of(a));
        return {};
      });
    });
  });
}

void TrunkLoader::pack_in_jobs(LoadPlan& plan, const WeightSources::Matrix& m, std::byte* memory) {
  const int64_t row_bytes = m.source.total_cols * size_of(m.source.dtype);
  // Pairs of panels, so that quantizing in blocks of 128 rows looks at each block once.
  for_row_runs(m.packed.n, row_bytes, 2 * kPanelRows, [&](int64_t row, int64_t count) {
    plan.add(
        {{m.tensor, (m.source.row0 + row) * row_bytes, count * row_bytes}},
        [=]() -> caf::error {
          auto packed = m.packed;
          return pack(packed, {&m.source, 1}, memory, row / kPanelRows,
                      (row + count + kPanelRows - 1) / kPanelRows);
        },
        m.shared());
  });
}

void TrunkLoader::matrix(const MatrixPart& part, PackedMatrix& out) {
  auto m = sources_.matrix(part);
  if (sources_.error())
    return;
  out = m.packed;
  reserve(packed_bytes(out), [this, m = std::move(m), &out](std::byte* memory) {
    attach(out, memory);
    pack_in_jobs(plan_, m, memory);
  });
}

void TrunkLoader::describe_attention(const std::string& prefix, AttentionWeights& attention) {
  const auto& c = config_;
  const int64_t d = c.hidden_size;
  const int64_t heads = c.num_attention_heads / share_.tp;
  vector(prefix + "kv_a_layernorm.weight", c.kv_lora_rank, attention.kv_a_norm);
  auto q = whole_matrix(prefix + "q_proj", c.num_attention_heads * c.qk_head_dim(), d);
  if (c.q_lora_rank > 0) {
    vector(prefix + "q_a_layernorm.weight", c.q_lora_rank, attention.q_a_norm);
    matrix(whole_matrix(prefix + "q_a_proj", c.q_lora_rank, d), attention.q_a);
    q = whole_matrix(prefix + "q_b_proj", q.total_rows, c.q_lora_rank);
  }
  q.rows = heads * c.qk_head_dim();
  q.row0 = share_.tp_rank * q.rows;
  matrix(q, attention.q);
  matrix(whole_matrix(prefix + "kv_a_proj_with_mqa", c.latent_dim(), d), attention.kv_a);
  describe_kv_b(prefix + "kv_b_proj", attention);
  auto o = whole_matrix(prefix + "o_proj", d, c.num_attention_heads * c.v_head_dim);
  o.segments = slice(head_segments(c.num_attention_heads, c.v_head_dim), share_.tp_rank, share_.tp);
  matrix(o, attention.o);
}

void TrunkLoader::describe_kv_b(const std::string& name, AttentionWeights& attention) {
  const auto& c = config_;
  const int64_t heads = c.num_attention_heads / share_.tp;
  const int64_t per_head = c.qk_nope_head_dim + c.v_head_dim;
  auto part = whole_matrix(name, c.num_attention_heads * per_head, c.kv_lora_rank);
  part.rows = heads * per_head;
  part.row0 = share_.tp_rank * part.rows;
  auto m = sources_.matrix(part);
  if (sources_.error())
    return;
  const auto forms = std::make_shared<const KvBForms>(m, heads, c.qk_nope_head_dim, c.v_head_dim);
  reserve(forms->bytes(), [=, this, &attention](std::byte* memory) {
    forms->attach(memory, attention);
    const int64_t row_bytes = c.kv_lora_rank * size_of(m.source.dtype);
    plan_.add(
        {{m.tensor, m.source.row0 * row_bytes, m.source.rows * row_bytes}},
        [forms, memory] { return forms->pack(memory); }, m.shared());
  });
}

// A dense or shared FFN: this rank's segments where there are enough for all, else all of it.
void TrunkLoader::describe_ffn(const std::string& prefix, int64_t width, BlockWeights& block,
                               FfnWeights& ffn) {
  auto segments = width_segments(width);
  block.ffn_is_cut = share_.tp > 1 && segments.count >= share_.tp;
  if (block.ffn_is_cut)
    segments = slice(segments, share_.tp_rank, share_.tp);
  const auto parts = ffn_parts(prefix, config_.hidden_size, width, segments);
  matrix(parts.gate, ffn.gate);
  matrix(parts.up, ffn.up);
  matrix(parts.down, ffn.down);
}

void TrunkLoader::describe_layer(int64_t layer, BlockWeights& block) {
  const auto& c = config_;
  const auto prefix = fmt::format("model.layers.{}.", layer);
  block.moe = layer >= c.num_hidden_layers || c.is_moe(layer);
  vector(prefix + "input_layernorm.weight", c.hidden_size, block.attention.input_norm);
  vector(prefix + "post_attention_layernorm.weight", c.hidden_size, block.attention.post_norm);
  describe_attention(prefix + "self_attn.", block.attention);
  if (!block.moe)
    return describe_ffn(prefix + "mlp.", c.intermediate_size, block, block.dense);
  matrix(whole_matrix(prefix + "mlp.gate", c.n_routed_experts, c.hidden_size, Storage::exact),
         block.router);
  optional_vector(prefix + "mlp.gate.e_score_correction_bias", c.n_routed_experts,
                  block.router_bias);
  if (share_.shared_experts && c.n_shared_experts > 0)
    describe_ffn(prefix + "mlp.shared_experts.", c.shared_intermediate_size(), block, block.shared);
}

void TrunkLoader::describe_mtp(int64_t module, MtpWeights& mtp) {
  const int64_t layer = config_.num_hidden_layers + module, d = config_.hidden_size;
  const auto prefix = fmt::format("model.layers.{}.", layer);
  vector(prefix + "enorm.weight", d, mtp.enorm);
  vector(prefix + "hnorm.weight", d, mtp.hnorm);
  matrix(whole_matrix(prefix + "eh_proj", d, 2 * d, Storage::unquantized), mtp.eh_proj);
  describe_layer(layer, mtp.block);
  vector(prefix + "shared_head.norm.weight", d, mtp.head_norm);
}

void TrunkLoader::describe() {
  auto& w = *weights_;
  const bool mtp = share_.num_mtp_layers > 0;
  if (share_.embedding || mtp)
    table("model.embed_tokens.weight", w.embedding);
  if (share_.main_layers) {
    w.layers.resize(static_cast<size_t>(config_.num_hidden_layers));
    for (size_t l = 0; l < w.layers.size(); ++l)
      describe_layer(static_cast<int64_t>(l), w.layers[l]);
    vector("model.norm.weight", config_.hidden_size, w.final_norm);
  }
  if (share_.head)
    matrix(whole_matrix(main_head(), config_.vocab_size, config_.hidden_size, Storage::unquantized),
           w.head);
  w.mtp.resize(static_cast<size_t>(share_.num_mtp_layers));
  for (size_t k = 0; k < w.mtp.size(); ++k)
    describe_mtp(static_cast<int64_t>(k), w.mtp[k]);
}

caf::error TrunkLoader::fill(int num_threads, const LoadProgress& progress) {
  auto memory = MemoryBlock::allocate(reserved_);
  if (!memory)
    return with_context("weights of the trunk", memory.error());
  for (const auto& [offset, place] : places_)
    place(memory->data() + offset);
  weights_->memory.push_back(std::move(*memory));
  return plan_.run(num_threads, progress, 0, plan_.bytes());
}

void TrunkLoader::compare_embedding(LoadPlan& plan, Copy& copy) {
  const int64_t rows = config_.vocab_size, cols = config_.hidden_size;
  const auto* view = sources_.tensor(copy.name, {rows, cols});
  if (view == nullptr)
    return;
  const DType a = arithmetic_.activations;
  const std::byte* const main = weights_->embedding;
  const int64_t row_bytes = cols * size_of(view->dtype);
  for_row_runs(rows, row_bytes, 1, [&](int64_t row, int64_t count) {
    plan.add({{view, row * row_bytes, count * row_bytes}}, [=, &copy]() -> caf::error {
      std::vector<std::byte> converted(static_cast<size_t>(count * cols * size_of(a)));
      convert(view->bytes.data() + row * row_bytes, view->dtype, count * cols, a, converted.data());
      if (std::memcmp(converted.data(), main + row * cols * size_of(a), converted.size()) != 0)
        copy.equal = false;
      return {};
    });
  });
}

void TrunkLoader::compare_head(LoadPlan& plan, Copy& copy) {
  const auto m = sources_.matrix(
      whole_matrix(copy.name, config_.vocab_size, config_.hidden_size, Storage::unquantized));
  if (sources_.error())
    return;
  const auto main = weights_->head;
  if (m.packed.dtype != main.dtype) {
    copy.equal = false;
    return;
  }
  const int64_t row_bytes = m.source.total_cols * size_of(m.source.dtype);
  for_row_runs(main.n, row_bytes, 2 * kPanelRows, [&](int64_t row, int64_t count) {
    plan.add(
        {{m.tensor, row * row_bytes, count * row_bytes}},
        [=, &copy]() -> caf::error {
          auto part = m.packed;
          part.n = count;
          auto source = m.source;
          source.row0 = row;
          source.rows = count;
          const auto bytes = static_cast<size_t>(packed_bytes(part));
          auto scratch = MemoryBlock::allocate(bytes);
          if (!scratch)
            return std::move(scratch.error());
          if (auto error = pack(part, {&source, 1}, scratch->data(), 0, part.panels()))
            return error;
          const auto there = panels_of(main, row, count);
          if (std::memcmp(scratch->data(), there.data, bytes) != 0)
            copy.equal = false;
          return {};
        },
        m.shared());
  });
}

caf::error TrunkLoader::load_copy(Copy& copy, int num_threads) {
  places_.clear();
  reserved_ = 0;
  plan_ = LoadPlan{checkpoint_};
  if (copy.head)
    matrix(whole_matrix(copy.name, config_.vocab_size, config_.hidden_size, Storage::unquantized),
           copy.mtp->head);
  else
    table(copy.name, copy.mtp->embedding);
  return fill(num_threads, {});
}

// The MTP modules share the main embedding and head unless theirs differ.
caf::error TrunkLoader::share_copies(int num_threads, const LoadProgress& progress) {
  std::vector<std::unique_ptr<Copy>> copies;
  LoadPlan plan{checkpoint_};
  for (size_t k = 0; k < weights_->mtp.size(); ++k) {
    auto& mtp = weights_->mtp[k];
    mtp.embedding = weights_->embedding;
    mtp.head = weights_->head;
    const auto prefix =
        fmt::format("model.layers.{}.", config_.num_hidden_layers + static_cast<int64_t>(k));
    const auto consider = [&](const std::string& name, bool head) {
      if (!sources_.has(head ? name + ".weight" : name))
        return;
      auto& copy = *copies.emplace_back(std::make_unique<Copy>());
      copy.name = name;
      copy.mtp = &mtp;
      copy.head = head;
      head ? compare_head(plan, copy) : compare_embedding(plan, copy);
    };
    consider(prefix + "embed_tokens.weight", false);
    if (share_.head)
      consider(prefix + "shared_head.head", true);
  }
  if (sources_.error())
    return sources_.error();
  const int64_t before = plan_.bytes();
  if (auto error = plan.run(num_threads, progress, before, before + plan.bytes()))
    return error;
  for (auto& copy : copies)
    if (!copy->equal)
      if (auto error = load_copy(*copy, num_threads))
        return error;
  return {};
}

caf::error TrunkLoader::load(int num_threads, const LoadProgress& progress) {
  if (auto error = check_share())
    return error;
  describe();
  if (sources_.error())
    return sources_.error();
  if (auto error = fill(num_threads, progress))
    return error;
  if (auto error = share_copies(num_threads, progress))
    return error;
  for (const auto& block : weights_->memory)
    weights_->bytes += static_cast<int64_t>(block.size());
  return {};
}

} // namespace

caf::expected<std::shared_ptr<const TrunkWeights>>
load_trunk(const Checkpoint& checkpoint, const Arithmetic& arithmetic, const TrunkShare& share,
           int num_threads, const LoadProgress& progress) {
  TrunkLoader loader{checkpoint, arithmetic, share};
  if (auto error = loader.load(num_threads, progress))
    return error;
  return loader.take();
}

} // namespace troupe
