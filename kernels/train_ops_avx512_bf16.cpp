// The training table for AVX-512 with vdpbf16ps.
#include "kernels/reference_backward_bf16.hpp"
#include "kernels/train_ops_simd.hpp"

#include <bit>
#include <cmath>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TROUPE_SIMD train_avx512_bf16
#define TROUPE_SIMD_DOT 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")
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

namespace {

// Whether vdpbf16ps does what the reference's BF16 does: the order of a pair, both roundings, and
// what becomes of denormals, rounded-up ones included.
bool rounds_like_the_reference() {
  constexpr float kTiny = 0x1p-126f;
  constexpr float kCases[][5] = {
      {1.0f, 0x1p-24f, 1.0f, 0x1p-24f, 1.0f},         // even roundings lose both
      {-1.0f, 0x1.02p0f, 0x1.fep0f, 0x1p-12f, 1.0f},  // one rounding would keep more
      {0x1p24f, 1.0f, 1.0f, -0x1p24f, 1.0f},          // the other order gives another sum
      {kTiny, 0.0f, 0.0f, -0x1p-75f, 0x1p-75f},       // rounds up to 2^-126 in 23 bits only
      {kTiny, -0x1p-75f, 0x1p-76f, 0.0f, 0.0f},       // rounds up to 2^-126 in any
      {0.0f, -0x1p-70f, 0x1p-70f, 0.0f, 0.0f},        // a result that is flushed
      {0x1p-127f, 0x1p-130f, 0x1p100f, 1.0f, kTiny}}; // operands that are
  for (const auto& [acc, a0, b0, a1, b1] : kCases) {
    const uint32_t a = std::bit_cast<uint32_t>(a1) | std::bit_cast<uint32_t>(a0) >> 16;
    const uint32_t b = std::bit_cast<uint32_t>(b1) | std::bit_cast<uint32_t>(b0) >> 16;
    const float pair[2][2] = {{a0, a1}, {b0, b1}};
    const float wanted = reference::bf16_chain(
        acc, 2, [&](int64_t i) { return reference::bf16_operand(pair[0][i]); },
        [&](int64_t i) { return reference::bf16_operand(pair[1][i]); });
    if (std::bit_cast<uint32_t>(train_avx512_bf16::dot_product(acc, a, b)) !=
        std::bit_cast<uint32_t>(wanted))
      return false;
  }
  return true;
}

} // namespace

const TrainOps* avx512_bf16_train_ops() {
  static const bool here =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("fma") && rounds_like_the_reference();
  return here ? &train_avx512_bf16::kTrainOps : nullptr;
}

} // namespace troupe

#else

namespace troupe {

const TrainOps* avx512_bf16_train_ops() { return nullptr; }

} // namespace troupe

#endif
