// A block is a header of kHeaderBytes and then gate, up and down as packed_matrix.hpp lays them
// out, each 64-byte aligned. Everything the header says besides the weights version and the
// checksums follows from config, arithmetic, layer, expert and each matrix' dtype and scale block,
// so a received header is compared with the one this rank would have written, and nothing in it is
// taken on trust.
#include "kernels/load_plan.hpp"
#include "kernels/weight_source.hpp"
#include "kernels/weights.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <array>
#include <bit>
#include <cstring>
#include <utility>

namespace troupe {

namespace {

static_assert(std::endian::native == std::endian::little, "blocks are sent as they lie in memory");

constexpr std::array<char, 8> kMagic = {'T', 'R', 'P', 'E', 'X', 'P', 'R', 'T'};
constexpr uint32_t kFormat = 1;
constexpr size_t kHeaderBytes = 256;

struct MatrixHeader {
  int64_t n = 0, k = 0;
  int32_t dtype = 0, block_k = 0;
  uint64_t offset = 0; // from the start of the block
};

struct Header {
  std::array<char, 8> magic = kMagic;
  uint32_t format = kFormat;
  int32_t expert = -1;
  int64_t layer = -1;
  uint64_t weights_version = 0;
  uint64_t total_bytes = 0; // header included
  uint64_t payload_xxh3 = 0;
  std::array<MatrixHeader, 3> matrices;  // gate, up, down
  std::array<std::byte, 104> reserved{}; // zero
  uint64_t header_xxh3 = 0;              // of all before it
};
static_assert(sizeof(Header) == kHeaderBytes && std::is_trivially_copyable_v<Header>);
static_assert(kHeaderBytes % 64 == 0, "the packed matrices behind it are 64-byte aligned");

constexpr size_t kChecked = offsetof(Header, header_xxh3);

struct Layout {
  Header header;
  FfnWeights weights;
};

std::array<PackedMatrix*, 3> matrices_of(FfnWeights& weights) {
  return {&weights.gate, &weights.up, &weights.down};
}

uint64_t align_up(uint64_t n) { return (n + 63) / 64 * 64; }

// Fills in where the matrices lie and what the header says of them.
Layout lay_out(int64_t layer, ExpertId expert, const FfnWeights& weights) {
  Layout layout;
  layout.weights = weights;
  layout.header.layer = layer;
  layout.header.expert = expert.value;
  uint64_t offset = kHeaderBytes;
  const auto matrices = matrices_of(layout.weights);
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto& m = *matrices[i];
    layout.header.matrices[i] = {m.n, m.k, static_cast<int32_t>(m.dtype),
                                 static_cast<int32_t>(m.block_k), offset};
    offset = align_up(offset + static_cast<uint64_t>(packed_bytes(m)));
  }
  layout.header.total_bytes = offset;
  return layout;
}

void seal(Header& header) { header.header_xxh3 = XXH3_64bits(&header, kChecked); }

// What the FFN of an expert is called and how wide it is. The shared experts are the logical
// expert behind the routed ones; their down_proj sums in canonical segments even when uncut.
caf::expected<FfnParts> parts_of(const ModelConfig& config, int64_t layer, ExpertId expert) {
  const int64_t num_layers = config.num_hidden_layers + config.num_nextn_predict_layers;
  const bool exists = layer >= 0 && layer < num_layers && config.has_moe() &&
                      (layer >= config.num_hidden_layers || config.is_moe(layer));
  if (!exists)
    return make_error(Errc::invalid_argument, fmt::format("layer {} has no experts", layer));
  const bool shared = expert.value == config.n_routed_experts && config.n_shared_experts > 0;
  if (!shared && (expert.value < 0 || expert.value >= config.n_routed_experts))
    return make_error(Errc::invalid_argument,
                      fmt::format("layer {} has {} routed experts, no expert {}", layer,
                                  config.n_routed_experts, expert.value));
  if (shared) {
    const int64_t width = config.shared_intermediate_size();
    return ffn_parts(fmt::format("model.layers.{}.mlp.shared_experts.", layer), config.hidden_size,
                     width, width_segments(width));
  }
  const int64_t width = config.moe_intermediate_size;
  return ffn_parts(fmt::format("model.layers.{}.mlp.experts.{}.", layer, expert.value),
                   config.hidden_size, width, whole_k(width));
}

// Whether a matrix may be held like this under the arithmetic. A matrix that the checkpoint stores
// unquantized is quantized in blocks of 128, others keep their own blocks.
bool fits(const ModelConfig& config, const Arithmetic& arithmetic, const MatrixHeader& matrix) {
  if (matrix.block_k != 128 &&
      !(config.quantization && matrix.block_k == config.quantization->block_cols))
    return false;
  const auto is = [&](DType dtype) { return matrix.dtype == static_cast<int32_t>(dtype); };
  if (arithmetic.fp8_weights)
    return is(DType::f8_e4m3);
  return is(DType::bf16) || (is(DType::f32) && arithmetic.activations == DType::f32);
}

// The layout that a valid block of this layer and expert, held as the header says, has here.
caf::expected<Layout> expected_layout(const ModelConfig& config, const Arithmetic& arithmetic,
                                      const Header& header) {
  auto parts = parts_of(config, header.layer, ExpertId{header.expert});
  if (!parts)
    return with_context("expert block", parts.error());
  FfnWeights weights;
  const auto matrices = matrices_of(weights);
  const std::array<const MatrixPart*, 3> wanted = {&parts->gate, &parts->up, &parts->down};
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto& said = header.matrices[i];
    if (!fits(config, arithmetic, said))
      return make_error(
          Errc::mismatch,
          fmt::format("expert block of layer {}, expert {}: dtype or scale blocks are "
                      "not those of the arithmetic {}",
                      header.layer, header.expert, to_string(arithmetic)));
    const auto& part = *wanted[i];
    matrices[i]->n = part.rows;
    matrices[i]->k = part.segments.begin[part.segments.count];
    matrices[i]->dtype = static_cast<DType>(said.dtype);
    matrices[i]->segments = part.segments;
    matrices[i]->block_k = said.block_k;
  }
  return lay_out(header.layer, ExpertId{header.expert}, weights);
}

