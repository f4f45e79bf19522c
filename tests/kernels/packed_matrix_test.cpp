// Packing against a reading of the layout's description, for every shape, part and conversion.
#include "kernels/packed_matrix.hpp"

#include "kernels/reference_access.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

using namespace troupe;
using namespace troupe::test;

namespace {

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Element (row, column) of a whole source, dequantized.
float element(const Source& s, int64_t row, int64_t column) {
  const std::byte* p = s.data.data() + (row * s.k + column) * size_of(s.dtype);
  switch (s.dtype) {
  case DType::f32:
    return load<float>(p);
  case DType::bf16:
    return to_float(load<BF16>(p));
  case DType::f16:
    return f16_to_float(load<uint16_t>(p));
  default: {
    const float value = e4m3_to_float(load<uint8_t>(p));
    const int64_t blocks = (s.k + s.block_k - 1) / s.block_k;
    return value * s.scales[static_cast<size_t>(row / 128 * blocks + column / s.block_k)];
  }
  }
}

Source random_f16(Random& random, int64_t n, int64_t k) {
  Source s{n, k, DType::f16, 128, std::vector<std::byte>(static_cast<size_t>(n * k * 2)), {}};
  for (int64_t i = 0; i < n * k; ++i) {
    const uint16_t bits = float_to_f16(random.value());
    std::memcpy(s.data.data() + i * 2, &bits, 2);
  }
  return s;
}
Source any_source(Random& random, DType dtype, int64_t n, int64_t k, int64_t block_k = 128) {
  return dtype == DType::f16 ? random_f16(random, n, k)
                             : random_source(random, dtype, n, k, block_k);
}

// Where (row, stored column) lies, from the header's table.
int64_t index_of(const PackedMatrix& m, int64_t stored_k, int64_t row, int64_t k) {
  const int64_t panel = row / 64, lane = row % 64;
  return m.dtype == DType::f32 ? (panel * stored_k + k) * 64 + lane
                               : ((panel * (stored_k / 2) + k / 2) * 64 + lane) * 2 + k % 2;
}

Weight empty_weight(DType dtype, int64_t n, int64_t k, const KSegments& segments, int64_t k0,
                    int64_t block_k) {
  Weight w;
  w.m.n = n;
  w.m.k = k;
  w.m.dtype = dtype;
  w.m.segments = segments;
  w.m.k0 = k0;
  w.m.block_k = block_k;
  w.memory = AlignedBytes(packed_bytes(w.m));
  std::memset(w.memory.data(), 0x7b, static_cast<size_t>(packed_bytes(w.m)));
  return w;
}

KSegments cut(int64_t k, int count) {
  KSegments s;
  s.count = count;
  for (int i = 0; i <= count; ++i)
    s.begin[i] = k * i / count;
  return s;
}

} // namespace

TEST_CASE("every element lands where the layout says, everything else is zero") {
  Random random(1);
  for (int round = 0; round < 120; ++round) {
    const DType from = random.pick({DType::f32, DType::bf16, DType::f16, DType::f8_e4m3});
    const DType to = random.pick({DType::f32, DType::bf16});
    const int64_t n = random.pick<int64_t>({1, 5, 63, 64, 65, 130, 200});
    const int64_t k = random.pick<int64_t>({1, 2, 3, 31, 127, 128, 129, 256, 300});
    const int64_t row0 = random.between(0, 70), col0 = random.between(0, 150);
    const Source source = any_source(random, from, row0 + n + 9, col0 + k + 7);
    Weight w = empty_weight(to, n, k, cut(k, k < 8 ? 1 : random.pick({1, 2, 4, 8})), col0, 128);
    const WeightSource part = source.part(row0, n, col0, k);
    REQUIRE(!pack(w.m, {&part, 1}, w.memory.data(), 0, w.m.panels()));
    CAPTURE(round);
    int64_t stored_k = 0;
    for (int s = 0; s < w.m.segments.count; ++s)
      stored_k += (w.m.segments.begin[s + 1] - w.m.segments.begin[s] + 1) / 2 * 2;
    const int64_t size = size_of(to), count = w.m.panels() * 64 * stored_k;
    REQUIRE(packed_bytes(w.m) == (count * size + 63) / 64 * 64);
    std::vector<std::byte> want(static_cast<size_t>(count * size));
    for (int64_t row = 0; row < n; ++row)
      for (int64_t s = 0, stored = 0; s < w.m.segments.count; ++s) {
        for (int64_t c = w.m.segments.begin[s]; c < w.m.segments.begin[s + 1]; ++c, ++stored) {
          const float value = element(source, row0 + row, col0 + c);
          const BF16 bits = to_bf16(value);
          std::memcpy(want.data() + index_of(w.m, stored_k, row, stored) * size,
                      to == DType::f32 ? static_cast<const void*>(&value) : &bits,
                      static_cast<size_t>(size));
        }
        stored += stored % 2;
      }
    CHECK(std::memcmp(w.m.data, want.data(), want.size()) == 0);
  }
}

