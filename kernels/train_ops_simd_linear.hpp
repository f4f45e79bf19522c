// The three products of a linear layer. Included once per target.
//
// All tasks of a call are cut into units (blocks of a result), which threads take one by one. A
// unit packs its rows of a (wgrad: of b too) for a stretch of the contraction that the second-level
// cache holds, then walks the tiles of its block; c waits in memory between stretches, which
// changes no bit. FP8 rows are quantized before, all at once, into codes as F32 values; a tile then
// sums one scale block from zero and c takes it times the scales.
namespace troupe::TROUPE_SIMD {

// Words along the contraction that are packed at once; whole scale blocks in any operand.
inline constexpr int64_t kStretch = 512, kWgradStretch = 256;
static_assert(kStretch % kScaleBlock == 0 && kWgradStretch % kScaleBlock == 0);
inline constexpr UnitSize kRowUnit{96, 1024}, kLeastRowUnit{24, 128};
inline constexpr UnitSize kWgradUnit{128, 256}, kLeastWgradUnit{32, 64};
static_assert(kWgradUnit.rows % 16 == 0 && kLeastWgradUnit.columns % kTileColumns == 0);

// MXCSR's FTZ and DAZ while it lives: how F32 FMAs do what vdpbf16ps does. Functions that compute
// under it are not inlined into the one that has it.
class FlushDenormals {
public:
  explicit FlushDenormals(bool on) : before_(_mm_getcsr()) {
    if (on)
      _mm_setcsr(before_ | 0x8040u);
  }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
  unsigned before_;
};

// Scales of the blocks of a contraction: of row i of a, and of columns of c.
struct Scales {
  const float* a = nullptr; // null: not FP8
  int64_t a_row = 0, a_block = 0;
  const float* b = nullptr;
  int64_t b_block = 0;
};

// A block of c and its packed operands, for one stretch of the contraction.
struct Stretch {
  int64_t rows, columns, steps;
  const uint32_t* a; // panels
  int64_t a_panel;
  const uint32_t* b;
  int64_t b_panel;
  float* c;
  int64_t c_row;
  bool from_zero, round;
};

// c = fma(a scale · b scale, part, c) for a tile.
inline void add_scaled(int64_t rows, int64_t columns, const float* part, const float* a_scale,
                       int64_t a_row, const float* b_scale, float* c, int64_t c_row, bool from_zero,
                       bool round) {
  for (int64_t i = 0; i < std::min(rows, kTileRows); ++i)
    for (int64_t j = 0; j < std::min(columns, kTileColumns); j += 16) {
      const int64_t left = columns - j;
      const V scale = set1(a_scale[i * a_row]) * load_some(b_scale + j, left);
      const V before = from_zero ? zero() : load_some(c + i * c_row + j, left);
      const V sum = fma(scale, load(part + i * kTileColumns + j), before);
      store_some(c + i * c_row + j, left, maybe_bf16(sum, round));
    }
}

template <Operand kOperand, bool kAlong>
[[gnu::noinline]] void multiply(const Stretch& s, const Scales& scales) {
  constexpr bool kDot = kOperand == Operand::dot;
  constexpr int64_t kStep = kAlong ? kTileRows * kAlongSteps : kTileRows;
  constexpr int64_t kBlock = steps_of(kOperand, kScaleBlock);
  for (int64_t j = 0; j < s.columns; j += kTileColumns)
    for (int64_t i = 0; i < s.rows; i += kTileRows) {
      const uint32_t* a = s.a + i / kTileRows * s.a_panel;
      const uint32_t* b = s.b + j / kTileColumns * s.b_panel;
      float* c = s.c + i * s.c_row + j;
      if (scales.a == nullptr || s.steps == 0) {
        tile_at<kDot, kAlong>(s.rows - i, s.columns - j, s.steps, a, kStep, b, kTileColumns, c,
                              s.c_row, s.from_zero, s.round);
        continue;
      }
      alignas(64) float part[kTileRows * kTileColumns];
      for (int64_t at = 0, block = 0; at < s.steps; at += kBlock, ++block) {
        const int64_t steps = std::min(kBlock, s.steps - at);
        tile<kDot, kAlong>(steps, a + (kAlong ? at / kAlongSteps : at) * kStep, kStep,
                           b + at * kTileColumns, kTileColumns, part, kTileColumns, true, false);
        add_scaled(s.rows - i, s.columns - j, part,
                   scales.a + i * scales.a_row + block * scales.a_block, scales.a_row,
                   scales.b + block * scales.b_block + j, c, s.c_row, s.from_zero && block == 0,
                   s.round && at + steps == s.steps);
      }
    }
}

// Scales from this row, column and step on.
template <Operand kOperand>
TROUPE_INLINE Scales scales_at(Scales s, int64_t row, int64_t column, int64_t step) {
  if (s.a == nullptr)
    return s;
  const int64_t block = step / steps_of(kOperand, kScaleBlock);
  s.a += row * s.a_row + block * s.a_block;
  s.b += block * s.b_block + column;
  return s;
}
template <Operand kOperand>
inline constexpr int64_t kElementsPerStep = kOperand == Operand::dot ? 2 : 1;

// fprop and dgrad: c [rows, columns] from rows of a and a prepared weight.
struct RowProduct {
  int64_t rows, columns, elements; // elements of the contraction
  const float* a;
  int64_t a_stride;
  const uint32_t* b;
  float* c;
  int64_t c_row;
  bool accumulate, round;
  Scales scales;
};

template <Operand kOperand>
[[gnu::noinline]] void row_unit(const RowProduct& p, UnitSize unit, int64_t m, int64_t n,
                                uint32_t* packed) {
  constexpr int64_t kPer = kElementsPerStep<kOperand>;
  const int64_t steps = steps_of(kOperand, p.elements);
  const int64_t rows = std::min(unit.rows, p.rows - m),
                columns = std::min(unit.columns, p.columns - n);
  for (int64_t at = 0; at == 0 || at < steps; at += kStretch) {
    const int64_t here = std::min(kStretch, steps - at);
    const int64_t elements = std::min(here * kPer, p.elements - at * kPer);
    const int64_t panel = round_up(here, kAlongSteps) * kTileRows;
    for (int64_t i = 0; i < rows; i += kTileRows)
      pack_along<kOperand>(std::min(kTileRows, rows - i), elements,
                           p.a + (m + i) * p.a_stride + at * kPer, p.a_stride,
                           packed + i / kTileRows * panel);
    multiply<kOperand, true>({rows, columns, here, packed, panel,
                              p.b + (n * steps + at * kTileColumns), steps * kTileColumns,
                              p.c + m * p.c_row + n, p.c_row, at == 0 && !p.accumulate,
                              p.round && at + here == steps},
                             scales_at<kOperand>(p.scales, m, n, at));
  }
}

// wgrad: c [n, k] += aᵀ b over the rows.
struct WeightGradient {
  int64_t rows, n, k;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_row;
  Scales scales;
};

template <Operand kOperand>
[[gnu::noinline]] void wgrad_unit(const WeightGradient& p, UnitSize unit, int64_t i, int64_t j,
                                  uint32_t* packed) {
  constexpr int64_t kPer = kElementsPerStep<kOperand>;
  const int64_t steps = steps_of(kOperand, p.rows);
  const int64_t rows = std::min(unit.rows, p.n - i), columns = std::min(unit.columns, p.k - j);
  uint32_t* packed_b = packed + kWgradUnit.rows * kWgradStretch;
  for (int64_t at = 0; at < steps; at += kWgradStretch) {
    const int64_t here = std::min(kWgradStretch, steps - at), row = at * kPer;
    const int64_t elements = std::min(here * kPer, p.rows - row);
    pack_a_across<kOperand>(elements, rows, p.a + row * p.a_stride + i, p.a_stride, packed);
    pack_b_across<kOperand>(elements, columns, p.b + row * p.b_stride + j, p.b_stride, packed_b,
                            here);
    multiply<kOperand, false>({rows, columns, here, packed, here * kTileRows, packed_b,
                               here * kTileColumns, p.c + i * p.c_row + j, p.c_row, false, false},
                              scales_at<kOperand>(p.scales, i, j, at));
  }
}

// ---- FP8 ----------------------------------------------------------------------------------------

// x rounded to E4M3, as a value. The last bit of m + 2^20 · exponent is worth an E4M3 mantissa's.
TROUPE_INLINE V round_e4m3(V x) {
  const V m = min(set1(448.0f), abs(x)); // NaN stays: it is the second operand
  const V big = max(set1(0x1p-6f), exponent(m)) * set1(0x1p20f);
  return copy_sign((m + big) - big, x);
}

// Codes of n ≤ 128 elements and their scale.
TROUPE_INLINE float quantize_row(int64_t n, const float* x, bool power_of_two, float* codes) {
  V top = zero();
  for (int64_t i = 0; i < n; i += 16)
    top = max(abs(load_some(x + i, n - i)), top);
  const float scale = tile_scale(max_lane(top), power_of_two);
  for (int64_t i = 0; i < n; i += 16)
    store_some(codes + i, n - i, round_e4m3(load_some(x + i, n - i) / set1(scale)));
  return scale;
}

// codes [rows, n] and scales [rows, ceil(n/128)] of rows of x.
inline void quantize_rows(int64_t rows, int64_t n, const float* x, int64_t stride,
                          bool power_of_two, float* codes, float* scales) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < n; c += kScaleBlock)
      *scales++ = quantize_row(std::min(kScaleBlock, n - c), x + r * stride + c, power_of_two,
                               codes + r * n + c);
}

