// SwiGLU FFNs against the formula in F64, and where each rounding stands.
#include "kernels/reference_math.hpp"
#include "kernels/trunk.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <cmath>

using namespace troupe;
using namespace troupe::test;

namespace {

// An expert in F32 with its dequantized weights at hand.
struct Expert {
  int64_t hidden, width;
  Tensor gate, up, down;
  std::vector<Weight> memory;
  FfnWeights weights;

  Expert(Random& random, int64_t h, int64_t w)
      : hidden(h), width(w), gate(random_tensor(random, DType::f32, w, h)),
        up(random_tensor(random, DType::f32, w, h)), down(random_tensor(random, DType::f32, h, w)) {
    weights = {packed(gate), packed(up), packed(down)};
  }
  PackedMatrix packed(const Tensor& t) {
    Source source{t.num_rows, t.num_columns, DType::f32, 128, {}, {}};
    for (int64_t r = 0; r < t.num_rows; ++r)
      source.data.insert(source.data.end(), t.row(r), t.row(r) + t.num_columns * 4);
    memory.push_back(pack_whole(source));
    return memory.back().m;
  }

  // W_down (silu(W_gate x) ⊙ W_up x) in F64, from the reference's templates.
  [[nodiscard]] std::vector<double> exact(const Tensor& x, int64_t row) const {
    const auto input = [&](int64_t k) { return static_cast<double>(x.at(row, k)); };
    const auto dot = [&](const Tensor& w, int64_t n, auto in) {
      return reference::chain<double>(0, w.num_columns, in,
                                      [&](int64_t k) { return static_cast<double>(w.at(n, k)); });
    };
    std::vector<double> product, out;
    for (int64_t n = 0; n < width; ++n)
      product.push_back(reference::silu(dot(gate, n, input)) * dot(up, n, input));
    for (int64_t n = 0; n < hidden; ++n)
      out.push_back(dot(down, n, [&](int64_t k) { return product[static_cast<size_t>(k)]; }));
    return out;
  }
};

Tensor run(const Backend& b, std::span<const ExpertGroup> groups, const Tensor& x, DType out,
           int64_t num_rows, int64_t width, const Tensor* residual = nullptr) {
  InlineWorkers workers;
  Tensor y(out, num_rows, x.num_columns);
  std::vector<std::byte> scratch(
      static_cast<size_t>(ffn_scratch_bytes(width, x.num_columns, num_rows, 1)));
  b.grouped_ffn({.groups = groups,
                 .x = x.rows(),
                 .xq = {},
                 .out = y.out(),
                 .residual = residual ? residual->rows() : Rows{},
                 .scratch = scratch,
                 .hidden = x.num_columns},
                workers);
  return y;
}

} // namespace

TEST_CASE("silu and its tails, in F64") {
  CHECK(reference::silu(0.0) == 0);
  CHECK(std::fabs(reference::silu(2.0) - 2 * 0.88079707797788243) <= 1e-15);
  CHECK(std::fabs(reference::silu(-1.0) + 0.26894142136999512) <= 1e-15);
  CHECK(reference::silu(-800.0) == 0);
  CHECK(reference::silu(800.0) == 800);
}

TEST_CASE("every backend's FFN is W_down (silu(W_gate x) * W_up x)") {
  Random random(1);
  for (const auto& name : available_backends()) {
    CAPTURE(name);
    const Expert expert(random, 40, 70);
    const Tensor x = random_tensor(random, DType::f32, 5, 40);
    const std::vector<int32_t> rows{4, 0, 0, 2};
    const ExpertGroup group{&expert.weights, rows, 0};
    const Tensor y = run(*find_backend(name), {&group, 1}, x, DType::f32, 4, 70);
    for (int64_t r = 0; r < 4; ++r) {
      const auto want = expert.exact(x, rows[static_cast<size_t>(r)]);
      double largest = 0;
      for (const double v : want)
        largest = std::max(largest, std::fabs(v));
      for (int64_t i = 0; i < 40; ++i) // two sums of up to 70 terms, each rounded
        CHECK(std::fabs(static_cast<double>(y.at(r, i)) - want[static_cast<size_t>(i)]) <=
              2 * 70 * 0x1p-24 * largest);
    }
  }
}

