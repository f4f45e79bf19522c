#include "kernels/train_ops.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace troupe {

std::string_view to_string(TrainPrecision precision) {
  switch (precision) {
  case TrainPrecision::f32:
    return "f32";
  case TrainPrecision::bf16:
    return "bf16";
  case TrainPrecision::fp8:
    return "fp8";
  }
  return "?";
}

caf::expected<TrainPrecision> parse_precision(std::string_view name) {
  for (const auto p : {TrainPrecision::f32, TrainPrecision::bf16, TrainPrecision::fp8})
    if (name == to_string(p))
      return p;
  return make_error(Errc::invalid_argument,
                    fmt::format("compute: \"{}\" given, expected f32, bf16 or fp8", name));
}

TrainScratch::TrainScratch(int num_threads) : memory_(static_cast<size_t>(num_threads) + 1) {}

std::byte* TrainScratch::of(int worker, size_t bytes) {
  constexpr size_t kAlignment = 64;
  auto& memory = memory_[static_cast<size_t>(worker + 1)];
  if (memory.size() < bytes + kAlignment)
    memory = std::vector<std::byte>(bytes + kAlignment);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + ((kAlignment - address % kAlignment) % kAlignment);
}

const TrainOps* find_train_ops(std::string_view name) {
  if (name == "reference")
    return &reference_train_ops();
  if (name == "simd")
    return &simd_train_ops();
  return nullptr;
}

} // namespace troupe
