#include "kernels/reference_backward_moe.hpp"

#include "tests/kernels/backward.hpp"

using namespace troupe;
using namespace troupe::test;
namespace ref = troupe::reference;

namespace {

// A small layer of routed experts on all tokens of one sequence, every formula used as the ranks
// use it: rows sorted by expert, the gate weight's gradient at the expert, sums by group.
struct Layer {
  ref::GateShape shape;
  int64_t rows = 0, d = 0, width = 0;
  double scaling = 2.5, alpha = 0.3;
  Vector x, router, bias, gate, up,
      down;                 // gate, up: [experts, width, d]; down: [experts, d, width]
  std::vector<int32_t> idx; // fixed, as no gradient goes through the choice

  Layer(Random& random, ScoringFunc scoring, bool norm)
      : rows(random.between(1, 5)), d(random.between(1, 4)), width(random.between(1, 5)) {
    shape = {6, 2, 2, 2, scoring, TopkMethod::noaux_tc, norm};
    x = random_vector(random, rows * d);
    router = random_vector(random, 6 * d);
    bias = random_vector(random, 6);
    gate = random_vector(random, 6 * width * d);
    up = random_vector(random, 6 * width * d);
    down = random_vector(random, 6 * d * width);
    idx.resize(static_cast<size_t>(rows * 2));
    ref::Gate<double> selector{shape};
    const Vector logits = gate_logits();
    std::vector<double> unused(2);
    for (int64_t r = 0; r < rows; ++r)
      selector.run({logits.data() + r * 6, 6}, bias.data(), scaling, {idx.data() + r * 2, 2},
                   unused.data());
  }

  [[nodiscard]] Vector gate_logits() const {
    Vector logits(static_cast<size_t>(rows * 6));
    ref::linear_fprop<double>(rows, 6, d, grid(x, d), grid(router, d), grid(logits, 6));
    return logits;
  }
  [[nodiscard]] Vector scores() const {
    const Vector logits = gate_logits();
    Vector s(logits.size());
    for (int64_t r = 0; r < rows; ++r)
      ref::gate_scores(shape, logits.data() + r * 6, s.data() + r * 6);
    return s;
  }
  // Weights of §3.2, steps 7 and 8, written down once more.
  [[nodiscard]] double weight(const Vector& s, int64_t row, int64_t slot) const {
    const auto score = [&](int64_t k) {
      return s[static_cast<size_t>(row * 6 + idx[static_cast<size_t>(row * 2 + k)])];
    };
    return scaling * score(slot) / (shape.norm_topk_prob ? score(0) + score(1) + 1e-20 : 1.0);
  }
  [[nodiscard]] double balance(Vector& dscores) const {
    const Vector s = scores();
    Vector f(6);
    ref::balance_fractions(shape, rows, idx.data(), f.data());
    return ref::balance_loss<double>(shape, rows, alpha, f.data(), grid(s, 6), grid(dscores, 6));
  }
  [[nodiscard]] double loss(const Vector& dy) const {
    const Vector s = scores();
    Vector ignored(s.size());
    double sum = balance(ignored);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t slot = 0; slot < 2; ++slot)
        for (int64_t j = 0, e = idx[static_cast<size_t>(r * 2 + slot)]; j < width; ++j) {
          double a = 0, b = 0, out = 0;
          for (int64_t i = 0; i < d; ++i) {
            a += grid(gate, d)(e * width + j, i) * grid(x, d)(r, i);
            b += grid(up, d)(e * width + j, i) * grid(x, d)(r, i);
            out += grid(down, width)(e * d + i, j) * grid(dy, d)(r, i);
          }
          sum += weight(s, r, slot) * ref::silu(a) * b * out;
        }
    return sum;
  }
};

struct Gradients {
  Vector x, router, gate, up, down;
  int64_t empty_experts = 0;
};

