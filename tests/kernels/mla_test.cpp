// The tiny MLA layer of §12.2, forward: the reference's formulas in F64 against the printed
// numbers, and every backend in F32 against F64.
#include "kernels/reference_math.hpp"
#include "kernels/rope_table.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <tuple>

using namespace troupe;
using namespace troupe::test;

namespace {

using Matrix = std::vector<std::vector<double>>;

Matrix gen(int seed, int rows, int cols, int div) {
  Matrix m(static_cast<size_t>(rows), std::vector<double>(static_cast<size_t>(cols)));
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j)
      m[static_cast<size_t>(i)][static_cast<size_t>(j)] =
          (((131 * seed + 17 * i + 29 * j) % 23) - 11) / static_cast<double>(div);
  return m;
}

constexpr int64_t kHeads = 2, kNope = 4, kRope = 4, kV = 4, kLatent = 6, kTokens = 3;
const double kTau = 1 / std::sqrt(8.0);

template <class Range>
auto reader(const Range& x, int64_t first = 0) {
  return [&x, first](int64_t i) { return x[static_cast<size_t>(first + i)]; };
}

std::vector<double> times(const Matrix& w, const std::vector<double>& x) {
  std::vector<double> y;
  for (const auto& row : w)
    y.push_back(reference::chain<double>(0, std::ssize(x), reader(x), reader(row)));
  return y;
}

std::vector<double> latent_norm(std::vector<double> x) {
  std::vector<double> y(x.size());
  reference::rms_norm<double>(
      std::ssize(x), kLatentNormEps, reader(x),
      [](int64_t i) { return 1 + (static_cast<double>(i % 3) - 1) / 8; },
      [&](int64_t i, double v) { y[static_cast<size_t>(i)] = v; });
  return y;
}

void rotate(std::vector<double>& x, int64_t first, int64_t position) {
  for (int i = 0; i < 2; ++i) {
    const auto angle =
        sin_cos_f64(static_cast<double>(position) * exp_f64(-0.5 * i * log_f64(1e4)));
    double &p = x[static_cast<size_t>(first + 2 * i)],
           &q = x[static_cast<size_t>(first + 2 * i + 1)];
    std::tie(p, q) = reference::rotate(p, q, angle.cos, angle.sin);
  }
}

// The layer up to attention; both forms start from here.
struct Layer {
  Matrix q_a = gen(1, 6, 8, 32), q_b = gen(2, 16, 6, 32), kv_a = gen(3, 10, 8, 32),
         kv_b = gen(4, 16, 6, 32), o = gen(5, 8, 8, 32), x = gen(7, 3, 8, 8);
  std::vector<std::vector<double>> c_q, q, cache;

  Layer() {
    for (int64_t t = 0; t < kTokens; ++t) {
      c_q.push_back(latent_norm(times(q_a, x[static_cast<size_t>(t)])));
      q.push_back(times(q_b, c_q.back()));
      for (int64_t h = 0; h < kHeads; ++h)
        rotate(q.back(), h * (kNope + kRope) + kNope, t);
      auto z = times(kv_a, x[static_cast<size_t>(t)]);
      std::vector<double> row = latent_norm({z.begin(), z.begin() + kLatent});
      row.insert(row.end(), z.begin() + kLatent, z.end());
      rotate(row, kLatent, t);
      cache.push_back(row);
    }
  }

  // One head's row of attention; `block` is the key block of the online softmax.
  [[nodiscard]] std::vector<double> naive(int64_t t, int64_t head, int64_t block) const {
    std::vector<std::vector<double>> up; // [k_nope ; v] of every key and head
    for (int64_t j = 0; j <= t; ++j) {
      const auto& row = cache[static_cast<size_t>(j)];
      up.push_back(times(kv_b, {row.begin(), row.begin() + kLatent}));
    }
    std::vector<double> out(kV);
    reference::attend<double>(
        t + 1, block, kTau,
        [&](int64_t j) {
          return reference::chain<double>(
              0, kNope + kRope, reader(q[static_cast<size_t>(t)], head * (kNope + kRope)),
              [&](int64_t i) {
                return i < kNope ? up[static_cast<size_t>(j)][static_cast<size_t>(head * 8 + i)]
                                 : cache[static_cast<size_t>(j)]
                                        [static_cast<size_t>(kLatent + i - kNope)];
              });
        },
        [&](int64_t j, int64_t i) {
          return up[static_cast<size_t>(j)][static_cast<size_t>(head * 8 + kNope + i)];
        },
        [](double p) { return p; }, out);
    return out;
  }

