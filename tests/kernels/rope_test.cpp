// RoPE and YaRN against §12.1.
#include "kernels/rope_table.hpp"

#include "kernels/reference_math.hpp"

#include <doctest/doctest.h>

#include <cmath>

using namespace troupe;

namespace {

ModelConfig config_of(double factor, double mscale, double theta = 10000) {
  ModelConfig c;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.rope_theta = theta;
  if (factor > 0)
    c.rope_scaling = RopeScaling{factor, 4096, 32, 1, mscale, mscale};
  return c;
}

// Ten printed digits.
bool same(double got, double printed) {
  return std::fabs(got - printed) <= 6e-11 * std::fabs(printed);
}
bool near(double got, double want, double tolerance = 1e-8) {
  return std::fabs(got - want) <= tolerance;
}

} // namespace

TEST_CASE("YaRN leaves fast channels alone and slows the slow ones, as published") {
  const auto base = rope_frequencies(config_of(0, 0));
  const auto yarn = rope_frequencies(config_of(40, 1));
  struct Row {
    size_t i;
    double base, yarn;
  };
  for (const Row& row : {Row{0, 1, 1},
                         {10, 5.6234132519e-2, 5.6234132519e-2},
                         {11, 4.2169650343e-2, 3.9006926567e-2},
                         {12, 3.1622776602e-2, 2.6879360111e-2},
                         {16, 1.0e-2, 5.5e-3},
                         {20, 3.1622776602e-3, 7.9056941504e-4},
                         {22, 1.7782794100e-3, 1.7782794100e-4},
                         {23, 1.3335214322e-3, 3.3338035804e-5},
                         {31, 1.3335214322e-4, 3.3338035804e-6}}) {
    CAPTURE(row.i);
    CHECK(same(base[row.i], row.base));
    CHECK(same(yarn[row.i], row.yarn));
  }
  for (size_t i = 11; i < 23; ++i)
    CHECK(yarn[i] / base[i] == doctest::Approx(1 - 0.975 * static_cast<double>(i - 10) / 13));
}

TEST_CASE("equal beta_fast and beta_slow give a ramp of one channel (Kimi-K2)") {
  auto config = config_of(32, 1, 50000);
  config.rope_scaling->beta_fast = 1;
  const auto yarn = rope_frequencies(config);
  config.rope_scaling.reset();
  const auto base = rope_frequencies(config);
  CHECK(yarn[19] == base[19]); // low 19, high 20
  CHECK(yarn[20] == doctest::Approx(base[20] / 32));
}

TEST_CASE("a ramp of no width is widened, not divided by") {
  auto config = config_of(4, 1);
  config.rope_scaling->beta_fast = config.rope_scaling->beta_slow = 1e9; // both ends at 0
  for (const double f : rope_frequencies(config))
    CHECK(std::isfinite(f));
}

TEST_CASE("the softmax scale carries YaRN's factor squared") {
  CHECK(near(softmax_scale(config_of(40, 1)), 0.1352337788608801));
  CHECK(near(softmax_scale(config_of(40, 0.707)), 0.1147213867929261));
  CHECK(near(softmax_scale(config_of(32, 1)), 0.1308607999629501));
  CHECK(near(softmax_scale(config_of(64, 1)), 0.1446796258026892));
  CHECK(near(softmax_scale(config_of(0, 1)), 0.0721687836487032));
  auto without = config_of(40, 1);
  without.rope_scaling->mscale_all_dim = 0;
  CHECK(near(softmax_scale(without), 0.0721687836487032));
}

TEST_CASE("cos and sin are scaled only where mscale and mscale_all_dim differ") {
  CHECK(rope_magnitude(config_of(40, 1)) == 1);
  CHECK(rope_magnitude(config_of(0, 1)) == 1);
  auto config = config_of(40, 1);
  config.rope_scaling->mscale_all_dim = 0;
  CHECK(near(rope_magnitude(config), 1.3688879454113936, 1e-15));
  const RopeTables scaled(config, 1), plain(config_of(40, 1), 1);
  CHECK(plain.table().cos[0] == 1.0f);
  CHECK(scaled.table().cos[0] == static_cast<float>(1.3688879454113936));
}

TEST_CASE("the table at position 4096 is V3's") {
  const RopeTables tables(config_of(40, 1), 4097);
  const RopeTable& t = tables.table();
  CHECK(t.dim == 64);
  CHECK(t.max_positions == 4097);
  struct Row {
    int64_t i;
    double cos, sin;
  };
  for (const Row& row : {Row{0, 0.803990613, -0.594641988},
                         {10, -0.541359536, -0.840791207},
                         {16, -0.859323223, -0.511432887},
                         {31, 0.999906768, 0.013654835}}) {
    CAPTURE(row.i); // to F32's rounding: half a unit of a number below 1, and the printed digits
    CHECK(near(t.cos[4096 * 32 + row.i], row.cos, 0x1p-25 + 1e-9));
    CHECK(near(t.sin[4096 * 32 + row.i], row.sin, 0x1p-25 + 1e-9));
  }
}

