// Every backend against the reference, and every backend against itself: a row's result may not
// depend on what else is in the batch.
#include "kernels/backend.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

using namespace troupe;
using namespace troupe::test;

namespace {

// Pretends to have several threads: chunks run one by one, last first, by changing workers. What
// depends on how work is cut, or on which worker takes a chunk, shows.
class CutWorkers final : public Workers {
public:
  explicit CutWorkers(int num_threads) : num_threads_(num_threads) {}
  [[nodiscard]] int num_threads() const override { return num_threads_; }
  void parallel_for(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> f) override {
    for (int64_t chunk = (n + grain - 1) / grain - 1; chunk >= 0; --chunk)
      f(chunk * grain, std::min(n, (chunk + 1) * grain),
        static_cast<int>((chunk * 7 + n) % num_threads_));
  }

private:
  int num_threads_;
};

std::vector<const Backend*> simd_backends() {
  std::vector<const Backend*> found;
  for (const Backend* b : {avx2_backend(), avx512_backend(), avx512_bf16_backend()})
    if (b)
      found.push_back(b);
  return found;
}
std::vector<const Backend*> all_backends() {
  auto found = simd_backends();
  found.push_back(&reference_backend());
  return found;
}

// vdpbf16ps pairs and rounds in its own way; everything else is the same arithmetic.
bool same_arithmetic(const Backend& b, DType a) {
  return a == DType::f32 || &b != avx512_bf16_backend();
}

// Also compares the padding behind each row, which no kernel may touch.
bool equal_bits(const Tensor& a, const Tensor& b) { return a.bytes == b.bytes; }
bool equal_rows(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b) {
  return std::memcmp(a.row(row_a), b.row(row_b),
                     static_cast<size_t>(a.num_columns * size_of(a.dtype))) == 0;
}
float largest(const Tensor& t) {
  float top = 0;
  for (int64_t r = 0; r < t.num_rows; ++r)
    for (int64_t c = 0; c < t.num_columns; ++c)
      top = std::max(top, std::fabs(t.at(r, c)));
  return top;
}
float largest_difference(const Tensor& a, const Tensor& b) {
  float top = 0;
  for (int64_t r = 0; r < a.num_rows; ++r)
    for (int64_t c = 0; c < a.num_columns; ++c) {
      const float d = std::fabs(a.at(r, c) - b.at(r, c));
      top = d <= top ? top : d; // a NaN stays
    }
  return top;
}
// Where vdpbf16ps is at work, values are rounded to BF16 (half a unit is 2^-9 of a value) at up to
// three places in a row, and each may fall to the other side: 2^-6 of the largest output leaves a
// factor of two. F32 outputs differ by rounding of sums only, far less.
bool close(const Tensor& a, const Tensor& b) {
  return largest_difference(a, b) <= std::ldexp(largest(b), -6);
}
bool agrees(const Backend& b, DType a, const Tensor& got, const Tensor& want) {
  return same_arithmetic(b, a) ? equal_bits(got, want) : close(got, want);
}

KSegments random_segments(Random& random, int64_t k) {
  const auto wanted = int64_t{1} << random.between(0, 3);
  if (k < wanted)
    return whole_k(k);
  KSegments s;
  s.count = static_cast<int>(wanted);
  for (int64_t i = 1; i < wanted; ++i) // strictly between the neighbours' bounds, odd ones too
    s.begin[i] = k * i / wanted;
  s.begin[wanted] = k;
  return s;
}

Tensor run_linear(const Backend& b, const Tensor& x, const PackedMatrix& w, DType out,
                  const Tensor* residual, Workers& workers) {
  Tensor y(out, x.num_rows, w.n);
  b.linear({.num_rows = x.num_rows,
            .x = x.rows(),
            .xq = {},
            .w = &w,
            .out = y.out(),
            .residual = residual ? residual->rows() : Rows{}},
           workers);
  return y;
}
Tensor run_linear(const Backend& b, const Quantized& x, int64_t num_rows, const PackedMatrix& w,
                  DType out, Workers& workers) {
  Tensor y(out, num_rows, w.n);
  b.linear({.num_rows = num_rows, .x = {}, .xq = x.rows(), .w = &w, .out = y.out(), .residual = {}},
           workers);
  return y;
}

std::vector<std::byte> scratch_of(int64_t bytes) {
  return std::vector<std::byte>(static_cast<size_t>(bytes));
}

} // namespace

