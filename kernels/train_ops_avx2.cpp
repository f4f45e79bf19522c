// The training table for AVX2.
#include "kernels/reference_backward_bf16.hpp"
#include "kernels/train_ops_simd.hpp"

#include <bit>
#include <cmath>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TROUPE_SIMD train_avx2
#define TROUPE_SIMD_DOT 0
#pragma GCC push_options
#pragma GCC target("avx2,fma")
// GCC 12's own AVX-512 headers read a register they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "kernels/simd_vec_avx2.hpp"

#include "kernels/simd_math.hpp"

#include "kernels/train_ops_simd_avx2.hpp"

#include "kernels/train_ops_simd_kernels.hpp"
#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace troupe {

const TrainOps* avx2_train_ops() {
  static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return here ? &train_avx2::kTrainOps : nullptr;
}

} // namespace troupe

#else

namespace troupe {

const TrainOps* avx2_train_ops() { return nullptr; }

} // namespace troupe

#endif
