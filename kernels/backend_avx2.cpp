// The table of the avx2 backend.
#include "kernels/simd_common.hpp"

#include <bit>
#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TROUPE_SIMD avx2
#define TROUPE_SIMD_DOT 0
#pragma GCC push_options
#pragma GCC target("avx2,fma")
// GCC 12's own AVX-512 headers read a register they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/simd_vec_avx2.hpp"

#include "kernels/simd_kernels.hpp"
#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace troupe {

const Backend* avx2_backend() {
  static const Backend table{.name = "avx2",
                             .linear = avx2::linear,
                             .add_partials = avx2::add_partials,
                             .rms_norm = avx2::rms_norm,
                             .rope = reference_backend().rope,
                             .mla_naive = avx2::mla_naive,
                             .mla_absorbed = avx2::mla_absorbed,
                             .gate = reference_backend().gate,
                             .grouped_ffn = avx2::grouped_ffn,
                             .quantize = avx2::quantize};
  static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return here ? &table : nullptr;
}

} // namespace troupe

#else

namespace troupe {

const Backend* avx2_backend() { return nullptr; }

} // namespace troupe

#endif
