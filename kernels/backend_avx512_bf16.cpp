// The table of the avx512_bf16 backend: vdpbf16ps where both inputs are BF16 or E4M3, and
// VBMI's byte tables to decode E4M3 (the first CPUs with vdpbf16ps, Cooper Lake, lack them and
// run avx512).
#include "kernels/simd_common.hpp"

#include <bit>
#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TROUPE_SIMD avx512_bf16
#define TROUPE_SIMD_DOT 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")
// GCC 12's own AVX-512 headers read a register they leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels/simd_vec_avx512.hpp"

#include "kernels/simd_kernels.hpp"
#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace troupe {

const Backend* avx512_bf16_backend() {
  static const Backend table{.name = "avx512_bf16",
                             .linear = avx512_bf16::linear,
                             .add_partials = avx512_bf16::add_partials,
                             .rms_norm = avx512_bf16::rms_norm,
                             .rope = reference_backend().rope,
                             .mla_naive = avx512_bf16::mla_naive,
                             .mla_absorbed = avx512_bf16::mla_absorbed,
                             .gate = reference_backend().gate,
                             .grouped_ffn = avx512_bf16::grouped_ffn,
                             .quantize = avx512_bf16::quantize};
  static const bool here =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("fma");
  return here ? &table : nullptr;
}

} // namespace troupe

#else

namespace troupe {

const Backend* avx512_bf16_backend() { return nullptr; }

} // namespace troupe

#endif
