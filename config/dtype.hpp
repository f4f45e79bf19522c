// Element types of tensors and their exact conversions.
//
// BF16 conversion rounds to nearest, ties to even; NaN stays NaN. E4M3 is the "fn" format of the
// FP8 recipe (DeepSeek-V3 report, 3.3): 1-4-3 bits, bias 7, no infinities, NaN only 0x7F and
// 0xFF, largest value 448; conversion rounds to nearest even and saturates at ±448.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>

namespace troupe {

enum class DType : uint8_t { f32, bf16, f16, f8_e4m3, f64, i64, i32, i16, i8, u8, boolean };

[[nodiscard]] constexpr int64_t size_of(DType t) {
  switch (t) {
  case DType::f64:
  case DType::i64:
    return 8;
  case DType::f32:
  case DType::i32:
    return 4;
  case DType::bf16:
  case DType::f16:
  case DType::i16:
    return 2;
  case DType::f8_e4m3:
  case DType::i8:
  case DType::u8:
  case DType::boolean:
    return 1;
  }
  return 0;
}

// The names safetensors uses: "F32", "BF16", "F8_E4M3", …
[[nodiscard]] std::string_view name_of(DType t);
[[nodiscard]] std::optional<DType> dtype_from_name(std::string_view name);

struct BF16 {
  uint16_t bits = 0;
};

[[nodiscard]] inline float to_float(BF16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

[[nodiscard]] inline BF16 to_bf16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return BF16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return BF16{static_cast<uint16_t>(u >> 16)};
}

// The value of an E4M3 code; codes 0x7F and 0xFF give NaN.
[[nodiscard]] inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t exponent = (code >> 3) & 0xfu;
  const uint32_t mantissa = code & 0x7u;
  if (exponent == 0xf && mantissa == 0x7)
    return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

// Nearest E4M3 code, ties to even, saturating at ±448. NaN gives 0x7F.
[[nodiscard]] uint8_t float_to_e4m3(float x);

[[nodiscard]] float f16_to_float(uint16_t bits);
[[nodiscard]] uint16_t float_to_f16(float x);

} // namespace troupe