// One tile of 128 × 128 for wgrad: quantized by rows, then what that leaves again by columns.
inline void quantize_tile_along_tokens(int64_t rows, int64_t n, const float* x, int64_t stride,
                                       bool power_of_two, float* codes, int64_t code_row,
                                       float* scales) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = codes + r * code_row;
    const V scale = set1(quantize_row(n, x + r * stride, power_of_two, row));
    for (int64_t c = 0; c < n; c += 16)
      store_some(row + c, n - c, load_some(row + c, n - c) * scale);
  }
  for (int64_t c = 0; c < n; c += 16) {
    V top = set1(1e-4f);
    for (int64_t r = 0; r < rows; ++r)
      top = max(abs(load_some(codes + r * code_row + c, n - c)), top);
    const V scale = top / set1(448.0f);
    store_some(scales + c, n - c, scale);
    for (int64_t r = 0; r < rows; ++r) {
      float* code = codes + r * code_row + c;
      store_some(code, n - c, round_e4m3(load_some(code, n - c) / scale));
    }
  }
}

// ---- prepared weights
// -----------------------------------------------------------------------------

inline Operand operand_of(TrainPrecision precision) {
  return precision == TrainPrecision::f32 ? Operand::f32 : kBf16Operand;
}
inline PreparedWeight prepared(TrainPrecision precision, int64_t n, int64_t k) {
  return {operand_of(precision), precision == TrainPrecision::fp8, n, k};
}