TEST_CASE("E4M3 codes and their scales keep their global blocks, wherever a part begins") {
  Random random(2);
  for (int round = 0; round < 60; ++round) {
    const int64_t n = random.pick<int64_t>({1, 64, 130, 200}), k = random.between(1, 400);
    const int64_t row0 = random.between(0, 200), col0 = random.between(0, 300);
    const int64_t block_k = random.pick<int64_t>({128, 128, 48});
    const Source source =
        random_source(random, DType::f8_e4m3, row0 + n + 5, col0 + k + 3, block_k);
    const Weight w = pack_part(source, row0, n, col0, k, cut(k, k < 8 ? 1 : 4));
    const reference::PackedReader reader(w.m);
    CAPTURE(round);
    int64_t wrong = 0;
    for (int64_t row = 0; row < n; ++row)
      for (int s = 0; s < w.m.segments.count; ++s)
        for (int64_t c = w.m.segments.begin[s]; c < w.m.segments.begin[s + 1]; ++c)
          wrong +=
              reader.at(row, s, c) * reader.scale(row, c) != element(source, row0 + row, col0 + c);
    CHECK(wrong == 0);
    // Padding rows have scale zero, so that nothing of them can reach a sum.
    const int64_t blocks = (col0 + k - 1) / block_k - col0 / block_k + 1;
    for (int64_t row = n; row < w.m.panels() * 64; ++row)
      for (int64_t b = 0; b < blocks; ++b)
        CHECK(w.m.scales[(row / 64 * blocks + b) * 64 + row % 64] == 0);
  }
}

TEST_CASE("a tensor of codes without scales has scales of one") {
  Random random(3);
  Source source = random_source(random, DType::f8_e4m3, 70, 130);
  source.scales.clear();
  const Weight w = pack_whole(source);
  CHECK(w.m.scales[0] == 1);
  CHECK(w.m.scales[64 + 3] == 1);
  Weight wide = empty_weight(DType::f32, 70, 130, whole_k(130), 0, 128);
  const WeightSource part = source.part(0, 70, 0, 130);
  REQUIRE(!pack(wide.m, {&part, 1}, wide.memory.data(), 0, 2));
  CHECK(load<float>(wide.m.data) == e4m3_to_float(static_cast<uint8_t>(source.data[0])));
}

