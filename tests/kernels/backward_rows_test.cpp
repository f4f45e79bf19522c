#include "tests/kernels/backward.hpp"

#include <limits>

using namespace troupe;
using namespace troupe::test;
namespace ref = troupe::reference;

TEST_CASE("dgrad and wgrad are the derivatives of a linear layer, also without rows") {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    CAPTURE(seed);
    Random random{seed};
    const int64_t rows = seed == 0 ? 0 : random.between(1, 7), n = random.between(1, 9),
                  k = random.between(1, 9);
    Vector x = random_vector(random, rows * k), w = random_vector(random, n * k);
    const Vector up = random_vector(random, rows * n);
    const auto loss = [&] {
      Vector y(up.size());
      ref::linear_fprop<double>(rows, n, k, grid(x, k), grid(w, k), grid(y, n));
      return dot(y, up);
    };
    Vector dx(x.size()), dw(w.size());
    ref::linear_dgrad<double>(rows, n, k, grid(up, n), grid(w, k), grid(dx, k));
    ref::linear_wgrad<double>(rows, n, k, grid(up, n), grid(x, k), grid(dw, k));
    check_gradient(x, dx, loss);
    check_gradient(w, dw, loss);
  }
}

TEST_CASE("a weight's gradient has the same bits however its rows are cut into calls") {
  Random random{3};
  const int64_t rows = 37, n = 5, k = 6;
  std::vector<float> x(rows * k), dy(rows * n), whole(n * k), parts(n * k);
  for (float& v : x)
    v = random.value();
  for (float& v : dy)
    v = random.value();
  using G = ref::Grid<float>;
  ref::linear_wgrad<float>(rows, n, k, G{dy.data(), n}, G{x.data(), k}, G{whole.data(), k});
  for (int64_t first = 0, size = 1; first < rows; first += size, size = random.between(0, 9)) {
    size = std::min(size, rows - first);
    ref::linear_wgrad<float>(size, n, k, G{dy.data() + first * n, n}, G{x.data() + first * k, k},
                             G{parts.data(), k});
  }
  CHECK(whole == parts);
}

TEST_CASE("products of BF16 operands are summed in F32") {
  Random random{4};
  const int64_t rows = 4, n = 3, k = 33;
  std::vector<BF16> x(rows * k), w(n * k);
  for (auto* v : {&x, &w})
    for (BF16& e : *v)
      e = to_bf16(random.value());
  const auto at = [&](const std::vector<BF16>& v) {
    return [&v](int64_t r, int64_t c) { return to_float(v[static_cast<size_t>(r * k + c)]); };
  };
  std::vector<float> y(rows * n);
  ref::linear_fprop<float>(rows, n, k, at(x), at(w), ref::Grid<float>{y.data(), n});
  Vector exact(y.size());
  ref::linear_fprop<double>(rows, n, k, at(x), at(w), grid(exact, n));
  // 33 additions of values below one, each off by at most half an ulp of a sum below 33.
  for (size_t i = 0; i < y.size(); ++i)
    CHECK(std::abs(static_cast<double>(y[i]) - exact[i]) <= 33 * 33 * 0x1p-24);
}

TEST_CASE("the backward of RMSNorm is its derivative, and its weight's gradient adds up") {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    CAPTURE(seed);
    Random random{seed};
    const int64_t rows = seed == 0 ? 0 : random.between(1, 4), n = random.between(1, 37);
    Vector x = random_vector(random, rows * n), w = random_vector(random, n);
    const Vector up = random_vector(random, rows * n);
    const auto loss = [&] {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r)
        ref::rms_norm<double>(
            n, 1e-6, [&](int64_t i) { return grid(x, n)(r, i); },
            [&](int64_t i) { return w[static_cast<size_t>(i)]; },
            [&](int64_t i, double y) { sum += y * grid(up, n)(r, i); });
      return sum;
    };
    Vector dx = up, dw(w.size(), 2.0); // dx aliases dy
    ref::rms_norm_backward<double>(rows, n, 1e-6, grid(x, n), w.data(), grid(dx, n), grid(dx, n),
                                   dw.data());
    for (double& g : dw)
      g -= 2.0;
    check_gradient(x, dx, loss);
    check_gradient(w, dw, loss);
  }
}

TEST_CASE("the backward of SwiGLU is its derivative") {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Random random{seed};
    const int64_t rows = seed == 0 ? 0 : random.between(1, 5), n = random.between(1, 19);
    Vector a = random_vector(random, rows * n, 4), b = random_vector(random, rows * n);
    const Vector up = random_vector(random, rows * n);
    const auto loss = [&] {
      double sum = 0;
      for (size_t i = 0; i < a.size(); ++i)
        sum += ref::silu(a[i]) * b[i] * up[i];
      return sum;
    };
    Vector da(a.size()), db(b.size());
    ref::swiglu_backward<double>(rows, n, grid(a, n), grid(b, n), grid(up, n), grid(da, n),
                                 grid(db, n));
    check_gradient(a, da, loss);
    check_gradient(b, db, loss);
  }
}

