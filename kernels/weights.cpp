#include "kernels/weights.hpp"

namespace troupe {

std::string to_string(const Arithmetic& arithmetic) {
  std::string text = arithmetic.activations == DType::f32 ? "f32" : "bf16";
  if (arithmetic.fp8_activations)
    text += "+fp8-activations";
  else if (arithmetic.fp8_weights)
    text += "+fp8-weights";
  if (arithmetic.fp8_activations && arithmetic.fp8_power_of_two)
    text += "+ue8m0";
  return text;
}

Arithmetic default_arithmetic(const ModelConfig& config, DType stored) {
  Arithmetic arithmetic;
  arithmetic.activations = stored == DType::f32 ? DType::f32 : DType::bf16;
  arithmetic.fp8_weights = config.quantization.has_value();
  arithmetic.fp8_power_of_two = config.quantization && config.quantization->scale_fmt == "ue8m0";
  return arithmetic;
}

} // namespace troupe