TEST_CASE("linear agrees with the reference for every dtype, shape, segment and residual") {
  Random random(1);
  InlineWorkers inline_workers;
  for (int round = 0; round < 150; ++round) {
    const DType a = random.pick({DType::f32, DType::bf16});
    const DType wt = random.pick({DType::f32, DType::bf16, DType::f8_e4m3});
    const int64_t rows = random.pick<int64_t>({0, 1, 2, 3, 5, 7, 13, 97, 101});
    const int64_t n = random.between(1, 200);
    const int64_t k = random.pick<int64_t>({1, 2, 31, 127, 128, 130, 257, 391, 640});
    const int64_t k0 = wt == DType::f8_e4m3 ? random.pick<int64_t>({0, 37, 128, 200}) : 0;
    const int64_t block_k = random.pick<int64_t>({128, 128, 48, 300});
    const Source source = random_source(random, wt, n, k0 + k, block_k);
    const Weight w = pack_part(source, 0, n, k0, k, random_segments(random, k));
    const Tensor x = random_tensor(random, a, rows, k);
    const DType out = random.chance(2) ? DType::f32 : a;
    const Tensor residual = random_tensor(random, random.chance(2) ? DType::f32 : a, rows, n, 4);
    const Tensor* add = random.chance(2) ? &residual : nullptr;
    const Tensor want = run_linear(reference_backend(), x, w.m, out, add, inline_workers);
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      CAPTURE(round);
      CAPTURE(rows);
      CAPTURE(n);
      CAPTURE(k);
      CHECK(agrees(*b, wt == DType::f32 ? DType::f32 : a,
                   run_linear(*b, x, w.m, out, add, inline_workers), want));
    }
  }
}

TEST_CASE("one vdpbf16ps linear is within its rounding of the reference") {
  // Each of K products is exact and every partial sum is rounded once by the reference and at most
  // twice by the instruction: both differ from the true sum by at most 2K · 2^-24 · Σ|x·w|.
  const Backend* b = avx512_bf16_backend();
  if (!b)
    return;
  Random random(2);
  InlineWorkers workers;
  for (const DType wt : {DType::bf16, DType::f8_e4m3}) {
    const int64_t k = 700, n = 130;
    const Source source = random_source(random, wt, n, k);
    Source magnitudes = source;
    for (int64_t i = 0; i < n * k; ++i) { // clear the sign, in the last byte of either format
      std::byte& top = magnitudes.data[static_cast<size_t>((i + 1) * size_of(wt) - 1)];
      top &= std::byte{0x7f};
    }
    const Tensor x = random_tensor(random, DType::bf16, 9, k);
    Tensor x_abs = x;
    for (int64_t r = 0; r < x.num_rows; ++r)
      for (int64_t c = 0; c < k; ++c)
        x_abs.set(r, c, std::fabs(x.at(r, c)));
    const Weight w = pack_whole(source), w_abs = pack_whole(magnitudes);
    const Tensor want = run_linear(reference_backend(), x, w.m, DType::f32, nullptr, workers);
    const Tensor sum =
        run_linear(reference_backend(), x_abs, w_abs.m, DType::f32, nullptr, workers);
    const Tensor got = run_linear(*b, x, w.m, DType::f32, nullptr, workers);
    for (int64_t r = 0; r < x.num_rows; ++r)
      for (int64_t c = 0; c < n; ++c)
        CHECK(std::fabs(got.at(r, c) - want.at(r, c)) <=
              4 * static_cast<float>(k) * 0x1p-24f * sum.at(r, c));
  }
}