TEST_CASE("quantizing takes each scale from the whole global block, also for a part of it") {
  Random random(4);
  for (const DType from : {DType::f32, DType::bf16}) {
    Source source = random_source(random, from, 300, 290);
    // Block (1, 1) gets its maximum in a place that the part below doesn't hold.
    const float large = 100;
    const BF16 large_bits = to_bf16(large);
    std::memcpy(source.data.data() + (130 * 290 + 130) * size_of(from),
                from == DType::f32 ? static_cast<const void*>(&large) : &large_bits,
                static_cast<size_t>(size_of(from)));
    for (int64_t r = 256; r < 300; ++r) // block (2, 0) is all zero
      std::memset(source.data.data() + r * 290 * size_of(from), 0,
                  static_cast<size_t>(128 * size_of(from)));
    const auto quantize = [&](int64_t row0, int64_t n, int64_t col0, int64_t k) {
      Weight w = empty_weight(DType::f8_e4m3, n, k, whole_k(k), col0, 128);
      const WeightSource part = source.part(row0, n, col0, k);
      REQUIRE(!pack(w.m, {&part, 1}, w.memory.data(), 0, w.m.panels()));
      return w;
    };
    const Weight whole = quantize(0, 300, 0, 290), part = quantize(140, 150, 150, 100);
    const reference::PackedReader all(whole.m), some(part.m);
    CHECK(all.scale(140, 150) == 100.0f / 448);
    CHECK(all.scale(260, 5) == 1);
    CHECK(all.at(260, 0, 5) == 0);
    float amax = 0; // of the ragged corner block
    for (int64_t r = 256; r < 300; ++r)
      for (int64_t c = 256; c < 290; ++c)
        amax = std::max(amax, std::fabs(element(source, r, c)));
    CHECK(all.scale(299, 289) == amax / 448);
    int64_t wrong = 0;
    for (int64_t r = 0; r < 300; ++r)
      for (int64_t c = 0; c < 290; ++c) {
        const float code = e4m3_to_float(float_to_e4m3(element(source, r, c) / all.scale(r, c)));
        wrong += all.at(r, 0, c) != code;
        if (r >= 140 && r < 290 && c >= 150 && c < 250) {
          wrong += some.at(r - 140, 0, c - 150) != code;
          wrong += some.scale(r - 140, c - 150) != all.scale(r, c);
        }
      }
    CHECK(wrong == 0);
  }
}

TEST_CASE("quantizing rounds every float to the code that float_to_e4m3 gives") {
  // Values around every code, tie, subnormal and sign, in blocks whose amax of 448 makes a scale
  // of 1.
  Source source{1, 0, DType::f32, 128, {}, {}};
  std::vector<float> values;
  for (int code = 0; code < 0x7e; ++code) {
    const float low = e4m3_to_float(static_cast<uint8_t>(code));
    const float high = e4m3_to_float(static_cast<uint8_t>(code + 1)), middle = (low + high) / 2;
    for (const float v : {low, std::nextafter(middle, low), middle, std::nextafter(middle, high)})
      for (const float sign : {1.0f, -1.0f}) {
        if (values.size() % 128 == 0)
          values.push_back(448);
        values.push_back(sign * v);
      }
  }
  source.k = static_cast<int64_t>(values.size());
  source.data.resize(values.size() * sizeof(float));
  std::memcpy(source.data.data(), values.data(), source.data.size());
  Weight w = empty_weight(DType::f8_e4m3, 1, source.k, whole_k(source.k), 0, 128);
  const WeightSource part = source.part(0, 1, 0, source.k);
  REQUIRE(!pack(w.m, {&part, 1}, w.memory.data(), 0, 1));
  const reference::PackedReader reader(w.m);
  for (int64_t c = 0; c < source.k; ++c) {
    CAPTURE(values[static_cast<size_t>(c)]);
    CHECK(reader.scale(0, c) == 1);
    const float got = reader.at(0, 0, c);
    const float want = e4m3_to_float(float_to_e4m3(values[static_cast<size_t>(c)]));
    CHECK(std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(want));
  }
}

