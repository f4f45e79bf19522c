// The reference backend against its own header, read once more and written down another way; FP8
// against §12.7; backends by name, and their fingerprints.
#include "kernels/backend.hpp"
#include "kernels/reference_math.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

using namespace troupe;
using namespace troupe::test;

namespace {

// Σ w·x in F64 of a whole source.
double exact(const Source& s, const Tensor& x, int64_t n, int64_t row) {
  double sum = 0;
  for (int64_t k = 0; k < s.k; ++k) {
    const std::byte* p = s.data.data() + (n * s.k + k) * size_of(s.dtype);
    double w = 0;
    if (s.dtype == DType::f32) {
      float v;
      std::memcpy(&v, p, sizeof v);
      w = static_cast<double>(v);
    } else if (s.dtype == DType::bf16) {
      BF16 v;
      std::memcpy(&v, p, sizeof v);
      w = static_cast<double>(to_float(v));
    } else {
      const int64_t blocks = (s.k + 127) / 128;
      w = static_cast<double>(e4m3_to_float(static_cast<uint8_t>(*p))) *
          static_cast<double>(s.scales[static_cast<size_t>(n / 128 * blocks + k / 128)]);
    }
    sum += w * static_cast<double>(x.at(row, k));
  }
  return sum;
}

Tensor linear(const Tensor& x, const PackedMatrix& w, DType out, const Tensor* residual = nullptr) {
  InlineWorkers workers;
  Tensor y(out, x.num_rows, w.n);
  reference_backend().linear({.num_rows = x.num_rows,
                              .x = x.rows(),
                              .xq = {},
                              .w = &w,
                              .out = y.out(),
                              .residual = residual ? residual->rows() : Rows{}},
                             workers);
  return y;
}

struct Tile {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
};
Tile quantize_row(const std::vector<float>& x, bool power_of_two) {
  const auto k = std::ssize(x);
  Tile t{std::vector<uint8_t>(x.size()), std::vector<float>((x.size() + 127) / 128)};
  InlineWorkers workers;
  reference_backend().quantize({.num_rows = 1,
                                .k = k,
                                .x = {x.data(), DType::f32, k},
                                .power_of_two = power_of_two,
                                .codes = t.codes.data(),
                                .scales = t.scales.data(),
                                .code_stride = k,
                                .scale_stride = std::ssize(t.scales)},
                               workers);
  return t;
}
double dequantized(const Tile& t, size_t i) {
  return static_cast<double>(e4m3_to_float(t.codes[i])) * static_cast<double>(t.scales[i / 128]);
}
double relative_rms(const Tile& t, const std::vector<float>& x) {
  double error = 0, sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double d = dequantized(t, i) - (static_cast<double>(i) - 63.5) / 10;
    error += d * d;
    sum += (static_cast<double>(i) - 63.5) / 10 * (static_cast<double>(i) - 63.5) / 10;
  }
  return std::sqrt(error / sum);
}

std::vector<float> published_tile() {
  std::vector<float> x;
  for (int i = 0; i < 128; ++i)
    x.push_back(static_cast<float>((i - 63.5) / 10));
  return x;
}

} // namespace

TEST_CASE("a linear is the matrix product, to FP32's rounding") {
  Random random(1);
  for (const DType wt : {DType::f32, DType::bf16, DType::f8_e4m3})
    for (const DType a : {DType::f32, DType::bf16}) {
      const Source source = random_source(random, wt, 130, 300);
      const Tensor x = random_tensor(random, a, 4, 300);
      const Tensor y = linear(x, pack_whole(source).m, DType::f32);
      // 300 roundings of partial sums that stay below 300 · largest product.
      const double largest = wt == DType::f8_e4m3 ? 448 * 0.003 : 1;
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t n = 0; n < 130; ++n)
          CHECK(std::fabs(static_cast<double>(y.at(r, n)) - exact(source, x, n, r)) <=
                300 * 300 * largest * 0x1p-24);
    }
}

