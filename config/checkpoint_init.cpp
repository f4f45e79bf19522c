#include "config/checkpoint_init.hpp"

#include "config/json.hpp"
#include "config/random.hpp"
#include "config/safetensors.hpp"

#include <fmt/format.h>

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <tuple>

namespace troupe {

namespace {

namespace fs = std::filesystem;

constexpr int64_t kPieceElements = int64_t{1} << 19; // generated, converted and written at a time

// A tensor of the model with its places in the files.
struct Planned {
  TensorSpec spec;
  std::string noise; // the name its values are drawn under
  DType dtype = DType::bf16;
  size_t shard = 0, tensor = 0;             // of the weight
  size_t scale_shard = 0, scale_tensor = 0; // F8_E4M3 only
};

struct Plan {
  QuantizationConfig quantization;
  std::vector<Planned> tensors;
  std::vector<std::vector<TensorDeclaration>> shards;
  int64_t total_bytes = 0;
};

// Adds a tensor to the last shard, or to a new one where it would grow too large.
std::pair<size_t, size_t> place(Plan& plan, std::vector<int64_t>& fill, TensorDeclaration tensor,
                                int64_t max_shard_bytes) {
  const int64_t bytes = tensor.num_bytes();
  if (plan.shards.empty() || fill.back() + bytes > max_shard_bytes) {
    plan.shards.emplace_back();
    fill.push_back(0);
  }
  fill.back() += bytes;
  plan.total_bytes += bytes;
  plan.shards.back().push_back(std::move(tensor));
  return {plan.shards.size() - 1, plan.shards.back().size() - 1};
}

std::string noise_name(const TensorSpec& spec) {
  if (!spec.mtp_copy)
    return spec.name;
  return spec.role == TensorRole::embedding ? "model.embed_tokens.weight" : "lm_head.weight";
}

Plan make_plan(const ModelConfig& config, const InitOptions& options) {
  Plan plan;
  plan.quantization = config.quantization.value_or(QuantizationConfig{});
  std::vector<int64_t> fill;
  for_each_tensor(config, config.num_nextn_predict_layers, [&](const TensorSpec& spec) {
    Planned planned{spec, noise_name(spec), stored_dtype(spec.role, options.format)};
    std::tie(planned.shard, planned.tensor) =
        place(plan, fill, {spec.name, planned.dtype, spec.shape}, options.max_shard_bytes);
    if (planned.dtype == DType::f8_e4m3)
      std::tie(planned.scale_shard, planned.scale_tensor) =
          place(plan, fill,
                {scale_name(spec.name), DType::f32, scale_shape(spec.shape, plan.quantization)},
                options.max_shard_bytes);
    plan.tensors.push_back(std::move(planned));
  });
  return plan;
}

struct Spread {
  float mean = 0;
  float deviation = 1;
};

Spread spread_of(const TensorSpec& spec) {
  const auto fan_in = static_cast<double>(spec.shape.back());
  switch (spec.role) {
  case TensorRole::embedding:
    return {0, 1};
  case TensorRole::head:
    return {0, static_cast<float>(2 / std::sqrt(fan_in))};
  case TensorRole::norm:
  case TensorRole::latent_norm:
    return {1, 0.1f};
  case TensorRole::router_bias:
    return {0, 0.1f};
  default:
    return {0, static_cast<float>(1 / std::sqrt(fan_in))};
  }
}

// Some rows of a matrix, or some elements of a vector, to be made in one go.
struct Piece {
  size_t tensor = 0; // index into Plan::tensors
  int64_t row = 0;
  int64_t num_rows = 0;
};

// Pieces of a quantized matrix start at block boundaries, those of any other at multiples of four
// elements, because a block of noise is four.
std::vector<Piece> cut(const Plan& plan) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const auto& planned = plan.tensors[i];
    const int64_t rows = planned.spec.shape.front();
    const int64_t cols = planned.spec.num_elements() / rows;
    const int64_t unit =
        planned.dtype == DType::f8_e4m3 ? std::lcm<int64_t>(plan.quantization.block_rows, 4) : 4;
    const int64_t step = std::max(kPieceElements / cols / unit, int64_t{1}) * unit;
    for (int64_t row = 0; row < rows; row += step)
      pieces.push_back({i, row, std::min(step, rows - row)});
  }
  return pieces;
}

// What a worker fills again and again.
struct Scratch {
  std::vector<float> values;
  std::vector<BF16> bf16;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
};

class Generator {
public:
  using Writers = std::vector<std::unique_ptr<SafetensorsWriter>>;

  Generator(const Plan& plan, const InitOptions& options, Writers& writers)
      : plan_(plan), options_(options), writers_(writers), pieces_(cut(plan)) {}

