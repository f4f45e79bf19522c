// Linear, and the sum that finishes a Linear cut along K. Included once per target.
namespace troupe::TROUPE_SIMD {

struct LinearPlan {
  const LinearArgs* args = nullptr;
  int64_t rows_per_block = 0, blocks = 0;
};

// Units are panel-major, so that all row blocks pass while a weight panel is in the cache.
inline void linear_units(const LinearPlan& plan, int64_t begin, int64_t end) {
  const LinearArgs& a = *plan.args;
  const RowSource source{a.x, a.xq};
  PanelScratch scratch;
  alignas(64) float sums[kRowBlock * kPanelRows];
  RowBlock rows;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t panel = unit / plan.blocks, block = unit % plan.blocks;
    const int64_t row0 = block * plan.rows_per_block;
    const int64_t row1 = std::min(a.num_rows, row0 + plan.rows_per_block);
    rows.start(source);
    for (int64_t r = row0; r < row1; ++r)
      rows.add(source, r);
    PanelProduct(rows, *a.w, scratch).multiply(panel, sums);
    const int64_t column = panel * kPanelRows, n = std::min(kPanelRows, a.w->n - column);
    for (int64_t r = row0; r < row1; ++r)
      finish_row(sums + (r - row0) * kPanelRows, r, column, n, a.residual, a.out);
  }
}

// Fewer rows at once where there would be too few units for the threads.
inline int64_t rows_per_unit(int64_t num_rows, int64_t panels, int num_threads) {
  int64_t rows = kRowBlock;
  while (rows > 2 * kMaxTileRows && panels * ceil_div(num_rows, rows) < 4 * int64_t{num_threads})
    rows /= 2;
  return rows;
}

inline void linear(const LinearArgs& args, Workers& workers) {
  const int64_t panels = args.w->panels();
  if (args.num_rows == 0 || panels == 0)
    return;
  const int64_t limit = rows_per_unit(args.num_rows, panels, workers.num_threads());
  LinearPlan plan{&args, even_rows(args.num_rows, limit), 0};
  plan.blocks = ceil_div(args.num_rows, plan.rows_per_block);
  const int64_t units = panels * plan.blocks;
  workers.parallel_for(
      units,
      grain_for(units, workers.num_threads(), args.w->k * kPanelRows * size_of(args.w->dtype)),
      [&](int64_t begin, int64_t end, int) { linear_units(plan, begin, end); });
}

// Lanes [i, i + n) of the partials, added as a tree of adjacent pairs.
inline V tree_sum(std::span<const float* const> partials, int64_t i, int64_t n) {
  if (partials.size() == 1)
    return load_any(DType::f32, partials[0], i, n);
  const size_t half = partials.size() / 2;
  return tree_sum(partials.first(half), i, n) + tree_sum(partials.subspan(half), i, n);
}

inline void add_partials_rows(const AddPartialsArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    void* out = row_of(a.out, row);
    const void* residual = a.residual.data ? row_of(a.residual, row) : nullptr;
    for (int64_t i = 0; i < a.n; i += 16) {
      V v = zero();
      if (!a.partials.empty())
        v = tree_sum(a.partials, row * a.n + i, std::min<int64_t>(16, a.n - i));
      if (residual)
        v = load_any(a.residual.dtype, residual, i, a.n - i) + v;
      store_any(a.out.dtype, out, i, a.n - i, v);
    }
  }
}

inline void add_partials(const AddPartialsArgs& args, Workers& workers) {
  workers.parallel_for(
      args.num_rows, grain_for(args.num_rows, workers.num_threads(), args.n * 4),
      [&](int64_t begin, int64_t end, int) { add_partials_rows(args, begin, end); });
}

} // namespace troupe::TROUPE_SIMD
