// The reference backend: the specification in plain loops, in exactly the documented order. Written
// to be read and compared with, not to be fast. Attention, gate and rotation have files of their
// own.
#include "kernels/reference_access.hpp"

#include <bit>

namespace troupe::reference {

namespace {

constexpr int64_t kQuantTile = 128; // columns of one activation scale

// ---- linear -----------------------------------------------------------------------------------

// Plain or quantized rows, as a weight row meets them.
struct Inputs {
  Rows x;
  QuantizedRows xq;
  [[nodiscard]] float times(const PackedReader& w, int64_t weight_row, int64_t row) const {
    if (xq.codes == nullptr)
      return product(w, weight_row, [&](int64_t k) { return get(x, row, k); });
    return product(
        w, weight_row, [&](int64_t k) { return e4m3_to_float(xq.codes[row * xq.code_stride + k]); },
        [&](int64_t k) { return xq.scales[row * xq.scale_stride + k / kQuantTile]; });
  }
};

// out = round(residual + sum), the residual being optional.
void finish(const MutableRows& out, const Rows& residual, int64_t row, int64_t i, float sum) {
  put(out, row, i, residual.data ? get(residual, row, i) + sum : sum);
}

void linear(const LinearArgs& a, Workers& workers) {
  const PackedReader w(*a.w);
  const Inputs inputs{a.x, a.xq};
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t n = 0; n < a.w->n; ++n)
        finish(a.out, a.residual, r, n, inputs.times(w, n, r));
  });
}

void add_partials(const AddPartialsArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> parts(a.partials.size());
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < a.n; ++i) {
        for (size_t p = 0; p < parts.size(); ++p)
          parts[p] = a.partials[p][r * a.n + i];
        finish(a.out, a.residual, r, i, tree<float>(parts));
      }
  });
}

// ---- rows -------------------------------------------------------------------------------------

void rms_norm_rows(const RmsNormArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      rms_norm<float>(
          a.n, a.eps, [&](int64_t i) { return get(a.x, r, i); },
          [&](int64_t i) { return a.weight[i]; }, [&](int64_t i, float y) { put(a.out, r, i, y); });
  });
}

void quantize_tile(const QuantizeArgs& a, int64_t row, int64_t first, int64_t last) {
  float amax = 1e-4f;
  for (int64_t i = first; i < last; ++i)
    amax = std::max(amax, std::fabs(get(a.x, row, i)));
  float scale = amax / 448.0f;
  if (a.power_of_two) // up, so that nothing saturates
    scale = std::bit_cast<float>((std::bit_cast<uint32_t>(scale) + 0x7fffffu) & 0xff800000u);
  a.scales[row * a.scale_stride + first / kQuantTile] = scale;
  for (int64_t i = first; i < last; ++i)
    a.codes[row * a.code_stride + i] = float_to_e4m3(get(a.x, row, i) / scale);
}

void quantize(const QuantizeArgs& a, Workers& workers) {
  workers.parallel_for(a.num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < a.k; i += kQuantTile)
        quantize_tile(a, r, i, std::min(a.k, i + kQuantTile));
  });
}

// ---- experts ----------------------------------------------------------------------------------

// One row of one expert: row x_row in, row out_row out.
void ffn_row(const GroupedFfnArgs& a, const FfnWeights& weights, int64_t x_row, int64_t out_row) {
  const PackedReader gate(weights.gate), up(weights.up), down(weights.down);
  const int64_t width = weights.gate.n;
  const bool quantized = a.xq.codes != nullptr;
  const DType dtype = quantized ? DType::bf16 : a.x.dtype;
  const Inputs in{a.x, a.xq};
  std::vector<float> hidden(static_cast<size_t>(width));
  for (int64_t i = 0; i < width; ++i)
    hidden[static_cast<size_t>(i)] =
        rounded(dtype, silu(in.times(gate, i, x_row)) * in.times(up, i, x_row));
  Inputs product{{hidden.data(), DType::f32, width}, {}};
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  if (quantized) {
    codes.resize(hidden.size());
    scales.resize((hidden.size() + kQuantTile - 1) / kQuantTile);
    InlineWorkers here;
    quantize({.num_rows = 1,
              .k = width,
              .x = product.x,
              .power_of_two = a.power_of_two,
              .codes = codes.data(),
              .scales = scales.data(),
              .code_stride = width,
              .scale_stride = std::ssize(scales)},
             here);
    product.xq = {codes.data(), scales.data(), width, std::ssize(scales)};
  }
  for (int64_t i = 0; i < weights.down.n; ++i)
    finish(a.out, a.residual, out_row, i, product.times(down, i, 0));
}

void grouped_ffn(const GroupedFfnArgs& a, Workers& workers) {
  for (const ExpertGroup& group : a.groups)
    workers.parallel_for(std::ssize(group.row_of_x), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        ffn_row(a, *group.weights, group.row_of_x[static_cast<size_t>(i)], group.out_begin + i);
    });
}

} // namespace

} // namespace troupe::reference

namespace troupe {

const Backend& reference_backend() {
  static const Backend table{.name = "reference",
                             .linear = reference::linear,
                             .add_partials = reference::add_partials,
                             .rms_norm = reference::rms_norm_rows,
                             .rope = reference::rope,
                             .mla_naive = reference::mla_naive,
                             .mla_absorbed = reference::mla_absorbed,
                             .gate = reference::gate,
                             .grouped_ffn = reference::grouped_ffn,
                             .quantize = reference::quantize};
  return table;
}

} // namespace troupe