TEST_CASE("linear over quantized rows agrees with the reference") {
  Random random(3);
  InlineWorkers workers;
  for (int round = 0; round < 30; ++round) {
    const int64_t rows = random.pick<int64_t>({0, 1, 4, 9, 100});
    const int64_t n = random.between(1, 150),
                  k = random.pick<int64_t>({1, 100, 128, 256, 300, 515});
    const int64_t k0 = random.pick<int64_t>({0, 128, 256});
    const Source source = random_source(random, DType::f8_e4m3, n, k0 + k);
    const Weight w = pack_part(source, 0, n, k0, k, random_segments(random, k));
    const Quantized x =
        quantize(reference_backend(), random_tensor(random, DType::bf16, rows, k), workers);
    const Tensor want = run_linear(reference_backend(), x, rows, w.m, DType::f32, workers);
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      CAPTURE(round);
      CHECK(agrees(*b, DType::bf16, run_linear(*b, x, rows, w.m, DType::f32, workers), want));
    }
  }
}

TEST_CASE("a row's linear does not depend on the batch, its place in it, or the threads") {
  Random random(4);
  InlineWorkers one;
  CutWorkers two(2), three(3);
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16})
      for (const DType wt : {DType::f32, DType::bf16, DType::f8_e4m3}) {
        CAPTURE(b->name);
        const Source source = random_source(random, wt, 200, 391);
        const Weight w = pack_part(source, 0, 200, 0, 391, random_segments(random, 391));
        const Tensor x = random_tensor(random, a, 110, 391);
        const Tensor whole = run_linear(*b, x, w.m, DType::f32, nullptr, one);
        CHECK(equal_bits(run_linear(*b, x, w.m, DType::f32, nullptr, two), whole));
        CHECK(equal_bits(run_linear(*b, x, w.m, DType::f32, nullptr, three), whole));
        for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 17, 48, 70}) {
          std::vector<int32_t> which;
          for (int64_t i = 0; i < rows; ++i)
            which.push_back(static_cast<int32_t>(random.between(0, x.num_rows - 1)));
          const Tensor some = run_linear(*b, take_rows(x, which), w.m, DType::f32, nullptr, two);
          for (int64_t i = 0; i < rows; ++i)
            CHECK(equal_rows(some, i, whole, which[static_cast<size_t>(i)]));
        }
      }
}

TEST_CASE("a not-a-number in one row reaches no other row") {
  Random random(5);
  InlineWorkers workers;
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16}) {
      const Weight w = random_weight(random, a, 70, 129);
      Tensor x = random_tensor(random, a, 9, 129);
      const Tensor clean = run_linear(*b, x, w.m, DType::f32, nullptr, workers);
      for (int64_t c = 0; c < x.num_columns; ++c)
        x.set(4, c, std::numeric_limits<float>::quiet_NaN());
      const Tensor dirty = run_linear(*b, x, w.m, DType::f32, nullptr, workers);
      for (int64_t r = 0; r < 9; ++r)
        CHECK(equal_rows(dirty, r, clean, r) == (r != 4));
    }
}

TEST_CASE("a matrix cut along K over ranks adds up to the whole one, bit for bit") {
  Random random(6);
  InlineWorkers workers;
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16})
      for (const DType wt : {DType::f32, DType::bf16, DType::f8_e4m3})
        for (const KSegments& segments : {head_segments(8, 25), width_segments(1100)}) {
          const int64_t k = segments.begin[segments.count], n = 70, rows = 7;
          const Source source = random_source(random, wt, n, k);
          const Tensor x = random_tensor(random, a, rows, k);
          const Tensor residual = random_tensor(random, a, rows, n, 8);
          const Weight all = pack_part(source, 0, n, 0, k, segments);
          const Tensor whole = run_linear(*b, x, all.m, a, &residual, workers);
          for (const int tp : {1, 2, 4, 8}) {
            CAPTURE(b->name);
            CAPTURE(tp);
            std::vector<std::vector<float>> sums;
            std::vector<const float*> partials;
            for (int rank = 0; rank < tp; ++rank) {
              KSegments part = slice(segments, rank, tp);
              const int64_t begin = part.begin[0], end = part.begin[part.count];
              for (int s = 0; s <= part.count; ++s)
                part.begin[s] -= begin;
              const Weight w = pack_part(source, 0, n, begin, end - begin, part);
              sums.emplace_back(static_cast<size_t>(rows * n));
              Rows columns = x.rows();
              columns.data = x.row(0) + begin * size_of(a);
              b->linear({.num_rows = rows,
                         .x = columns,
                         .xq = {},
                         .w = &w.m,
                         .out = {sums.back().data(), DType::f32, n},
                         .residual = {}},
                        workers);
            }
            for (const auto& s : sums)
              partials.push_back(s.data());
            Tensor out(a, rows, n);
            b->add_partials({.num_rows = rows,
                             .n = n,
                             .partials = partials,
                             .residual = residual.rows(),
                             .out = out.out()},
                            workers);
            CHECK(equal_bits(out, whole));
          }
        }
}

