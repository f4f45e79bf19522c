// The training table for AVX-512.
#include "kernels/reference_backward_bf16.hpp"
#include "kernels/train_ops_simd.hpp"

#include <bit>
#include <cmath>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TROUPE_SIMD train_avx512
#define TROUPE_SIMD_DOT 0
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
// GCC 12's own AVX-512 headers read a register they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "kernels/simd_vec_avx512.hpp"

#include "kernels/simd_math.hpp"

#include "kernels/train_ops_simd_avx512.hpp"

#include "kernels/train_ops_simd_kernels.hpp"
#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace troupe {

const TrainOps* avx512_train_ops() {
  static const bool here = __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  return here ? &train_avx512::kTrainOps : nullptr;
}

} // namespace troupe

#else

namespace troupe {

const TrainOps* avx512_train_ops() { return nullptr; }

} // namespace troupe

#endif
