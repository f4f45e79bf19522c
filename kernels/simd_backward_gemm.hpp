// The loops of gemm_f32 for one vector width. Included by kernels/training_gemm.cpp once per
// width, inside a target pragma, with TROUPE_SIMD (the namespace) and TROUPE_GEMM_512 defined.
//
// A task owns a block of c. Per kSum elements of the sum it packs its columns of b, then a few rows
// of a at a time, both in the order the tile reads them; padding is zero and only reaches elements
// of c that do not exist. c waits in memory between stretches of the sum, which changes no bit.
//
// Measured on a shared two-core AMD EPYC with AVX-512, one thread, 1024³, best of 12, while FMAs on
// registers alone gave 117 GFLOP/s: the tile alone 109, fprop 82, dgrad 95, wgrad 89. Packing reads
// b at 1.8 ns per element in fprop, where its columns are rows of w, and at 0.2 ns otherwise.

namespace troupe::TROUPE_SIMD {

#if TROUPE_GEMM_512
using Vec = __m512;
constexpr int64_t kLanes = 16, kTileRows = 12;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
using Vec = __m256;
constexpr int64_t kLanes = 8, kTileRows = 6;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kSum = 320, kColumns = 512, kRows = 20 * kTileRows;
static_assert(kColumns % kTileColumns == 0 && kRows % kTileRows == 0);

// c tile = (from_zero ? 0 : c tile) + a panel [sum, kTileRows] · b panel [sum, kTileColumns].
inline void tile(int64_t sum, const float* a, const float* b, float* c, int64_t c_row,
                 bool from_zero) {
  Vec acc[kTileRows][2];
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t v = 0; v < 2; ++v)
      acc[i][v] = from_zero ? broadcast(0) : load(c + i * c_row + v * kLanes);
  for (int64_t s = 0; s < sum; ++s, a += kTileRows, b += kTileColumns) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Vec x = broadcast(a[i]);
      acc[i][0] = fma(x, b0, acc[i][0]);
      acc[i][1] = fma(x, b1, acc[i][1]);
    }
  }
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t v = 0; v < 2; ++v)
      store(c + i * c_row + v * kLanes, acc[i][v]);
}

// A tile at the edge of c goes through a whole one of its own.
inline void edge_tile(int64_t rows, int64_t columns, int64_t sum, const float* a, const float* b,
                      float* c, int64_t c_row, bool from_zero) {
  float whole[kTileRows * kTileColumns] = {};
  for (int64_t i = 0; i < rows && !from_zero; ++i)
    std::copy_n(c + i * c_row, columns, whole + i * kTileColumns);
  tile(sum, a, b, whole, kTileColumns, from_zero);
  for (int64_t i = 0; i < rows; ++i)
    std::copy_n(whole + i * kTileColumns, columns, c + i * c_row);
}

// Panels of `width` rows of x, each [sum, width]; x(i, s) = x[i · stride + s · sum_stride].
inline void pack(int64_t rows, int64_t width, int64_t sum, const float* x, int64_t stride,
                 int64_t sum_stride, float* out) {
  for (int64_t first = 0; first < rows; first += width, out += sum * width) {
    const int64_t here = std::min(width, rows - first);
    for (int64_t s = 0; s < sum; ++s) {
      const float* from = x + first * stride + s * sum_stride;
      for (int64_t i = 0; i < here; ++i)
        out[s * width + i] = from[i * stride];
      std::fill(out + s * width + here, out + (s + 1) * width, 0.0f);
    }
  }
}

struct Range {
  int64_t begin, end;
};

inline void block(const GemmF32& g, Range rows, Range columns, float* packed_a, float* packed_b) {
  const int64_t n = columns.end - columns.begin;
  for (int64_t s = 0; s < g.k; s += kSum) {
    const int64_t sum = std::min(kSum, g.k - s);
    const bool from_zero = s == 0 && !g.accumulate;
    pack(n, kTileColumns, sum, g.b + s * g.b_sum + columns.begin * g.b_column, g.b_column, g.b_sum,
         packed_b);
    for (int64_t r = rows.begin; r < rows.end; r += kRows) {
      const int64_t m = std::min(kRows, rows.end - r);
      pack(m, kTileRows, sum, g.a + r * g.a_row + s * g.a_sum, g.a_row, g.a_sum, packed_a);
      for (int64_t j = 0; j < n; j += kTileColumns)
        for (int64_t i = 0; i < m; i += kTileRows) {
          float* c = g.c + (r + i) * g.c_row + columns.begin + j;
          const float *a = packed_a + i * sum, *b = packed_b + j * sum;
          if (m - i >= kTileRows && n - j >= kTileColumns)
            tile(sum, a, b, c, g.c_row, from_zero);
          else
            edge_tile(std::min(kTileRows, m - i), std::min(kTileColumns, n - j), sum, a, b, c,
                      g.c_row, from_zero);
        }
    }
  }
}

// Blocks of columns; rows are cut too where those are fewer than four per thread.
inline void gemm(const GemmF32& g, Workers& workers) {
  const int64_t across = (g.n + kColumns - 1) / kColumns;
  const int64_t wanted = (4 * workers.num_threads() + across - 1) / across;
  const int64_t height = std::max((g.m / wanted + kRows - 1) / kRows, int64_t{1}) * kRows;
  const int64_t down = (g.m + height - 1) / height;
  workers.parallel_for(across * down, 1, [&](int64_t begin, int64_t end, int) {
    thread_local std::vector<float> a(static_cast<size_t>(kRows * kSum)),
        b(static_cast<size_t>(kColumns * kSum));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t % down * height, j = t / down * kColumns;
      block(g, {i, std::min(g.m, i + height)}, {j, std::min(g.n, j + kColumns)}, a.data(),
            b.data());
    }
  });
}

} // namespace troupe::TROUPE_SIMD
