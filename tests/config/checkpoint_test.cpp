#include "config/checkpoint.hpp"
#include "config/checkpoint_digest.hpp"
#include "config/checkpoint_init.hpp"
#include "config/json.hpp"
#include "config/parameters.hpp"
#include "config/presets.hpp"
#include "config/safetensors.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>

using namespace troupe;

namespace json = boost::json;
namespace fs = std::filesystem;

namespace {

ModelConfig small(std::string_view name) {
  auto config = *preset(name);
  config.num_hidden_layers = 2;
  config.n_routed_experts = config.n_group * 2;
  config.num_experts_per_tok = 2;
  return config;
}

fs::path make(const ScratchFolder& folder, const ModelConfig& config, InitOptions options = {}) {
  const auto path = folder / "model";
  fs::remove_all(path);
  const auto error = init_checkpoint(config, path, options);
  REQUIRE_MESSAGE(!error, text_of(error));
  return path;
}

// What opening says; empty where it succeeds.
std::string complaint(const fs::path& path) {
  const auto checkpoint = Checkpoint::open(path);
  return checkpoint ? std::string{} : text_of(checkpoint.error());
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// A checkpoint's tensors in memory, to be changed and written again into one file.
struct Tensor {
  DType dtype;
  std::vector<int64_t> shape;
};
using Tensors = std::map<std::string, Tensor>;

void rewrite(const fs::path& folder, const std::function<void(Tensors&)>& change) {
  const auto file = folder / "model.safetensors";
  Tensors tensors;
  {
    const auto old = SafetensorsFile::open(file);
    REQUIRE(old);
    for (const auto& entry : (*old)->header().entries)
      tensors[entry.name] = {entry.dtype, entry.shape};
  }
  change(tensors);
  std::vector<TensorDeclaration> declarations;
  for (const auto& [name, tensor] : tensors)
    declarations.push_back({name, tensor.dtype, tensor.shape});
  auto writer = SafetensorsWriter::create(file, declarations);
  REQUIRE(writer);
  const std::vector<std::byte> zeros(static_cast<size_t>((*writer)->num_data_bytes()));
  CHECK(!(*writer)->append(zeros));
  CHECK(!(*writer)->finish());
}

void edit_config(const fs::path& folder, const std::function<void(json::object&)>& change) {
  auto object = *parse_json_object(read_file(folder / "config.json"), "config.json");
  change(object);
  write_file(folder / "config.json", json::serialize(object));
}

const std::string kGate = "model.layers.1.mlp.gate.weight";
const std::string kKvA = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";

} // namespace

TEST_CASE("a random checkpoint of every tiny preset opens in every format") {
  const ScratchFolder folder;
  for (const auto name : preset_names()) {
    if (!name.starts_with("tiny"))
      continue;
    for (const auto format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::fp8}) {
      CAPTURE(name);
      const auto config = *preset(name);
      const auto path = make(folder, config, {.format = format});
      const auto checkpoint = Checkpoint::open(path);
      REQUIRE_MESSAGE(checkpoint, complaint(path));
      CHECK((*checkpoint)->num_mtp_layers() == config.num_nextn_predict_layers);
      CHECK((*checkpoint)->config().quantization.has_value() == (format == WeightFormat::fp8));
      int64_t bytes = 0, expected = 0;
      for (const auto& entry : fs::directory_iterator{path})
        if (entry.path().extension() == ".safetensors")
          bytes += static_cast<int64_t>(entry.file_size());
      for (const auto& spec : enumerate_tensors(config, config.num_nextn_predict_layers))
        expected += stored_bytes(spec, format, {});
      CHECK(bytes > expected);
      CHECK(bytes < expected + 100'000); // the header
    }
  }
}

TEST_CASE("the same seed makes the same bytes with any number of threads, another seed others") {
  const ScratchFolder folder;
  const auto config = small("tiny-v3");
  for (const auto format : {WeightFormat::bf16, WeightFormat::fp8}) {
    const auto one = read_file(make(folder, config, {format, 7, 1}) / "model.safetensors");
    const auto three = read_file(make(folder, config, {format, 7, 3}) / "model.safetensors");
    const auto other = read_file(make(folder, config, {format, 8, 1}) / "model.safetensors");
    CHECK(one == three);
    CHECK(one != other);
    CHECK(one.size() == other.size());
  }
}

TEST_CASE("noise has mean 0 and deviation 1, and a part of it equals that part of the whole") {
  std::vector<float> all(1 << 18);
  fill_noise(3, "x", 0, all);
  double sum = 0, squares = 0;
  for (const float x : all) {
    sum += x;
    squares += static_cast<double>(x) * x;
    if (std::fabs(x) > 3.5f)
      FAIL("out of range: " << x);
  }
  const auto n = static_cast<double>(all.size());
  CHECK(std::fabs(sum / n) < 0.01); // 5 standard errors of 1/√2^18
  CHECK(std::fabs(std::sqrt(squares / n) - 1) < 0.01);
  std::vector<float> part(103);
  fill_noise(3, "x", 400, part);
  CHECK(std::equal(part.begin(), part.end(), all.begin() + 400));
  fill_noise(3, "y", 400, part);
  CHECK(!std::equal(part.begin(), part.end(), all.begin() + 400));
}

TEST_CASE("blocks are quantized to E4M3 within half a step, ragged ones by their own maximum") {
  for (const bool ue8m0 : {false, true}) {
    QuantizationConfig quantization{4, 8, ue8m0 ? "ue8m0" : ""};
    constexpr int64_t kRows = 6, kCols = 19; // 2 × 3 blocks, the last of 2 × 3 elements
    std::vector<float> values(kRows * kCols);
    fill_noise(1, "w", 0, values);
    values.back() = 5;
    std::vector<uint8_t> codes(values.size());
    std::vector<float> scales(6);
    quantize_blocks(values, kCols, quantization, codes, scales);
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t c = 0; c < kCols; ++c) {
        const auto i = static_cast<size_t>(r * kCols + c);
        const float scale = scales[static_cast<size_t>(r / 4 * 3 + c / 8)];
        const float error = std::fabs(e4m3_to_float(codes[i]) * scale - values[i]);
        CHECK(error <= std::fabs(values[i]) / 16 + scale * 0x1p-9f); // 3 mantissa bits
      }
    if (ue8m0)
      CHECK(scales.back() == 0x1p-6f); // 5/448 = 0.01116 → 2^-6
    else
      CHECK(scales.back() == 5.0f / 448);
  }
  std::vector<uint8_t> codes(4, 1);
  std::vector<float> scales(1);
  quantize_blocks(std::vector<float>(4), 2, {}, codes, scales);
  CHECK(scales[0] == 1);
  CHECK(codes == std::vector<uint8_t>(4));
}