TEST_CASE("every entry is the correctly rounded sine of an angle in F64") {
  const auto config = config_of(40, 1);
  const auto f = rope_frequencies(config);
  const RopeTables tables(config, 2000);
  int64_t different = 0;
  for (int64_t p = 0; p < 2000; ++p)
    for (int64_t i = 0; i < 32; ++i) {
      const double angle = static_cast<double>(p) * f[static_cast<size_t>(i)];
      different += tables.table().sin[p * 32 + i] != static_cast<float>(std::sin(angle));
      different += tables.table().cos[p * 32 + i] != static_cast<float>(std::cos(angle));
    }
  CHECK(different == 0);
}

TEST_CASE("a rotation of interleaved pairs, in F64") {
  const double x[4] = {1, 2, 3, 4}, want[4] = {-1.272232513, -1.838864985, 2.8786681, 4.088186636};
  for (int i = 0; i < 2; ++i) {
    const auto angle = sin_cos_f64(3.0 * exp_f64(-0.5 * i * log_f64(1e4)));
    const auto [p, q] = reference::rotate(x[2 * i], x[2 * i + 1], angle.cos, angle.sin);
    CHECK(near(p, want[2 * i]));
    CHECK(near(q, want[2 * i + 1]));
  }
}

TEST_CASE("half-split and interleaved rotations differ by a permutation only") {
  ModelConfig config;
  config.qk_rope_head_dim = 8;
  config.rope_theta = 1e4;
  const RopeTables interleaved(config, 10);
  config.rope_interleave = false;
  const RopeTables split(config, 10);
  float a[16], b[16];
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 4; ++i) {
      a[8 * h + 2 * i] = b[8 * h + i] = static_cast<float>(i + 1 + h);
      a[8 * h + 2 * i + 1] = b[8 * h + 4 + i] = static_cast<float>(7 - i);
    }
  InlineWorkers workers;
  const int32_t position = 9;
  reference_backend().rope({1, 2, {a, DType::f32, 16}, 8, &position, &interleaved.table()},
                           workers);
  reference_backend().rope({1, 2, {b, DType::f32, 16}, 8, &position, &split.table()}, workers);
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 4; ++i) {
      CHECK(a[8 * h + 2 * i] == b[8 * h + i]);
      CHECK(a[8 * h + 2 * i + 1] == b[8 * h + 4 + i]);
    }
  CHECK(a[0] != 1.0f);
}

TEST_CASE("the backend's rotation has the bits of the formula, in both dtypes and orders") {
  ModelConfig config;
  config.qk_rope_head_dim = 34; // 17 pairs: vectors and a rest
  config.rope_theta = 1e4;
  InlineWorkers workers;
  for (const bool interleaved : {true, false}) {
    config.rope_interleave = interleaved;
    const RopeTables tables(config, 100);
    const RopeTable& t = tables.table();
    const int32_t positions[3] = {0, 99, 41};
    float x[3][80], y[3][80];
    BF16 z[3][80];
    for (int r = 0; r < 3; ++r)
      for (int i = 0; i < 80; ++i) {
        z[r][i] = to_bf16(static_cast<float>((37 * i + 11 * r) % 19) * 0.37f - 3);
        x[r][i] = y[r][i] = to_float(z[r][i]);
      }
    reference_backend().rope({3, 2, {y, DType::f32, 80}, 40, positions, &t}, workers);
    reference_backend().rope({3, 2, {z, DType::bf16, 80}, 40, positions, &t}, workers);
    for (int r = 0; r < 3; ++r)
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < 17; ++i) {
          const int p = 40 * h + (interleaved ? 2 * i : i), q = interleaved ? p + 1 : p + 17;
          const int64_t angle = positions[r] * 17 + i;
          const auto [a, b] = reference::rotate(x[r][p], x[r][q], t.cos[angle], t.sin[angle]);
          CHECK(y[r][p] == a);
          CHECK(y[r][q] == b);
          CHECK(z[r][p].bits == to_bf16(a).bits);
          CHECK(z[r][q].bits == to_bf16(b).bits);
        }
    for (int r = 0; r < 3; ++r)
      for (const int i : {34, 39, 74, 79}) // between the vectors
        CHECK(y[r][i] == x[r][i]);
  }
}