TEST_CASE("norms, rotations and quantization have the reference's bits in every backend") {
  Random random(7);
  CutWorkers workers(3);
  for (int round = 0; round < 40; ++round)
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      CAPTURE(round);
      const DType in = random.pick({DType::f32, DType::bf16});
      const DType out = random.pick({DType::f32, DType::bf16});
      const int64_t rows = random.between(0, 9),
                    n = random.pick<int64_t>({1, 15, 16, 17, 128, 300});
      const Tensor x = random_tensor(random, in, rows, n, random.chance(4) ? 1e-7f : 30.0f);
      const Tensor weight = random_tensor(random, DType::f32, 1, n);
      const auto* gains = reinterpret_cast<const float*>(weight.bytes.data());
      Tensor got(out, rows, n), want(out, rows, n);
      RmsNormArgs norm{rows, n, x.rows(), gains, 1e-6f, got.out()};
      b->rms_norm(norm, workers);
      norm.out = want.out();
      reference_backend().rms_norm(norm, workers);
      CHECK(equal_bits(got, want));

      const Quantized q = quantize(*b, x, workers),
                      q_want = quantize(reference_backend(), x, workers);
      CHECK(q.codes == q_want.codes);
      CHECK(q.scales == q_want.scales);
      Quantized p = q, p_want = q;
      QuantizeArgs args{rows,           n, x.rows(), true, p.codes.data(), p.scales.data(), n,
                        (n + 127) / 128};
      b->quantize(args, workers);
      args.codes = p_want.codes.data();
      args.scales = p_want.scales.data();
      reference_backend().quantize(args, workers);
      CHECK(p.codes == p_want.codes);
      CHECK(p.scales == p_want.scales);

      const int64_t dim = 2 * random.between(1, 20), heads = random.between(1, 3);
      const Tensor angles = random_tensor(random, DType::f32, 2, 8 * dim);
      const RopeTable table{dim, 8, reinterpret_cast<const float*>(angles.row(0)),
                            reinterpret_cast<const float*>(angles.row(1)), random.chance(2)};
      std::vector<int32_t> positions;
      for (int64_t r = 0; r < rows; ++r)
        positions.push_back(static_cast<int32_t>(random.between(0, 7)));
      Tensor turned = random_tensor(random, in, rows, heads * (dim + 1)), turned_want = turned;
      RopeArgs rope{rows, heads, turned.out(), dim + 1, positions.data(), &table};
      b->rope(rope, workers);
      rope.x = turned_want.out();
      reference_backend().rope(rope, workers);
      CHECK(equal_bits(turned, turned_want));
    }
}

TEST_CASE("quantization rounds every kind of value as the reference does") {
  InlineWorkers workers;
  Tensor x(DType::f32, 1, 128);
  // Halves between neighbouring codes, subnormals, signed zeros, and what saturates.
  for (int64_t c = 0; c < 128; ++c) {
    const float low = e4m3_to_float(static_cast<uint8_t>(std::min<int64_t>(c, 0x7d)));
    const float high = e4m3_to_float(static_cast<uint8_t>(std::min<int64_t>(c, 0x7d) + 1));
    x.set(0, c, (c % 2 ? -0.5f : 0.5f) * (low + high));
  }
  x.set(0, 0, -0.0f);
  x.set(0, 1, 448.0f); // the scale is exactly 1
  x.set(0, 2, -0x1p-10f);
  x.set(0, 3, 0x1.8p-10f);
  const Quantized want = quantize(reference_backend(), x, workers);
  CHECK(want.scales[0] == 1.0f);
  for (const Backend* b : simd_backends()) {
    CAPTURE(b->name);
    CHECK(quantize(*b, x, workers).codes == want.codes);
  }
}

