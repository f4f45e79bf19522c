// Rows of a training micro-batch on their way to experts and back. Pure but for the memory.
//
// One table per expert rank of the copy, in both passes: forward carries rows and brings the
// weighted sums of complete gate groups (or single rows), backward carries gradients of the same
// rows and brings gradients of the inputs, again by group, followed by one F32 per entry: the
// gradient of its gate weight. Sums are those of the contract (Combine, Backward).
#pragma once

#include "actors/dispatch_plan.hpp"
#include "actors/train_context.hpp"

#include <cstdint>
#include <span>
#include <tuple>
#include <vector>

namespace troupe {

// What a message of a step is about, in the header's `attempt`.
enum class TrainPass : uint32_t { forward, backward, backward_deferred, evaluate };

// kind, run, micro-batch, layer (or phase at the receiver), pass, source: no two messages have the
// same.
using TrainMessageKey = std::tuple<WireKind, uint64_t, uint64_t, uint32_t, uint32_t, RankId>;
[[nodiscard]] TrainMessageKey key_of(const WireHeader& header);

struct ExpertRoute {
  // By expert rank of the copy, in order; some may be without rows.
  std::vector<DispatchTable> tables;
  std::vector<std::vector<AnswerRow>> answers; // per table
  // Where the terms of a row's sum come from, by (row, group, place).
  struct Term {
    int32_t row = 0;
    int16_t group = 0, place = 0;
    bool complete = false;
    float weight = 0;
    int32_t table = 0, answer = 0;
  };
  std::vector<Term> terms;
  std::vector<size_t> row_terms; // [rows + 1]
};

// Routes rows by the choices of a gate. `peers` are the copy's expert ranks.
[[nodiscard]] caf::expected<ExpertRoute> plan_route(const View& view, const LayerPlacement& layer,
                                                    RankId self, std::span<const RankId> peers,
                                                    const GateChoice& choice, int64_t rows);

// A payload per table, filled with the rows of x [rows, width].
[[nodiscard]] caf::expected<std::vector<BufferRef>> fill_route(const ExpertRoute& route,
                                                               BufferPool& pool, RowFormat format,
                                                               int64_t width, const float* x,
                                                               Workers& workers);

// Bytes of an answer.
[[nodiscard]] size_t answer_bytes(std::span<const AnswerRow> rows, size_t num_entries,
                                  RowFormat format, int64_t width, bool backward);

// Errc::malformed where an answer's size is not what the route expects.
[[nodiscard]] caf::error check_answers(const ExpertRoute& route, int64_t width, RowFormat format,
                                       bool backward, std::span<const Envelope> answers);

// A sum over the terms of one gate group, in order: acc = fma(weight, row, acc) from 0 (weights 1
// in the backward pass), rounded where `round`. row(i) is a pointer to term i's row [width].
void sum_group_rows(size_t num_terms, FunctionRef<const float*(size_t)> row,
                    FunctionRef<float(size_t)> weight, int64_t width, bool round, float* out);

// out [rows, width] = round((Σ groups + first) + second): forward first = shared experts' rows,
// second = the residual; backward shared experts' and the router's gradients. Null: left out.
// answers[t] is table t's message; those of tables without rows are ignored.
void combine_route(const ExpertRoute& route, int64_t rows, int64_t width, RowFormat format,
                   bool backward, std::span<const Envelope> answers, const float* first,
                   const float* second, bool round, float* out, Workers& workers);

// The gradients of gate weights [rows, top_k] that came with backward answers.
void gate_weight_gradients(const ExpertRoute& route, int64_t top_k, int64_t width, RowFormat format,
                           std::span<const Envelope> answers, std::span<float> out);

} // namespace troupe