TEST_CASE("conversions give the bits of the plain functions for every kind of number") {
  // One row of all codes, and of floats around every BF16 tie and border.
  Source codes{1, 256, DType::f8_e4m3, 128, {}, {1, 0.3f}};
  for (int c = 0; c < 256; ++c)
    codes.data.push_back(static_cast<std::byte>(c));
  Source floats{1, 0, DType::f32, 128, {}, {}};
  std::vector<float> values;
  for (const uint32_t high : {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3f80u, 0x3f81u, 0x7f7fu})
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      for (const uint32_t sign : {0u, 0x80000000u})
        values.push_back(std::bit_cast<float>(sign | high << 16 | low));
  for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x7f800001u, 0xffffffffu, 0x7fc00000u})
    values.push_back(std::bit_cast<float>(bits));
  floats.k = std::ssize(values);
  floats.data.resize(values.size() * 4);
  std::memcpy(floats.data.data(), values.data(), floats.data.size());
  const auto pack_to = [](const Source& source, DType to) {
    Weight w = empty_weight(to, 1, source.k, whole_k(source.k), 0, 128);
    const WeightSource part = source.part(0, 1, 0, source.k);
    REQUIRE(!pack(w.m, {&part, 1}, w.memory.data(), 0, 1));
    return w;
  };
  for (const Source* source : {&codes, &floats}) {
    const Weight wide = pack_to(*source, DType::f32), narrow = pack_to(*source, DType::bf16);
    for (int64_t c = 0; c < source->k; ++c) {
      CAPTURE(c);
      const float want = element(*source, 0, c);
      const auto got = load<float>(wide.m.data + index_of(wide.m, source->k, 0, c) * 4);
      const auto half = load<BF16>(narrow.m.data + index_of(narrow.m, source->k + 1, 0, c) * 2);
      if (want == want) {
        CHECK(std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(want));
        CHECK(half.bits == to_bf16(want).bits);
      } else {
        CHECK(got != got);
        CHECK(to_float(half) != to_float(half));
      }
    }
  }
}

TEST_CASE("a stored scale that is no positive number is refused by tensor, block and value") {
  Random random(8);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const DType to : {DType::f8_e4m3, DType::bf16, DType::f32})
    for (const float bad : {0.0f, -0.5f, kInf, -kInf, std::nanf("")}) {
      Source source = random_source(random, DType::f8_e4m3, 300, 400, 96);
      source.scales[2 * 5 + 3] = bad; // rows 256 … 299, columns 288 … 383
      const auto complaint = [&](int64_t row0, int64_t n, int64_t col0, int64_t k) {
        Weight w = empty_weight(to, n, k, whole_k(k), col0, 96);
        WeightSource part = source.part(row0, n, col0, k);
        part.name = "o_proj.weight";
        const auto error = pack(w.m, {&part, 1}, w.memory.data(), 0, w.m.panels());
        if (error)
          CHECK(code_of(error) == Errc::malformed);
        return text_of(error);
      };
      const auto want = fmt::format("tensor o_proj.weight_scale_inv: block [2, 3] has the scale "
                                    "{}, expected a finite number above 0",
                                    bad);
      CHECK(complaint(0, 300, 0, 400) == want);
      CHECK(complaint(299, 1, 383, 2) == want);
      // Parts that the block does not touch.
      CHECK(complaint(0, 256, 0, 400).empty());
      CHECK(complaint(200, 100, 384, 16).empty());
      CHECK(complaint(200, 100, 100, 188).empty());
    }
  Source least = random_source(random, DType::f8_e4m3, 64, 64);
  least.scales[0] = std::numeric_limits<float>::denorm_min();
  CHECK(pack_whole(least).m.scales[0] == least.scales[0]);
}

TEST_CASE("a block with an infinity or NaN is refused when it is to be quantized") {
  Random random(9);
  for (const float bad : {-std::numeric_limits<float>::infinity(), std::nanf("")}) {
    Source source = random_source(random, DType::f32, 150, 140);
    std::memcpy(source.data.data() + (149 * 140 + 139) * 4, &bad, 4);
    Weight w = empty_weight(DType::f8_e4m3, 150, 140, whole_k(140), 0, 128);
    WeightSource part = source.part(0, 150, 0, 140);
    part.name = "w";
    CHECK(text_of(pack(w.m, {&part, 1}, w.memory.data(), 0, 3)) ==
          "tensor w: block [1, 1] of 128×128 can't be quantized: it holds an infinity or NaN");
  }
}

