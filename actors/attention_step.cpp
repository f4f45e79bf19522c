#include "actors/attention_step.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace troupe {

namespace {

// Rows of logits computed at once: bounds memory, and long enough to use the cores well.
constexpr int64_t kLogitRows = 64;

} // namespace

bool AttentionStep::captures() const {
  return std::find(wants_hidden.begin(), wants_hidden.end(), true) != wants_hidden.end();
}

void AttentionStep::prologue(Workers&) { trunk->embed(tokens, x); }

void AttentionStep::capture(int64_t index, const std::byte* rows) {
  const auto hidden_size = static_cast<size_t>(context->config.hidden_size);
  const DType a = context->arithmetic.activations;
  int64_t row = 0;
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const auto n = static_cast<int64_t>(plan.sequences[s].tokens.size());
    if (wants_hidden[s]) {
      RowsReady ready;
      ready.id = plan.sequences[s].request;
      ready.name = fmt::format("hidden.{}", index);
      ready.first_row = plan.sequences[s].first_position;
      ready.num_rows = n;
      ready.num_cols = static_cast<int64_t>(hidden_size);
      ready.bytes.resize(static_cast<size_t>(n) * hidden_size * sizeof(float));
      const std::byte* from =
          rows + static_cast<size_t>(row) * hidden_size * static_cast<size_t>(size_of(a));
      for (size_t i = 0; i < static_cast<size_t>(n) * hidden_size; ++i) {
        float value = 0;
        if (a == DType::f32)
          std::memcpy(&value, from + i * 4, 4);
        else {
          BF16 b;
          std::memcpy(&b, from + i * 2, 2);
          value = to_float(b);
        }
        std::memcpy(ready.bytes.data() + i * 4, &value, 4);
      }
      captured.push_back(std::move(ready));
    }
    row += n;
  }
}

void AttentionStep::epilogue(Workers& workers) {
  const DType a = context->arithmetic.activations;
  const int64_t hidden_size = context->config.hidden_size;
  const MutableRows h{hidden->data(), a, hidden_size};
  trunk->final_norm(num_rows(), Rows{x.data, x.dtype, x.stride}, h, workers);
  if (captures())
    capture(context->config.num_hidden_layers, hidden->data());
  const auto row_size = static_cast<size_t>(hidden_size * size_of(a));
  const auto vocab = static_cast<size_t>(context->config.vocab_size);
  const auto chunk =
      static_cast<size_t>(std::min<int64_t>(kLogitRows, static_cast<int64_t>(wanted.size())));
  std::vector<std::byte> gathered(chunk * row_size);
  std::vector<float> logits(chunk * vocab);
  for (size_t begin = 0; begin < wanted.size(); begin += chunk) {
    const size_t n = std::min(chunk, wanted.size() - begin);
    for (size_t i = 0; i < n; ++i)
      std::memcpy(gathered.data() + i * row_size,
                  hidden->data() + static_cast<size_t>(wanted[begin + i].row) * row_size, row_size);
    trunk->logits(static_cast<int64_t>(n), Rows{gathered.data(), a, hidden_size}, logits.data(),
                  workers);
    finish_rows(std::span{wanted}.subspan(begin, n), logits.data(), workers);
  }
}

void AttentionStep::finish_rows(std::span<LogitRow> rows, const float* logits, Workers& workers) {
  const auto vocab = static_cast<size_t>(context->config.vocab_size);
  workers.parallel_for(static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) {
      auto& row = rows[static_cast<size_t>(i)];
      const std::span<const float> raw{logits + static_cast<size_t>(i) * vocab, vocab};
      if (row.sample)
        row.sampled = sample(raw, sampling[row.sequence], row.counts,
                             static_cast<uint32_t>(row.position + 1), parts.num_ids, scratch);
      if (row.target >= 0)
        row.logprob = log_probability(raw, row.target);
      if (row.keep) {
        row.raw.resize(vocab * sizeof(float));
        std::memcpy(row.raw.data(), raw.data(), row.raw.size());
      }
    }
  });
}

} // namespace troupe
