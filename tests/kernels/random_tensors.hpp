// Random inputs for kernel tests and benchmarks: activations, packed weights, latent caches.
#pragma once

#include "config/random.hpp"
#include "kernels/backend.hpp"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace troupe::test {

// 64-byte aligned memory.
class AlignedBytes {
public:
  AlignedBytes() = default;
  explicit AlignedBytes(int64_t size)
      : bytes_(static_cast<std::byte*>(
            std::aligned_alloc(64, static_cast<size_t>((size + 127) / 64 * 64)))) {}
  [[nodiscard]] std::byte* data() const { return bytes_.get(); }

private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> bytes_;
};

// Uniform in (-1, 1).
class Random {
public:
  explicit Random(uint64_t seed) : stream_(seed) {}
  float value() { return 2 * uniform_open(static_cast<uint32_t>(stream_.next())) - 1; }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(stream_.below(static_cast<uint64_t>(high - low + 1)));
  }
  bool chance(int64_t one_in) { return between(1, one_in) == 1; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

private:
  KeyedStream stream_;
};

// A row-major matrix with a few columns of padding, which a kernel must leave alone.
struct Tensor {
  DType dtype = DType::f32;
  int64_t num_rows = 0, num_columns = 0, stride = 0;
  std::vector<std::byte> bytes;

  Tensor() = default;
  Tensor(DType t, int64_t rows, int64_t columns, int64_t padding = 3)
      : dtype(t), num_rows(rows), num_columns(columns), stride(columns + padding),
        bytes(static_cast<size_t>(rows * stride * size_of(t)), std::byte{0x5a}) {}

  [[nodiscard]] std::byte* row(int64_t r) { return bytes.data() + r * stride * size_of(dtype); }
  [[nodiscard]] const std::byte* row(int64_t r) const {
    return bytes.data() + r * stride * size_of(dtype);
  }
  [[nodiscard]] float at(int64_t r, int64_t c) const {
    const std::byte* p = row(r) + c * size_of(dtype);
    if (dtype == DType::f32) {
      float f;
      std::memcpy(&f, p, sizeof f);
      return f;
    }
    BF16 h;
    std::memcpy(&h, p, sizeof h);
    return to_float(h);
  }
  void set(int64_t r, int64_t c, float value) {
    std::byte* p = row(r) + c * size_of(dtype);
    const BF16 h = to_bf16(value);
    if (dtype == DType::f32)
      std::memcpy(p, &value, sizeof value);
    else
      std::memcpy(p, &h, sizeof h);
  }
  [[nodiscard]] Rows rows() const { return {bytes.data(), dtype, stride}; }
  [[nodiscard]] MutableRows out() { return {bytes.data(), dtype, stride}; }
};

inline Tensor random_tensor(Random& random, DType dtype, int64_t rows, int64_t columns,
                            float scale = 1) {
  Tensor t(dtype, rows, columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      t.set(r, c, random.chance(50) ? 0.0f : scale * random.value());
  return t;
}

// Rows chosen from another tensor.
inline Tensor take_rows(const Tensor& from, const std::vector<int32_t>& which) {
  Tensor t(from.dtype, static_cast<int64_t>(which.size()), from.num_columns);
  for (size_t i = 0; i < which.size(); ++i)
    std::memcpy(t.row(static_cast<int64_t>(i)), from.row(which[i]),
                static_cast<size_t>(from.num_columns * size_of(from.dtype)));
  return t;
}

struct Quantized {
  int64_t k = 0;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  [[nodiscard]] QuantizedRows rows() const {
    return {codes.data(), scales.data(), k, (k + 127) / 128};
  }
};
inline Quantized quantize(const Backend& backend, const Tensor& x, Workers& workers) {
  Quantized q{x.num_columns, {}, {}};
  const int64_t tiles = (q.k + 127) / 128;
  q.codes.resize(static_cast<size_t>(x.num_rows * q.k));
  q.scales.resize(static_cast<size_t>(x.num_rows * tiles));
  backend.quantize({.num_rows = x.num_rows,
                    .k = q.k,
                    .x = x.rows(),
                    .power_of_two = false,
                    .codes = q.codes.data(),
                    .scales = q.scales.data(),
                    .code_stride = q.k,
                    .scale_stride = tiles},
                   workers);
  return q;
}

// A [n, k] weight as a checkpoint would hold it.
struct Source {
  int64_t n = 0, k = 0;
  DType dtype = DType::f32;
  int64_t block_k = 128;
  std::vector<std::byte> data;
  std::vector<float> scales; // F8

  [[nodiscard]] WeightSource part(int64_t row0, int64_t rows, int64_t col0, int64_t cols) const {
    return {.name = "random",
            .data = data.data(),
            .dtype = dtype,
            .total_rows = n,
            .total_cols = k,
            .row0 = row0,
            .rows = rows,
            .col0 = col0,
            .cols = cols,
            .scales = scales.empty() ? nullptr : reinterpret_cast<const std::byte*>(scales.data()),
            .block_rows = 128,
            .block_cols = block_k};
  }
};

inline Source random_source(Random& random, DType dtype, int64_t n, int64_t k,
                            int64_t block_k = 128) {
  Source s{
      n, k, dtype, block_k, std::vector<std::byte>(static_cast<size_t>(n * k * size_of(dtype))),
      {}};
  for (int64_t i = 0; i < n * k; ++i) {
    std::byte* p = s.data.data() + i * size_of(dtype);
    const float value = random.value();
    const BF16 h = to_bf16(value);
    if (dtype == DType::f32)
      std::memcpy(p, &value, sizeof value);
    else if (dtype == DType::bf16)
      std::memcpy(p, &h, sizeof h);
    else // every code but NaN, subnormals among them
      *p = static_cast<std::byte>(random.between(0, 1) * 0x80 + random.between(0, 0x7e));
  }
  if (dtype == DType::f8_e4m3)
    for (int64_t i = 0; i < ((n + 127) / 128) * ((k + block_k - 1) / block_k); ++i)
      s.scales.push_back(0.002f + 0.001f * random.value());
  return s;
}

// A packed part of a source, with its memory.
struct Weight {
  PackedMatrix m;
  AlignedBytes memory;
};
inline Weight pack_part(const Source& source, int64_t row0, int64_t rows, int64_t col0,
                        int64_t cols, const KSegments& segments) {
  Weight w;
  w.m.n = rows;
  w.m.k = cols;
  w.m.dtype = source.dtype;
  w.m.segments = segments;
  w.m.k0 = col0;
  w.m.block_k = source.block_k;
  w.memory = AlignedBytes(packed_bytes(w.m));
  const WeightSource part = source.part(row0, rows, col0, cols);
  if (pack(w.m, {&part, 1}, w.memory.data(), 0, w.m.panels()))
    std::abort(); // this source is good
  return w;
}
inline Weight pack_whole(const Source& source) {
  return pack_part(source, 0, source.n, 0, source.k, whole_k(source.k));
}
inline Weight random_weight(Random& random, DType dtype, int64_t n, int64_t k) {
  return pack_whole(random_source(random, dtype, n, k));
}

} // namespace troupe::test
