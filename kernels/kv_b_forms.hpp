// kv_b_proj of one layer in its three forms: whole for the naive product, and per head W_UKᵀ and
// W_UV for the absorbed ones (weights.hpp says how they are held).
#pragma once

#include "kernels/weight_source.hpp"

#include <vector>

namespace troupe {

class KvBForms {
public:
  // `whole`: rows of `num_heads` consecutive heads of kv_b, head by head `nope` key rows and
  // `v_dim` value rows.
  KvBForms(const WeightSources::Matrix& whole, int64_t num_heads, int64_t nope, int64_t v_dim);

  [[nodiscard]] int64_t bytes() const { return bytes_; }
  // Points kv_b, w_uk_t and w_uv of `out` into `memory` (bytes() long, 64-byte aligned).
  void attach(std::byte* memory, AttentionWeights& out) const;
  // Fills the memory from the checkpoint.
  [[nodiscard]] caf::error pack(std::byte* memory) const;

private:
  struct Placed {
    PackedMatrix matrix;
    int64_t offset = 0;
  };
  [[nodiscard]] Placed place(const PackedMatrix& matrix);
  [[nodiscard]] int64_t key_row(size_t head) const; // counted from the first row held
  // Whether each head's value rows are whole panels of kv_b, and so need no copy.
  [[nodiscard]] bool values_are_views() const;

  WeightSource source_;
  int64_t nope_, v_dim_;
  int64_t bytes_ = 0;
  Placed whole_;
  std::vector<Placed> keys_, values_; // per head; no values where they are views
};

// Rows [row0, row0 + rows) of a packed matrix without copying; row0 is a panel boundary.
[[nodiscard]] PackedMatrix panels_of(const PackedMatrix& whole, int64_t row0, int64_t rows);

} // namespace troupe