  [[nodiscard]] std::vector<double> absorbed(int64_t t, int64_t head, int64_t block) const {
    const auto& query = q[static_cast<size_t>(t)];
    std::vector<double> q_abs(kLatent + kRope), latent(kLatent), out(kV);
    for (int64_t c = 0; c < kLatent; ++c)
      q_abs[static_cast<size_t>(c)] =
          reference::chain<double>(0, kNope, reader(query, head * 8), [&](int64_t i) {
            return kv_b[static_cast<size_t>(head * 8 + i)][static_cast<size_t>(c)];
          });
    for (int64_t i = 0; i < kRope; ++i)
      q_abs[static_cast<size_t>(kLatent + i)] = query[static_cast<size_t>(head * 8 + kNope + i)];
    reference::attend<double>(
        t + 1, block, kTau,
        [&](int64_t j) {
          return reference::lanes<double>(kLatent + kRope, reader(q_abs),
                                          reader(cache[static_cast<size_t>(j)]));
        },
        [&](int64_t j, int64_t i) { return cache[static_cast<size_t>(j)][static_cast<size_t>(i)]; },
        [](double p) { return p; }, latent);
    for (int64_t i = 0; i < kV; ++i)
      out[static_cast<size_t>(i)] = reference::chain<double>(
          0, kLatent, reader(latent), reader(kv_b[static_cast<size_t>(head * 8 + kNope + i)]));
    return out;
  }

  [[nodiscard]] std::vector<double> heads(int64_t t, bool absorbed_form, int64_t block) const {
    std::vector<double> all;
    for (int64_t h = 0; h < kHeads; ++h) {
      const auto one = absorbed_form ? absorbed(t, h, block) : naive(t, h, block);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
};

void check_near(const std::vector<double>& got, const std::vector<double>& want,
                double tolerance = 1e-8) {
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    CAPTURE(i);
    CHECK(std::fabs(got[i] - want[i]) <= tolerance);
  }
}

const Matrix kU{{0.554413760, 0.589618125, -1.397742031, 0.126789604, 0.812977352, 0.095915514,
                 -0.579091267, 0.526268424},
                {0.038251459, 0.586096608, -0.641399541, -0.443904804, 0.489033949, 0.426735290,
                 -0.467702851, -0.004181642},
                {-0.133450779, 0.129052580, 0.066650322, -0.296833635, -0.077268768, 0.320861532,
                 -0.030944793, -0.145121216}};

std::vector<float> floats(const Matrix& rows) {
  std::vector<float> out;
  for (const auto& row : rows)
    out.insert(out.end(), row.begin(), row.end());
  return out;
}

Weight packed(const std::vector<float>& values, int64_t n, int64_t k) {
  Source source{n, k, DType::f32, 128, std::vector<std::byte>(values.size() * 4), {}};
  std::memcpy(source.data.data(), values.data(), source.data.size());
  return pack_whole(source);
}

} // namespace

TEST_CASE("the latents, rope keys and query latent of the tiny layer are the published ones") {
  const Layer layer;
  check_near(layer.c_q[1],
             {0.584735744, 0.656119069, -1.004682324, -0.302999431, 2.016958619, -0.416908992});
  check_near(layer.cache[0], {-0.196055970, 1.573215080, -0.402242492, -0.850966339, -0.271737150,
                              1.716234633, -0.332031250, -0.835937500, -0.261718750, 1.210937500});
  check_near(layer.cache[1], {-0.914799011, -0.410324595, 1.998224567, -0.378707117, -1.090451662,
                              -0.512203133, 0.929445875, 0.832997529, -0.785546543, -0.355529361});
  check_near(layer.cache[2],
             {-0.234975079, -1.096093665, -0.462414515, 1.563303590, -0.301425758, -1.270098534,
              -1.004950324, -0.807890935, -0.221672199, -0.832724688});
}

TEST_CASE("both forms of attention give the published outputs, in key blocks of any size") {
  const Layer layer;
  for (const bool absorbed : {false, true})
    for (const int64_t block : {1, 2, 64})
      for (int64_t t = 0; t < kTokens; ++t) {
        CAPTURE(absorbed);
        CAPTURE(block);
        CAPTURE(t);
        check_near(times(layer.o, layer.heads(t, absorbed, block)), kU[static_cast<size_t>(t)]);
      }
}

