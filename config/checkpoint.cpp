#include "config/checkpoint.hpp"

#include "config/checkpoint_digest.hpp"
#include "config/json.hpp"
#include "config/parameters.hpp"
#include "config/safetensors.hpp"

#include <fmt/format.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <deque>
#include <map>
#include <set>
#include <unordered_map>
#include <unordered_set>

namespace troupe {

namespace {

namespace fs = std::filesystem;

constexpr JsonLimits kIndexLimits{size_t{256} << 20, 8, 16'000'000};
constexpr int64_t kMaxShards = 65'536;

caf::error wrong(Errc code, const fs::path& folder, const std::string& text) {
  return make_error(code, fmt::format("{}: {}", folder.string(), text));
}

// Which file is said to hold which tensor; empty for a checkpoint without index.
using WeightMap = std::map<std::string, std::string, std::less<>>;

// A shard's name must not lead out of the folder.
bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name.find('/') == std::string_view::npos &&
         name.find('\0') == std::string_view::npos && name != "." && name != "..";
}

caf::expected<WeightMap> read_index(const fs::path& path) {
  auto text = read_text_file(path, kIndexLimits.max_bytes);
  if (!text)
    return text.error();
  auto root = parse_json_object(*text, path.string(), kIndexLimits);
  if (!root)
    return root.error();
  JsonFields fields{*root, path.string()};
  const auto* map = fields.object_or_null("weight_map");
  if (!map)
    fields.fail(Errc::malformed, "weight_map", "expected an object, but it is absent");
  if (!fields.ok())
    return fields.error();
  WeightMap result;
  for (const auto& [tensor, file] : *map) {
    if (!file.is_string() || !is_plain_file_name(std::string_view{file.get_string()}))
      return wrong(Errc::malformed, path,
                   fmt::format("weight_map: {}: expected the name of a file in this folder, got {}",
                               std::string_view{tensor}, shown(file)));
    result.emplace(tensor, file.get_string());
  }
  return result;
}

// The L of "model.layers.L.…", or -1.
int64_t layer_of(std::string_view name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix))
    return -1;
  int64_t layer = -1;
  const auto* begin = name.data() + kPrefix.size();
  const auto [end, ec] = std::from_chars(begin, name.data() + name.size(), layer);
  return ec == std::errc{} && end != name.data() + name.size() && *end == '.' ? layer : -1;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

class MappedCheckpoint final : public Checkpoint {
public:
  explicit MappedCheckpoint(fs::path folder) : folder_(std::move(folder)) {}

  caf::error load() {
    auto config = load_model_config(folder_ / "config.json");
    if (!config)
      return config.error();
    config_ = std::move(*config);
    if (auto error = open_files())
      return error;
    if (auto error = count_mtp_layers())
      return error;
    if (auto error = check_tensors())
      return error;
    return compute_digest();
  }

  const ModelConfig& config() const override { return config_; }
  int64_t num_mtp_layers() const override { return num_mtp_layers_; }
  const std::vector<fs::path>& files() const override { return paths_; }
  uint64_t digest() const override { return digest_; }

  const TensorView* find(std::string_view name) const override {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : found->second;
  }