TEST_CASE("MTP copies of embedding and head equal the main ones") {
  const ScratchFolder folder;
  const auto checkpoint = *Checkpoint::open(make(folder, small("tiny-v3")));
  const auto same = [&](std::string_view a, std::string_view b) {
    const auto x = checkpoint->find(a)->bytes, y = checkpoint->find(b)->bytes;
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size()) == 0;
  };
  CHECK(same("model.embed_tokens.weight", "model.layers.3.embed_tokens.weight"));
  CHECK(same("lm_head.weight", "model.layers.2.shared_head.head.weight"));
  CHECK(!same("lm_head.weight", "model.embed_tokens.weight"));
}

TEST_CASE("a sharded checkpoint opens, with a scale in another shard than its weight") {
  const ScratchFolder folder;
  const auto config = small("tiny-v3");
  const auto path = make(folder, config, {WeightFormat::fp8, 0, 2, 4096});
  const auto checkpoint = Checkpoint::open(path);
  REQUIRE_MESSAGE(checkpoint, complaint(path));
  CHECK((*checkpoint)->files().size() > 10);
  int apart = 0;
  for (const auto& spec : enumerate_tensors(config, 2)) {
    const auto* weight = (*checkpoint)->find(spec.name);
    REQUIRE(weight);
    if (const auto* scale = (*checkpoint)->find(scale_name(spec.name)))
      apart += scale->file != weight->file;
  }
  CHECK(apart > 0);
  const auto whole = *Checkpoint::open(make(folder, config, {WeightFormat::fp8, 0, 1}));
  CHECK(whole->digest() == (*checkpoint)->digest());
}

TEST_CASE("releasing memory changes no byte") {
  const ScratchFolder folder;
  const auto checkpoint = *Checkpoint::open(make(folder, *preset("tiny-v3")));
  const auto* tensor = checkpoint->find("model.embed_tokens.weight");
  const std::vector<std::byte> before(tensor->bytes.begin(), tensor->bytes.end());
  checkpoint->release(tensor->bytes);
  checkpoint->release({});
  checkpoint->release(tensor->bytes.first(3));
  CHECK(std::equal(before.begin(), before.end(), tensor->bytes.begin()));
}