  caf::error run() {
    std::vector<std::thread> helpers;
    for (int i = 1; i < options_.num_threads; ++i)
      helpers.emplace_back([this] { work(); });
    work();
    for (auto& helper : helpers)
      helper.join();
    return error_;
  }

private:
  void work() {
    Scratch scratch;
    for (;;) {
      const size_t i = next_.fetch_add(1);
      if (i >= pieces_.size() || failed_.load())
        return;
      int64_t bytes = 0;
      auto error = options_.interrupted && options_.interrupted()
                       ? make_error(Errc::cancelled, "interrupted; what was written is removed")
                       : make(pieces_[i], scratch, bytes);
      report(std::move(error), bytes);
    }
  }

  void report(caf::error error, int64_t bytes) {
    const std::lock_guard lock{mutex_};
    done_ += bytes;
    if (error && !error_) {
      error_ = std::move(error);
      failed_ = true;
    } else if (!error && options_.progress) {
      options_.progress(done_, plan_.total_bytes);
    }
  }

  caf::error make(const Piece& piece, Scratch& scratch, int64_t& bytes) {
    const auto& planned = plan_.tensors[piece.tensor];
    const int64_t cols = planned.spec.num_elements() / planned.spec.shape.front();
    const auto n = static_cast<size_t>(piece.num_rows * cols);
    scratch.values.resize(n);
    fill_noise(options_.seed, planned.noise, piece.row * cols, scratch.values);
    const auto [mean, deviation] = spread_of(planned.spec);
    for (float& x : scratch.values)
      x = mean + deviation * x;
    switch (planned.dtype) {
    case DType::f8_e4m3:
      return write_fp8(planned, piece, cols, scratch, bytes);
    case DType::bf16:
      scratch.bf16.resize(n);
      std::ranges::transform(scratch.values, scratch.bf16.begin(), to_bf16);
      return write(planned, piece.row * cols, std::as_bytes(std::span{scratch.bf16}), bytes);
    default:
      return write(planned, piece.row * cols, std::as_bytes(std::span{scratch.values}), bytes);
    }
  }

  caf::error write(const Planned& planned, int64_t element, std::span<const std::byte> data,
                   int64_t& bytes) {
    auto& writer = *writers_[planned.shard];
    bytes += static_cast<int64_t>(data.size());
    return writer.write_at(writer.position_of(planned.tensor) + element * size_of(planned.dtype),
                           data);
  }

  caf::error write_fp8(const Planned& planned, const Piece& piece, int64_t cols, Scratch& scratch,
                       int64_t& bytes) {
    const auto& quantization = plan_.quantization;
    const auto blocks = scale_shape({piece.num_rows, cols}, quantization);
    scratch.codes.resize(scratch.values.size());
    scratch.scales.resize(static_cast<size_t>(blocks[0] * blocks[1]));
    quantize_blocks(scratch.values, cols, quantization, scratch.codes, scratch.scales);
    auto& writer = *writers_[planned.scale_shard];
    const int64_t first_scale = piece.row / quantization.block_rows * blocks[1];
    const auto scales = std::as_bytes(std::span{scratch.scales});
    if (auto error = writer.write_at(
            writer.position_of(planned.scale_tensor) + first_scale * size_of(DType::f32), scales))
      return error;
    bytes += static_cast<int64_t>(scales.size());
    return write(planned, piece.row * cols, std::as_bytes(std::span{scratch.codes}), bytes);
  }

  const Plan& plan_;
  const InitOptions& options_;
  Writers& writers_;
  std::vector<Piece> pieces_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_; // guards what follows
  int64_t done_ = 0;
  caf::error error_;
};

std::string shard_name(size_t i, size_t n) {
  return n == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, n);
}

caf::error write_index(const Plan& plan, const fs::path& folder) {
  boost::json::object map;
  for (size_t i = 0; i < plan.shards.size(); ++i)
    for (const auto& tensor : plan.shards[i])
      map[tensor.name] = shard_name(i, plan.shards.size());
  const boost::json::object root{{"metadata", {{"total_size", plan.total_bytes}}},
                                 {"weight_map", std::move(map)}};
  return write_text_file(folder / "model.safetensors.index.json", pretty(root));
}

ModelConfig config_of_files(ModelConfig config, WeightFormat format) {
  config.torch_dtype = format == WeightFormat::f32 ? "float32" : "bfloat16";
  if (format != WeightFormat::fp8)
    config.quantization.reset();
  else if (!config.quantization)
    config.quantization = QuantizationConfig{};
  return config;
}

// What may stand beside a model before it is made.
bool is_tokenizer_file(std::string_view name) {
  return name.starts_with("tokenizer") || name == "tiktoken.model" ||
         name == "special_tokens_map.json";
}

// A folder that holds other things is somebody's, named by mistake.
caf::error prepare_folder(const fs::path& folder) {
  if (folder.empty())
    return make_error(Errc::invalid_argument, "the folder to create has an empty name");
  std::error_code ec;
  fs::create_directories(folder, ec);
  if (ec)
    return make_error(Errc::io_error, fmt::format("{}: {}", folder.string(), ec.message()));
  for (const char* name : {"config.json", "model.safetensors", "model.safetensors.index.json"})
    if (fs::exists(folder / name, ec))
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: already holds {}; choose another folder or remove it",
                                    folder.string(), name));
  for (fs::directory_iterator entry{folder, ec}, end; !ec && entry != end; entry.increment(ec))
    if (const auto name = entry->path().filename().string(); !is_tokenizer_file(name))
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: holds {}; expected a new folder, or one with nothing but "
                                    "a tokenizer",
                                    folder.string(), name));
  return ec ? make_error(Errc::io_error, fmt::format("{}: {}", folder.string(), ec.message()))
            : caf::error{};
}