TEST_CASE("rows go where their group begins, and nothing else is written") {
  Random random(2);
  const Expert a(random, 24, 30), b(random, 24, 64);
  const Tensor x = random_tensor(random, DType::f32, 3, 24);
  const std::vector<int32_t> first{2}, second{1, 2};
  const std::vector<ExpertGroup> groups{
      {&a.weights, first, 4}, {&b.weights, {}, 0}, {&b.weights, second, 1}};
  for (const auto& name : available_backends()) {
    CAPTURE(name);
    const Tensor y = run(*find_backend(name), groups, x, DType::f32, 5, 64);
    const Tensor untouched(DType::f32, 5, 24);
    for (const int64_t row : {0, 3})
      CHECK(std::memcmp(y.row(row), untouched.row(row), 24 * 4) == 0);
    CHECK(y.at(4, 3) == doctest::Approx(a.exact(x, 2)[3]).epsilon(1e-4));
    CHECK(y.at(1, 3) == doctest::Approx(b.exact(x, 1)[3]).epsilon(1e-4));
    CHECK(y.at(2, 3) == doctest::Approx(b.exact(x, 2)[3]).epsilon(1e-4));
  }
}

TEST_CASE("a quantized product takes scales of the kind asked for, tile by tile") {
  // Product i is silu(1) · c_i for a chosen code c_i, and down the identity: what comes out is the
  // quantized product itself. The second tile is ragged and a thousand times smaller.
  constexpr int64_t kWidth = 200;
  const auto codes = [](int64_t n, int64_t k, auto value) {
    Source source{n, k, DType::f8_e4m3, 128, {}, {}};
    for (int64_t i = 0; i < n * k; ++i)
      source.data.push_back(static_cast<std::byte>(float_to_e4m3(value(i / k, i % k))));
    return pack_whole(source);
  };
  const auto chosen = [](int64_t i) {
    return static_cast<float>(i % 13 - 6) * (i < 128 ? 0.5f : 0x1p-9f);
  };
  const Weight gate = codes(kWidth, kWidth, [](auto, auto k) { return k == 0 ? 1.0f : 0.0f; });
  const Weight up = codes(kWidth, kWidth, [&](auto n, auto k) { return k == 0 ? chosen(n) : 0; });
  const Weight down = codes(kWidth, kWidth, [](auto n, auto k) { return n == k ? 1.0f : 0.0f; });
  const FfnWeights weights{gate.m, up.m, down.m};
  Quantized x{kWidth, std::vector<uint8_t>(kWidth), {1, 1}};
  x.codes[0] = float_to_e4m3(1);
  const std::vector<int32_t> rows{0};
  const ExpertGroup group{&weights, rows, 0};
  InlineWorkers workers;
  std::vector<std::byte> scratch(static_cast<size_t>(ffn_scratch_bytes(kWidth, kWidth, 1, 1)));
  const auto product = [&](int64_t i) { return to_float(to_bf16(silu_f32(1) * chosen(i))); };
  for (const auto& name : available_backends())
    for (const bool power_of_two : {false, true}) {
      CAPTURE(name);
      CAPTURE(power_of_two);
      Tensor y(DType::f32, 1, kWidth);
      find_backend(name)->grouped_ffn({.groups = {&group, 1},
                                       .x = {},
                                       .xq = x.rows(),
                                       .out = y.out(),
                                       .residual = {},
                                       .scratch = scratch,
                                       .hidden = kWidth,
                                       .power_of_two = power_of_two},
                                      workers);
      // amax: 3 · silu(1) = 2.19 and 6 · 2^-9 · silu(1) = 0.00857.
      const float plain[2] = {product(0) / -448.0f, product(130) / -448.0f};
      const float rounded[2] = {0x1p-7f, 0x1p-15f};
      const float* scales = power_of_two ? rounded : plain;
      for (int64_t i = 0; i < kWidth; ++i) {
        CAPTURE(i);
        const float scale = scales[i / 128];
        CHECK(y.at(0, i) == e4m3_to_float(float_to_e4m3(product(i) / scale)) * scale);
      }
    }
}

