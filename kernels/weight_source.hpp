// Finds the published tensors of a checkpoint and says how parts of them are held in memory.
//
// Resident dtypes. Linear weights of the blocks: E4M3 with `fp8_weights`; else BF16 in the bf16
// arithmetic; else (f32) BF16 where stored so, which is exact, and F32 otherwise. The head and
// eh_proj: the same without E4M3. The router: F32, or BF16 where stored so; never rounded. Norms
// and the gate's bias: F32.
#pragma once

#include "config/checkpoint.hpp"
#include "kernels/packed_matrix.hpp"
#include "kernels/weights.hpp"

#include <string>
#include <string_view>
#include <vector>

namespace troupe {

enum class Storage : uint8_t { linear, unquantized, exact };

// A part of the matrix `name`.weight, [total_rows, total_cols]: rows [row0, row0 + rows) and the
// columns of `segments` (global, contiguous).
struct MatrixPart {
  std::string name;
  int64_t total_rows = 0, total_cols = 0;
  int64_t row0 = 0, rows = 0;
  KSegments segments;
  Storage storage = Storage::linear;
};
[[nodiscard]] MatrixPart whole_matrix(std::string name, int64_t rows, int64_t cols,
                                      Storage storage = Storage::linear);

// gate, up and down of one SwiGLU FFN of `width`, as far as the columns `down_segments` of its
// down_proj need them. `prefix` ends with a dot.
struct FfnParts {
  MatrixPart gate, up, down;
};
[[nodiscard]] FfnParts ffn_parts(std::string_view prefix, int64_t hidden, int64_t width,
                                 const KSegments& down_segments);

// What an arithmetic asks that the model or Troupe can't give.
[[nodiscard]] caf::error check_arithmetic(const ModelConfig& config, const Arithmetic& arithmetic);

// Looks tensors up; the first thing that is wrong is kept in `error()`, later calls then return
// placeholders, so that a long list of look-ups reads without a check behind every line.
class WeightSources {
public:
  WeightSources(const Checkpoint& checkpoint, const Arithmetic& arithmetic)
      : checkpoint_(checkpoint), arithmetic_(arithmetic) {}

  [[nodiscard]] const caf::error& error() const { return error_; }
  [[nodiscard]] bool has(std::string_view name) const { return checkpoint_.find(name) != nullptr; }
  // A tensor that must be there with this shape; nullptr after an error.
  const TensorView* tensor(const std::string& name, const std::vector<int64_t>& shape);
  // Where a part lies in the checkpoint and how it will be held (unbound).
  struct Matrix {
    const TensorView* tensor = nullptr;
    const TensorView* scales = nullptr; // of E4M3
    WeightSource source;
    PackedMatrix packed;
    // What each job that packs a part of it reads besides the part.
    [[nodiscard]] std::vector<const TensorView*> shared() const {
      return scales ? std::vector{scales} : std::vector<const TensorView*>{};
    }
  };
  Matrix matrix(const MatrixPart& part);

private:
  void fail(Errc code, std::string text);
  const TensorView* scales_of(const MatrixPart& part);
  [[nodiscard]] DType resident_dtype(Storage storage, DType stored) const;

  const Checkpoint& checkpoint_;
  const Arithmetic arithmetic_;
  caf::error error_;
};

} // namespace troupe
