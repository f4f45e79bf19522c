// The SIMD tables of training and what they share that does not depend on the instruction set.
//
// One source serves three targets, like the SIMD backends (kernels/simd_common.hpp): the headers
// train_ops_simd_*.hpp have no include guard and are included once per train_ops_<target>.cpp.
#pragma once

#include "kernels/math.hpp"
#include "kernels/simd_common.hpp"
#include "kernels/train_ops.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace troupe {

// Null where this CPU or this build lacks the instructions. All have the reference's bits.
[[nodiscard]] const TrainOps* avx2_train_ops();
[[nodiscard]] const TrainOps* avx512_train_ops();
[[nodiscard]] const TrainOps* avx512_bf16_train_ops(); // also null where vdpbf16ps rounds otherwise

// ---- packed operands ----------------------------------------------------------------------------
//
// A product c += a·b runs over 32-bit words: an F32 element, or a pair of BF16 elements of the
// contraction. Without vdpbf16ps a BF16 element is an F32 word, and pairs lie swapped, because the
// odd one comes first. `steps` counts words along the contraction.
//
//   a along   [steps/16][8][16]   panels of 8 rows whose elements lie along the contraction
//   a across  [steps][8]          panels of 8 columns of memory: the contraction runs across rows
//   b         [steps][32]         panels of 32 columns of c

inline constexpr int64_t kTileRows = 8, kTileColumns = 32, kAlongSteps = 16;
enum class Operand : uint8_t { f32, swapped, dot };

[[nodiscard]] constexpr int64_t steps_of(Operand operand, int64_t elements) {
  switch (operand) {
  case Operand::f32:
    return elements;
  case Operand::swapped:
    return (elements + 1) / 2 * 2;
  case Operand::dot:
    return (elements + 1) / 2;
  }
  return 0;
}
[[nodiscard]] constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline constexpr int64_t kScaleBlock = 128; // elements of one FP8 scale

// Where the parts of a prepared weight [n, k] begin, in words: panels of b for fprop (contraction
// k, columns n) and for dgrad (contraction n, columns k); under fp8 with scales
// [blocks of the contraction][padded columns].
struct PreparedWeight {
  int64_t fprop_steps, dgrad_steps; // of one panel
  int64_t fprop_columns, dgrad_columns;
  int64_t fprop = 0, dgrad, fprop_scales, dgrad_scales, words;
  PreparedWeight(Operand operand, bool scaled, int64_t n, int64_t k)
      : fprop_steps(steps_of(operand, k)), dgrad_steps(steps_of(operand, n)),
        fprop_columns(round_up(n, kTileColumns)), dgrad_columns(round_up(k, kTileColumns)),
        dgrad(fprop_steps * fprop_columns), fprop_scales(dgrad + dgrad_steps * dgrad_columns),
        dgrad_scales(fprop_scales + (scaled ? ceil_div(k, kScaleBlock) * fprop_columns : 0)),
        words(dgrad_scales + (scaled ? ceil_div(n, kScaleBlock) * dgrad_columns : 0)) {}
};

// ---- cutting a call's results into units of work
// --------------------------------------------------

// Blocks of c, [rows, columns], that one thread computes at once.
struct UnitSize {
  int64_t rows, columns;
  [[nodiscard]] int64_t count(int64_t m, int64_t n) const {
    return ceil_div(m, rows) * ceil_div(n, columns);
  }
};

// Halves `size` down to `least` until there are four units per thread, first rows, then columns:
// what a unit packs of a serves all its columns. Bits don't depend on it.
template <class Shapes> // calls f(m, n) for every product
[[nodiscard]] UnitSize unit_size(UnitSize size, UnitSize least, int num_threads, Shapes shapes) {
  for (;;) {
    int64_t units = 0;
    shapes([&](int64_t m, int64_t n) { units += size.count(m, n); });
    if (units >= 4 * int64_t{num_threads})
      return size;
    if (size.rows > 2 * least.rows || (size.rows > least.rows && size.columns <= least.columns))
      size.rows /= 2;
    else if (size.columns > least.columns)
      size.columns /= 2;
    else
      return size;
  }
}

// Which task a unit belongs to: first[i] is the first unit of task i, first[tasks] their number.
[[nodiscard]] inline size_t task_of(std::span<const int64_t> first, int64_t unit) {
  return static_cast<size_t>(std::upper_bound(first.begin(), first.end(), unit) - first.begin()) -
         1;
}

} // namespace troupe