TEST_CASE("the order of a linear's sum is ascending in K, one fma each") {
  // 2^24 + 1 is lost in FP32, so the order of these terms shows in the result.
  const std::vector<float> w{0x1p24f, 1, 1, -0x1p24f, 1};
  Source source{1, 5, DType::f32, 128, std::vector<std::byte>(20), {}};
  std::memcpy(source.data.data(), w.data(), 20);
  Tensor x(DType::f32, 1, 5);
  for (int64_t k = 0; k < 5; ++k)
    x.set(0, k, 1);
  CHECK(linear(x, pack_whole(source).m, DType::f32).at(0, 0) == 1); // (2^24 + 1 + 1 - 2^24) + 1
  // Two segments: (2^24 + 1) + (1 - 2^24 + 1) = 2^24 - (2^24 - 2) by exact sums of each.
  KSegments two;
  two.count = 2;
  two.begin[1] = 2;
  two.begin[2] = 5;
  CHECK(linear(x, pack_part(source, 0, 1, 0, 5, two).m, DType::f32).at(0, 0) == 2);
}

TEST_CASE("a residual is added before the one rounding to the output's dtype") {
  Source source{1, 1, DType::f32, 128, std::vector<std::byte>(4), {}};
  const float w = 0x1.01p0f; // in BF16 a tie that goes down to 1; with 2^-9 more it goes up
  std::memcpy(source.data.data(), &w, 4);
  Tensor x(DType::f32, 1, 1), residual(DType::f32, 1, 1);
  x.set(0, 0, 1);
  residual.set(0, 0, 0x1p-12f);
  CHECK(linear(x, pack_whole(source).m, DType::bf16).at(0, 0) == 1.0f);
  CHECK(linear(x, pack_whole(source).m, DType::bf16, &residual).at(0, 0) == 0x1.02p0f);
}

TEST_CASE("partials add in a tree of adjacent pairs") {
  const float a[4] = {0x1p24f, 1, 1, -0x1p24f};
  const float* partials[4] = {a, a + 1, a + 2, a + 3};
  InlineWorkers workers;
  float out = 0;
  const auto add = [&](size_t n) {
    reference_backend().add_partials({.num_rows = 1,
                                      .n = 1,
                                      .partials = {partials, n},
                                      .residual = {},
                                      .out = {&out, DType::f32, 1}},
                                     workers);
    return out;
  };
  CHECK(add(1) == 0x1p24f);
  CHECK(add(2) == 0x1p24f);
  CHECK(add(4) == 1.0f); // 2^24 + (1 - 2^24) = 2^24 - (2^24 - 1)
}

TEST_CASE("sums along a row run in 16 lanes that are added in halves") {
  std::vector<double> x(40), ones(40, 1);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<double>(i);
  const auto at = [](const std::vector<double>& v) {
    return [&v](int64_t i) { return v[static_cast<size_t>(i)]; };
  };
  CHECK(reference::lanes<double>(40, at(x), at(ones)) == 780);
  CHECK(reference::lanes<double>(0, at(x), at(ones)) == 0);
  // Lane 0 holds 2^24 and lane 8 its negative: they meet first, so that lane 4's 1 survives.
  std::vector<float> y(16);
  y[0] = 0x1p24f;
  y[8] = -0x1p24f;
  y[4] = 1;
  const auto value = [&](int64_t i) { return y[static_cast<size_t>(i)]; };
  CHECK(reference::lanes<float>(16, value, [](int64_t) { return 1.0f; }) == 1);
  std::swap(y[8], y[1]); // now 2^24 + 1 comes first
  CHECK(reference::lanes<float>(16, value, [](int64_t) { return 1.0f; }) == 0);
}

TEST_CASE("RMSNorm is w · x / sqrt(mean(x²) + eps)") {
  Random random(2);
  InlineWorkers workers;
  const Tensor x = random_tensor(random, DType::f32, 3, 77),
               w = random_tensor(random, DType::f32, 1, 77);
  Tensor y(DType::f32, 3, 77);
  const RmsNormArgs args{3,    77,     x.rows(), reinterpret_cast<const float*>(w.bytes.data()),
                         0.5f, y.out()};
  reference_backend().rms_norm(args, workers);
  for (int64_t r = 0; r < 3; ++r) {
    double mean = 0;
    for (int64_t i = 0; i < 77; ++i)
      mean += static_cast<double>(x.at(r, i) * x.at(r, i)) / 77;
    for (int64_t i = 0; i < 77; ++i)
      CHECK(y.at(r, i) ==
            doctest::Approx(static_cast<double>(w.at(0, i) * x.at(r, i)) / std::sqrt(mean + 0.5))
                .epsilon(1e-6));
  }
}