TEST_CASE("missing, extra and misshapen tensors are named") {
  const ScratchFolder folder;
  const auto path = make(folder, small("tiny-v3"));
  const auto after = [&](const std::function<void(Tensors&)>& change) {
    make(folder, small("tiny-v3"));
    rewrite(path, change);
    return complaint(path);
  };
  CHECK(after([](Tensors&) {}).empty());
  CHECK(contains(after([](Tensors& t) { t.erase(kGate); }), kGate + " [8, 64] is missing"));
  CHECK(contains(after([](Tensors& t) {
                   t["model.extra.weight"] = {DType::f32, {1}};
                 }),
                 "model.extra.weight [1] belongs to no part"));
  CHECK(contains(after([](Tensors& t) {
                   t[kGate].shape = {64, 8};
                 }),
                 kGate + " has shape [64, 8], config.json calls for [8, 64]"));
  CHECK(contains(after([](Tensors& t) { t[kGate].dtype = DType::i8; }), "stored as I8"));
  CHECK(contains(after([](Tensors& t) { t[kGate].dtype = DType::f8_e4m3; }), "stored as F8_E4M3"));
  CHECK(contains(after([](Tensors& t) { t[kKvA].dtype = DType::f8_e4m3; }),
                 "no quantization_config"));
  CHECK(after([](Tensors& t) {
          t["model.layers.0.self_attn.rotary_emb.inv_freq"] = {DType::f32, {4}};
          t[kGate].dtype = DType::f16;
          t["model.norm.weight"].dtype = DType::f32;
        }).empty());
}

TEST_CASE("scales that are missing or do not fit are named") {
  const ScratchFolder folder;
  const auto path = folder / "model";
  const auto after = [&](const std::function<void(Tensors&)>& change) {
    make(folder, small("tiny-v3"), {.format = WeightFormat::fp8});
    rewrite(path, change);
    return complaint(path);
  };
  const auto scale = scale_name(kKvA);
  CHECK(contains(after([&](Tensors& t) { t.erase(scale); }), scale + " is missing"));
  CHECK(contains(after([&](Tensors& t) { t[scale].shape = {2, 1}; }), "call for F32 [1, 1]"));
  CHECK(contains(after([&](Tensors& t) { t[scale].dtype = DType::bf16; }), "call for F32 [1, 1]"));
  // A weight kept in BF16 inside an FP8 checkpoint is fine, but then its scale means nothing.
  CHECK(contains(after([&](Tensors& t) { t[kKvA].dtype = DType::bf16; }), "belongs to no part"));
  CHECK(after([&](Tensors& t) {
          t[kKvA].dtype = DType::bf16;
          t.erase(scale);
        }).empty());
}

TEST_CASE("MTP layers may be absent, but not half") {
  const ScratchFolder folder;
  const auto path = folder / "model";
  const auto erase = [](Tensors& t, std::string_view prefix) {
    std::erase_if(t, [&](const auto& item) { return item.first.starts_with(prefix); });
  };
  const auto layers_after = [&](const std::function<void(Tensors&)>& change) -> int64_t {
    make(folder, small("tiny-v3"));
    rewrite(path, change);
    const auto checkpoint = Checkpoint::open(path);
    return checkpoint ? (*checkpoint)->num_mtp_layers() : -1;
  };
  CHECK(layers_after([](Tensors&) {}) == 2);
  CHECK(layers_after([&](Tensors& t) { erase(t, "model.layers.3."); }) == 1);
  CHECK(layers_after([&](Tensors& t) {
          erase(t, "model.layers.2.");
          erase(t, "model.layers.3.");
        }) == 0);
  CHECK(layers_after([&](Tensors& t) {
          erase(t, "model.layers.2.embed_tokens");
          erase(t, "model.layers.2.shared_head.head");
        }) == 2);
  CHECK((*Checkpoint::open(path))->find("model.layers.2.embed_tokens.weight") == nullptr);
  CHECK(layers_after([&](Tensors& t) { erase(t, "model.layers.2."); }) == -1);
  CHECK(contains(complaint(path), "MTP layer 3 is present"));
  CHECK(layers_after([&](Tensors& t) { erase(t, "model.layers.3.eh_proj"); }) == -1);
  CHECK(contains(complaint(path), "model.layers.3.eh_proj.weight"));
  // Without MTP in the config its layers are ignored.
  make(folder, small("tiny-v3"));
  edit_config(path, [](json::object& c) { c["num_nextn_predict_layers"] = 0; });
  CHECK((*Checkpoint::open(path))->num_mtp_layers() == 0);
}

