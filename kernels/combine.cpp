// The combine of MoE outputs, in columns of kTile so that a row's running sums stay in registers
// and the first-level cache while its terms stream past.
//
// One body serves three targets; it holds nothing but loads, fused multiply-adds, adds and the
// rounding to BF16, each exact or correctly rounded, so that all three give the same bits.
#include "kernels/trunk.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace troupe {

namespace {

constexpr int64_t kTile = 256;

#define TROUPE_INLINE inline __attribute__((always_inline))

TROUPE_INLINE float load_element(const float* p) { return *p; }
TROUPE_INLINE float load_element(const BF16* p) { return to_float(*p); }
TROUPE_INLINE float rounded(float x, const float*) { return x; }
TROUPE_INLINE float rounded(float x, const BF16*) { return to_float(to_bf16(x)); }
TROUPE_INLINE void store_element(float* p, float x) { *p = x; }
TROUPE_INLINE void store_element(BF16* p, float x) { *p = to_bf16(x); }

// sum[i] = the rounded sum of one group's terms, columns [begin, begin + n).
template <class T>
TROUPE_INLINE void group_tile(const CombineTerm* first, const CombineTerm* last, int64_t begin,
                              int64_t n, float* sum) {
  std::fill_n(sum, n, 0.0f);
  for (const auto* term = first; term != last; ++term) {
    const T* const row = static_cast<const T*>(term->row) + begin;
    const float weight = term->weight;
    for (int64_t i = 0; i < n; ++i)
      sum[i] = __builtin_fmaf(weight, load_element(row + i), sum[i]);
  }
  for (int64_t i = 0; i < n; ++i)
    sum[i] = rounded(sum[i], static_cast<const T*>(nullptr));
}

// The terms that belong together with `first`: a complete group stands for itself.
TROUPE_INLINE const CombineTerm* end_of_group(const CombineTerm* first, const CombineTerm* end) {
  const auto* last = first + 1;
  if (!first->complete)
    while (last != end && last->group == first->group && !last->complete)
      ++last;
  return last;
}

template <class T>
TROUPE_INLINE void combine_tile(const CombineTerm* first, const CombineTerm* end, const T* shared,
                                T* x, int64_t begin, int64_t n) {
  alignas(64) float total[kTile], sum[kTile];
  std::fill_n(total, n, 0.0f);
  while (first != end) {
    const auto* const last = end_of_group(first, end);
    if (first->complete) {
      const T* const row = static_cast<const T*>(first->row) + begin;
      for (int64_t i = 0; i < n; ++i)
        total[i] += load_element(row + i);
    } else {
      group_tile<T>(first, last, begin, n, sum);
      for (int64_t i = 0; i < n; ++i)
        total[i] += sum[i];
    }
    first = last;
  }
  if (shared != nullptr)
    for (int64_t i = 0; i < n; ++i)
      total[i] += load_element(shared + begin + i);
  for (int64_t i = 0; i < n; ++i)
    store_element(x + begin + i, total[i] + load_element(x + begin + i));
}

template <class T>
TROUPE_INLINE void combine_rows(const CombineArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const auto* const terms = args.terms.data();
    const auto row = static_cast<size_t>(r);
    const T* const shared = args.shared.data == nullptr
                                ? nullptr
                                : static_cast<const T*>(args.shared.data) + r * args.shared.stride;
    T* const x = static_cast<T*>(args.x.data) + r * args.x.stride;
    for (int64_t c = 0; c < args.hidden; c += kTile)
      combine_tile(terms + args.row_terms[row], terms + args.row_terms[row + 1], shared, x, c,
                   std::min(kTile, args.hidden - c));
  }
}

template <class T>
TROUPE_INLINE void sum_terms(std::span<const CombineTerm> terms, int64_t hidden, void* out) {
  alignas(64) float sum[kTile];
  for (int64_t c = 0; c < hidden; c += kTile) {
    const int64_t n = std::min(kTile, hidden - c);
    group_tile<T>(terms.data(), terms.data() + terms.size(), c, n, sum);
    for (int64_t i = 0; i < n; ++i)
      store_element(static_cast<T*>(out) + c + i, sum[i]);
  }
}

TROUPE_INLINE void combine_any(const CombineArgs& args, int64_t begin, int64_t end) {
  args.dtype == DType::bf16 ? combine_rows<BF16>(args, begin, end)
                            : combine_rows<float>(args, begin, end);
}
TROUPE_INLINE void sum_any(std::span<const CombineTerm> terms, DType dtype, int64_t hidden,
                           void* out) {
  dtype == DType::bf16 ? sum_terms<BF16>(terms, hidden, out) : sum_terms<float>(terms, hidden, out);
}

struct Target {
  void (*combine)(const CombineArgs&, int64_t, int64_t);
  void (*sum)(std::span<const CombineTerm>, DType, int64_t, void*);
};

void combine_any_cpu(const CombineArgs& args, int64_t begin, int64_t end) {
  combine_any(args, begin, end);
}
void sum_any_cpu(std::span<const CombineTerm> terms, DType dtype, int64_t hidden, void* out) {
  sum_any(terms, dtype, hidden, out);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void combine_avx2(const CombineArgs& args, int64_t begin,
                                                      int64_t end) {
  combine_any(args, begin, end);
}
__attribute__((target("avx2,fma"))) void sum_avx2(std::span<const CombineTerm> terms, DType dtype,
                                                  int64_t hidden, void* out) {
  sum_any(terms, dtype, hidden, out);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) void
combine_avx512(const CombineArgs& args, int64_t begin, int64_t end) {
  combine_any(args, begin, end);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) void
sum_avx512(std::span<const CombineTerm> terms, DType dtype, int64_t hidden, void* out) {
  sum_any(terms, dtype, hidden, out);
}

Target choose_target() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return {combine_avx512, sum_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {combine_avx2, sum_avx2};
  return {combine_any_cpu, sum_any_cpu};
}
#else
Target choose_target() { return {combine_any_cpu, sum_any_cpu}; }
#endif

const Target& target() {
  static const Target chosen = choose_target();
  return chosen;
}

} // namespace

void sum_group(std::span<const CombineTerm> terms, DType dtype, int64_t hidden, void* out) {
  target().sum(terms, dtype, hidden, out);
}

void combine(const CombineArgs& args, Workers& workers) {
  constexpr int64_t kGrainElements = 16384; // about 10 µs
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(args.hidden, 1));
  workers.parallel_for(args.num_rows, grain, [&](int64_t begin, int64_t end, int) {
    target().combine(args, begin, end);
  });
}

} // namespace troupe