Gradients backward(const Layer& l, const Vector& dy) {
  Gradients g{Vector(l.x.size()),  Vector(l.router.size()), Vector(l.gate.size()),
              Vector(l.up.size()), Vector(l.down.size()),   0};
  const Vector s = l.scores();
  Vector dscores(s.size()), dweight(l.idx.size()), slots(l.idx.size() * static_cast<size_t>(l.d));
  (void)l.balance(dscores);
  for (int64_t e = 0; e < 6; ++e) {
    std::vector<size_t> mine; // positions in idx, ascending
    for (size_t i = 0; i < l.idx.size(); ++i)
      if (l.idx[i] == e)
        mine.push_back(i);
    const auto n = std::ssize(mine);
    g.empty_experts += n == 0;
    const auto size = [&](int64_t columns) { return static_cast<size_t>(n * columns); };
    Vector x(size(l.d)), dout(size(l.d)), a(size(l.width)), b(a), z(a), dz(a), da(a), db(a),
        weights(size(1)), dweights(weights), dx(size(l.d)), part(dx);
    for (int64_t r = 0; r < n; ++r) {
      const auto token = static_cast<int64_t>(mine[static_cast<size_t>(r)] / 2);
      weights[static_cast<size_t>(r)] =
          l.weight(s, token, static_cast<int64_t>(mine[static_cast<size_t>(r)] % 2));
      for (int64_t i = 0; i < l.d; ++i) {
        grid(x, l.d)(r, i) = grid(l.x, l.d)(token, i);
        grid(dout, l.d)(r, i) = grid(dy, l.d)(token, i);
      }
    }
    const auto of = [&](auto& w) { return w.data() + e * l.width * l.d; };
    const ref::Grid<const double> gate{of(l.gate), l.d}, up{of(l.up), l.d},
        down{of(l.down), l.width};
    ref::linear_fprop<double>(n, l.width, l.d, grid(x, l.d), gate, grid(a, l.width));
    ref::linear_fprop<double>(n, l.width, l.d, grid(x, l.d), up, grid(b, l.width));
    for (size_t i = 0; i < z.size(); ++i)
      z[i] = ref::silu(a[i]) * b[i];
    ref::linear_dgrad<double>(n, l.d, l.width, grid(dout, l.d), down, grid(dz, l.width));
    ref::expert_weight_backward<double>(n, l.width, grid(z, l.width), weights.data(),
                                        grid(dz, l.width), dweights.data());
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < l.width; ++i) // the weight goes with z into W_down's gradient
        grid(z, l.width)(r, i) *= weights[static_cast<size_t>(r)];
    ref::linear_wgrad<double>(n, l.d, l.width, grid(dout, l.d), grid(z, l.width),
                              {of(g.down), l.width});
    ref::swiglu_backward<double>(n, l.width, grid(a, l.width), grid(b, l.width), grid(dz, l.width),
                                 grid(da, l.width), grid(db, l.width));
    ref::linear_wgrad<double>(n, l.width, l.d, grid(da, l.width), grid(x, l.d), {of(g.gate), l.d});
    ref::linear_wgrad<double>(n, l.width, l.d, grid(db, l.width), grid(x, l.d), {of(g.up), l.d});
    ref::linear_dgrad<double>(n, l.width, l.d, grid(da, l.width), gate, grid(dx, l.d));
    ref::linear_dgrad<double>(n, l.width, l.d, grid(db, l.width), up, grid(part, l.d));
    for (int64_t r = 0; r < n; ++r) {
      const size_t slot = mine[static_cast<size_t>(r)];
      dweight[slot] = dweights[static_cast<size_t>(r)];
      for (int64_t i = 0; i < l.d; ++i)
        grid(slots, l.d)(static_cast<int64_t>(slot), i) =
            grid(dx, l.d)(r, i) + grid(part, l.d)(r, i);
    }
  }
  Vector dlogits(s.size()), from_router(g.x.size()), shared(static_cast<size_t>(l.d));
  for (int64_t r = 0; r < l.rows; ++r) {
    ref::gate_weights_backward(l.shape, l.scaling, s.data() + r * 6, {l.idx.data() + r * 2, 2},
                               dweight.data() + r * 2, dscores.data() + r * 6);
    ref::gate_scores_backward(l.shape, s.data() + r * 6, dscores.data() + r * 6,
                              dlogits.data() + r * 6);
  }
  ref::linear_wgrad<double>(l.rows, 6, l.d, grid(dlogits, 6), grid(l.x, l.d), grid(g.router, l.d));
  ref::linear_dgrad<double>(l.rows, 6, l.d, grid(dlogits, 6), grid(l.router, l.d),
                            grid(from_router, l.d));
  for (int64_t r = 0; r < l.rows; ++r)
    ref::dispatch_backward<double>(
        l.shape, l.d, {l.idx.data() + r * 2, 2},
        [&](size_t k) { return slots.data() + (r * 2 + static_cast<int64_t>(k)) * l.d; },
        shared.data(), from_router.data() + r * l.d, [](double v) { return v; },
        g.x.data() + r * l.d);
  return g;
}

} // namespace

