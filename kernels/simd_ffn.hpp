// Grouped SwiGLU FFN: gate and up of one panel together, SwiGLU in registers, then down.
// Included once per target, see simd_common.hpp.
namespace troupe::TROUPE_SIMD {

struct FfnPlan {
  const GroupedFfnArgs* args = nullptr;
  RowSource source;              // of gate and up: x; of down: the product
  MutableRows product;           // [rows of all groups, one behind the other][width]
  int64_t row_limit = kRowBlock; // of a block
};

// Where a unit of work lies. Units run group by group, panel-major inside a group, so that a
// thread reads one expert's weights in one sweep.
struct FfnUnit {
  const ExpertGroup* group = nullptr;
  int64_t first_product_row = 0; // of the group
  int64_t panel = 0, row0 = 0, row1 = 0;
};

inline int64_t num_rows_of(const ExpertGroup& group) {
  return static_cast<int64_t>(group.row_of_x.size());
}
inline int64_t units_of(const ExpertGroup& group, const FfnPlan& plan, bool down) {
  const int64_t n = num_rows_of(group);
  if (n == 0)
    return 0;
  const PackedMatrix& w = down ? group.weights->down : group.weights->gate;
  return w.panels() * ceil_div(n, even_rows(n, plan.row_limit));
}
inline int64_t count_units(const FfnPlan& plan, bool down) {
  int64_t units = 0;
  for (const ExpertGroup& group : plan.args->groups)
    units += units_of(group, plan, down);
  return units;
}

// Walks units [begin, end) of gate/up or of down.
class FfnWalk {
public:
  FfnWalk(const FfnPlan& plan, bool down, int64_t begin) : plan_(plan), down_(down), left_(begin) {}
  FfnUnit next() {
    const auto groups = plan_.args->groups;
    int64_t units = units_of(groups[index_], plan_, down_);
    while (left_ >= units) {
      left_ -= units;
      product_row_ += num_rows_of(groups[index_]);
      units = units_of(groups[++index_], plan_, down_);
    }
    const ExpertGroup& group = groups[index_];
    const int64_t rows = even_rows(num_rows_of(group), plan_.row_limit);
    const int64_t blocks = ceil_div(num_rows_of(group), rows);
    const int64_t row0 = left_ % blocks * rows;
    FfnUnit unit{&group, product_row_, left_ / blocks, row0,
                 std::min(num_rows_of(group), row0 + rows)};
    ++left_;
    return unit;
  }

private:
  const FfnPlan& plan_;
  bool down_;
  size_t index_ = 0;
  int64_t product_row_ = 0;
  int64_t left_; // units from the start of group index_ to the next one
};

inline void swiglu_row(const float* gate, const float* up, int64_t n, int64_t column, DType dtype,
                       void* out) {
  for (int64_t c = 0; c < n; c += 16)
    store_any(dtype, out, column + c, n - c, silu(load(gate + c)) * load(up + c));
}

// Columns of the product that a narrower group leaves over are zero: they must not reach the amax
// of a quantized tile.
inline void clear_tail(const FfnPlan& plan, const FfnUnit& unit, int64_t column) {
  const size_t bytes =
      static_cast<size_t>((plan.product.stride - column) * size_of(plan.product.dtype));
  for (int64_t r = unit.row0; r < unit.row1; ++r)
    std::memset(static_cast<std::byte*>(row_of(plan.product, unit.first_product_row + r)) +
                    column * size_of(plan.product.dtype),
                0, bytes);
}

inline void gate_up_units(const FfnPlan& plan, int64_t begin, int64_t end) {
  PanelScratch scratch;
  alignas(64) float gate[kRowBlock * kPanelRows], up[kRowBlock * kPanelRows];
  RowBlock rows;
  FfnWalk walk(plan, false, begin);
  for (int64_t i = begin; i < end; ++i) {
    const FfnUnit unit = walk.next();
    const FfnWeights& w = *unit.group->weights;
    rows.start(plan.source);
    for (int64_t r = unit.row0; r < unit.row1; ++r)
      rows.add(plan.source, unit.group->row_of_x[static_cast<size_t>(r)]);
    PanelProduct(rows, w.gate, scratch).multiply(unit.panel, gate);
    PanelProduct(rows, w.up, scratch).multiply(unit.panel, up);
    const int64_t column = unit.panel * kPanelRows, n = std::min(kPanelRows, w.gate.n - column);
    for (int64_t r = 0; r < rows.num_rows; ++r)
      swiglu_row(gate + r * kPanelRows, up + r * kPanelRows, n, column, plan.product.dtype,
                 row_of(plan.product, unit.first_product_row + unit.row0 + r));
    if (column + n == w.gate.n)
      clear_tail(plan, unit, w.gate.n);
  }
}

inline void down_units(const FfnPlan& plan, int64_t begin, int64_t end) {
  PanelScratch scratch;
  alignas(64) float sums[kRowBlock * kPanelRows];
  RowBlock rows;
  FfnWalk walk(plan, true, begin);
  for (int64_t i = begin; i < end; ++i) {
    const FfnUnit unit = walk.next();
    const PackedMatrix& w = unit.group->weights->down;
    rows.start(plan.source);
    for (int64_t r = unit.row0; r < unit.row1; ++r)
      rows.add(plan.source, unit.first_product_row + r);
    PanelProduct(rows, w, scratch).multiply(unit.panel, sums);
    const int64_t column = unit.panel * kPanelRows, n = std::min(kPanelRows, w.n - column);
    for (int64_t r = 0; r < rows.num_rows; ++r)
      finish_row(sums + r * kPanelRows, unit.group->out_begin + unit.row0 + r, column, n,
                 plan.args->residual, plan.args->out);
  }
}

inline void grouped_ffn(const GroupedFfnArgs& args, Workers& workers) {
  int64_t rows = 0, width = 0;
  for (const ExpertGroup& group : args.groups)
    if (num_rows_of(group) > 0) {
      rows += num_rows_of(group);
      width = std::max(width, group.weights->gate.n);
    }
  if (rows == 0 || width == 0)
    return;
  const bool quantized = args.xq.codes != nullptr;
  const DType a = quantized ? DType::bf16 : args.x.dtype;
  ScratchCursor cursor(args.scratch);
  const FfnScratch scratch(cursor, width, rows, a, quantized);
  FfnPlan plan{&args, {args.x, args.xq}, {scratch.product, a, width}};
  const int threads = workers.num_threads();
  while (plan.row_limit > 2 * kMaxTileRows && count_units(plan, false) < 4 * int64_t{threads})
    plan.row_limit /= 2;

  int64_t units = count_units(plan, false);
  workers.parallel_for(units, grain_for(units, threads, 4 * args.hidden * kPanelRows),
                       [&](int64_t begin, int64_t end, int) { gate_up_units(plan, begin, end); });
  plan.source = {{scratch.product, a, width}, {}};
  if (quantized) {
    QuantizeArgs q{.num_rows = rows,
                   .k = width,
                   .x = plan.source.x,
                   .power_of_two = args.power_of_two,
                   .codes = scratch.codes,
                   .scales = scratch.scales,
                   .code_stride = width,
                   .scale_stride = ceil_div(width, kQuantTile)};
    quantize(q, workers);
    plan.source = {{}, {scratch.codes, scratch.scales, width, q.scale_stride}};
  }
  units = count_units(plan, true);
  workers.parallel_for(units, grain_for(units, threads, 2 * width * kPanelRows),
                       [&](int64_t begin, int64_t end, int) { down_units(plan, begin, end); });
}

} // namespace troupe::TROUPE_SIMD