TEST_CASE("stacked sources are one matrix, and panels can be packed in any order") {
  Random random(5);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f8_e4m3}) {
    const int64_t k = 131;
    const Source a = random_source(random, dtype, 100, k), b = random_source(random, dtype, 71, k),
                 c = random_source(random, dtype, 1, k);
    const std::vector<WeightSource> parts{a.part(3, 90, 0, k), b.part(0, 71, 0, k),
                                          c.part(0, 1, 0, k)};
    Weight w = empty_weight(dtype, 162, k, whole_k(k), 0, 128);
    Weight again = empty_weight(dtype, 162, k, whole_k(k), 0, 128);
    REQUIRE(!pack(w.m, parts, w.memory.data(), 0, 3));
    for (const int64_t panel : {2, 0, 1})
      REQUIRE(!pack(again.m, parts, again.memory.data(), panel, panel + 1));
    const int64_t data = w.m.panels() * 64 * (k + 1) * size_of(dtype);
    CHECK(std::memcmp(w.m.data, again.m.data, static_cast<size_t>(data)) == 0);
    const reference::PackedReader reader(w.m);
    const auto value = [&](int64_t row, int64_t column) {
      return reader.at(row, 0, column) *
             (dtype == DType::f8_e4m3 ? reader.scale(row, column) : 1.0f);
    };
    CHECK(value(0, 130) == element(a, 3, 130));
    CHECK(value(89, 7) == element(a, 92, 7));
    CHECK(value(90, 7) == element(b, 0, 7));
    CHECK(value(160, 0) == element(b, 70, 0));
    CHECK(value(161, 99) == element(c, 0, 99));
  }
}

TEST_CASE("a matrix that moved is attached to its new place") {
  Random random(6);
  const Weight w = random_weight(random, DType::f8_e4m3, 70, 200);
  const AlignedBytes copy(packed_bytes(w.m));
  std::memcpy(copy.data(), w.memory.data(), static_cast<size_t>(packed_bytes(w.m)));
  PackedMatrix moved = w.m;
  attach(moved, copy.data());
  CHECK(moved.data == copy.data());
  CHECK(reinterpret_cast<const std::byte*>(moved.scales) - moved.data ==
        reinterpret_cast<const std::byte*>(w.m.scales) - w.m.data);
  CHECK(reference::PackedReader(moved).scale(69, 199) ==
        reference::PackedReader(w.m).scale(69, 199));
}

TEST_CASE("an empty matrix takes no memory and packs nothing") {
  PackedMatrix m;
  CHECK(packed_bytes(m) == 0);
  m.dtype = DType::f8_e4m3;
  CHECK(packed_bytes(m) == 0);
  CHECK(!pack(m, {}, nullptr, 0, 0));
}

TEST_CASE("o_proj is cut into runs of heads, as many as divide them up to eight") {
  const auto count = [](int64_t heads) { return head_segments(heads, 128).count; };
  CHECK(count(128) == 8);
  CHECK(count(64) == 8);
  CHECK(count(12) == 4);
  CHECK(count(6) == 2);
  CHECK(count(7) == 1);
  CHECK(count(1) == 1);
  const KSegments s = head_segments(12, 10);
  for (int i = 0; i <= 4; ++i)
    CHECK(s.begin[i] == 30 * i);
}

TEST_CASE("down_proj is cut at granules of 128 columns, the last may be short") {
  const KSegments wide = width_segments(18432);
  CHECK(wide.count == 8);
  for (int i = 0; i <= 8; ++i)
    CHECK(wide.begin[i] == 2304 * i);
  const KSegments odd = width_segments(10944); // V2-Lite: 86 granules, the last of 64
  CHECK(odd.count == 8);
  for (int i = 0; i < 8; ++i)
    CHECK(odd.begin[i] == i * 86 / 8 * 128);
  CHECK(odd.begin[8] == 10944);
  CHECK(width_segments(384).count == 2);
  CHECK(width_segments(384).begin[1] == 128);
  CHECK(width_segments(300).begin[2] == 300);
  CHECK(width_segments(128).count == 1);
  CHECK(width_segments(1).begin[1] == 1);
}

TEST_CASE("ranks' slices of the segments tile them") {
  const KSegments all = width_segments(10944);
  for (const int tp : {1, 2, 4, 8}) {
    int64_t at = 0;
    for (int rank = 0; rank < tp; ++rank) {
      const KSegments part = slice(all, rank, tp);
      CHECK(part.count == 8 / tp);
      CHECK(part.begin[0] == at);
      at = part.begin[part.count];
    }
    CHECK(at == 10944);
  }
}