TEST_CASE("the backward of routed experts is their derivative, with experts nobody was sent to") {
  int64_t empty = 0;
  for (uint64_t seed = 0; seed < 4; ++seed)
    for (const auto scoring : {ScoringFunc::sigmoid, ScoringFunc::softmax})
      for (const bool norm : {true, false}) {
        CAPTURE(seed);
        CAPTURE(norm);
        Random random{seed};
        Layer layer{random, scoring, norm};
        const Vector dy = random_vector(random, layer.rows * layer.d);
        const Gradients g = backward(layer, dy);
        empty += g.empty_experts;
        const auto loss = [&] { return layer.loss(dy); };
        check_gradient(layer.x, g.x, loss);
        check_gradient(layer.router, g.router, loss);
        check_gradient(layer.gate, g.gate, loss);
        check_gradient(layer.up, g.up, loss);
        check_gradient(layer.down, g.down, loss);
      }
  CHECK(empty > 0);
}

TEST_CASE("the gate's gradient is the specification's, and ignores a common scale of scores") {
  const Vector logits = {0.5, -1, 2, 1, 1.5, -0.5, 0, 0.25, -2, 3, -3, -2.5};
  const ref::GateShape shape{12, 4, 2, 3};
  const std::vector<int32_t> idx = {4, 3, 7};
  const Vector dweight = {0.3, -0.2, 0.5};
  Vector s(12), ds(12), dl(12);
  ref::gate_scores(shape, logits.data(), s.data());
  ref::gate_weights_backward(shape, 2.5, s.data(), std::span<const int32_t>(idx), dweight.data(),
                             ds.data());
  CHECK(std::abs(dot(s, ds)) <= 1e-15);
  ref::gate_scores_backward(shape, s.data(), ds.data(), dl.data());
  for (size_t e = 0; e < 12; ++e)
    CHECK(agrees(dl[e], e == 4 ? 0.021180522 : e == 3 ? -0.088510422 : e == 7 ? 0.093257131 : 0.0));
}

TEST_CASE("the balance loss and its gradient are the specification's") {
  const Vector logits = {2, 0, -1, 1, 1, 0.5, -2, 0, 3, -1, 0, 0.5, 0.5, 2, -1, -0.5};
  const std::vector<int32_t> idx = {0, 3, 0, 1, 0, 3, 1, 0};
  const ref::GateShape shape{4, 1, 1, 2};
  Vector s(16), ds(16), dl(16), f(4);
  for (size_t r = 0; r < 4; ++r)
    ref::gate_scores(shape, logits.data() + 4 * r, s.data() + 4 * r);
  ref::balance_fractions(shape, 4, idx.data(), f.data());
  CHECK(f == Vector{2, 1, 0, 1});
  CHECK(std::abs(ref::balance_loss<double>(shape, 4, 1.0, f.data(), grid(std::as_const(s), 4),
                                           grid(ds, 4)) -
                 1.2311702754) <= 1e-9);
  const Vector want = {0.008191651, -0.006746589, -0.025951439, -0.005305839,
                       0.017188332, -0.009237032, -0.017432549, -0.009826475,
                       0.003888049, -0.004048869, -0.031812408, -0.004839478,
                       0.022835111, -0.002007904, -0.026624653, -0.004494226};
  for (size_t r = 0; r < 4; ++r)
    ref::gate_scores_backward(shape, s.data() + 4 * r, ds.data() + 4 * r, dl.data() + 4 * r);
  for (size_t i = 0; i < 16; ++i)
    CHECK(agrees(dl[i], want[i]));
}

TEST_CASE("a token's gradients are rounded once per group, then added to shared and router") {
  const ref::GateShape shape{4, 2, 2, 3};
  const std::vector<int32_t> idx = {3, 0, 2}; // groups 1, 0, 1
  const std::vector<float> slots = {1.0f, 0.25f, 0x1p-9f};
  const float shared = 2, router = 4;
  float out = 0;
  ref::dispatch_backward<float>(
      shape, 1, idx, [&](size_t k) { return &slots[k]; }, &shared, &router,
      [](float x) { return to_float(to_bf16(x)); }, &out);
  CHECK(out == 7.25f); // 1 + 2^-9 rounds to 1
}
