// One step of the trunk: its plan, its memory, what it computes before and after its walk, and what
// was found. Shared by the attention actor and the jobs of the walk; while a job runs, the job's.
#pragma once

#include "actors/attention.hpp"
#include "actors/messages.hpp"
#include "actors/rank_context.hpp"
#include "kernels/sampling.hpp"
#include "kernels/trunk.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace troupe {

struct AttentionStep {
  // One row whose logits are wanted.
  struct LogitRow {
    int64_t row = 0;     // of the step
    size_t sequence = 0; // of `plan.sequences`
    int32_t position = 0;
    int32_t target = -1; // prompt id whose log-probability is wanted
    bool sample = false;
    bool keep = false;  // the raw row is wanted
    TokenCounts counts; // with the drafts before this row; kept only for penalties
    Sampled sampled;
    double logprob = 0;
    std::vector<uint8_t> raw;
  };
  struct Mine { // what the leader knows of a sequence of the plan
    Sequence* sequence = nullptr;
    int64_t row_begin = 0;
  };

  const RankContext* context = nullptr;
  TrunkParts parts;
  std::shared_ptr<Trunk> trunk;
  StepPlan plan;
  std::vector<Mine> mine; // empty on a sibling
  std::vector<int32_t> tokens;
  BufferRef hidden; // [rows, hidden] in A, after the final norm
  std::vector<LogitRow> wanted;
  std::vector<RowsReady> captured;      // hidden states
  std::vector<SamplingParams> sampling; // per sequence
  std::vector<bool> wants_hidden;       // per sequence
  MutableRows x;

  [[nodiscard]] int64_t num_rows() const { return static_cast<int64_t>(tokens.size()); }
  [[nodiscard]] bool captures() const;
  // Jobs of its walk.
  void prologue(Workers& workers);
  void epilogue(Workers& workers);
  // Keeps rows [num_rows, hidden] in A as hidden state `index` of who wants them.
  void capture(int64_t index, const std::byte* rows);

private:
  void finish_rows(std::span<LogitRow> rows, const float* logits, Workers& workers);
};

} // namespace troupe