caf::error corrupt(std::string_view what) {
  return make_error(Errc::malformed, fmt::format("expert block: {}", what));
}

// Everything about `bytes` that can be wrong.
caf::expected<Layout> check_block(const ModelConfig& config, const Arithmetic& arithmetic,
                                  std::span<const std::byte> bytes) {
  Header header;
  if (bytes.size() < sizeof(header))
    return corrupt(fmt::format("{} bytes, its header alone has {}", bytes.size(), sizeof(header)));
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.magic != kMagic)
    return corrupt("does not begin with its magic");
  if (header.format != kFormat)
    return make_error(Errc::unsupported, fmt::format("expert block: format {}, this build reads {}",
                                                     header.format, kFormat));
  if (XXH3_64bits(&header, kChecked) != header.header_xxh3)
    return corrupt("header checksum does not match");
  auto layout = expected_layout(config, arithmetic, header);
  if (!layout)
    return layout;
  auto& expected = layout->header;
  expected.weights_version = header.weights_version;
  expected.payload_xxh3 = header.payload_xxh3;
  seal(expected);
  if (std::memcmp(&expected, &header, sizeof(header)) != 0)
    return make_error(Errc::mismatch,
                      fmt::format("expert block of layer {}, expert {}: its shapes or dtypes are "
                                  "not this model's",
                                  header.layer, header.expert));
  if (bytes.size() != expected.total_bytes)
    return corrupt(fmt::format("{} bytes, expected {}", bytes.size(), expected.total_bytes));
  if (XXH3_64bits(bytes.data() + kHeaderBytes, bytes.size() - kHeaderBytes) != header.payload_xxh3)
    return corrupt(
        fmt::format("checksum of layer {}, expert {} does not match", header.layer, header.expert));
  return layout;
}

// Points the matrices into the block's memory.
void bind_block(Layout& layout, const MemoryBlock& memory) {
  const auto matrices = matrices_of(layout.weights);
  for (size_t i = 0; i < matrices.size(); ++i)
    attach(*matrices[i], memory.data() + layout.header.matrices[i].offset);
}

std::vector<LoadPlan::Piece> pieces_of(const WeightSources::Matrix& m) {
  return {{m.tensor, 0, static_cast<int64_t>(m.tensor->bytes.size())}};
}

} // namespace

// One expert on its way from the checkpoint into a block.
class ExpertBlockLoader {
public:
  // Finds the tensors; reads headers only.
  static caf::expected<ExpertBlockLoader> make(const Checkpoint& checkpoint,
                                               const Arithmetic& arithmetic, const ExpertKey& key) {
    auto parts = parts_of(checkpoint.config(), key.layer, key.expert);
    if (!parts)
      return std::move(parts.error());
    WeightSources sources{checkpoint, arithmetic};
    ExpertBlockLoader loader;
    loader.matrices_ = {sources.matrix(parts->gate), sources.matrix(parts->up),
                        sources.matrix(parts->down)};
    if (sources.error())
      return sources.error();
    loader.key_ = key;
    loader.version_ = checkpoint.digest();
    return loader;
  }

