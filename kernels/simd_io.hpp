// Activations in and out of registers, whatever their dtype and however few of 16 lanes are left.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

inline V load_any(DType dtype, const void* p, int64_t i, int64_t n) {
  if (dtype == DType::f32) {
    const float* f = static_cast<const float*>(p) + i;
    if (n >= 16)
      return load(f);
    float part[16] = {};
    std::memcpy(part, f, static_cast<size_t>(n) * sizeof(float));
    return load(part);
  }
  const uint16_t* h = static_cast<const uint16_t*>(p) + i;
  if (n >= 16)
    return load_bf16(h);
  uint16_t part[16] = {};
  std::memcpy(part, h, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_bf16(part);
}

// Rounds to dtype and stores the first n lanes.
inline void store_any(DType dtype, void* p, int64_t i, int64_t n, V v) {
  if (dtype == DType::f32) {
    float* f = static_cast<float*>(p) + i;
    if (n >= 16)
      return store(f, v);
    float part[16];
    store(part, v);
    std::memcpy(f, part, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(p) + i;
  if (n >= 16)
    return store_bf16(h, v);
  uint16_t part[16];
  store_bf16(part, v);
  std::memcpy(h, part, static_cast<size_t>(n) * sizeof(uint16_t));
}

inline const void* row_of(const Rows& m, int64_t row) {
  return static_cast<const std::byte*>(m.data) + row * m.stride * size_of(m.dtype);
}
inline void* row_of(const MutableRows& m, int64_t row) {
  return static_cast<std::byte*>(m.data) + row * m.stride * size_of(m.dtype);
}

} // namespace troupe::TROUPE_SIMD