// ---- FP8 (§12.7) ------------------------------------------------------------------------------

TEST_CASE("the published tile quantizes to the published codes") {
  const auto x = published_tile();
  const Tile t = quantize_row(x, false);
  CHECK(t.scales[0] == 0.014174106530845165f);
  struct Row {
    size_t i;
    int code;
    double value;
  };
  for (const Row& row : {Row{0, 0xfe, -6.349999726},
                         {1, 0xfe, -6.349999726},
                         {32, 0xf6, -3.174999863},
                         {63, 0xc6, -0.049609373},
                         {64, 0x46, 0.049609373},
                         {65, 0x53, 0.155915172},
                         {96, 0x76, 3.174999863},
                         {126, 0x7e, 6.349999726},
                         {127, 0x7e, 6.349999726}}) {
    CAPTURE(row.i);
    CHECK(t.codes[row.i] == row.code);
    CHECK(std::fabs(dequantized(t, row.i) - row.value) <= 1e-9);
  }
  CHECK(std::fabs(relative_rms(t, x) - 0.02521847) <= 1e-8);
  double worst = 0;
  for (size_t i = 0; i < 128; ++i)
    worst = std::max(worst, std::fabs(dequantized(t, i) - (static_cast<double>(i) - 63.5) / 10));
  CHECK(std::fabs(worst - 0.22142873) <= 1e-8);
}

TEST_CASE("power-of-two scales round up, as published") {
  const auto x = published_tile();
  const Tile t = quantize_row(x, true);
  CHECK(t.scales[0] == 0x1p-6f);
  const std::pair<size_t, int> codes[] = {
      {0, 0xfd}, {1, 0xfc}, {32, 0xf5}, {64, 0x45}, {127, 0x7d}};
  for (const auto& [i, code] : codes)
    CHECK(t.codes[i] == code);
  CHECK(std::fabs(relative_rms(t, x) - 0.02777984) <= 1e-8);
  CHECK(quantize_row(std::vector<float>(128, 448.0f), true).scales[0] == 1.0f); // exact: no step up
  CHECK(quantize_row(std::vector<float>(128, 448.1f), true).scales[0] == 2.0f);
}

TEST_CASE("a tile of zeros has the smallest scale, a ragged tile its own") {
  CHECK(quantize_row(std::vector<float>(128), false).scales[0] == 1e-4f / 448.0f);
  CHECK(quantize_row(std::vector<float>(128), true).scales[0] == 0x1p-22f);
  std::vector<float> x(130, 1);
  x[129] = 44.8f;
  const Tile t = quantize_row(x, false);
  CHECK(t.scales[0] == 1.0f / 448.0f);
  CHECK(t.scales[1] == 44.8f / 448.0f);
  CHECK(t.codes[127] == 0x7e);
  CHECK(t.codes[129] == 0x7e);
}

TEST_CASE("a product of quantized rows takes both scales, block by block") {
  Source source{1, 256, DType::f8_e4m3, 128, std::vector<std::byte>(256), {1.0f, 1.0f}};
  for (auto& code : source.data)
    code = static_cast<std::byte>(float_to_e4m3(0.75f));
  std::vector<uint8_t> codes(256, float_to_e4m3(1.0f));
  std::vector<float> scales{1, 1};
  float out = 0;
  InlineWorkers workers;
  const auto product = [&] {
    const Weight w = pack_whole(source);
    reference_backend().linear({.num_rows = 1,
                                .x = {},
                                .xq = {codes.data(), scales.data(), 256, 2},
                                .w = &w.m,
                                .out = {&out, DType::f32, 1},
                                .residual = {}},
                               workers);
    return out;
  };
  CHECK(product() == 192);
  scales = {1, 4};
  CHECK(product() == 96 + 4 * 96);
  source.scales = {2, 8};
  CHECK(product() == 2 * 96 + 32 * 96);
}

// ---- backends ---------------------------------------------------------------------------------

TEST_CASE("backends are found by name, the fastest as simd") {
  const auto names = available_backends();
  CHECK(names.back() == "reference");
  CHECK(names.front() == best_backend().name);
  for (const auto& name : names) {
    REQUIRE(find_backend(name) != nullptr);
    CHECK(find_backend(name)->name == name);
  }
  CHECK(find_backend("simd") == &best_backend());
  CHECK(find_backend("reference") == &reference_backend());
  CHECK(find_backend("") == nullptr);
  CHECK(find_backend("cuda9") == nullptr);
  for (const Backend* b : {avx2_backend(), avx512_backend(), avx512_bf16_backend()})
    if (b)
      CHECK(find_backend(b->name) == b);
}

