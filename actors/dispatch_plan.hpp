// Which rows go where, and in which order their answers come back. Pure.
//
// A dispatch is a table and rows. The table lists, for each row, the experts it wants: *entries*
// ordered by (gate group, top-k place), each with its gate weight. A group is *complete* when every
// expert that the token chose in that group is in this dispatch; its entries may then be answered
// by one row, weighted, summed and rounded (contract, Combine). The answer carries no table: its
// rows come in an order that both sides derive from the dispatch's table (`answer_rows`).
//
// Payload of a dispatch or forward (little-endian, every part 16-byte aligned):
//
//   DispatchHead │ DispatchRow[num_rows] │ DispatchEntry[num_entries] │ rows
//
// where rows are [num_rows, row_bytes] as transport/rows.hpp lays them out: F32 or BF16 values, or
// with FP8 activations E4M3 codes followed by F32 scales per 128.
#pragma once

#include "actors/view.hpp"
#include "config/dtype.hpp"
#include "config/errors.hpp"
#include "config/ids.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace troupe {

struct DispatchHead {
  uint32_t num_rows = 0;
  uint32_t num_entries = 0;
  uint32_t row_bytes = 0;
  uint32_t format = 0; // RowFormat
};
enum class RowFormat : uint32_t { f32 = 0, bf16 = 1, fp8 = 2 };

struct DispatchRow {
  int32_t row = 0;         // the source's row number, echoed nowhere: answers are by order
  int32_t num_entries = 0; // its entries follow those of the row before
};

struct DispatchEntry {
  int32_t slot = 0;     // physical slot in the layer's placement
  int32_t expert = 0;   // logical expert, checked against the slot
  uint32_t version = 0; // slot version the source believes in
  float weight = 0;     // gate weight
  int16_t group = 0;
  int16_t place = 0; // top-k place, 0 = best
  uint16_t complete = 0;
  uint16_t reserved = 0;
};
static_assert(sizeof(DispatchHead) == 16 && sizeof(DispatchRow) == 8 &&
              sizeof(DispatchEntry) == 24);

// The table of one message and where it goes.
struct DispatchTable {
  RankId destination;
  std::vector<DispatchRow> rows;
  std::vector<DispatchEntry> entries;
};

// One row of an answer: either entry `first_entry` alone, or the complete group that starts there.
struct AnswerRow {
  int32_t row = 0;         // index into the table's rows
  int32_t first_entry = 0; // index into the table's entries
  int32_t num_entries = 0;
  bool complete = false;
};

struct GateChoice {
  std::span<const int32_t> topk_idx;  // [num_rows, top_k]
  std::span<const float> topk_weight; // [num_rows, top_k]
  int32_t top_k = 0;
  int32_t experts_per_group = 1;
};

// One table per destination, ascending by rank: expert ranks when direct; with two-hop the
// forwarders, one per node (a node's expert rank number source-index mod count).
// Rows [row_begin, row_end) only. Errc::peer_lost when an expert has no live slot.
[[nodiscard]] caf::expected<std::vector<DispatchTable>>
plan_dispatch(const View& view, const LayerPlacement& placement, RankId source,
              const GateChoice& choice, int32_t row_begin, int32_t row_end);

// What a forwarder sends on inside its node: one table per expert rank. `rows[i].row` of a result
// is the row's index in `table`. A group stays complete only where the source said so.
[[nodiscard]] std::vector<DispatchTable> plan_forward(const LayerPlacement& placement,
                                                      const DispatchTable& table);

// The answer's rows in their order.
[[nodiscard]] std::vector<AnswerRow> answer_rows(std::span<const DispatchRow> rows,
                                                 std::span<const DispatchEntry> entries);

// The forwarder that `source` uses on `node`.
[[nodiscard]] RankId forwarder_of(const View& view, RankId source, NodeId node);

// Byte layout of a payload.
struct DispatchLayout {
  size_t rows_offset = 0, entries_offset = 0, data_offset = 0, total_bytes = 0;
};
[[nodiscard]] DispatchLayout dispatch_layout(const DispatchHead& head);
[[nodiscard]] size_t row_bytes(RowFormat format, int64_t hidden);
// How rows travel to experts.
[[nodiscard]] RowFormat dispatch_format(DType activations, bool fp8_activations);
// From one row of an answer to the next.
[[nodiscard]] size_t answer_row_bytes(DType combine, int64_t hidden);
// E4M3 codes first; scales start at this offset in a row.
[[nodiscard]] size_t fp8_scales_offset(int64_t hidden);

// Writes head and table; row data is the caller's, at dispatch_layout().data_offset.
void write_table(std::span<std::byte> payload, const DispatchTable& table, RowFormat format,
                 int64_t hidden);
// Reads and checks a table from any bytes: sizes, alignment, finite weights, slots that exist on
// `self` (pass an invalid rank to skip that check), entries in order, complete groups whole.
struct DispatchView {
  DispatchHead head;
  std::span<const DispatchRow> rows;
  std::span<const DispatchEntry> entries;
  const std::byte* data = nullptr; // [num_rows, row_bytes]
};
[[nodiscard]] caf::expected<DispatchView> read_dispatch(std::span<const std::byte> payload,
                                                        const LayerPlacement& placement,
                                                        RankId self, RowFormat format,
                                                        int64_t hidden);

} // namespace troupe