namespace {

// One FFN layer with experts, some rows of which are asked for by index.
struct FfnCase {
  int64_t hidden = 0, width = 0;
  Tensor x;
  std::vector<FfnWeights> experts;
  std::vector<Weight> memory;
  std::vector<std::vector<int32_t>> rows_of; // per expert

  FfnCase(Random& random, DType a, DType wt, int64_t num_rows, int64_t num_experts)
      : hidden(random.pick<int64_t>({64, 150, 200})), width(random.pick<int64_t>({40, 128, 260})),
        x(random_tensor(random, a, num_rows, hidden)) {
    for (int64_t e = 0; e < num_experts; ++e) {
      memory.push_back(random_weight(random, wt, width, hidden));
      memory.push_back(random_weight(random, wt, width, hidden));
      const Source down = random_source(random, wt, hidden, width);
      memory.push_back(pack_part(down, 0, hidden, 0, width, width_segments(width)));
      const size_t last = memory.size();
      experts.push_back({memory[last - 3].m, memory[last - 2].m, memory[last - 1].m});
      std::vector<int32_t> rows;
      if (num_rows > 0)
        for (int64_t i = random.pick<int64_t>({0, 1, 2, 9}); i > 0; --i)
          rows.push_back(static_cast<int32_t>(random.between(0, num_rows - 1)));
      rows_of.push_back(rows);
    }
  }
  [[nodiscard]] int64_t num_out_rows() const {
    int64_t n = 0;
    for (const auto& rows : rows_of)
      n += static_cast<int64_t>(rows.size());
    return n;
  }
  [[nodiscard]] std::vector<ExpertGroup> groups() const {
    std::vector<ExpertGroup> out;
    int64_t begin = 0;
    for (size_t e = 0; e < experts.size(); ++e) {
      out.push_back({&experts[e], rows_of[e], begin});
      begin += static_cast<int64_t>(rows_of[e].size());
    }
    return out;
  }
  // Without `q` on plain rows.
  [[nodiscard]] Tensor run(const Backend& b, std::span<const ExpertGroup> groups, DType out,
                           const Quantized* q, Workers& workers, bool power_of_two = false) const {
    Tensor y(out, std::max<int64_t>(1, num_out_rows()), hidden);
    auto scratch =
        scratch_of(ffn_scratch_bytes(width, hidden, num_out_rows(), workers.num_threads()));
    b.grouped_ffn({.groups = groups,
                   .x = q ? Rows{} : x.rows(),
                   .xq = q ? q->rows() : QuantizedRows{},
                   .out = y.out(),
                   .residual = {},
                   .scratch = scratch,
                   .hidden = hidden,
                   .power_of_two = power_of_two},
                  workers);
    return y;
  }
};

} // namespace

TEST_CASE("grouped FFNs agree with the reference, with groups of no, one and several rows") {
  Random random(8);
  CutWorkers workers(2);
  for (int round = 0; round < 12; ++round) {
    const DType a = random.pick({DType::f32, DType::bf16});
    const DType wt = random.pick({a, DType::f8_e4m3});
    const FfnCase c(random, a, wt, random.pick<int64_t>({0, 1, 12}), random.between(0, 5));
    const auto groups = c.groups();
    const DType out = random.chance(2) ? DType::f32 : a;
    const Tensor want = c.run(reference_backend(), groups, out, nullptr, workers);
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      CAPTURE(round);
      CHECK(agrees(*b, a, c.run(*b, groups, out, nullptr, workers), want));
    }
  }
}

TEST_CASE("grouped FFNs on quantized rows agree with the reference") {
  Random random(9);
  CutWorkers workers(2);
  for (int round = 0; round < 6; ++round) {
    const FfnCase c(random, DType::bf16, DType::f8_e4m3, 12, 4);
    const auto groups = c.groups();
    const Quantized q = quantize(reference_backend(), c.x, workers);
    const bool power_of_two = round % 2 == 1;
    const auto run = [&](const Backend& b) {
      return c.run(b, groups, DType::bf16, &q, workers, power_of_two);
    };
    const Tensor want = run(reference_backend());
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      const Tensor got = run(*b);
      if (same_arithmetic(*b, DType::bf16))
        CHECK(equal_bits(got, want));
      else // the product is rounded to E4M3, whose steps are 2^-3: a flip in few of many terms
        CHECK(largest_difference(got, want) <= std::ldexp(largest(want), -3));
    }
  }
}

