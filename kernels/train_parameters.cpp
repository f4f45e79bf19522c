#include "kernels/train_parameters.hpp"

#include "config/checkpoint_init.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace troupe {

namespace {

constexpr int64_t kAlignment = 16;       // elements: a cache line
constexpr int64_t kNoisePiece = 1 << 16; // elements; a multiple of 4

template <class Stored, class Convert>
void convert(std::span<const std::byte> bytes, std::span<float> values, Convert to_value) {
  for (size_t i = 0; i < values.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, bytes.data() + i * sizeof(Stored), sizeof(Stored));
    values[i] = to_value(stored);
  }
}

// E4M3 codes times the scales of their blocks.
caf::error dequantize(const Checkpoint& checkpoint, const TensorView& tensor,
                      std::span<float> values) {
  const auto& blocks = checkpoint.config().quantization;
  const auto* scales = checkpoint.find(scale_name(tensor.name));
  if (!blocks || !scales || scales->dtype != DType::f32)
    return make_error(Errc::malformed,
                      fmt::format("{}: E4M3 without F32 scales for its blocks", tensor.name));
  const int64_t rows = tensor.shape[0], cols = tensor.shape[1], scale_cols = scales->shape[1];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      float scale = 0;
      const auto s =
          static_cast<size_t>(r / blocks->block_rows * scale_cols + c / blocks->block_cols);
      std::memcpy(&scale, scales->bytes.data() + s * sizeof(float), sizeof(float));
      const auto i = static_cast<size_t>(r * cols + c);
      values[i] = e4m3_to_float(static_cast<uint8_t>(tensor.bytes[i])) * scale;
    }
  return {};
}

caf::error read_tensor(const Checkpoint& checkpoint, const TensorView& tensor,
                       std::span<float> values) {
  switch (tensor.dtype) {
  case DType::f32:
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
    return {};
  case DType::bf16:
    convert<BF16>(tensor.bytes, values, [](BF16 x) { return to_float(x); });
    return {};
  case DType::f16:
    convert<uint16_t>(tensor.bytes, values, f16_to_float);
    return {};
  case DType::f8_e4m3:
    return dequantize(checkpoint, tensor, values);
  default:
    return make_error(Errc::unsupported,
                      fmt::format("{}: {} can't be trained", tensor.name, name_of(tensor.dtype)));
  }
}

} // namespace

TrainLayout::TrainLayout(const ModelConfig& config, int64_t num_mtp_layers,
                         const std::function<bool(const TensorSpec&)>& holds) {
  for_each_tensor(config, num_mtp_layers, [&](const TensorSpec& spec) {
    if (spec.mtp_copy || !holds(spec))
      return;
    by_name_.emplace(spec.name, tensors_.size());
    tensors_.push_back({spec, num_elements_, spec.num_elements()});
    num_elements_ += (spec.num_elements() + kAlignment - 1) / kAlignment * kAlignment;
  });
}

const TrainTensor* TrainLayout::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

caf::expected<TrainArena> TrainArena::make(std::shared_ptr<const TrainLayout> layout) {
  TrainArena arena;
  const auto bytes = static_cast<size_t>(layout->num_elements()) * sizeof(float);
  auto memory = MemoryBlock::allocate(std::max<size_t>(bytes, 1));
  if (!memory)
    return memory.error();
  arena.memory_ = std::move(*memory);
  arena.layout_ = std::move(layout);
  return arena;
}

std::span<float> TrainArena::all() const {
  return {reinterpret_cast<float*>(memory_.data()), static_cast<size_t>(layout_->num_elements())};
}

std::span<float> TrainArena::of(const TrainTensor& tensor) const {
  return all().subspan(static_cast<size_t>(tensor.begin), static_cast<size_t>(tensor.size));
}

caf::error load_master(const Checkpoint& checkpoint, const TensorSpec& spec, std::span<float> to) {
  const auto* tensor = checkpoint.find(spec.name);
  if (!tensor)
    return make_error(Errc::not_found, fmt::format("the checkpoint has no {} to train", spec.name));
  if (auto error = read_tensor(checkpoint, *tensor, to))
    return error;
  checkpoint.release(tensor->bytes);
  return {};
}

void init_master(uint64_t seed, float std, const TensorSpec& spec, std::span<float> to) {
  if (spec.role == TensorRole::router_bias)
    std::ranges::fill(to, 0.0f);
  else if (spec.shape.size() == 1)
    std::ranges::fill(to, 1.0f);
  else
    for (size_t begin = 0; begin < to.size(); begin += kNoisePiece) {
      const auto piece = to.subspan(begin, std::min<size_t>(kNoisePiece, to.size() - begin));
      fill_noise(seed, spec.name, static_cast<int64_t>(begin), piece);
      for (auto& value : piece)
        value *= std;
    }
}

double squared_norm(std::span<const float> block) {
  double sum = 0;
  for (const float g : block) // the product is exact in F64: no need to fuse it
    sum += static_cast<double>(g) * static_cast<double>(g);
  return sum;
}

} // namespace troupe