inline size_t weight_bytes(TrainPrecision precision, int64_t n, int64_t k) {
  return static_cast<size_t>(prepared(precision, n, k).words) * sizeof(uint32_t);
}

// The 128 × 128 block of w at (i, j) into both forms. x points to it.
template <Operand kOperand>
inline void prepare_block(const PreparedWeight& w, int64_t i, int64_t j, int64_t rows,
                          int64_t columns, const float* x, int64_t stride, uint32_t* out) {
  constexpr int64_t kPer = kElementsPerStep<kOperand>;
  pack_b_along<kOperand>(columns, rows, x, stride,
                         out + w.fprop + i * w.fprop_steps + j / kPer * kTileColumns,
                         w.fprop_steps);
  pack_b_across<kOperand>(rows, columns, x, stride,
                          out + w.dgrad + j * w.dgrad_steps + i / kPer * kTileColumns,
                          w.dgrad_steps);
}

// An FP8 block: its codes into `codes` [128, 128], its scale into both forms.
inline void quantize_block(const PreparedWeight& w, int64_t i, int64_t j, int64_t rows,
                           int64_t columns, const float* x, int64_t stride, uint32_t* out,
                           float* codes) {
  V top = zero();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 16)
      top = max(abs(load_some(x + r * stride + c, columns - c)), top);
  const float amax = max_lane(top), scale = amax == 0 ? 1.0f : amax / 448.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 16)
      store_some(codes + r * kScaleBlock + c, columns - c,
                 round_e4m3(load_some(x + r * stride + c, columns - c) / set1(scale)));
  auto* words = reinterpret_cast<float*>(out);
  std::fill_n(words + w.fprop_scales + j / kScaleBlock * w.fprop_columns + i,
              round_up(rows, kTileColumns), scale);
  std::fill_n(words + w.dgrad_scales + i / kScaleBlock * w.dgrad_columns + j,
              round_up(columns, kTileColumns), scale);
}

inline void prepare_weight(TrainPrecision precision, int64_t n, int64_t k, const float* master,
                           std::byte* out, Workers& workers) {
  const auto w = prepared(precision, n, k);
  auto* words = reinterpret_cast<uint32_t*>(out);
  const int64_t across = ceil_div(k, kScaleBlock);
  workers.parallel_for(ceil_div(n, kScaleBlock) * across, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b / across * kScaleBlock, j = b % across * kScaleBlock;
      const int64_t rows = std::min(kScaleBlock, n - i), columns = std::min(kScaleBlock, k - j);
      const float* x = master + i * k + j;
      if (precision == TrainPrecision::f32) {
        prepare_block<Operand::f32>(w, i, j, rows, columns, x, k, words);
      } else if (precision == TrainPrecision::bf16) {
        prepare_block<kBf16Operand>(w, i, j, rows, columns, x, k, words);
      } else {
        alignas(64) float codes[kScaleBlock * kScaleBlock];
        quantize_block(w, i, j, rows, columns, x, k, words, codes);
        prepare_block<kBf16Operand>(w, i, j, rows, columns, codes, kScaleBlock, words);
      }
    }
  });
}

