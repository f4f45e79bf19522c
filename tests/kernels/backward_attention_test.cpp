#include "kernels/reference_backward_attention.hpp"

#include "config/model_config.hpp"
#include "tests/kernels/backward.hpp"

#include <array>

using namespace troupe;
using namespace troupe::test;
namespace ref = troupe::reference;

namespace {

// The operands of one attention, or their gradients.
struct Operands {
  Vector q, k_nope, k_rope, v;
  [[nodiscard]] ref::AttentionInputs<const double> inputs(const ref::AttentionShape& s) const {
    return {grid(q, s.heads * (s.d_nope + s.d_rope)), grid(k_nope, s.heads * s.d_nope),
            grid(k_rope, s.d_rope), grid(v, s.heads * s.d_v)};
  }
  [[nodiscard]] ref::AttentionInputs<double> outputs(const ref::AttentionShape& s) {
    return {grid(q, s.heads * (s.d_nope + s.d_rope)), grid(k_nope, s.heads * s.d_nope),
            grid(k_rope, s.d_rope), grid(v, s.heads * s.d_v)};
  }
};

Operands random_operands(Random& random, const ref::AttentionShape& s) {
  return {random_vector(random, s.rows * s.heads * (s.d_nope + s.d_rope)),
          random_vector(random, s.rows * s.heads * s.d_nope),
          random_vector(random, s.rows * s.d_rope),
          random_vector(random, s.rows * s.heads * s.d_v)};
}

struct Forward {
  Vector out, lse;
};
Forward run(const ref::AttentionShape& s, double tau, const Operands& x) {
  Forward f{Vector(static_cast<size_t>(s.rows * s.heads * s.d_v)),
            Vector(static_cast<size_t>(s.rows * s.heads))};
  ref::attention_forward<double>(s, tau, x.inputs(s), grid(f.out, s.heads * s.d_v),
                                 grid(f.lse, s.heads));
  return f;
}

Operands gradients(const ref::AttentionShape& s, double tau, const Operands& x, const Forward& f,
                   const Vector& dout) {
  Operands d = x; // whatever was there is overwritten
  ref::attention_backward<double>(s, tau, x.inputs(s), grid(f.out, s.heads * s.d_v),
                                  grid(f.lse, s.heads), grid(dout, s.heads * s.d_v), d.outputs(s));
  return d;
}

Vector gen(int seed, int rows, int cols, int div) {
  Vector m;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j)
      m.push_back((((131 * seed + 17 * i + 29 * j) % 23) - 11) / static_cast<double>(div));
  return m;
}

} // namespace

TEST_CASE(
    "the backward of attention is its derivative, with ragged key blocks and packed samples") {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    CAPTURE(seed);
    Random random{seed};
    const int64_t rows = seed == 0 ? 0 : random.between(1, 9);
    std::vector<int32_t> first(static_cast<size_t>(rows), 0);
    for (size_t t = 1; t < first.size(); ++t) // a new sample begins at about every third row
      first[t] = random.chance(3) ? static_cast<int32_t>(t) : first[t - 1];
    const ref::AttentionShape s{rows,
                                random.between(1, 3),
                                random.between(1, 4),
                                2 * random.between(1, 2),
                                random.between(1, 5),
                                random.between(2, 4),
                                first.data()};
    const double tau = 0.7;
    Operands x = random_operands(random, s);
    const Vector up = random_vector(random, rows * s.heads * s.d_v);
    const Operands d = gradients(s, tau, x, run(s, tau, x), up);
    const auto loss = [&] { return dot(run(s, tau, x).out, up); };
    check_gradient(x.q, d.q, loss);
    check_gradient(x.k_nope, d.k_nope, loss);
    check_gradient(x.k_rope, d.k_rope, loss);
    check_gradient(x.v, d.v, loss);
  }
}

TEST_CASE("a packed sample has the bits it has alone") {
  Random random{11};
  std::vector<int32_t> first = {0, 0, 0, 3, 3, 3, 3, 3, 3, 3};
  const ref::AttentionShape packed{10, 2, 3, 2, 4, 4, first.data()};
  const std::vector<int32_t> none(7, 0);
  const ref::AttentionShape alone{7, 2, 3, 2, 4, 4, none.data()};
  const Operands x = random_operands(random, packed);
  const auto tail = [](const Vector& v) {
    return Vector(v.begin() + static_cast<std::ptrdiff_t>(v.size() / 10 * 3), v.end());
  };
  const Operands y{tail(x.q), tail(x.k_nope), tail(x.k_rope), tail(x.v)};
  const Vector up = random_vector(random, 10 * 8);
  const Forward f = run(packed, 0.5, x), g = run(alone, 0.5, y);
  CHECK(tail(f.out) == g.out);
  CHECK(tail(f.lse) == g.lse);
  const Operands dx = gradients(packed, 0.5, x, f, up), dy = gradients(alone, 0.5, y, g, tail(up));
  CHECK(tail(dx.q) == dy.q);
  CHECK(tail(dx.k_nope) == dy.k_nope);
  CHECK(tail(dx.k_rope) == dy.k_rope);
  CHECK(tail(dx.v) == dy.v);
}