TEST_CASE("equal arithmetic has equal fingerprints, different arithmetic different ones") {
  const uint64_t f32 = arithmetic_fingerprint(reference_backend(), DType::f32);
  const uint64_t bf16 = arithmetic_fingerprint(reference_backend(), DType::bf16);
  CHECK(f32 == arithmetic_fingerprint(reference_backend(), DType::f32));
  CHECK(f32 != bf16);
  for (const auto& name : available_backends()) {
    CAPTURE(name);
    const Backend& b = *find_backend(name);
    CHECK(arithmetic_fingerprint(b, DType::f32) == f32);
    CHECK((arithmetic_fingerprint(b, DType::bf16) == bf16) == (&b != avx512_bf16_backend()));
  }
}

namespace {

// A backend whose last element of one kernel's output is off by one unit.
template <auto kKernel, class Args>
void off_by_a_unit(const Args& args, Workers& workers) {
  (reference_backend().*kKernel)(args, workers);
  auto* byte = static_cast<uint8_t*>(args.out.data);
  *byte = static_cast<uint8_t>(*byte ^ 1);
}

} // namespace

TEST_CASE("one unit in one kernel's output changes the fingerprint") {
  const uint64_t right = arithmetic_fingerprint(reference_backend(), DType::bf16);
  const auto changed = [&](auto change) {
    Backend b = reference_backend();
    change(b);
    return arithmetic_fingerprint(b, DType::bf16) != right;
  };
  CHECK(changed([](Backend& b) { b.linear = off_by_a_unit<&Backend::linear>; }));
  CHECK(changed([](Backend& b) { b.add_partials = off_by_a_unit<&Backend::add_partials>; }));
  CHECK(changed([](Backend& b) { b.rms_norm = off_by_a_unit<&Backend::rms_norm>; }));
  CHECK(changed([](Backend& b) { b.mla_naive = off_by_a_unit<&Backend::mla_naive>; }));
  CHECK(changed([](Backend& b) { b.mla_absorbed = off_by_a_unit<&Backend::mla_absorbed>; }));
  CHECK(changed([](Backend& b) { b.grouped_ffn = off_by_a_unit<&Backend::grouped_ffn>; }));
  CHECK(changed([](Backend& b) {
    b.rope = [](const RopeArgs& args, Workers& workers) {
      reference_backend().rope(args, workers);
      auto* byte = static_cast<uint8_t*>(args.x.data);
      *byte = static_cast<uint8_t>(*byte ^ 1);
    };
  }));
  CHECK(changed([](Backend& b) {
    b.gate = [](const GateArgs& args, Workers& workers) {
      reference_backend().gate(args, workers);
      args.topk_weight[0] = std::nextafter(args.topk_weight[0], 9.0f);
    };
  }));
  CHECK(changed([](Backend& b) {
    b.quantize = [](const QuantizeArgs& args, Workers& workers) {
      reference_backend().quantize(args, workers);
      args.scales[0] = std::nextafter(args.scales[0], 9.0f);
    };
  }));
}

// ---- the reference's own invariance -------------------------------------------------------------

TEST_CASE("no rows, no work, no crash") {
  Random random(3);
  InlineWorkers workers;
  const Backend& b = reference_backend();
  const Weight w = random_weight(random, DType::f32, 5, 7);
  b.linear({.num_rows = 0, .x = {}, .xq = {}, .w = &w.m, .out = {}, .residual = {}}, workers);
  b.add_partials({}, workers);
  b.rms_norm({}, workers);
  b.quantize({}, workers);
  b.gate({.logits = nullptr}, workers);
  b.grouped_ffn({}, workers);
  const RopeTable table{4, 0, nullptr, nullptr, true};
  b.rope({0, 1, {}, 4, nullptr, &table}, workers);
  const SequenceRows none{};
  b.mla_naive({{}, {&none, 1}, {}, {}, &w.m, {}, {}}, workers);
  b.mla_absorbed({{}, {&none, 1}, {}, {}, {}, {}, {}, {}}, workers);
}