TEST_CASE("an expert's row does not depend on other rows, other experts or threads") {
  Random random(10);
  InlineWorkers one;
  CutWorkers three(3);
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16}) {
      CAPTURE(b->name);
      const FfnCase c(random, a, a, 12, 5);
      const auto groups = c.groups();
      const Tensor all = c.run(*b, groups, DType::f32, nullptr, one);
      CHECK(equal_bits(c.run(*b, groups, DType::f32, nullptr, three), all));
      for (const ExpertGroup& group : groups)
        for (size_t i = 0; i < group.row_of_x.size(); ++i) {
          const ExpertGroup alone{group.weights, group.row_of_x.subspan(i, 1), 0};
          const Tensor row = c.run(*b, {&alone, 1}, DType::f32, nullptr, one);
          CHECK(equal_rows(row, 0, all, group.out_begin + static_cast<int64_t>(i)));
        }
    }
}

TEST_CASE("a shared expert adds its residual before rounding") {
  Random random(11);
  InlineWorkers workers;
  for (const Backend* b : simd_backends())
    for (const DType a : {DType::f32, DType::bf16}) {
      FfnCase c(random, a, a, 8, 1);
      c.rows_of[0] = {0, 1, 2, 3, 4, 5, 6, 7};
      const auto groups = c.groups();
      const Tensor residual = random_tensor(random, a, 8, c.hidden, 5);
      Tensor got = residual, want = residual; // in place
      auto scratch = scratch_of(ffn_scratch_bytes(c.width, c.hidden, 8, 1));
      GroupedFfnArgs args{groups, c.x.rows(), {}, got.out(), got.rows(), scratch, c.hidden};
      b->grouped_ffn(args, workers);
      args.out = want.out();
      args.residual = want.rows();
      reference_backend().grouped_ffn(args, workers);
      CHECK(agrees(*b, a, got, want));
    }
}

namespace {

// A layer's attention over paged latents. What no row may read is NaN.
struct MlaCase {
  MlaShape shape;
  DType a;
  int64_t num_pages;
  Tensor cache;
  std::vector<std::vector<int32_t>> pages; // per sequence
  std::vector<int64_t> lengths;
  std::vector<Tensor> queries; // per sequence, one row for each position
  Weight kv_b;
  std::vector<Weight> memory;
  std::vector<PackedMatrix> w_uk_t, w_uv;

  MlaCase(Random& random, DType dtype, DType weights, std::vector<int64_t> sequence_lengths)
      : shape{random.between(1, 5),
              random.pick<int64_t>({6, 16, 32}),
              2 * random.between(1, 5),
              random.pick<int64_t>({8, 16, 70}),
              random.pick<int64_t>({20, 64, 112}),
              0.3f},
        a(dtype), num_pages(static_cast<int64_t>(sequence_lengths.size()) * 4),
        cache(dtype, num_pages * kPageTokens, shape.kv_lora_rank + shape.qk_rope_head_dim, 0),
        lengths(std::move(sequence_lengths)) {
    for (int64_t r = 0; r < cache.num_rows; ++r)
      for (int64_t c = 0; c < cache.num_columns; ++c)
        cache.set(r, c, std::numeric_limits<float>::quiet_NaN());
    for (size_t s = 0; s < lengths.size(); ++s) {
      pages.emplace_back();
      for (int64_t p = 0; p < 4; ++p) // interleaved with the other sequences'
        pages.back().push_back(static_cast<int32_t>(p * static_cast<int64_t>(lengths.size()) +
                                                    static_cast<int64_t>(s)));
      for (int64_t position = 0; position < lengths[s]; ++position)
        for (int64_t c = 0; c < cache.num_columns; ++c)
          cache.set(pages[s][static_cast<size_t>(position / kPageTokens)] * kPageTokens +
                        position % kPageTokens,
                    c, random.value());
      queries.push_back(
          random_tensor(random, dtype, lengths[s],
                        shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)));
    }
    pack_weights(random, weights);
  }

