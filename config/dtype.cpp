#include "config/dtype.hpp"

#include <array>
#include <utility>

namespace troupe {

namespace {

constexpr std::array<std::pair<DType, std::string_view>, 11> kNames{{
    {DType::f32, "F32"},
    {DType::bf16, "BF16"},
    {DType::f16, "F16"},
    {DType::f8_e4m3, "F8_E4M3"},
    {DType::f64, "F64"},
    {DType::i64, "I64"},
    {DType::i32, "I32"},
    {DType::i16, "I16"},
    {DType::i8, "I8"},
    {DType::u8, "U8"},
    {DType::boolean, "BOOL"},
}};

// `value` divided by 2^shift, rounded to nearest, ties to even; shift in [1, 31].
uint32_t shift_right_to_even(uint32_t value, uint32_t shift) {
  const uint32_t kept = value >> shift;
  const uint32_t rest = value & ((1u << shift) - 1);
  const uint32_t half = 1u << (shift - 1);
  return kept + static_cast<uint32_t>(rest > half || (rest == half && (kept & 1u)));
}

// A float's magnitude as a narrower float code: `mantissa_bits` explicit bits, exponent bias
// `bias`. The code may exceed the format's largest finite value; callers saturate. A carry out of
// the mantissa runs into the exponent, which is just what rounding up to the next binade means.
uint32_t narrow(uint32_t magnitude, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t significand = (magnitude & 0x7fffffu) | (magnitude >> 23 ? 0x800000u : 0u);
  const auto drop = static_cast<uint32_t>(23 - mantissa_bits);
  if (exponent >= 1 - bias) // normal: the implicit bit adds one to the exponent field
    return shift_right_to_even(significand, drop) +
           (static_cast<uint32_t>(exponent + bias - 1) << mantissa_bits);
  const uint32_t denormal = drop + static_cast<uint32_t>(1 - bias - exponent);
  return denormal > 31 ? 0 : shift_right_to_even(significand, denormal);
}

} // namespace

std::string_view name_of(DType t) {
  for (const auto& [dtype, name] : kNames)
    if (dtype == t)
      return name;
  return "unknown";
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const auto& [dtype, known] : kNames)
    if (known == name)
      return dtype;
  return std::nullopt;
}

uint8_t float_to_e4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return 0x7f;
  constexpr uint32_t kLargest = 0x7e; // 448; infinity ends here too
  const uint32_t code = magnitude >= 0x43e00000u ? kLargest : narrow(magnitude, 3, 7);
  return static_cast<uint8_t>((bits >> 24 & 0x80u) | (code < kLargest ? code : kLargest));
}

float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1f) // infinity, or NaN made quiet
    return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0u));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112u) << 23 | mantissa << 13);
}

uint16_t float_to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x47800000u) // 65536 and above
    return static_cast<uint16_t>(sign | 0x7c00u);
  return static_cast<uint16_t>(sign | narrow(magnitude, 10, 15)); // 65520 … 65535 carry to infinity
}

} // namespace troupe
