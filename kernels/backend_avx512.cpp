// The table of the avx512 backend.
#include "kernels/simd_common.hpp"

#include <bit>
#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TROUPE_SIMD avx512
#define TROUPE_SIMD_DOT 0
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
// GCC 12's own AVX-512 headers read a register they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/simd_vec_avx512.hpp"

#include "kernels/simd_kernels.hpp"
#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace troupe {

const Backend* avx512_backend() {
  static const Backend table{.name = "avx512",
                             .linear = avx512::linear,
                             .add_partials = avx512::add_partials,
                             .rms_norm = avx512::rms_norm,
                             .rope = reference_backend().rope,
                             .mla_naive = avx512::mla_naive,
                             .mla_absorbed = avx512::mla_absorbed,
                             .gate = reference_backend().gate,
                             .grouped_ffn = avx512::grouped_ffn,
                             .quantize = avx512::quantize};
  static const bool here = __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  return here ? &table : nullptr;
}

} // namespace troupe

#else

namespace troupe {

const Backend* avx512_backend() { return nullptr; }

} // namespace troupe

#endif
