// A whole model on one thread, put together from the kernels alone: what the actors do, without
// anyone to talk to. Tensor-parallel ranks are held side by side and trade partials by pointer.
#pragma once

#include "config/checkpoint.hpp"
#include "kernels/trunk.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace troupe::test {

template <class T>
T must(caf::expected<T> result) {
  if (!result)
    FAIL(text_of(result.error()));
  return std::move(*result);
}

class Forward {
public:
  struct Options {
    Arithmetic arithmetic;
    const Backend* backend = &reference_backend();
    int tp = 1;
    int64_t max_rows = 256;
    int64_t max_context = 256;
    int64_t max_sequences = 4;
    int64_t num_mtp_layers = 0;
    bool complete_groups = false; // send one row per gate group instead of one per expert
    int64_t max_expert_rows = 1024;
  };
  // Consecutive positions of one sequence in a step.
  struct Part {
    int sequence = 0;
    int32_t first_position = 0;
    std::vector<int32_t> tokens;
    bool answer = false; // absorbed form
  };
  struct Result {                           // rows of all parts, one behind the other
    std::vector<std::vector<float>> hidden; // before each layer, and the last after the final norm
    std::vector<float> logits;              // [num_rows, vocab]
  };

  Forward(std::shared_ptr<const Checkpoint> checkpoint, const Options& options)
      : checkpoint_(std::move(checkpoint)), config_(checkpoint_->config()), options_(options),
        experts_(config_, options.arithmetic, *options.backend, options.max_expert_rows, 1) {
    for (int r = 0; r < options.tp; ++r)
      ranks_.push_back(make_rank(r));
    const int64_t layers = config_.num_hidden_layers + options.num_mtp_layers;
    for (int64_t layer = 0; layer < layers; ++layer)
      if (layer >= config_.num_hidden_layers || config_.is_moe(layer))
        for (int32_t e = 0; e < config_.n_routed_experts; ++e)
          expert_keys_.push_back({layer, ExpertId{e}});
    blocks_ = must(load_experts(*checkpoint_, options.arithmetic, expert_keys_, 1, {}));
    // Pages of a sequence lie scattered, as they do in a cluster that has run for a while.
    const int64_t per_sequence = pages_per_sequence();
    for (int64_t s = 0; s < options.max_sequences; ++s) {
      auto& pages = pages_.emplace_back();
      for (int64_t p = 0; p < per_sequence; ++p)
        pages.push_back(static_cast<int32_t>((p * options.max_sequences + s + 1) %
                                             (per_sequence * options.max_sequences)));
    }
  }

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] const TrunkWeights& weights() const { return ranks_.front().trunk->weights(); }

  Result step(const std::vector<Part>& parts) {
    const auto rows = rows_of(parts);
    std::vector<int32_t> tokens;
    for (const auto& part : parts)
      tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
    Result result;
    for (auto& rank : ranks_)
      rank.trunk->embed(tokens, rank.x());
    for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
      result.hidden.push_back(to_floats(ranks_.front().x(), rows.num_rows));
      run_block(layer, rows);
    }
    auto& first = ranks_.front();
    first.trunk->final_norm(rows.num_rows, lent(first.x()), first.x(), workers_);
    result.hidden.push_back(to_floats(first.x(), rows.num_rows));
    result.logits.resize(static_cast<size_t>(rows.num_rows * config_.vocab_size));
    first.trunk->logits(rows.num_rows, lent(first.x()), result.logits.data(), workers_);
    return result;
  }

  // Rows of module k: `hidden` [rows, hidden] is the state of depth k (main: after the final norm),
  // the tokens are those one place further. hidden.front() is what the next depth takes.
  Result mtp_step(int64_t module, const std::vector<Part>& parts,
                  const std::vector<float>& hidden) {
    const auto rows = rows_of(parts);
    std::vector<int32_t> tokens;
    for (const auto& part : parts)
      tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
    for (auto& rank : ranks_) {
      Activations embedding{*this}, state{*this};
      rank.trunk->mtp_embed(module, tokens, embedding.out());
      from_floats(hidden, state.out());
      rank.trunk->mtp_input(module, rows.num_rows, lent(embedding.out()), lent(state.out()),
                            rank.x(), workers_);
    }
    run_block(config_.num_hidden_layers + module, rows);
    auto& first = ranks_.front();
    first.trunk->mtp_head_norm(module, rows.num_rows, lent(first.x()), first.x(), workers_);
    Result result;
    result.hidden.push_back(to_floats(first.x(), rows.num_rows));
    result.logits.resize(static_cast<size_t>(rows.num_rows * config_.vocab_size));
    first.trunk->mtp_logits(module, rows.num_rows, lent(first.x()), result.logits.data(), workers_);
    return result;
  }