TEST_CASE("the backward of RoPE is its derivative in both layouts, with a multiplier too") {
  for (const bool interleaved : {true, false}) {
    CAPTURE(interleaved);
    Random random{7};
    const int64_t rows = 5, dim = 6, half = dim / 2, positions = 9;
    Vector cos(positions * half), sin(cos.size());
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t i = 0; i < half; ++i) {
        const auto angle = sin_cos_f64(static_cast<double>(p) / static_cast<double>(1 + 3 * i));
        grid(cos, half)(p, i) = 1.25 * angle.cos;
        grid(sin, half)(p, i) = 1.25 * angle.sin;
      }
    const std::vector<int32_t> at = {0, 8, 3, 3, 1};
    Vector x = random_vector(random, rows * dim);
    const Vector up = random_vector(random, rows * dim);
    const auto loss = [&] {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < half; ++i) {
          const int64_t a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : i + half;
          const int64_t p = at[static_cast<size_t>(r)];
          const auto [u, v] = ref::rotate(grid(x, dim)(r, a), grid(x, dim)(r, b),
                                          grid(cos, half)(p, i), grid(sin, half)(p, i));
          sum += u * grid(up, dim)(r, a) + v * grid(up, dim)(r, b);
        }
      return sum;
    };
    Vector dx = up;
    ref::rope_backward<double>(rows, dim, at.data(), grid(std::as_const(cos), half),
                               grid(std::as_const(sin), half), interleaved, grid(dx, dim));
    check_gradient(x, dx, loss);
  }
}

TEST_CASE("the embedding's gradient adds rows of the same id in the order of positions") {
  const std::vector<int32_t> ids = {2, 0, 2, 2};
  const std::vector<float> dy = {1e8f, 3.0f, -1e8f, 1.0f};
  std::vector<float> table(4, 0.0f);
  ref::embedding_backward<float>(4, 1, ids.data(), {dy.data(), 1}, {table.data(), 1});
  CHECK(table == std::vector<float>{3.0f, 0.0f, 1.0f, 0.0f}); // another order loses the one
}

TEST_CASE("the backward of cross-entropy is its derivative; rows without target have none") {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Random random{seed};
    const int64_t rows = seed == 0 ? 0 : random.between(2, 5), vocab = random.between(2, 23);
    Vector logits = random_vector(random, rows * vocab, 6);
    std::vector<int32_t> targets(static_cast<size_t>(rows));
    for (int32_t& t : targets)
      t = static_cast<int32_t>(random.between(0, vocab - 1));
    if (rows > 0)
      targets[1] = ref::kNoTarget;
    Vector lse(targets.size()), d(logits.size());
    const auto loss = [&] {
      return 0.25 * ref::cross_entropy<double>(rows, vocab, grid(std::as_const(logits), vocab),
                                               targets.data(), lse.data());
    };
    const double at = loss();
    CHECK(at >= 0);
    ref::cross_entropy_backward<double>(rows, vocab, grid(logits, vocab), targets.data(),
                                        lse.data(), 0.25, grid(d, vocab));
    if (rows > 0)
      for (int64_t i = 0; i < vocab; ++i)
        CHECK(grid(d, vocab)(1, i) == 0);
    check_gradient(logits, d, loss);
  }
}

TEST_CASE("cross-entropy survives logits beyond the range of exp") {
  const std::vector<float> logits = {1000.0f, 0.0f, -1000.0f};
  const int32_t target = 1;
  float lse = 0;
  CHECK(ref::cross_entropy<float>(1, 3, {logits.data(), 3}, &target, &lse) == 1000.0);
  std::vector<float> d(3);
  ref::cross_entropy_backward<float>(1, 3, {logits.data(), 3}, &target, &lse, 1.0f, {d.data(), 3});
  CHECK(d == std::vector<float>{1.0f, -1.0f, 0.0f});
}

TEST_CASE("AdamW takes the specification's three steps") {
  ref::AdamW<double> o{.lr = 2.2e-4, .weight_decay = 0.1};
  double theta = 0.5, m = 0, v = 0;
  const double g[] = {0.2, -0.1, 0.05}, want_m[] = {0.02, 0.008, 0.0122},
               want_v[] = {0.002, 0.0024, 0.002405},
               want[] = {0.499769000011, 0.499698963818, 0.499611700489};
  for (int i = 0; i < 3; ++i) {
    o.step = i + 1;
    ref::adamw(o, 1, 1.0, g + i, &theta, &m, &v, [](double x) { return x; });
    CHECK(std::abs(m - want_m[i]) <= 1e-12);
    CHECK(std::abs(v - want_v[i]) <= 1e-12);
    CHECK(std::abs(theta - want[i]) <= 1e-12);
  }
}

TEST_CASE("AdamW keeps moments rounded, and moves a weight without gradient on") {
  const auto bf16 = [](float x) { return to_float(to_bf16(x)); };
  ref::AdamW<float> o{.lr = 1e-2f, .weight_decay = 0.0f};
  float theta = 1, m = 0, v = 0, g = 0.3f;
  ref::adamw(o, 1, 1.0f, &g, &theta, &m, &v, bf16);
  CHECK(m == bf16(m));
  CHECK(v == bf16(v));
  const float before = theta;
  g = 0;
  o.step = 2;
  ref::adamw(o, 1, 1.0f, &g, &theta, &m, &v, bf16);
  CHECK(theta < before);
}

TEST_CASE("clipping scales down to the norm, never up, and keeps NaN") {
  CHECK(ref::clip_factor(0.5, 1.0) == 1.0);
  CHECK(ref::clip_factor(0.0, 1.0) == 1.0);
  CHECK(ref::clip_factor(4.0, 1.0) == 0.25);
  CHECK(std::isnan(ref::clip_factor(std::numeric_limits<double>::quiet_NaN(), 1.0)));
}