  void pack_weights(Random& random, DType weights) {
    const int64_t nope = shape.qk_nope_head_dim, v = shape.v_head_dim, d_c = shape.kv_lora_rank;
    const Source source = random_source(random, weights, shape.heads * (nope + v), d_c);
    kv_b = pack_whole(source);
    if (weights == DType::f8_e4m3)
      return; // the absorbed form gets its transposed matrices in BF16 or F32
    for (int64_t h = 0; h < shape.heads; ++h) {
      Source transposed{d_c, nope, weights, 128, {}, {}};
      transposed.data.resize(static_cast<size_t>(d_c * nope * size_of(weights)));
      for (int64_t i = 0; i < nope; ++i)
        for (int64_t j = 0; j < d_c; ++j)
          std::memcpy(transposed.data.data() + (j * nope + i) * size_of(weights),
                      source.data.data() + ((h * (nope + v) + i) * d_c + j) * size_of(weights),
                      static_cast<size_t>(size_of(weights)));
      memory.push_back(pack_whole(transposed));
      w_uk_t.push_back(memory.back().m);
      memory.push_back(pack_part(source, h * (nope + v) + nope, v, 0, d_c, whole_k(d_c)));
      w_uv.push_back(memory.back().m);
    }
  }

  struct Run {
    int64_t sequence, first, count;
  };
  // Rows of the step in the order of `runs`, one gap row between two runs.
  [[nodiscard]] Tensor attend(const Backend& b, const std::vector<Run>& runs, bool absorbed,
                              Workers& workers) const {
    int64_t rows = 0, longest = 0;
    std::vector<SequenceRows> sequences;
    for (const Run& run : runs) {
      sequences.push_back({rows, run.count, static_cast<int32_t>(run.first),
                           pages[static_cast<size_t>(run.sequence)].data()});
      rows += run.count + 1;
      longest = std::max(longest, run.first + run.count);
    }
    Tensor q(a, rows, queries[0].num_columns), out(a, rows, shape.heads * shape.v_head_dim);
    for (size_t i = 0; i < runs.size(); ++i)
      for (int64_t r = 0; r < runs[i].count; ++r)
        std::memcpy(q.row(sequences[i].row_begin + r),
                    queries[static_cast<size_t>(runs[i].sequence)].row(runs[i].first + r),
                    static_cast<size_t>(q.num_columns * size_of(a)));
    auto scratch = scratch_of(
        mla_scratch_bytes(shape, a, std::max<int64_t>(rows, 1), longest, workers.num_threads()));
    const LatentCacheLayer layer{const_cast<std::byte*>(cache.bytes.data()), a, cache.num_columns};
    if (absorbed)
      b.mla_absorbed({shape, sequences, q.rows(), layer, w_uk_t, w_uv, out.out(), scratch},
                     workers);
    else
      b.mla_naive({shape, sequences, q.rows(), layer, &kv_b.m, out.out(), scratch}, workers);
    return out;
  }
};

} // namespace

TEST_CASE("naive attention agrees with the reference") {
  Random random(12);
  CutWorkers workers(2);
  for (int round = 0; round < 14; ++round) {
    const DType a = random.pick({DType::f32, DType::bf16});
    const DType wt = random.pick({a, DType::f8_e4m3});
    const MlaCase c(random, a, wt, {random.between(1, 200), random.between(1, 70), 1});
    const int64_t first = random.between(0, c.lengths[0] - 1);
    const std::vector<MlaCase::Run> runs{
        {0, first, c.lengths[0] - first}, {1, 0, c.lengths[1]}, {1, 0, 0}, {2, 0, 1}};
    const Tensor want = c.attend(reference_backend(), runs, false, workers);
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      CAPTURE(round);
      CHECK(agrees(*b, a, c.attend(*b, runs, false, workers), want));
    }
  }
}

TEST_CASE("absorbed attention agrees with the reference") {
  Random random(13);
  CutWorkers workers(2);
  for (int round = 0; round < 14; ++round) {
    const DType a = random.pick({DType::f32, DType::bf16});
    const MlaCase c(random, a, a, {random.between(3, 200), random.between(1, 140), 1});
    const std::vector<MlaCase::Run> runs{
        {0, c.lengths[0] - 3, 3}, {1, c.lengths[1] - 1, 1}, {1, 0, 0}, {2, 0, 1}};
    const Tensor want = c.attend(reference_backend(), runs, true, workers);
    for (const Backend* b : simd_backends()) {
      CAPTURE(b->name);
      CAPTURE(round);
      CHECK(agrees(*b, a, c.attend(*b, runs, true, workers), want));
    }
  }
}

