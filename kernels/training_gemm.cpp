#include "kernels/training_gemm.hpp"

#include "kernels/reference_backward.hpp"

#include <algorithm>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f")
#define TROUPE_SIMD training_avx512
#define TROUPE_GEMM_512 1
#include "kernels/simd_backward_gemm.hpp"
#undef TROUPE_SIMD
#undef TROUPE_GEMM_512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TROUPE_SIMD training_avx2
#define TROUPE_GEMM_512 0
#include "kernels/simd_backward_gemm.hpp"
#undef TROUPE_SIMD
#undef TROUPE_GEMM_512
#pragma GCC pop_options
#endif

namespace troupe {

namespace {

void plain(const GemmF32& g, Workers& workers) {
  workers.parallel_for(g.m, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < g.n; ++j) {
        float sum = g.accumulate ? g.c[i * g.c_row + j] : 0.0f;
        for (int64_t s = 0; s < g.k; ++s)
          sum = std::fma(g.a[i * g.a_row + s * g.a_sum], g.b[s * g.b_sum + j * g.b_column], sum);
        g.c[i * g.c_row + j] = sum;
      }
  });
}

} // namespace

void gemm_f32(const GemmF32& g, Workers& workers) {
  if (g.m == 0 || g.n == 0)
    return;
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool wide = fma && __builtin_cpu_supports("avx512f");
  if (g.k > 0 && wide)
    return training_avx512::gemm(g, workers);
  if (g.k > 0 && fma)
    return training_avx2::gemm(g, workers);
#endif
  plain(g, workers);
}

} // namespace troupe