TEST_CASE("an expert rank's FFN follows the arithmetic's kind of scales") {
  Random random(3);
  ModelConfig config;
  config.hidden_size = 200;
  config.moe_intermediate_size = 150;
  const Weight gate = random_weight(random, DType::f8_e4m3, 150, 200),
               up = random_weight(random, DType::f8_e4m3, 150, 200),
               down = random_weight(random, DType::f8_e4m3, 200, 150);
  const FfnWeights weights{gate.m, up.m, down.m};
  InlineWorkers workers;
  const Tensor x = random_tensor(random, DType::bf16, 6, 200, 30);
  const Quantized q = quantize(reference_backend(), x, workers);
  const std::vector<int32_t> rows{5, 0, 1, 2, 3};
  const ExpertGroup group{&weights, rows, 0};
  for (const auto& name : available_backends()) {
    CAPTURE(name);
    const Backend& b = *find_backend(name);
    std::vector<Tensor> results;
    for (const bool power_of_two : {false, true}) {
      Arithmetic arithmetic;
      arithmetic.fp8_weights = arithmetic.fp8_activations = true;
      arithmetic.fp8_power_of_two = power_of_two;
      ExpertCompute compute(config, arithmetic, b, 2, 1); // in several parts
      Tensor got(DType::bf16, 5, 200), want(DType::bf16, 5, 200);
      compute.run({&group, 1}, x.rows(), q.rows(), got.out(), workers);
      std::vector<std::byte> scratch(static_cast<size_t>(ffn_scratch_bytes(150, 200, 5, 1)));
      b.grouped_ffn({.groups = {&group, 1},
                     .x = {},
                     .xq = q.rows(),
                     .out = want.out(),
                     .residual = {},
                     .scratch = scratch,
                     .hidden = 200,
                     .power_of_two = power_of_two},
                    workers);
      CHECK(got.bytes == want.bytes);
      results.push_back(got);
    }
    CHECK(results[0].bytes != results[1].bytes);
  }
}

TEST_CASE("in BF16 the product is rounded once, gate and up are not") {
  // Gate and up give sums that BF16 can't hold: the product must come from the unrounded
  // ones.
  const auto matrix = [](std::vector<float> values, int64_t n, int64_t k) {
    Source source{n, k, DType::bf16, 128, {}, {}};
    for (const float v : values) {
      const BF16 h = to_bf16(v);
      const auto* p = reinterpret_cast<const std::byte*>(&h);
      source.data.insert(source.data.end(), p, p + 2);
    }
    return pack_whole(source);
  };
  const Weight gate = matrix({8, 0x1.cp-6f}, 1, 2), up = matrix({1, 0x1.cp-9f}, 1, 2),
               down = matrix({1, 1}, 2, 1);
  const FfnWeights weights{gate.m, up.m, down.m};
  Tensor x(DType::bf16, 1, 2);
  x.set(0, 0, 1);
  x.set(0, 1, 1);
  const std::vector<int32_t> rows{0};
  const ExpertGroup group{&weights, rows, 0};
  const float g = 8 + 0x1.cp-6f, u = 1 + 0x1.cp-9f;
  const float want = to_float(to_bf16(silu_f32(g) * u));
  REQUIRE(want != to_float(to_bf16(silu_f32(to_float(to_bf16(g))) * to_float(to_bf16(u)))));
  for (const auto& name : available_backends()) {
    CAPTURE(name);
    CHECK(run(*find_backend(name), {&group, 1}, x, DType::f32, 1, 1).at(0, 0) == want);
  }
}