TEST_CASE("a prompt in chunks attends to the bits of the whole prompt") {
  Random random(14);
  InlineWorkers one;
  CutWorkers three(3);
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16}) {
      CAPTURE(b->name);
      const MlaCase c(random, a, a, {150, 80});
      const Tensor whole = c.attend(*b, {{0, 0, 150}, {1, 0, 80}}, false, one);
      CHECK(equal_bits(c.attend(*b, {{0, 0, 150}, {1, 0, 80}}, false, three), whole));
      for (const int64_t chunk : {1, 7, 64})
        for (int64_t first = 0; first < 150; first += chunk * (chunk == 1 ? 13 : 1)) {
          const int64_t n = std::min(chunk, 150 - first);
          const Tensor part = c.attend(*b, {{1, 3, 5}, {0, first, n}}, false, one);
          for (int64_t r = 0; r < n; ++r)
            CHECK(equal_rows(part, 6 + r, whole, first + r));
        }
    }
}

TEST_CASE("an answer's row attends alike alone, with drafts behind it, and among many") {
  Random random(15);
  InlineWorkers one;
  CutWorkers three(3);
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16}) {
      CAPTURE(b->name);
      const MlaCase c(random, a, a, {150, 80});
      const Tensor many = c.attend(*b, {{0, 60, 90}, {1, 70, 10}}, true, one);
      CHECK(equal_bits(c.attend(*b, {{0, 60, 90}, {1, 70, 10}}, true, three), many));
      for (int64_t first = 60; first < 150; first += 11) {
        const Tensor alone = c.attend(*b, {{0, first, 1}}, true, one);
        CHECK(equal_rows(alone, 0, many, first - 60));
        const Tensor drafts =
            c.attend(*b, {{0, first, std::min<int64_t>(3, 150 - first)}}, true, three);
        CHECK(equal_rows(drafts, 0, many, first - 60));
      }
    }
}

TEST_CASE("what another row of the step left in the cache does not touch an earlier row") {
  Random random(16);
  InlineWorkers workers;
  for (const Backend* b : all_backends())
    for (const DType a : {DType::f32, DType::bf16})
      for (const bool absorbed : {false, true}) {
        CAPTURE(b->name);
        MlaCase c(random, a, a, {40});
        const Tensor clean = c.attend(*b, {{0, 0, 40}}, absorbed, workers);
        for (int64_t i = 0; i < c.cache.num_columns; ++i) // page 0 starts at row 0
          c.cache.set(21, i, std::numeric_limits<float>::infinity());
        const Tensor dirty = c.attend(*b, {{0, 0, 40}}, absorbed, workers);
        for (int64_t r = 0; r < 21; ++r)
          CHECK(equal_rows(dirty, r, clean, r));
      }
}

TEST_CASE("every backend chooses the reference's experts") {
  Random random(17);
  InlineWorkers workers;
  for (const Backend* b : simd_backends()) {
    const int64_t rows = 9, n = 32, k = 4;
    const Tensor logits = random_tensor(random, DType::f32, 1, rows * n, 3);
    const Tensor bias = random_tensor(random, DType::f32, 1, n);
    std::vector<int32_t> idx(static_cast<size_t>(rows * k)), idx_want = idx;
    std::vector<float> weight(static_cast<size_t>(rows * k)), weight_want = weight;
    GateArgs args{.num_rows = rows,
                  .n_experts = n,
                  .n_group = 4,
                  .topk_group = 2,
                  .top_k = k,
                  .routed_scaling_factor = 2.5f,
                  .logits = reinterpret_cast<const float*>(logits.bytes.data()),
                  .bias = reinterpret_cast<const float*>(bias.bytes.data()),
                  .topk_idx = idx.data(),
                  .topk_weight = weight.data()};
    b->gate(args, workers);
    args.topk_idx = idx_want.data();
    args.topk_weight = weight_want.data();
    reference_backend().gate(args, workers);
    CHECK(idx == idx_want);
    CHECK(weight == weight_want);
  }
}