// ---- calls
// ----------------------------------------------------------------------------------------

// Memory of a call: where each task's units begin, then codes and scales of FP8 operands.
struct CallMemory {
  std::span<int64_t> first_unit;
  float* floats;
  CallMemory(TrainScratch& scratch, size_t tasks, int64_t num_floats) {
    const size_t head = (tasks + 1) * sizeof(int64_t);
    std::byte* memory = scratch.of(-1, head + 64 + static_cast<size_t>(num_floats) * sizeof(float));
    first_unit = {reinterpret_cast<int64_t*>(memory), tasks + 1};
    floats = reinterpret_cast<float*>(memory + (head + 63) / 64 * 64);
  }
};

// Runs unit(task, row, column, worker) for every block of every task's [m(task), n(task)].
template <class Shape, class Unit>
inline void for_units(std::span<const LinearTask> tasks, UnitSize size, CallMemory& memory,
                      Workers& workers, Shape shape, Unit unit) {
  int64_t units = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    memory.first_unit[i] = units;
    units += size.count(shape(tasks[i]).first, shape(tasks[i]).second);
  }
  memory.first_unit.back() = units;
  workers.parallel_for(units, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t u = begin; u < end; ++u) {
      const size_t task = task_of(memory.first_unit, u);
      const int64_t at = u - memory.first_unit[task];
      const int64_t down = ceil_div(shape(tasks[task]).first, size.rows);
      unit(task, at % down * size.rows, at / down * size.columns, worker);
    }
  });
}

template <class Shape>
inline UnitSize size_for(std::span<const LinearTask> tasks, UnitSize size, UnitSize least,
                         const Workers& workers, Shape shape) {
  return unit_size(size, least, workers.num_threads(), [&](auto count) {
    for (const auto& t : tasks)
      count(shape(t).first, shape(t).second);
  });
}

// fprop and dgrad; `backward` says which.
inline void row_products(TrainPrecision precision, bool backward, std::span<const LinearTask> tasks,
                         TrainScratch& scratch, Workers& workers) {
  const bool scaled = precision == TrainPrecision::fp8;
  const auto depth = [&](const LinearTask& t) { return backward ? t.n : t.k; };
  const auto shape = [&](const LinearTask& t) { return std::pair{t.rows, backward ? t.k : t.n}; };
  const auto code_floats = [&](const LinearTask& t) {
    return t.rows * (depth(t) + ceil_div(depth(t), kScaleBlock));
  };
  int64_t floats = 0;
  for (const auto& t : tasks)
    floats += scaled ? code_floats(t) : 0;
  CallMemory memory(scratch, tasks.size(), floats);
  if (scaled) {
    float* codes = memory.floats;
    for (const auto& t : tasks) {
      const int64_t n = depth(t);
      float* scales = codes + t.rows * n;
      workers.parallel_for(t.rows, 16, [&](int64_t begin, int64_t end, int) {
        quantize_rows(end - begin, n, t.a + begin * t.a_stride, t.a_stride, t.power_of_two,
                      codes + begin * n, scales + begin * ceil_div(n, kScaleBlock));
      });
      codes += code_floats(t);
    }
  }
  const auto product = [&](size_t task) {
    const auto& t = tasks[task];
    const auto w = prepared(precision, t.n, t.k);
    const auto* words = reinterpret_cast<const uint32_t*>(t.weight);
    RowProduct p{t.rows,
                 shape(t).second,
                 depth(t),
                 t.a,
                 t.a_stride,
                 words + (backward ? w.dgrad : w.fprop),
                 t.out,
                 t.out_stride,
                 backward && t.accumulate,
                 t.round,
                 {}};
    if (scaled) {
      const float* codes = memory.floats;
      for (size_t i = 0; i < task; ++i)
        codes += code_floats(tasks[i]);
      p.a = codes;
      p.a_stride = p.elements;
      p.scales = {codes + t.rows * p.elements, ceil_div(p.elements, kScaleBlock), 1,
                  reinterpret_cast<const float*>(words) +
                      (backward ? w.dgrad_scales : w.fprop_scales),
                  backward ? w.dgrad_columns : w.fprop_columns};
    }
    return p;
  };
  const auto size = size_for(tasks, kRowUnit, kLeastRowUnit, workers, shape);
  for_units(
      tasks, size, memory, workers, shape, [&](size_t task, int64_t m, int64_t n, int worker) {
        auto* packed = reinterpret_cast<uint32_t*>(
            scratch.of(worker, static_cast<size_t>(kRowUnit.rows * kStretch) * sizeof(uint32_t)));
        const FlushDenormals flush{!kHasDot && precision == TrainPrecision::bf16};
        if (precision == TrainPrecision::f32)
          row_unit<Operand::f32>(product(task), size, m, n, packed);
        else
          row_unit<kBf16Operand>(product(task), size, m, n, packed);
      });
}