TEST_CASE("an index that lies is refused") {
  const ScratchFolder folder;
  const auto path = folder / "model";
  const auto after = [&](const std::function<void(json::object&)>& change) {
    make(folder, small("tiny-v2-lite"), {WeightFormat::bf16, 0, 1, 100'000});
    const auto index = path / "model.safetensors.index.json";
    auto root = *parse_json_object(read_file(index), "index");
    change(root["weight_map"].get_object());
    write_file(index, json::serialize(root));
    return complaint(path);
  };
  CHECK(after([](json::object&) {}).empty());
  const auto head = [](json::object& map) -> json::value& { return map["lm_head.weight"]; };
  CHECK(contains(after([&](json::object& m) { head(m) = m["model.embed_tokens.weight"]; }),
                 "holds lm_head.weight, but it does not"));
  CHECK(contains(after([&](json::object& m) { head(m) = "absent.safetensors"; }),
                 "absent.safetensors"));
  CHECK(contains(after([&](json::object& m) { head(m) = "../model.safetensors"; }),
                 "the name of a file in this folder"));
  CHECK(contains(after([&](json::object& m) { head(m) = 7; }), "lm_head.weight"));
  CHECK(contains(after([](json::object& m) { m["x"] = m["lm_head.weight"]; }),
                 "holds x, but it does not"));
  CHECK(contains(after([](json::object& m) { m.erase("lm_head.weight"); }), "lm_head.weight"));
  make(folder, small("tiny-v2-lite"), {WeightFormat::bf16, 0, 1, 100'000});
  write_file(path / "model.safetensors.index.json", "{}");
  CHECK(contains(complaint(path), "weight_map: expected an object"));
}

TEST_CASE("a folder without config or weights is refused by what it lacks") {
  const ScratchFolder folder;
  const auto path = make(folder, small("tiny-v2"));
  fs::remove(path / "model.safetensors");
  CHECK(contains(complaint(path), "holds neither model.safetensors nor"));
  fs::remove(path / "config.json");
  CHECK(contains(complaint(path), "config.json: no such file"));
  CHECK(contains(complaint(folder / "nowhere"), "nowhere"));
}

TEST_CASE("a folder that holds a checkpoint is not overwritten") {
  const ScratchFolder folder;
  const auto path = make(folder, small("tiny-v2"));
  const auto error = init_checkpoint(small("tiny-v2"), path, {});
  CHECK(code_of(error) == Errc::invalid_argument);
  CHECK(contains(text_of(error), "already holds config.json"));
}

TEST_CASE("the digest follows config, shapes, dtypes and the weights, not where they lie") {
  const ScratchFolder folder;
  const auto digest = [&](const ModelConfig& config, InitOptions options) {
    return (*Checkpoint::open(make(folder, config, options)))->digest();
  };
  const auto config = small("tiny-v2");
  const auto base = digest(config, {});
  CHECK(digest(config, {}) == base);
  CHECK(digest(config, {.seed = 1}) != base);
  CHECK(digest(config, {.format = WeightFormat::f32}) != base);
  auto other = config;
  other.rms_norm_eps = 1e-5;
  CHECK(digest(other, {}) != base);
  const auto path = make(folder, config);
  fs::rename(path, folder / "moved");
  CHECK((*Checkpoint::open(folder / "moved"))->digest() == base);
}

TEST_CASE("any tensor whose data was flipped gives another digest") {
  const ScratchFolder folder;
  const auto path = make(folder, small("tiny-v3"), {.format = WeightFormat::fp8});
  const auto file = path / "model.safetensors";
  const auto header = (*SafetensorsFile::open(file))->header();
  const auto bytes = read_file(file);
  const auto digest = [&] { return (*Checkpoint::open(path))->digest(); };
  const auto base = digest();
  std::set<uint64_t> digests{base};
  for (size_t i = 0; i < header.entries.size(); i += 1 + header.entries.size() / 40) {
    const auto& entry = header.entries[i];
    auto flipped = bytes;
    for (int64_t b = 0; b < entry.num_bytes; ++b)
      flipped[static_cast<size_t>(entry.offset + b)] ^= 0x01;
    write_file(file, flipped);
    CAPTURE(entry.name);
    CHECK(digests.insert(digest()).second);
  }
  write_file(file, bytes);
  CHECK(digest() == base);
}

TEST_CASE("a file that shrinks while it is opened is an error, not a crash") {
  const ScratchFolder folder;
  const auto path = make(folder, small("tiny-v2"));
  std::vector<TensorView> views;
  std::vector<const TensorView*> tensors;
  const auto file = SafetensorsFile::open(path / "model.safetensors");
  for (const auto& entry : (*file)->header().entries)
    views.push_back({entry.name, entry.dtype, entry.shape, (*file)->bytes(entry), 0, entry.offset});
  for (const auto& view : views)
    tensors.push_back(&view);
  const std::vector<fs::path> files{path / "model.safetensors"};
  CHECK(digest_checkpoint("", tensors, files));
  fs::resize_file(files[0], fs::file_size(files[0]) - 1);
  CHECK(contains(text_of(digest_checkpoint("", tensors, files).error()),
                 "model.safetensors: the file ends early"));
  fs::remove(files[0]);
  CHECK(contains(text_of(digest_checkpoint("", tensors, files).error()), "can't be opened"));
}

namespace {

// The tensors of a checkpoint that nobody has to write, sorted by name.
struct Extents {
  std::vector<std::string> names;
  std::vector<TensorExtent> tensors;
  Extents(const ModelConfig& config, WeightFormat format) {
    std::map<std::string, int64_t> sizes;
    const auto quantization = config.quantization.value_or(QuantizationConfig{});
    for (const auto& spec : enumerate_tensors(config, config.num_nextn_predict_layers)) {
      const auto dtype = stored_dtype(spec.role, format);
      sizes[spec.name] = spec.num_elements() * size_of(dtype);
      if (dtype == DType::f8_e4m3) {
        const auto blocks = scale_shape(spec.shape, quantization);
        sizes[scale_name(spec.name)] = blocks[0] * blocks[1] * 4;
      }
    }
    for (const auto& [name, size] : sizes)
      names.push_back(name);
    for (const auto& name : names)
      tensors.push_back({name, sizes[name]});
  }
};

} // namespace

TEST_CASE("DeepSeek-V3's 688 GB are sampled in ten thousand reads that leave no large gap") {
  const Extents v3{*preset("v3"), WeightFormat::fp8};
  REQUIRE(v3.tensors.size() == 91'991);
  const auto samples = plan_samples(v3.tensors);
  CHECK(samples.size() < 10'500);
  std::vector<int64_t> starts{0};
  for (const auto& tensor : v3.tensors)
    starts.push_back(starts.back() + tensor.num_bytes);
  CHECK(starts.back() == 688'574'839'360);
  std::set<size_t> sampled;
  std::set<int64_t> places;
  int64_t bytes = 0;
  for (const auto& sample : samples) {
    REQUIRE(sample.offset >= 0);
    REQUIRE(sample.size > 0);
    REQUIRE(sample.offset + sample.size <= v3.tensors[sample.tensor].num_bytes);
    sampled.insert(sample.tensor);
    places.insert(starts[sample.tensor] + sample.offset);
    bytes += sample.size;
  }
  CHECK(bytes < 42'000'000);
  CHECK(*places.begin() == 0);
  CHECK(*places.rbegin() >= starts.back() - kSampleBytes);
  int64_t gap = 0, before = 0;
  for (const int64_t place : places)
    gap = std::max(gap, place - std::exchange(before, place));
  CHECK(gap < 85'000'000);
  for (size_t i = 0; i < v3.tensors.size(); ++i)
    if (!contains(v3.names[i], ".mlp.experts."))
      CHECK(sampled.contains(i));
}

TEST_CASE("a small checkpoint's samples are all of its bytes, once") {
  const Extents tiny{*preset("tiny-v3"), WeightFormat::bf16};
  int64_t total = 0;
  for (const auto& tensor : tiny.tensors)
    total += tensor.num_bytes;
  std::map<size_t, int64_t> seen; // bytes of each tensor, which come in order
  for (const auto& sample : plan_samples(tiny.tensors)) {
    CHECK(sample.offset == seen[sample.tensor]);
    seen[sample.tensor] += sample.size;
    total -= sample.size;
  }
  CHECK(total == 0);
  CHECK(plan_samples({}).empty());
}
