#include "config/dtype.hpp"

#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <utility>

using namespace troupe;

TEST_CASE("E4M3 encodes the vectors of the specification") {
  const std::array<std::pair<float, int>, 22> vectors{{
      {0.0f, 0x00},
      {448.0f, 0x7E},
      {447.0f, 0x7E},
      {464.0f, 0x7E},
      {480.0f, 0x7E},
      {1000.0f, 0x7E},
      {1.0f, 0x38},
      {0.5f, 0x30},
      {0x1p-6f, 0x08},
      {0x1p-7f, 0x04},
      {0x1p-9f, 0x01},
      {0x1p-10f, 0x00},
      {1.5f * 0x1p-10f, 0x01},
      {1.0625f, 0x38},
      {1.1875f, 0x3A},
      {1.3125f, 0x3A},
      {-3.3f, 0xC5},
      {240.0f, 0x77},
      {17.0f, 0x58},
      {0.3f, 0x2A},
      {100.0f, 0x6C},
      {-0.0f, 0x80},
  }};
  for (const auto& [x, code] : vectors) {
    CAPTURE(x);
    CHECK(int{float_to_e4m3(x)} == code);
  }
}

TEST_CASE("every finite E4M3 code survives the way to float and back") {
  int finite = 0;
  for (int code = 0; code < 256; ++code) {
    const float x = e4m3_to_float(static_cast<uint8_t>(code));
    if (std::isnan(x))
      continue;
    ++finite;
    CHECK(int{float_to_e4m3(x)} == code);
  }
  CHECK(finite == 254);
}

TEST_CASE("E4M3 takes the nearest code, and of two equally near ones the even") {
  for (int code = 0; code < 0x7E; ++code) {
    const float low = e4m3_to_float(static_cast<uint8_t>(code));
    const float high = e4m3_to_float(static_cast<uint8_t>(code + 1));
    const float middle = (low + high) / 2; // exact
    CAPTURE(code);
    CHECK(int{float_to_e4m3(middle)} == (code % 2 == 0 ? code : code + 1));
    CHECK(int{float_to_e4m3(std::nextafter(middle, 0.0f))} == code);
    CHECK(int{float_to_e4m3(std::nextafter(middle, 1000.0f))} == code + 1);
    CHECK(int{float_to_e4m3(-middle)} == int{float_to_e4m3(middle)} + 0x80);
  }
}

TEST_CASE("E4M3 saturates infinities and keeps NaN") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CHECK(int{float_to_e4m3(kInfinity)} == 0x7E);
  CHECK(int{float_to_e4m3(-kInfinity)} == 0xFE);
  CHECK(int{float_to_e4m3(std::numeric_limits<float>::quiet_NaN())} == 0x7F);
  CHECK(int{float_to_e4m3(std::numeric_limits<float>::denorm_min())} == 0);
}

TEST_CASE("every F16 code survives the way to float and back") {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const auto bits = static_cast<uint16_t>(code);
    const float x = f16_to_float(bits);
    if (std::isnan(x))
      CHECK(std::isnan(f16_to_float(float_to_f16(x))));
    else if (float_to_f16(x) != bits)
      FAIL("code " << code << " came back as " << float_to_f16(x));
  }
}

TEST_CASE("F16 rounds ties to even and overflows to infinity") {
  CHECK(float_to_f16(1.0f + 0x1p-11f) == 0x3C00);
  CHECK(float_to_f16(1.0f + 0x1.8p-10f) == 0x3C02);
  CHECK(float_to_f16(65519.0f) == 0x7BFF);
  CHECK(float_to_f16(65520.0f) == 0x7C00);
  CHECK(float_to_f16(-1e9f) == 0xFC00);
  CHECK(float_to_f16(0x1p-25f) == 0);
  CHECK(float_to_f16(0x1.8p-25f) == 1);
}

TEST_CASE("dtype names are those of safetensors, in both directions") {
  for (const auto t : {DType::f32, DType::bf16, DType::f16, DType::f8_e4m3, DType::f64, DType::i64,
                       DType::i32, DType::i16, DType::i8, DType::u8, DType::boolean})
    CHECK(dtype_from_name(name_of(t)) == t);
  CHECK(name_of(DType::f8_e4m3) == "F8_E4M3");
  CHECK(!dtype_from_name("F8_E5M2"));
  CHECK(!dtype_from_name(""));
}
