// Which table this CPU runs.
#include "kernels/train_ops_simd.hpp"

namespace troupe {

const TrainOps& simd_train_ops() {
  for (const auto* ops : {avx512_bf16_train_ops(), avx512_train_ops(), avx2_train_ops()})
    if (ops != nullptr)
      return *ops;
  return reference_train_ops();
}

} // namespace troupe
