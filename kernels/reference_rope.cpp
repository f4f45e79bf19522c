// RoPE. All CPU backends share it, so it is compiled once more for CPUs with fused multiply-adds
// in hardware: elsewhere each is a call.
#include "kernels/reference_access.hpp"

namespace troupe::reference {

namespace {

[[gnu::always_inline]] inline float value_of(float x) { return x; }
[[gnu::always_inline]] inline float value_of(BF16 x) { return to_float(x); }
[[gnu::always_inline]] inline void store(float& to, float x) { to = x; }
[[gnu::always_inline]] inline void store(BF16& to, float x) { to = to_bf16(x); }

template <class T>
[[gnu::always_inline]] inline void rotate_vector(T* x, const float* cos, const float* sin,
                                                 int64_t pairs, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, to_second = interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    T& p = x[i * step];
    T& q = x[i * step + to_second];
    const auto [turned_p, turned_q] = rotate(value_of(p), value_of(q), cos[i], sin[i]);
    store(p, turned_p);
    store(q, turned_q);
  }
}

template <class T>
[[gnu::always_inline]] inline void rotate_rows(const RopeArgs& a, int64_t begin, int64_t end) {
  const RopeTable& t = *a.table;
  const int64_t pairs = t.dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    const float* cos = t.cos + a.positions[r] * pairs;
    const float* sin = t.sin + a.positions[r] * pairs;
    for (int64_t h = 0; h < a.heads; ++h)
      rotate_vector(static_cast<T*>(a.x.data) + r * a.x.stride + h * a.head_stride, cos, sin, pairs,
                    t.interleaved);
  }
}

[[gnu::always_inline]] inline void rotate_any(const RopeArgs& a, int64_t begin, int64_t end) {
  a.x.dtype == DType::f32 ? rotate_rows<float>(a, begin, end) : rotate_rows<BF16>(a, begin, end);
}

void rotate_cpu(const RopeArgs& a, int64_t begin, int64_t end) { rotate_any(a, begin, end); }

using RotateRows = void (*)(const RopeArgs&, int64_t, int64_t);
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void rotate_fma(const RopeArgs& a, int64_t begin, int64_t end) {
  rotate_any(a, begin, end);
}
RotateRows choose() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? rotate_fma : rotate_cpu;
}
#else
RotateRows choose() { return rotate_cpu; }
#endif

} // namespace

void rope(const RopeArgs& a, Workers& workers) {
  static const RotateRows rotate_some = choose();
  workers.parallel_for(a.num_rows, 8,
                       [&](int64_t begin, int64_t end, int) { rotate_some(a, begin, end); });
}

} // namespace troupe::reference