  [[nodiscard]] std::vector<LoadPlan::Piece> pieces() const {
    std::vector<LoadPlan::Piece> pieces;
    for (const auto& m : matrices_)
      for (const auto& piece : pieces_of(m))
        pieces.push_back(piece);
    return pieces;
  }
  [[nodiscard]] std::vector<const TensorView*> shared() const {
    std::vector<const TensorView*> tensors;
    for (const auto& m : matrices_)
      for (const auto* tensor : m.shared())
        tensors.push_back(tensor);
    return tensors;
  }

  // Of the block.
  [[nodiscard]] size_t num_bytes() const { return layout().header.total_bytes; }

  // `memory` has num_bytes().
  [[nodiscard]] caf::expected<ExpertBlock> load(MemoryBlock memory) const {
    auto layout = this->layout();
    bind_block(layout, memory);
    const auto packed = matrices_of(layout.weights);
    for (size_t i = 0; i < packed.size(); ++i)
      if (auto error =
              pack(*packed[i], {&matrices_[i].source, 1},
                   memory.data() + layout.header.matrices[i].offset, 0, packed[i]->panels()))
        return error;
    auto& header = layout.header;
    header.weights_version = version_;
    header.payload_xxh3 = XXH3_64bits(memory.data() + kHeaderBytes, memory.size() - kHeaderBytes);
    seal(header);
    std::memcpy(memory.data(), &header, sizeof(header));
    ExpertBlock block;
    block.memory_ = std::move(memory);
    block.weights_ = layout.weights;
    block.layer_ = key_.layer;
    block.expert_ = key_.expert;
    block.weights_version_ = version_;
    return block;
  }

private:
  [[nodiscard]] Layout layout() const {
    return lay_out(key_.layer, key_.expert,
                   FfnWeights{matrices_[0].packed, matrices_[1].packed, matrices_[2].packed});
  }

  std::array<WeightSources::Matrix, 3> matrices_;
  ExpertKey key_;
  uint64_t version_ = 0;
};

caf::expected<ExpertBlock> ExpertBlock::load(const Checkpoint& checkpoint,
                                             const Arithmetic& arithmetic, int64_t layer,
                                             ExpertId expert) {
  const ExpertKey key{layer, expert};
  auto blocks = load_experts(checkpoint, arithmetic, {&key, 1}, 1, {});
  if (!blocks)
    return std::move(blocks.error());
  return std::move(blocks->front());
}

caf::expected<ExpertBlock> ExpertBlock::adopt(const ModelConfig& config,
                                              const Arithmetic& arithmetic,
                                              std::span<const std::byte> bytes) {
  auto layout = check_block(config, arithmetic, bytes);
  if (!layout)
    return std::move(layout.error());
  auto memory = MemoryBlock::allocate(layout->header.total_bytes);
  if (!memory)
    return with_context(
        fmt::format("layer {}, expert {}", layout->header.layer, layout->header.expert),
        memory.error());
  bind_block(*layout, *memory);
  std::memcpy(memory->data(), bytes.data(), bytes.size());
  ExpertBlock block;
  block.memory_ = std::move(*memory);
  block.weights_ = layout->weights;
  block.layer_ = layout->header.layer;
  block.expert_ = ExpertId{layout->header.expert};
  block.weights_version_ = layout->header.weights_version;
  return block;
}

caf::expected<std::vector<ExpertBlock>>
load_experts(const Checkpoint& checkpoint, const Arithmetic& arithmetic,
             std::span<const ExpertKey> keys, int num_threads, const LoadProgress& progress) {
  if (auto error = check_arithmetic(checkpoint.config(), arithmetic))
    return error;
  std::vector<ExpertBlockLoader> loaders;
  std::vector<size_t> bytes;
  for (const auto& key : keys) {
    auto loader = ExpertBlockLoader::make(checkpoint, arithmetic, key);
    if (!loader)
      return std::move(loader.error());
    bytes.push_back(loader->num_bytes());
    loaders.push_back(std::move(*loader));
  }
  auto memory = MemoryBlock::allocate_together(bytes);
  if (!memory)
    return with_context(fmt::format("{} experts", keys.size()), memory.error());
  std::vector<ExpertBlock> blocks(keys.size());
  LoadPlan plan{checkpoint};
  for (size_t i = 0; i < keys.size(); ++i)
    plan.add(
        loaders[i].pieces(),
        [&, i]() -> caf::error {
          auto loaded = loaders[i].load(std::move((*memory)[i]));
          if (!loaded)
            return std::move(loaded.error());
          blocks[i] = std::move(*loaded);
          return {};
        },
        loaders[i].shared());
  if (auto error = plan.run(num_threads, progress, 0, plan.bytes()))
    return error;
  return blocks;
}

} // namespace troupe