private:
  struct Activations { // [max_rows, hidden] in A
    explicit Activations(const Forward& f)
        : dtype(f.options_.arithmetic.activations), hidden(f.config_.hidden_size),
          bytes(static_cast<size_t>(f.options_.max_rows * hidden * size_of(dtype))) {}
    MutableRows out() { return {bytes.data(), dtype, hidden}; }
    DType dtype;
    int64_t hidden;
    std::vector<std::byte> bytes;
  };
  struct Rank {
    std::unique_ptr<Trunk> trunk;
    std::unique_ptr<LatentCache> cache;
    std::unique_ptr<Activations> residual;
    std::vector<float> partial;
    MutableRows x() { return residual->out(); }
  };

  [[nodiscard]] int64_t pages_per_sequence() const {
    return (options_.max_context + kPageTokens - 1) / kPageTokens;
  }
  static Rows lent(MutableRows rows) { return {rows.data, rows.dtype, rows.stride}; }

  Rank make_rank(int r) {
    TrunkShare share;
    share.tp = options_.tp;
    share.tp_rank = r;
    share.head = r == 0;
    share.num_mtp_layers = options_.num_mtp_layers;
    Rank rank;
    auto weights = must(load_trunk(*checkpoint_, options_.arithmetic, share, 2, {}));
    Trunk::Limits limits;
    limits.max_rows = options_.max_rows;
    limits.max_context = options_.max_context;
    rank.trunk = std::make_unique<Trunk>(config_, options_.arithmetic, *options_.backend,
                                         std::move(weights), share, limits);
    rank.cache = must(LatentCache::make(config_, options_.arithmetic.activations,
                                        config_.num_hidden_layers + options_.num_mtp_layers,
                                        pages_per_sequence() * options_.max_sequences));
    rank.residual = std::make_unique<Activations>(*this);
    rank.partial.resize(static_cast<size_t>(options_.max_rows * config_.hidden_size));
    return rank;
  }

  StepRows rows_of(const std::vector<Part>& parts) const {
    StepRows rows;
    for (const auto& part : parts) {
      SequenceRows sequence;
      sequence.row_begin = rows.num_rows;
      sequence.num_rows = static_cast<int64_t>(part.tokens.size());
      sequence.first_position = part.first_position;
      sequence.pages = pages_[static_cast<size_t>(part.sequence)].data();
      (part.answer ? rows.answer : rows.prompt).push_back(sequence);
      for (size_t i = 0; i < part.tokens.size(); ++i)
        rows.positions.push_back(part.first_position + static_cast<int32_t>(i));
      rows.num_rows += sequence.num_rows;
    }
    REQUIRE(rows.num_rows <= options_.max_rows);
    return rows;
  }

  const BlockWeights& block(Rank& rank, int64_t layer) const {
    const auto& w = rank.trunk->weights();
    const int64_t module = layer - config_.num_hidden_layers;
    return module < 0 ? w.layers[static_cast<size_t>(layer)]
                      : w.mtp[static_cast<size_t>(module)].block;
  }
  std::vector<const float*> partials() const {
    std::vector<const float*> list;
    for (const auto& rank : ranks_)
      list.push_back(rank.partial.data());
    return list;
  }

  void run_block(int64_t layer, const StepRows& rows) {
    const int64_t n = rows.num_rows;
    for (auto& rank : ranks_)
      rank.trunk->attention(block(rank, layer), rank.cache->layer(layer), rows, rank.x(),
                            rank.partial.data(), workers_);
    if (ranks_.size() > 1)
      for (auto& rank : ranks_)
        rank.trunk->finish_attention(n, partials(), rank.x(), workers_);
    const auto& b = block(ranks_.front(), layer);
    if (b.moe)
      return run_moe(layer, n);
    for (auto& rank : ranks_)
      rank.trunk->dense_ffn(block(rank, layer), n, rank.x(), rank.partial.data(), workers_);
    if (b.ffn_is_cut)
      for (auto& rank : ranks_)
        rank.trunk->finish_attention(n, partials(), rank.x(), workers_);
  }

  struct Gated {
    std::vector<uint8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> idx;
    std::vector<float> weight;
    QuantizedRows quantized;
  };
  Gated run_gate(Rank& rank, int64_t layer, int64_t n, MutableRows u) {
    Gated g;
    const int64_t k = config_.num_experts_per_tok, tiles = (config_.hidden_size + 127) / 128;
    g.idx.resize(static_cast<size_t>(n * k));
    g.weight.resize(static_cast<size_t>(n * k));
    Trunk::GateOut out;
    out.u = u;
    if (options_.arithmetic.fp8_activations) {
      g.codes.resize(static_cast<size_t>(n * config_.hidden_size));
      g.scales.resize(static_cast<size_t>(n * tiles));
      out.codes = g.codes.data();
      out.scales = g.scales.data();
      g.quantized = {out.codes, out.scales, config_.hidden_size, tiles};
    }
    out.topk_idx = g.idx.data();
    out.topk_weight = g.weight.data();
    rank.trunk->gate(block(rank, layer), n, lent(rank.x()), out, workers_);
    return g;
  }

  void run_moe(int64_t layer, int64_t n) {
    Activations u{*this}, shared{*this};
    Gated g;
    for (auto& rank : ranks_) {
      g = run_gate(rank, layer, n, u.out());
      if (config_.n_shared_experts > 0)
        rank.trunk->shared_ffn(block(rank, layer), n, lent(u.out()), g.quantized, shared.out(),
                               rank.partial.data(), workers_);
    }
    auto& first = ranks_.front();
    if (config_.n_shared_experts > 0 && block(first, layer).ffn_is_cut)
      first.trunk->finish_shared(n, partials(), shared.out(), workers_);
    const auto rows = run_experts(layer, n, g, lent(u.out()));
    CombineArgs args;
    args.num_rows = n;
    args.hidden = config_.hidden_size;
    args.dtype = options_.arithmetic.activations;
    std::vector<std::byte> sums;
    std::vector<int32_t> row_terms;
    const auto terms = terms_of(n, g, rows, row_terms, sums);
    args.terms = terms;
    args.row_terms = row_terms;
    if (config_.n_shared_experts > 0)
      args.shared = lent(shared.out());
    for (auto& rank : ranks_) {
      args.x = rank.x();
      combine(args, workers_);
    }
  }

  // Output row r·k + j: what choice j of row r computed.
  std::vector<std::byte> run_experts(int64_t layer, int64_t n, const Gated& g, Rows u) {
    const int64_t k = config_.num_experts_per_tok;
    std::map<int32_t, std::vector<std::pair<int32_t, int64_t>>> by_expert; // row, slot
    for (int64_t i = 0; i < n * k; ++i)
      by_expert[g.idx[static_cast<size_t>(i)]].emplace_back(static_cast<int32_t>(i / k), i);
    std::vector<std::vector<int32_t>> rows;
    std::vector<int64_t> slots;
    std::vector<ExpertGroup> groups;
    rows.reserve(by_expert.size());
    for (const auto& [expert, list] : by_expert) {
      ExpertGroup group;
      group.weights = &expert_block(layer, expert).weights();
      group.out_begin = static_cast<int64_t>(slots.size());
      auto& which = rows.emplace_back();
      for (const auto& [row, slot] : list) {
        which.push_back(row);
        slots.push_back(slot);
      }
      group.row_of_x = which;
      groups.push_back(group);
    }
    const DType a = options_.arithmetic.activations;
    const auto bytes = static_cast<size_t>(config_.hidden_size * size_of(a));
    std::vector<std::byte> out(slots.size() * bytes), placed(out.size());
    experts_.run(groups, u, g.quantized, {out.data(), a, config_.hidden_size}, workers_);
    for (size_t i = 0; i < slots.size(); ++i)
      std::memcpy(placed.data() + static_cast<size_t>(slots[i]) * bytes, out.data() + i * bytes,
                  bytes);
    return placed;
  }
  const ExpertBlock& expert_block(int64_t layer, int32_t expert) const {
    for (size_t i = 0; i < expert_keys_.size(); ++i)
      if (expert_keys_[i].layer == layer && expert_keys_[i].expert.value == expert)
        return blocks_[i];
    FAIL("no such expert");
    return blocks_.front();
  }

  std::vector<CombineTerm> terms_of(int64_t n, const Gated& g, const std::vector<std::byte>& rows,
                                    std::vector<int32_t>& row_terms,
                                    std::vector<std::byte>& sums) const {
    const DType a = options_.arithmetic.activations;
    const auto bytes = static_cast<size_t>(config_.hidden_size * size_of(a));
    const int64_t k = config_.num_experts_per_tok;
    sums.resize(static_cast<size_t>(n * k) * bytes);
    std::vector<CombineTerm> terms;
    row_terms = {0};
    for (int64_t r = 0; r < n; ++r) {
      std::vector<CombineTerm> of_row;
      for (int64_t i = r * k; i < (r + 1) * k; ++i) {
        const auto place = static_cast<size_t>(i);
        const auto group = static_cast<int32_t>(g.idx[place] / config_.experts_per_group());
        of_row.push_back({rows.data() + place * bytes, g.weight[place], group, false});
      }
      std::stable_sort(of_row.begin(), of_row.end(),
                       [](const auto& l, const auto& m) { return l.group < m.group; });
      for (size_t i = 0; i < of_row.size();) {
        size_t end = i;
        while (end < of_row.size() && of_row[end].group == of_row[i].group)
          ++end;
        if (options_.complete_groups) {
          std::byte* const sum = sums.data() + (static_cast<size_t>(r * k) + i) * bytes;
          sum_group(std::span{of_row}.subspan(i, end - i), a, config_.hidden_size, sum);
          terms.push_back({sum, 0, of_row[i].group, true});
        } else {
          terms.insert(terms.end(), of_row.begin() + static_cast<std::ptrdiff_t>(i),
                       of_row.begin() + static_cast<std::ptrdiff_t>(end));
        }
        i = end;
      }
      row_terms.push_back(static_cast<int32_t>(terms.size()));
    }
    return terms;
  }

  [[nodiscard]] std::vector<float> to_floats(MutableRows x, int64_t n) const {
    std::vector<float> out(static_cast<size_t>(n * config_.hidden_size));
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = x.dtype == DType::f32 ? static_cast<const float*>(x.data)[i]
                                     : to_float(static_cast<const BF16*>(x.data)[i]);
    return out;
  }
  static void from_floats(const std::vector<float>& values, MutableRows out) {
    for (size_t i = 0; i < values.size(); ++i)
      if (out.dtype == DType::f32)
        static_cast<float*>(out.data)[i] = values[i];
      else
        static_cast<BF16*>(out.data)[i] = to_bf16(values[i]);
  }

  std::shared_ptr<const Checkpoint> checkpoint_;
  const ModelConfig& config_;
  const Options options_;
  InlineWorkers workers_;
  std::vector<Rank> ranks_;
  std::vector<ExpertKey> expert_keys_;
  std::vector<ExpertBlock> blocks_;
  ExpertCompute experts_;
  std::vector<std::vector<int32_t>> pages_;
};

} // namespace troupe::test