// The whole layer of §12.2, composed as a caller composes it.
TEST_CASE("the backward of MLA gives the specification's gradients") {
  constexpr int64_t T = 3, D = 8, C = 6;
  const std::vector<int32_t> first(T, 0), position = {0, 1, 2};
  const ref::AttentionShape s{T, 2, 4, 4, 4, 64, first.data()};
  const double tau = 1 / std::sqrt(8.0);
  const Vector q_a = gen(1, 6, 8, 32), q_b = gen(2, 16, 6, 32), kv_a = gen(3, 10, 8, 32),
               kv_b = gen(4, 16, 6, 32), o = gen(5, 8, 8, 32), x = gen(7, 3, 8, 8),
               up = gen(6, 3, 8, 16);
  Vector norm(C), cos(T * 2), sin(T * 2);
  for (size_t j = 0; j < norm.size(); ++j)
    norm[j] = 1 + (static_cast<double>(j % 3) - 1) / 8;
  for (int64_t p = 0; p < T; ++p)
    for (int64_t i = 0; i < 2; ++i) {
      const auto angle = sin_cos_f64(static_cast<double>(p) * (i == 0 ? 1.0 : 0.01));
      grid(cos, 2)(p, i) = angle.cos;
      grid(sin, 2)(p, i) = angle.sin;
    }
  const Vector& ccos = cos;
  const Vector& csin = sin;
  const auto rotate = [&](ref::Grid<double> m) { // forward: backward of the opposite angles
    Vector minus = sin;
    for (double& v : minus)
      v = -v;
    const Vector& cminus = minus;
    ref::rope_backward<double>(T, 4, position.data(), grid(ccos, 2), grid(cminus, 2), true, m);
  };
  const auto unrotate = [&](ref::Grid<double> m) {
    ref::rope_backward<double>(T, 4, position.data(), grid(ccos, 2), grid(csin, 2), true, m);
  };
  const auto normalize = [&](ref::Grid<const double> in, Vector& out) {
    for (int64_t t = 0; t < T; ++t)
      ref::rms_norm<double>(
          C, kLatentNormEps, [&](int64_t i) { return in(t, i); },
          [&](int64_t i) { return norm[static_cast<size_t>(i)]; },
          [&](int64_t i, double v) { grid(out, C)(t, i) = v; });
  };

  Vector zq(T * C), c_q(T * C), zkv(T * 10), c(T * C), kv(T * 16), u(T * D);
  Operands in{Vector(T * 16), Vector(T * 8), Vector(T * 4), Vector(T * 8)};
  ref::linear_fprop<double>(T, C, D, grid(x, D), grid(q_a, D), grid(zq, C));
  normalize(grid(zq, C), c_q);
  ref::linear_fprop<double>(T, 16, C, grid(c_q, C), grid(q_b, C), grid(in.q, 16));
  for (int64_t head = 0; head < 2; ++head)
    rotate({in.q.data() + head * 8 + 4, 16});
  ref::linear_fprop<double>(T, 10, D, grid(x, D), grid(kv_a, D), grid(zkv, 10));
  normalize(grid(zkv, 10), c);
  ref::linear_fprop<double>(T, 16, C, grid(c, C), grid(kv_b, C), grid(kv, 16));
  const auto split = [&](int64_t t, int64_t head, int64_t i) -> std::array<double*, 3> {
    return {&grid(kv, 16)(t, head * 8 + i), &grid(in.k_nope, 8)(t, head * 4 + i),
            &grid(in.v, 8)(t, head * 4 + i)};
  };
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < 4; ++i) {
      grid(in.k_rope, 4)(t, i) = grid(zkv, 10)(t, C + i);
      for (int64_t head = 0; head < 2; ++head) {
        const auto [from, k, v] = split(t, head, i);
        *k = from[0];
        *v = from[4];
      }
    }
  rotate(grid(in.k_rope, 4));
  const Forward f = run(s, tau, in);
  ref::linear_fprop<double>(T, D, 8, grid(f.out, 8), grid(o, 8), grid(u, D));
  CHECK(std::abs(dot(u, up) - -1.4246569870970298) <= 1e-12);

  Vector d_o(o.size()), dout(T * 8), dkv(T * 16), dq_b(q_b.size()), dkv_b(kv_b.size()),
      dq_a(q_a.size()), dkv_a(kv_a.size()), dq_norm(C), dkv_norm(C), dc(T * C), dz(T * 10),
      dx(T * D), part(T * D);
  ref::linear_wgrad<double>(T, D, 8, grid(up, D), grid(f.out, 8), grid(d_o, 8));
  ref::linear_dgrad<double>(T, D, 8, grid(up, D), grid(o, 8), grid(dout, 8));
  Operands d = gradients(s, tau, in, f, dout);
  for (int64_t head = 0; head < 2; ++head)
    unrotate({d.q.data() + head * 8 + 4, 16});
  unrotate(grid(d.k_rope, 4));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < 4; ++i) {
      grid(dz, 10)(t, C + i) = grid(d.k_rope, 4)(t, i);
      for (int64_t head = 0; head < 2; ++head) {
        grid(dkv, 16)(t, head * 8 + i) = grid(d.k_nope, 8)(t, head * 4 + i);
        grid(dkv, 16)(t, head * 8 + 4 + i) = grid(d.v, 8)(t, head * 4 + i);
      }
    }
  ref::linear_wgrad<double>(T, 16, C, grid(dkv, 16), grid(c, C), grid(dkv_b, C));
  ref::linear_dgrad<double>(T, 16, C, grid(dkv, 16), grid(kv_b, C), grid(dc, C));
  ref::rms_norm_backward<double>(T, C, kLatentNormEps, grid(zkv, 10), norm.data(), grid(dc, C),
                                 grid(dz, 10), dkv_norm.data());
  ref::linear_wgrad<double>(T, 10, D, grid(dz, 10), grid(x, D), grid(dkv_a, D));
  ref::linear_dgrad<double>(T, 10, D, grid(dz, 10), grid(kv_a, D), grid(dx, D));
  ref::linear_wgrad<double>(T, 16, C, grid(d.q, 16), grid(c_q, C), grid(dq_b, C));
  ref::linear_dgrad<double>(T, 16, C, grid(d.q, 16), grid(q_b, C), grid(dc, C));
  ref::rms_norm_backward<double>(T, C, kLatentNormEps, grid(zq, C), norm.data(), grid(dc, C),
                                 grid(dc, C), dq_norm.data());
  ref::linear_wgrad<double>(T, C, D, grid(dc, C), grid(x, D), grid(dq_a, D));
  ref::linear_dgrad<double>(T, C, D, grid(dc, C), grid(q_a, D), grid(part, D));
  for (size_t i = 0; i < dx.size(); ++i)
    dx[i] += part[i];

  const Vector want_dx = {-0.058105656, -0.153564859, 0.082771486,  0.105248935,  -0.058624917,
                          -0.154084120, 0.082252225,  0.104729674,  0.360439729,  -0.176163799,
                          -0.209475938, -0.045047567, 0.363976680,  -0.152150312, -0.190771192,
                          0.121701164,  0.174187588,  0.045430912,  -0.038423549, -0.188764349,
                          0.173632672,  0.016707212,  -0.046748723, -0.121473239};
  const Vector want_q = {-0.060981670, -0.013280971, 0.067904186,
                         -0.084902759, -0.053072746, -0.029904658},
               want_kv = {0.010286026,  -0.723004727, -0.220169506,
                          -0.381804500, -0.130075869, -0.709504678};
  for (size_t i = 0; i < dx.size(); ++i)
    CHECK(agrees(dx[i], want_dx[i]));
  for (size_t i = 0; i < want_q.size(); ++i) {
    CHECK(agrees(dq_norm[i], want_q[i]));
    CHECK(agrees(dkv_norm[i], want_kv[i]));
  }
  struct Printed {
    const Vector& gradient;
    double sum, norm, front, back;
  };
  for (const Printed& p : {Printed{dq_a, -0.094669829, 0.727728799, -0.025380167, -0.049593891},
                           Printed{dq_b, -0.350042706, 1.526822675, 0.108544100, 0.092987384},
                           Printed{dkv_a, 0.173763846, 2.706910531, 0.267719788, 0.194491180},
                           Printed{dkv_b, 0.837283913, 2.906621871, -0.045533969, 0.480064124},
                           Printed{d_o, -0.433043395, 3.045208603, 0.030921876, 0.377947145}}) {
    CHECK(agrees(dot(p.gradient, Vector(p.gradient.size(), 1.0)), p.sum));
    CHECK(agrees(std::sqrt(dot(p.gradient, p.gradient)), p.norm));
    CHECK(agrees(p.gradient.front(), p.front));
    CHECK(agrees(p.gradient.back(), p.back));
  }
}