TEST_CASE("naive and absorbed attention agree to F64's rounding") {
  const Layer layer;
  for (int64_t t = 0; t < kTokens; ++t)
    check_near(layer.heads(t, false, 64), layer.heads(t, true, 64), 1e-15);
}

TEST_CASE("the softmax weights of the tiny layer are the published ones") {
  const Layer layer;
  // Values that are unit vectors make attention's output its weights.
  const auto weights = [&](int64_t t, int64_t head) {
    std::vector<double> p(static_cast<size_t>(t + 1));
    std::vector<std::vector<double>> up;
    for (int64_t j = 0; j <= t; ++j) {
      const auto& row = layer.cache[static_cast<size_t>(j)];
      up.push_back(times(layer.kv_b, {row.begin(), row.begin() + kLatent}));
    }
    reference::attend<double>(
        t + 1, 2, kTau,
        [&](int64_t j) {
          double s = 0;
          for (int64_t i = 0; i < 4; ++i) {
            s += layer.q[static_cast<size_t>(t)][static_cast<size_t>(head * 8 + i)] *
                 up[static_cast<size_t>(j)][static_cast<size_t>(head * 8 + i)];
            s += layer.q[static_cast<size_t>(t)][static_cast<size_t>(head * 8 + 4 + i)] *
                 layer.cache[static_cast<size_t>(j)][static_cast<size_t>(6 + i)];
          }
          return s;
        },
        [](int64_t j, int64_t i) { return i == j ? 1.0 : 0.0; }, [](double x) { return x; }, p);
    return p;
  };
  check_near(weights(1, 0), {0.454105059, 0.545894941});
  check_near(weights(1, 1), {0.579056073, 0.420943927});
  check_near(weights(2, 0), {0.185460809, 0.338918514, 0.475620677});
  check_near(weights(2, 1), {0.380132146, 0.337200897, 0.282666956});
}

TEST_CASE("every backend's attention computes the tiny layer in F32") {
  const Layer layer;
  const auto q = floats(layer.q), kv_b = floats(layer.kv_b);
  std::vector<float> cache(kPageTokens * (kLatent + kRope));
  const auto rows = floats(layer.cache);
  std::copy(rows.begin(), rows.end(), cache.begin());
  const LatentCacheLayer latents{reinterpret_cast<std::byte*>(cache.data()), DType::f32,
                                 kLatent + kRope};
  const Weight whole = packed(kv_b, 16, kLatent);
  std::vector<Weight> memory;
  std::vector<PackedMatrix> w_uk_t, w_uv;
  for (int64_t h = 0; h < kHeads; ++h) {
    std::vector<float> keys, values;
    for (int64_t c = 0; c < kLatent; ++c)
      for (int64_t i = 0; i < kNope; ++i)
        keys.push_back(kv_b[static_cast<size_t>((h * 8 + i) * kLatent + c)]);
    for (int64_t i = 0; i < kV * kLatent; ++i)
      values.push_back(kv_b[static_cast<size_t>((h * 8 + kNope) * kLatent + i)]);
    memory.push_back(packed(keys, kLatent, kNope));
    w_uk_t.push_back(memory.back().m);
    memory.push_back(packed(values, kV, kLatent));
    w_uv.push_back(memory.back().m);
  }
  const int32_t page = 0;
  const SequenceRows sequence{0, kTokens, 0, &page};
  const MlaShape shape{kHeads, kNope, kRope, kV, kLatent, static_cast<float>(kTau)};
  InlineWorkers workers;
  std::vector<std::byte> scratch(
      static_cast<size_t>(mla_scratch_bytes(shape, DType::f32, kTokens, kPageTokens, 1)));
  for (const std::string& name : available_backends())
    for (const bool absorbed : {false, true}) {
      CAPTURE(name);
      CAPTURE(absorbed);
      std::vector<float> out(kTokens * kHeads * kV);
      const MutableRows to{out.data(), DType::f32, kHeads * kV};
      const Rows from{q.data(), DType::f32, kHeads * (kNope + kRope)};
      const Backend& b = *find_backend(name);
      if (absorbed)
        b.mla_absorbed({shape, {&sequence, 1}, from, latents, w_uk_t, w_uv, to, scratch}, workers);
      else
        b.mla_naive({shape, {&sequence, 1}, from, latents, &whole.m, to, scratch}, workers);
      // A handful of F32 roundings of numbers around 1.
      for (int64_t t = 0; t < kTokens; ++t) {
        const auto first = out.begin() + t * kHeads * kV;
        check_near({first, first + kHeads * kV}, layer.heads(t, false, 64), 1e-6);
      }
    }
}