  void release(std::span<const std::byte> bytes) const override {
    const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<uintptr_t>(bytes.data());
    const auto begin = (address + page - 1) / page * page; // a page shared with a neighbour stays
    const auto end = (address + bytes.size()) / page * page;
    if (begin < end) // advice: nothing depends on whether the kernel takes it
      ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

private:
  caf::error open_files() {
    const auto index = folder_ / "model.safetensors.index.json";
    const auto single = folder_ / "model.safetensors";
    std::error_code ec;
    if (!fs::exists(index, ec)) {
      if (!fs::exists(single, ec))
        return wrong(Errc::not_found, folder_,
                     "holds neither model.safetensors nor model.safetensors.index.json");
      return open_file(single);
    }
    auto map = read_index(index);
    if (!map)
      return map.error();
    std::set<std::string> names;
    for (const auto& [tensor, file] : *map)
      names.insert(file);
    if (static_cast<int64_t>(names.size()) > kMaxShards)
      return wrong(Errc::malformed, index, fmt::format("names more than {} files", kMaxShards));
    for (const auto& name : names)
      if (auto error = open_file(folder_ / name))
        return error;
    return check_index(*map, index);
  }

  caf::error open_file(const fs::path& path) {
    auto file = SafetensorsFile::open(path);
    if (!file)
      return file.error();
    const int number = static_cast<int>(files_.size());
    for (const auto& entry : (*file)->header().entries) {
      auto& view = views_.emplace_back(TensorView{entry.name, entry.dtype, entry.shape,
                                                  (*file)->bytes(entry), number, entry.offset});
      if (const auto [known, fresh] = by_name_.emplace(view.name, &view); !fresh)
        return wrong(Errc::malformed, path,
                     fmt::format("tensor {} is also in {}", entry.name,
                                 paths_.at(static_cast<size_t>(known->second->file)).string()));
    }
    files_.push_back(std::move(*file));
    paths_.push_back(path);
    return {};
  }

  caf::error check_index(const WeightMap& map, const fs::path& index) const {
    for (const auto& [tensor, file] : map) {
      const auto* view = find(tensor);
      if (!view || paths_[static_cast<size_t>(view->file)].filename() != file)
        return wrong(
            Errc::malformed, index,
            fmt::format("weight_map says that {} holds {}, but it does not", file, tensor));
    }
    for (const auto& view : views_)
      if (!map.contains(view.name))
        return wrong(Errc::malformed, paths_[static_cast<size_t>(view.file)],
                     fmt::format("tensor {} is not in {}", view.name, index.filename().string()));
    return {};
  }

  // Modules 0 … n − 1 are present where any tensor of theirs is; check_tensors finds what they
  // lack.
  caf::error count_mtp_layers() {
    std::set<int64_t> present;
    for (const auto& view : views_) {
      const int64_t k = layer_of(view.name) - config_.num_hidden_layers;
      if (k >= 0 && k < config_.num_nextn_predict_layers)
        present.insert(k);
    }
    num_mtp_layers_ = static_cast<int64_t>(present.size());
    if (!present.empty() && *present.rbegin() != num_mtp_layers_ - 1)
      return wrong(Errc::not_found, folder_,
                   fmt::format("MTP layer {} is present, but one before it is missing",
                               config_.num_hidden_layers + *present.rbegin()));
    return {};
  }

  caf::error check_tensors() const {
    std::unordered_set<std::string_view> expected;
    caf::error first;
    for_each_tensor(config_, num_mtp_layers_, [&](const TensorSpec& spec) {
      if (!first)
        first = check_tensor(spec, expected);
    });
    if (first)
      return first;
    for (const auto& view : views_)
      if (!expected.contains(view.name) && !is_ignorable(view.name))
        return wrong(Errc::malformed, paths_[static_cast<size_t>(view.file)],
                     fmt::format("tensor {} {} belongs to no part of the model in config.json",
                                 view.name, shape_text(view.shape)));
    return {};
  }

  caf::error check_tensor(const TensorSpec& spec,
                          std::unordered_set<std::string_view>& expected) const {
    const auto* view = find(spec.name);
    if (!view)
      return spec.mtp_copy
                 ? caf::error{}
                 : wrong(Errc::not_found, folder_,
                         fmt::format("tensor {} {} is missing", spec.name, shape_text(spec.shape)));
    expected.insert(view->name);
    const auto& path = paths_[static_cast<size_t>(view->file)];
    if (view->shape != spec.shape)
      return wrong(Errc::mismatch, path,
                   fmt::format("tensor {} has shape {}, config.json calls for {}", spec.name,
                               shape_text(view->shape), shape_text(spec.shape)));
    switch (view->dtype) {
    case DType::f32:
    case DType::bf16:
    case DType::f16:
      return {};
    case DType::f8_e4m3:
      if (is_quantizable(spec.role))
        return check_scale(spec, path, expected);
      break;
    default:
      break;
    }
    return wrong(Errc::unsupported, path,
                 fmt::format("tensor {} is stored as {}; expected F32, BF16{}", spec.name,
                             name_of(view->dtype),
                             is_quantizable(spec.role) ? ", F16 or F8_E4M3" : " or F16"));
  }

  // A weight in E4M3 means nothing without its scales, which may lie in any shard.
  caf::error check_scale(const TensorSpec& spec, const fs::path& path,
                         std::unordered_set<std::string_view>& expected) const {
    if (!config_.quantization)
      return wrong(Errc::mismatch, path,
                   fmt::format("tensor {} is stored as F8_E4M3, but config.json has no "
                               "quantization_config",
                               spec.name));
    const auto name = scale_name(spec.name);
    const auto* scale = find(name);
    if (!scale)
      return wrong(Errc::not_found, folder_, fmt::format("tensor {} is missing", name));
    expected.insert(scale->name);
    const auto shape = scale_shape(spec.shape, *config_.quantization);
    if (scale->shape != shape || scale->dtype != DType::f32)
      return wrong(Errc::mismatch, paths_[static_cast<size_t>(scale->file)],
                   fmt::format("tensor {} is {} {}; blocks of {}×{} call for F32 {}", name,
                               name_of(scale->dtype), shape_text(scale->shape),
                               config_.quantization->block_rows, config_.quantization->block_cols,
                               shape_text(shape)));
    return {};
  }

  bool is_ignorable(std::string_view name) const {
    return name.ends_with("rotary_emb.inv_freq") ||
           (config_.num_nextn_predict_layers == 0 && layer_of(name) >= config_.num_hidden_layers);
  }

  caf::error compute_digest() {
    std::vector<const TensorView*> tensors;
    for (const auto& view : views_)
      tensors.push_back(&view);
    auto digest = digest_checkpoint(to_json(config_), std::move(tensors), paths_);
    if (!digest)
      return digest.error();
    digest_ = *digest;
    return {};
  }

  fs::path folder_;
  ModelConfig config_;
  int64_t num_mtp_layers_ = 0;
  uint64_t digest_ = 0;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::vector<fs::path> paths_;
  std::deque<TensorView> views_; // stays where it is while it grows; names are files_' own
  std::unordered_map<std::string_view, const TensorView*> by_name_; // never walked in order
};

} // namespace

caf::expected<std::shared_ptr<const Checkpoint>> Checkpoint::open(const fs::path& folder) {
  auto checkpoint = std::make_shared<MappedCheckpoint>(folder);
  if (auto error = checkpoint->load())
    return error;
  return std::shared_ptr<const Checkpoint>{std::move(checkpoint)};
}

} // namespace troupe
