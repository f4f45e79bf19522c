#include "kernels/weight_source.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace troupe {

MatrixPart whole_matrix(std::string name, int64_t rows, int64_t cols, Storage storage) {
  return {std::move(name), rows, cols, 0, rows, whole_k(cols), storage};
}

FfnParts ffn_parts(std::string_view prefix, int64_t hidden, int64_t width,
                   const KSegments& down_segments) {
  const int64_t begin = down_segments.begin[0];
  const int64_t end = down_segments.begin[down_segments.count];
  FfnParts parts;
  parts.gate = whole_matrix(fmt::format("{}gate_proj", prefix), width, hidden);
  parts.up = whole_matrix(fmt::format("{}up_proj", prefix), width, hidden);
  parts.down = whole_matrix(fmt::format("{}down_proj", prefix), hidden, width);
  for (auto* part : {&parts.gate, &parts.up}) {
    part->row0 = begin;
    part->rows = end - begin;
  }
  parts.down.segments = down_segments;
  return parts;
}

caf::error check_arithmetic(const ModelConfig& config, const Arithmetic& arithmetic) {
  if (arithmetic.activations != DType::f32 && arithmetic.activations != DType::bf16)
    return make_error(Errc::invalid_argument, fmt::format("activations must be F32 or BF16, not {}",
                                                          name_of(arithmetic.activations)));
  if (!arithmetic.fp8_activations)
    return {};
  if (!arithmetic.fp8_weights || arithmetic.activations != DType::bf16)
    return make_error(Errc::invalid_argument,
                      "FP8 activations need FP8 weights and the bf16 arithmetic");
  if (config.quantization && config.quantization->block_cols != 128)
    return make_error(Errc::unsupported,
                      fmt::format("FP8 activations are quantized per 128 channels, but the "
                                  "checkpoint's weight_block_size has {} columns",
                                  config.quantization->block_cols));
  return {};
}

void WeightSources::fail(Errc code, std::string text) {
  if (!error_)
    error_ = make_error(code, std::move(text));
}

const TensorView* WeightSources::tensor(const std::string& name,
                                        const std::vector<int64_t>& shape) {
  const auto* view = checkpoint_.find(name);
  if (view == nullptr) {
    fail(Errc::not_found, fmt::format("the checkpoint has no tensor {}", name));
    return nullptr;
  }
  if (view->shape != shape) {
    fail(Errc::mismatch, fmt::format("tensor {} has shape [{}], expected [{}]", name,
                                     fmt::join(view->shape, ", "), fmt::join(shape, ", ")));
    return nullptr;
  }
  switch (view->dtype) {
  case DType::f32:
  case DType::bf16:
  case DType::f16:
  case DType::f8_e4m3:
    return view;
  default:
    fail(Errc::unsupported,
         fmt::format("tensor {} has dtype {}, expected F32, BF16, F16 or F8_E4M3", name,
                     name_of(view->dtype)));
    return nullptr;
  }
}

DType WeightSources::resident_dtype(Storage storage, DType stored) const {
  if (storage == Storage::linear && arithmetic_.fp8_weights)
    return DType::f8_e4m3;
  const bool round = storage != Storage::exact && arithmetic_.activations == DType::bf16;
  return round || stored == DType::bf16 ? DType::bf16 : DType::f32;
}

const TensorView* WeightSources::scales_of(const MatrixPart& part) {
  const auto& quantization = checkpoint_.config().quantization;
  const auto name = part.name + ".weight_scale_inv";
  if (!quantization) {
    fail(Errc::malformed, fmt::format("tensor {}.weight is F8_E4M3, but the config has no "
                                      "quantization_config",
                                      part.name));
    return nullptr;
  }
  const auto blocks = [](int64_t n, int64_t block) { return (n + block - 1) / block; };
  const auto* scales = tensor(name, {blocks(part.total_rows, quantization->block_rows),
                                     blocks(part.total_cols, quantization->block_cols)});
  if (scales == nullptr)
    return nullptr;
  if (scales->dtype != DType::f32) {
    fail(Errc::unsupported,
         fmt::format("tensor {} has dtype {}, expected F32", name, name_of(scales->dtype)));
    return nullptr;
  }
  return scales;
}

WeightSources::Matrix WeightSources::matrix(const MatrixPart& part) {
  Matrix m;
  m.tensor = tensor(part.name + ".weight", {part.total_rows, part.total_cols});
  if (m.tensor == nullptr)
    return m;
  const auto& segments = part.segments;
  m.source.name = m.tensor->name;
  m.source.data = m.tensor->bytes.data();
  m.source.dtype = m.tensor->dtype;
  m.source.total_rows = part.total_rows;
  m.source.total_cols = part.total_cols;
  m.source.row0 = part.row0;
  m.source.rows = part.rows;
  m.source.col0 = segments.begin[0];
  m.source.cols = segments.begin[segments.count] - segments.begin[0];
  if (m.tensor->dtype == DType::f8_e4m3) {
    m.scales = scales_of(part);
    if (error_)
      return m;
    m.source.scales = m.scales->bytes.data();
    m.source.block_rows = checkpoint_.config().quantization->block_rows;
    m.source.block_cols = checkpoint_.config().quantization->block_cols;
  }
  m.packed.n = part.rows;
  m.packed.k = m.source.cols;
  m.packed.dtype = resident_dtype(part.storage, m.tensor->dtype);
  m.packed.segments.count = segments.count;
  for (int s = 0; s <= segments.count; ++s)
    m.packed.segments.begin[s] = segments.begin[s] - segments.begin[0];
  m.packed.k0 = segments.begin[0];
  m.packed.block_k = m.source.block_cols;
  return m;
}

} // namespace troupe