// Told before hours of writing, and before the disk is full for everybody.
caf::error check_room(const fs::path& folder, int64_t bytes) {
  std::error_code ec;
  const auto space = fs::space(folder, ec);
  if (ec || space.available >= static_cast<uint64_t>(bytes))
    return {};
  constexpr double kGiB = 1 << 30;
  return make_error(Errc::io_error,
                    fmt::format("{}: the checkpoint takes {:.1f} GiB, the disk has room for {:.1f} "
                                "GiB",
                                folder.string(), static_cast<double>(bytes) / kGiB,
                                static_cast<double>(space.available) / kGiB));
}

} // namespace

caf::error init_checkpoint(const ModelConfig& config, const fs::path& folder,
                           const InitOptions& options) {
  if (auto error = prepare_folder(folder))
    return error;
  const auto plan = make_plan(config, options);
  if (auto error = check_room(folder, plan.total_bytes))
    return error;
  Generator::Writers writers;
  for (size_t i = 0; i < plan.shards.size(); ++i) {
    auto writer =
        SafetensorsWriter::create(folder / shard_name(i, plan.shards.size()), plan.shards[i]);
    if (!writer)
      return writer.error();
    writers.push_back(std::move(*writer));
  }
  if (auto error = Generator{plan, options, writers}.run())
    return error;
  for (auto& writer : writers)
    if (auto error = writer->finish())
      return error;
  if (plan.shards.size() > 1)
    if (auto error = write_index(plan, folder))
      return error;
  return write_text_file(folder / "config.json", to_json(config_of_files(config, options.format)));
}

// The sum of a word's four bytes is nearly normal (mean 510, deviation 147.8). A hash of the whole
// word adds a fraction in [0, 1), so that values are not confined to 1021 steps. No libm is asked,
// so every machine gives the same bits.
void fill_noise(uint64_t seed, std::string_view name, int64_t begin, std::span<float> values) {
  constexpr float kMean = 510.5f;
  constexpr float kInverseDeviation = 1.0f / 147.8f; // √(4 · (256² − 1)/12), and the fraction's
  const uint64_t key = XXH3_64bits_withSeed(name.data(), name.size(), seed);
  const std::array<uint32_t, 2> halves{static_cast<uint32_t>(key),
                                       static_cast<uint32_t>(key >> 32)};
  const auto gauss = [](uint32_t word) {
    const uint32_t pairs = (word & 0x00ff00ffu) + (word >> 8 & 0x00ff00ffu);
    const uint32_t sum = (pairs & 0xffffu) + (pairs >> 16);
    const auto fraction = static_cast<float>(word * 0x9E3779B1u >> 20) * 0x1p-12f;
    return (static_cast<float>(sum) + fraction - kMean) * kInverseDeviation;
  };
  for (size_t i = 0; i < values.size(); i += 4) {
    const auto block = (static_cast<uint64_t>(begin) + i) / 4;
    const auto words = philox4x32(
        {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0x494E4954u}, halves);
    const size_t n = std::min<size_t>(4, values.size() - i);
    for (size_t j = 0; j < n; ++j)
      values[i + j] = gauss(words[j]);
  }
}

void quantize_blocks(std::span<const float> values, int64_t cols,
                     const QuantizationConfig& quantization, std::span<uint8_t> codes,
                     std::span<float> scales) {
  const int64_t rows = static_cast<int64_t>(values.size()) / cols;
  const bool power_of_two = quantization.scale_fmt == "ue8m0";
  size_t block = 0;
  for (int64_t r0 = 0; r0 < rows; r0 += quantization.block_rows) {
    const int64_t r1 = std::min(rows, r0 + quantization.block_rows);
    for (int64_t c0 = 0; c0 < cols; c0 += quantization.block_cols) {
      const int64_t c1 = std::min(cols, c0 + quantization.block_cols);
      float amax = 0;
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c1; ++c)
          amax = std::max(amax, std::fabs(values[static_cast<size_t>(r * cols + c)]));
      float scale = amax / 448.0f;
      if (scale == 0) // zeros, or numbers so small that nothing is left of them
        scale = 1;
      if (power_of_two) {
        int exponent = 0;
        const float mantissa = std::frexp(scale, &exponent); // in [1/2, 1)
        scale = std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
      }
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c1; ++c) {
          const auto at = static_cast<size_t>(r * cols + c);
          codes[at] = float_to_e4m3(values[at] / scale);
        }
      scales[block++] = scale;
    }
  }
}

} // namespace troupe