inline void fprop(TrainPrecision precision, std::span<const LinearTask> tasks,
                  TrainScratch& scratch, Workers& workers) {
  row_products(precision, false, tasks, scratch, workers);
}
inline void dgrad(TrainPrecision precision, std::span<const LinearTask> tasks,
                  TrainScratch& scratch, Workers& workers) {
  row_products(precision, true, tasks, scratch, workers);
}

// Codes [rows, n] and scales [ceil(rows/128), n] of one side of a wgrad.
inline void quantize_along_tokens(int64_t rows, int64_t n, const float* x, int64_t stride,
                                  bool power_of_two, float* codes, float* scales,
                                  Workers& workers) {
  const int64_t across = ceil_div(n, kScaleBlock);
  workers.parallel_for(
      ceil_div(rows, kScaleBlock) * across, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t r = b / across * kScaleBlock, c = b % across * kScaleBlock;
          quantize_tile_along_tokens(std::min(kScaleBlock, rows - r), std::min(kScaleBlock, n - c),
                                     x + r * stride + c, stride, power_of_two, codes + r * n + c, n,
                                     scales + r / kScaleBlock * n + c);
        }
      });
}

inline void wgrad(TrainPrecision precision, std::span<const LinearTask> tasks,
                  TrainScratch& scratch, Workers& workers) {
  const bool scaled = precision == TrainPrecision::fp8;
  const auto shape = [](const LinearTask& t) {
    return t.rows == 0 ? std::pair<int64_t, int64_t>{0, 0} : std::pair{t.n, t.k};
  };
  const auto side_floats = [](const LinearTask& t, int64_t n) {
    return (t.rows + ceil_div(t.rows, kScaleBlock)) * n;
  };
  int64_t floats = 0;
  for (const auto& t : tasks)
    floats += scaled ? side_floats(t, t.n + t.k) : 0;
  CallMemory memory(scratch, tasks.size(), floats);
  if (scaled) {
    float* at = memory.floats;
    for (const auto& t : tasks) {
      quantize_along_tokens(t.rows, t.n, t.a, t.a_stride, t.power_of_two, at, at + t.rows * t.n,
                            workers);
      at += side_floats(t, t.n);
      quantize_along_tokens(t.rows, t.k, t.b, t.b_stride, t.b_power_of_two, at, at + t.rows * t.k,
                            workers);
      at += side_floats(t, t.k);
    }
  }
  const auto product = [&](size_t task) {
    const auto& t = tasks[task];
    WeightGradient p{t.rows, t.n, t.k, t.a, t.a_stride, t.b, t.b_stride, t.out, t.out_stride, {}};
    if (scaled) {
      const float* at = memory.floats;
      for (size_t i = 0; i < task; ++i)
        at += side_floats(tasks[i], tasks[i].n + tasks[i].k);
      p.a = at;
      p.a_stride = t.n;
      p.b = at + side_floats(t, t.n);
      p.b_stride = t.k;
      p.scales = {p.a + t.rows * t.n, 1, t.n, p.b + t.rows * t.k, t.k};
    }
    return p;
  };
  const auto size = size_for(tasks, kWgradUnit, kLeastWgradUnit, workers, shape);
  for_units(
      tasks, size, memory, workers, shape, [&](size_t task, int64_t i, int64_t j, int worker) {
        auto* packed = reinterpret_cast<uint32_t*>(scratch.of(
            worker, static_cast<size_t>((kWgradUnit.rows + kWgradUnit.columns) * kWgradStretch) *
                        sizeof(uint32_t)));
        const FlushDenormals flush{!kHasDot && precision == TrainPrecision::bf16};
        if (precision == TrainPrecision::f32)
          wgrad_unit<Operand::f32>(product(task), size, i, j, packed);
        else
          wgrad_unit<kBf16Operand>(product(task), size, i, j, packed);
      });
}

} // namespace troupe::TROUPE_SIMD
