// Kernels that take one row at a time: RMSNorm and quantization. Included once per target.
namespace troupe::TROUPE_SIMD {

inline void rms_norm_rows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const void* x = row_of(a.x, row);
    void* out = row_of(a.out, row);
    V squares = zero();
    for (int64_t i = 0; i < a.n; i += 16) {
      const V v = load_any(a.x.dtype, x, i, a.n - i);
      squares = fma(v, v, squares);
    }
    const float mean = reduce_halves(squares) / static_cast<float>(a.n);
    const V r = set1(1.0f / std::sqrt(mean + a.eps));
    for (int64_t i = 0; i < a.n; i += 16) {
      const V v = load_any(a.x.dtype, x, i, a.n - i) * r;
      store_any(a.out.dtype, out, i, a.n - i, load_any(DType::f32, a.weight, i, a.n - i) * v);
    }
  }
}

inline void rms_norm(const RmsNormArgs& args, Workers& workers) {
  workers.parallel_for(args.num_rows, grain_for(args.num_rows, workers.num_threads(), args.n * 4),
                       [&](int64_t begin, int64_t end, int) { rms_norm_rows(args, begin, end); });
}

// One 1×128 tile of n ≤ 128 columns.
inline void quantize_tile(const QuantizeArgs& a, const void* x, int64_t column, int64_t n,
                          uint8_t* codes, float* scale_out) {
  V top = zero();
  for (int64_t i = 0; i < n; i += 16)
    top = max(top, abs(load_any(a.x.dtype, x, column + i, n - i)));
  const float scale = tile_scale(max_lane(top), a.power_of_two);
  *scale_out = scale;
  for (int64_t i = 0; i < n; i += 16) {
    const V v = load_any(a.x.dtype, x, column + i, n - i) / set1(scale);
    if (n - i >= 16) {
      store_e4m3(codes + column + i, v);
    } else {
      uint8_t part[16];
      store_e4m3(part, v);
      std::memcpy(codes + column + i, part, static_cast<size_t>(n - i));
    }
  }
}

inline void quantize_rows(const QuantizeArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < a.k; column += kQuantTile)
      quantize_tile(a, row_of(a.x, row), column, std::min(kQuantTile, a.k - column),
                    a.codes + row * a.code_stride,
                    a.scales + row * a.scale_stride + column / kQuantTile);
}

inline void quantize(const QuantizeArgs& args, Workers& workers) {
  workers.parallel_for(args.num_rows, grain_for(args.num_rows, workers.num_threads(), args.k * 4),
                       [&](int64_t begin, int64_t end, int) { quantize_rows(args, begin, end); });
}

} // namespace troupe::TROUPE_SIMD
