#include "kernels/weights.hpp"
#include "tests/kernels/checkpoints.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>
#include <limits>

using namespace troupe;
using namespace troupe::test;

namespace {

template <class T>
T must(caf::expected<T> result) {
  if (!result)
    FAIL(text_of(result.error()));
  return std::move(*result);
}

// Element i of a stored tensor, without its scale.
float element(const TensorView& view, int64_t i) {
  const auto* p = view.bytes.data() + i * size_of(view.dtype);
  if (view.dtype == DType::f8_e4m3)
    return e4m3_to_float(static_cast<uint8_t>(*p));
  if (view.dtype == DType::bf16) {
    BF16 value;
    std::memcpy(&value, p, 2);
    return to_float(value);
  }
  float value = 0;
  std::memcpy(&value, p, 4);
  return value;
}

// W[row, col] of a published matrix, dequantized.
float published(const Checkpoint& checkpoint, const std::string& name, int64_t row, int64_t col) {
  const auto& view = *checkpoint.find(name);
  const float value = element(view, row * view.shape[1] + col);
  if (view.dtype != DType::f8_e4m3)
    return value;
  const auto& scales = *checkpoint.find(name + "_scale_inv");
  const auto& q = *checkpoint.config().quantization;
  return value * element(scales, row / q.block_rows * scales.shape[1] + col / q.block_cols);
}

// W[row, col] as a packed matrix holds it, by the layout that packed_matrix.hpp describes.
float held(const PackedMatrix& m, int64_t row, int64_t col) {
  int64_t padded_k = 0, at = 0;
  for (int s = 0; s < m.segments.count; ++s) {
    const int64_t begin = m.segments.begin[s], end = m.segments.begin[s + 1];
    if (col >= begin && col < end)
      at = padded_k + (col - begin);
    padded_k += (end - begin + 1) / 2 * 2;
  }
  const int64_t panel = row / kPanelRows, lane = row % kPanelRows;
  if (m.dtype == DType::f32) {
    float value = 0;
    std::memcpy(&value, m.data + ((panel * padded_k + at) * kPanelRows + lane) * 4, 4);
    return value;
  }
  const int64_t i = panel * padded_k * kPanelRows + at / 2 * 2 * kPanelRows + lane * 2 + at % 2;
  if (m.dtype == DType::bf16) {
    BF16 value;
    std::memcpy(&value, m.data + 2 * i, 2);
    return to_float(value);
  }
  const int64_t first_block = m.k0 / m.block_k;
  const int64_t blocks = (m.k0 + m.k - 1) / m.block_k - first_block + 1;
  const int64_t block = (m.k0 + col) / m.block_k - first_block;
  return e4m3_to_float(static_cast<uint8_t>(m.data[i])) *
         m.scales[(panel * blocks + block) * kPanelRows + lane];
}

// The number of places where the part of `name` that starts at (row0, col0) is not what `m` holds.
int64_t differences(const Checkpoint& checkpoint, const std::string& name, const PackedMatrix& m,
                    int64_t row0, int64_t col0, bool transposed = false) {
  int64_t count = 0;
  for (int64_t r = 0; r < m.n; ++r)
    for (int64_t c = 0; c < m.k; ++c) {
      const float expected = transposed ? published(checkpoint, name, row0 + c, col0 + r)
                                        : published(checkpoint, name, row0 + r, col0 + c);
      count += held(m, r, c) != expected;
    }
  return count;
}

Arithmetic arithmetic_of(WeightFormat format) {
  Arithmetic a;
  a.activations = format == WeightFormat::f32 ? DType::f32 : DType::bf16;
  a.fp8_weights = format == WeightFormat::fp8;
  return a;
}

// Blocks that are cut by heads, by tensor parallelism and by the matrix' own end.
ModelConfig ragged_config() {
  auto config = preset("tiny-v3").value();
  config.qk_nope_head_dim = 24;
  config.v_head_dim = 21; // segments of an odd length
  config.kv_lora_rank = 40;
  config.hidden_size = 72;
  config.intermediate_size = 4 * 128 + 24;
  config.moe_intermediate_size = 20;
  config.n_shared_experts = 2;
  config.num_hidden_layers = 2;
  config.quantization = QuantizationConfig{16, 32, ""};
  return config;
}

void check_attention(const Checkpoint& checkpoint, const AttentionWeights& w, int64_t layer,
                     const TrunkShare& share) {
  const auto& c = checkpoint.config();
  const auto prefix = fmt::format("model.layers.{}.self_attn.", layer);
  const int64_t heads = c.num_attention_heads / share.tp, first = heads * share.tp_rank;
  const int64_t nope = c.qk_nope_head_dim, v = c.v_head_dim;
  CHECK(w.q.n == heads * c.qk_head_dim());
  CHECK(differences(checkpoint, prefix + "q_b_proj.weight", w.q, first * c.qk_head_dim(), 0) == 0);
  CHECK(w.kv_a.n == c.latent_dim());
  CHECK(differences(checkpoint, prefix + "kv_a_proj_with_mqa.weight", w.kv_a, 0, 0) == 0);
  const auto kv_b = prefix + "kv_b_proj.weight";
  CHECK(differences(checkpoint, kv_b, w.kv_b, first * (nope + v), 0) == 0);
  REQUIRE(static_cast<int64_t>(w.w_uk_t.size()) == heads);
  REQUIRE(static_cast<int64_t>(w.w_uv.size()) == heads);
  for (int64_t h = 0; h < heads; ++h) {
    const auto& key = w.w_uk_t[static_cast<size_t>(h)];
    const auto& value = w.w_uv[static_cast<size_t>(h)];
    const int64_t row = (first + h) * (nope + v);
    CHECK((key.n == c.kv_lora_rank && key.k == nope));
    CHECK((value.n == v && value.k == c.kv_lora_rank));
    CHECK(differences(checkpoint, kv_b, key, row, 0, true) == 0);
    CHECK(differences(checkpoint, kv_b, value, row + nope, 0) == 0);
  }
  CHECK(w.o.k == heads * v);
  CHECK(w.o.k0 == first * v);
  CHECK(w.o.segments.count == 8 / share.tp);
  CHECK(differences(checkpoint, prefix + "o_proj.weight", w.o, 0, first * v) == 0);
}

} // namespace

TEST_CASE("a tensor-parallel rank holds its heads and columns of the published matrices") {
  for (const auto format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::fp8}) {
    CAPTURE(name_of(format));
    const RandomCheckpoint checkpoint{ragged_config(), format};
    const auto& c = checkpoint->config();
    for (const int tp : {1, 2, 4})
      for (int rank = 0; rank < tp; rank += 3) {
        CAPTURE(tp);
        CAPTURE(rank);
        TrunkShare share;
        share.tp = tp;
        share.tp_rank = rank;
        const auto trunk = must(load_trunk(*checkpoint, arithmetic_of(format), share, 2, {}));
        REQUIRE(trunk->layers.size() == 2);
        for (int64_t l = 0; l < 2; ++l)
          check_attention(*checkpoint, trunk->layers[static_cast<size_t>(l)].attention, l, share);
        const auto& dense = trunk->layers[0];
        CHECK(dense.ffn_is_cut == (tp > 1));
        const auto all = width_segments(c.intermediate_size);
        const auto mine = slice(all, rank, tp);
        CHECK(dense.dense.down.k == mine.begin[mine.count] - mine.begin[0]);
        CHECK(differences(*checkpoint, "model.layers.0.mlp.down_proj.weight", dense.dense.down, 0,
                          mine.begin[0]) == 0);
        CHECK(differences(*checkpoint, "model.layers.0.mlp.gate_proj.weight", dense.dense.gate,
                          mine.begin[0], 0) == 0);
        CHECK(differences(*checkpoint, "model.layers.0.mlp.up_proj.weight", dense.dense.up,
                          mine.begin[0], 0) == 0);
        const auto& moe = trunk->layers[1]; // 40 columns: one granule, held whole
        CHECK_FALSE(moe.ffn_is_cut);
        CHECK(moe.shared.down.k == c.shared_intermediate_size());
        CHECK(differences(*checkpoint, "model.layers.1.mlp.shared_experts.down_proj.weight",
                          moe.shared.down, 0, 0) == 0);
        CHECK(moe.router.dtype != DType::f8_e4m3);
        CHECK(differences(*checkpoint, "model.layers.1.mlp.gate.weight", moe.router, 0, 0) == 0);
        CHECK(differences(*checkpoint, "lm_head.weight", trunk->head, 0, 0) == 0);
      }
  }
}

TEST_CASE("scale blocks of any size are held as published, whole and cut") {
  for (const auto& [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{
           {64, 64}, {96, 80}, {1, 1}, {128, 512}, {7, 300}, {1 << 20, 1 << 20}}) {
    CAPTURE(rows);
    CAPTURE(cols);
    auto config = ragged_config();
    config.quantization = QuantizationConfig{rows, cols, ""};
    const RandomCheckpoint checkpoint{config, WeightFormat::fp8};
    for (const auto format : {WeightFormat::fp8, WeightFormat::f32})
      for (const int tp : {1, 4}) {
        TrunkShare share;
        share.tp = tp;
        share.tp_rank = tp - 1;
        const auto trunk = must(load_trunk(*checkpoint, arithmetic_of(format), share, 1, {}));
        check_attention(*checkpoint, trunk->layers[1].attention, 1, share);
        const auto& down = trunk->layers[0].dense.down;
        CHECK(differences(*checkpoint, "model.layers.0.mlp.down_proj.weight", down, 0,
                          config.intermediate_size - down.k) == 0);
      }
    const auto arithmetic = arithmetic_of(WeightFormat::fp8);
    const auto block = must(ExpertBlock::load(*checkpoint, arithmetic, 1, ExpertId{5}));
    CHECK(differences(*checkpoint, "model.layers.1.mlp.experts.5.gate_proj.weight",
                      block.weights().gate, 0, 0) == 0);
    CHECK(ExpertBlock::adopt(config, arithmetic, block.bytes()));
    auto w8a8 = arithmetic;
    w8a8.fp8_activations = true;
    const auto refused = load_trunk(*checkpoint, w8a8, {}, 1, {});
    REQUIRE_FALSE(refused);
    CHECK(text_of(refused.error()) ==
          fmt::format("FP8 activations are quantized per 128 channels, but the checkpoint's "
                      "weight_block_size has {} columns",
                      cols));
  }
}

TEST_CASE("a block scale that is no positive number stops loading, whatever it is loaded for") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::fp8};
  for (const auto format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::fp8})
    for (const auto& [part, bad] : std::vector<std::pair<std::string, float>>{
             {"self_attn.kv_b_proj", 0.0f},
             {"self_attn.o_proj", -1.0f},
             {"mlp.shared_experts.up_proj", std::numeric_limits<float>::infinity()},
             {"mlp.experts.3.down_proj", std::numeric_limits<float>::quiet_NaN()}}) {
      const auto name = fmt::format("model.layers.1.{}.weight_scale_inv", part);
      CAPTURE(name);
      EditedCheckpoint edited{checkpoint.get()};
      std::memcpy(edited.edit(name).bytes.data(), &bad, 4);
      const auto arithmetic = arithmetic_of(format);
      const auto want = fmt::format(
          "tensor {}: block [0, 0] has the scale {}, expected a finite number above 0", name, bad);
      if (part.find(".experts.") != std::string::npos) {
        const auto block = ExpertBlock::load(edited, arithmetic, 1, ExpertId{3});
        REQUIRE_FALSE(block);
        CHECK(text_of(block.error()) == want);
      } else {
        const auto trunk = load_trunk(edited, arithmetic, {}, 2, {});
        REQUIRE_FALSE(trunk);
        CHECK(text_of(trunk.error()) == want);
      }
    }
}

TEST_CASE("value rows of kv_b are not stored twice where heads fill whole panels") {
  auto config = preset("tiny-v3").value();
  config.qk_nope_head_dim = 64;
  config.v_head_dim = 128;
  config.num_hidden_layers = 1;
  for (const auto format : {WeightFormat::bf16, WeightFormat::fp8}) {
    const RandomCheckpoint checkpoint{config, format};
    const auto trunk = must(load_trunk(*checkpoint, arithmetic_of(format), {}, 1, {}));
    const auto& w = trunk->layers[0].attention;
    check_attention(*checkpoint, w, 0, {});
    CHECK(w.w_uv[1].data > w.kv_b.data);
    CHECK(w.w_uv[1].data < w.kv_b.data + packed_bytes(w.kv_b));
  }
}

TEST_CASE("norms, biases and the embedding keep their values in every arithmetic") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::bf16};
  for (const DType a : {DType::f32, DType::bf16}) {
    Arithmetic arithmetic;
    arithmetic.activations = a;
    TrunkShare share;
    share.num_mtp_layers = 1;
    const auto trunk = must(load_trunk(*checkpoint, arithmetic, share, 2, {}));
    const auto equal = [&](const std::string& name, const float* values) {
      const auto& view = *checkpoint->find(name);
      int64_t count = 0;
      for (int64_t i = 0; i < view.shape[0]; ++i)
        count += values[i] != element(view, i);
      CHECK(count == 0);
    };
    equal("model.norm.weight", trunk->final_norm);
    equal("model.layers.0.input_layernorm.weight", trunk->layers[0].attention.input_norm);
    equal("model.layers.1.self_attn.q_a_layernorm.weight", trunk->layers[1].attention.q_a_norm);
    equal("model.layers.2.mlp.gate.e_score_correction_bias", trunk->layers[2].router_bias);
    equal("model.layers.3.hnorm.weight", trunk->mtp[0].hnorm);
    const auto& table = *checkpoint->find("model.embed_tokens.weight");
    int64_t count = 0;
    for (int64_t i = 0; i < table.shape[0] * table.shape[1]; ++i) {
      float value = 0;
      BF16 half;
      if (a == DType::f32)
        std::memcpy(&value, trunk->embedding + 4 * i, 4);
      else if (std::memcpy(&half, trunk->embedding + 2 * i, 2); true)
        value = to_float(half);
      count += value != element(table, i);
    }
    CHECK(count == 0);
  }
}

TEST_CASE("MTP shares embedding and head where its copies are absent or equal") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::bf16};
  const std::string embedding = "model.layers.3.embed_tokens.weight";
  const std::string head = "model.layers.3.shared_head.head.weight";
  REQUIRE(checkpoint->find(embedding) != nullptr);
  TrunkShare share;
  share.num_mtp_layers = 2;
  const auto load = [&](const Checkpoint& c) {
    return must(load_trunk(c, Arithmetic{}, share, 2, {}));
  };
  SUBCASE("equal") {
    const auto trunk = load(*checkpoint);
    for (const auto& mtp : trunk->mtp) {
      CHECK(mtp.embedding == trunk->embedding);
      CHECK(mtp.head.data == trunk->head.data);
    }
  }
  SUBCASE("absent") {
    EditedCheckpoint edited{checkpoint.get()};
    edited.hide(embedding);
    edited.hide(head);
    const auto trunk = load(edited);
    CHECK(trunk->mtp[0].embedding == trunk->embedding);
    CHECK(trunk->mtp[0].head.data == trunk->head.data);
  }
  SUBCASE("different") {
    EditedCheckpoint edited{checkpoint.get()};
    for (const auto* name : {&embedding, &head})
      edited.edit(*name).bytes.back() ^= std::byte{0x80};
    const auto trunk = load(edited);
    CHECK(trunk->mtp[0].embedding != trunk->embedding);
    CHECK(trunk->mtp[0].head.data != trunk->head.data);
    CHECK(differences(edited, head, trunk->mtp[0].head, 0, 0) == 0);
    const auto& view = *edited.find(embedding);
    CHECK(std::memcmp(trunk->mtp[0].embedding, view.bytes.data(), view.bytes.size()) == 0);
    CHECK(trunk->mtp[1].embedding == trunk->embedding);
    CHECK(trunk->mtp[1].head.data == trunk->head.data);
  }
}

TEST_CASE("a share that the model cannot be cut into is refused") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::fp8};
  const auto refused = [&](const Arithmetic& arithmetic, const TrunkShare& share) {
    const auto trunk = load_trunk(*checkpoint, arithmetic, share, 1, {});
    REQUIRE_FALSE(trunk);
    return text_of(trunk.error());
  };
  TrunkShare share;
  share.tp = 16;
  CHECK(refused({}, share) ==
        "tensor parallelism 16: with 8 attention heads it must be a power of two up to 8");
  share.tp = 3;
  CHECK(refused({}, share).find("power of two up to 8") != std::string::npos);
  share.tp = 2;
  share.tp_rank = 2;
  CHECK(refused({}, share) == "no tensor-parallel rank 2 of 2");
  share.tp_rank = 0;
  Arithmetic w8a8;
  w8a8.fp8_weights = w8a8.fp8_activations = true;
  CHECK(refused(w8a8, share) == "tensor parallelism 2 cuts o_proj every 64 columns, inside a 1×128 "
                                "tile of FP8 activations");
  w8a8.activations = DType::f32;
  CHECK(refused(w8a8, {}) == "FP8 activations need FP8 weights and the bf16 arithmetic");
  TrunkShare mtp;
  mtp.num_mtp_layers = 3;
  CHECK(refused({}, mtp) == "the checkpoint holds 2 MTP modules, 3 asked for");
}

TEST_CASE("a tensor that is missing, misshapen or gone with its file is named") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::fp8};
  Arithmetic arithmetic;
  arithmetic.fp8_weights = true;
  EditedCheckpoint edited{checkpoint.get()};
  const auto error = [&] {
    const auto trunk = load_trunk(edited, arithmetic, {}, 2, {});
    REQUIRE_FALSE(trunk);
    return text_of(trunk.error());
  };
  SUBCASE("missing") {
    edited.hide("model.layers.1.self_attn.kv_b_proj.weight_scale_inv");
    CHECK(error() == "the checkpoint has no tensor "
                     "model.layers.1.self_attn.kv_b_proj.weight_scale_inv");
  }
  SUBCASE("misshapen") {
    edited.edit("model.norm.weight").view.shape = {63};
    CHECK(error() == "tensor model.norm.weight has shape [63], expected [64]");
  }
  SUBCASE("of a dtype nobody computes in") {
    edited.edit("lm_head.weight").view.dtype = DType::i32;
    CHECK(error() == "tensor lm_head.weight has dtype I32, expected F32, BF16, F16 or F8_E4M3");
  }
  SUBCASE("in a file of scales that was cut off after it was opened") {
    InitOptions options;
    options.format = WeightFormat::fp8;
    options.max_shard_bytes = 1; // a file for each tensor
    const TempFolder folder;
    REQUIRE(!init_checkpoint(checkpoint->config(), folder.path() / "model", options));
    const auto sharded = open_checkpoint(folder.path() / "model");
    const auto refused = [&](const std::string& name, auto load) {
      const auto& scales = *sharded->find(name);
      const auto& file = sharded->files()[static_cast<size_t>(scales.file)];
      const auto whole = folder.path() / "whole";
      constexpr auto kOver = std::filesystem::copy_options::overwrite_existing;
      std::filesystem::copy_file(file, whole, kOver);
      std::filesystem::resize_file(file, 0);
      const auto result = load();
      std::filesystem::copy_file(whole, file, kOver); // into the same, mapped file
      REQUIRE_FALSE(result);
      CHECK(text_of(result.error()).find(file.string() + ": can't read tensor " + name) == 0);
    };
    for (const char* part : {"self_attn.o_proj", "self_attn.kv_b_proj"})
      refused(fmt::format("model.layers.1.{}.weight_scale_inv", part),
              [&] { return load_trunk(*sharded, arithmetic, {}, 2, {}); });
    refused("model.layers.1.mlp.experts.4.up_proj.weight_scale_inv",
            [&] { return ExpertBlock::load(*sharded, arithmetic, 1, ExpertId{4}); });
  }
  SUBCASE("cut off after the file was opened") {
    const auto& file = checkpoint->files().front();
    std::filesystem::resize_file(file, std::filesystem::file_size(file) / 4);
    const auto text = error();
    CHECK(text.find(file.string()) == 0);
    CHECK(text.find("the file ends early") != std::string::npos);
  }
}

TEST_CASE("progress counts every byte once and ends at the total") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::bf16};
  int64_t last = 0, total = 0;
  TrunkShare share;
  share.num_mtp_layers = 2;
  (void)must(load_trunk(*checkpoint, Arithmetic{}, share, 2, [&](int64_t done, int64_t of) {
    CHECK(done > last);
    last = done;
    total = of;
  }));
  CHECK(last == total);
}

TEST_CASE("experts come back in the order asked for, the shared ones as the last of a layer") {
  for (const auto format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::fp8}) {
    const RandomCheckpoint checkpoint{ragged_config(), format};
    const auto& c = checkpoint->config();
    const ExpertId shared{static_cast<int32_t>(c.n_routed_experts)};
    const std::vector<ExpertKey> keys = {{2, ExpertId{3}}, {1, shared}, {1, ExpertId{15}}};
    const auto blocks = must(load_experts(*checkpoint, arithmetic_of(format), keys, 2, {}));
    REQUIRE(blocks.size() == 3);
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto& block = blocks[i];
      CHECK(block.layer() == keys[i].layer);
      CHECK(block.expert() == keys[i].expert);
      CHECK(block.weights_version() == checkpoint->digest());
      const auto prefix =
          keys[i].expert == shared
              ? fmt::format("model.layers.{}.mlp.shared_experts.", keys[i].layer)
              : fmt::format("model.layers.{}.mlp.experts.{}.", keys[i].layer, keys[i].expert.value);
      CHECK(differences(*checkpoint, prefix + "gate_proj.weight", block.weights().gate, 0, 0) == 0);
      CHECK(differences(*checkpoint, prefix + "up_proj.weight", block.weights().up, 0, 0) == 0);
      CHECK(differences(*checkpoint, prefix + "down_proj.weight", block.weights().down, 0, 0) == 0);
    }
  }
}

TEST_CASE("experts that do not exist are refused") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::bf16};
  const auto error = [&](int64_t layer, int32_t expert) {
    const auto block = ExpertBlock::load(*checkpoint, Arithmetic{}, layer, ExpertId{expert});
    return block ? std::string{} : text_of(block.error());
  };
  CHECK(error(0, 0) == "layer 0 has no experts");
  CHECK(error(5, 0) == "layer 5 has no experts");
  CHECK(error(-1, 0) == "layer -1 has no experts");
  CHECK(error(1, 17) == "layer 1 has 16 routed experts, no expert 17");
  CHECK(error(1, -1) == "layer 1 has 16 routed experts, no expert -1");
  CHECK(error(4, 16).empty());
}

TEST_CASE("an expert block survives the wire, and only whole") {
  for (const auto format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::fp8}) {
    const RandomCheckpoint checkpoint{"tiny-v3", format};
    const auto& config = checkpoint->config();
    const auto arithmetic = arithmetic_of(format);
    const auto block = must(ExpertBlock::load(*checkpoint, arithmetic, 1, ExpertId{5}));
    const auto adopt = [&](std::span<const std::byte> bytes) {
      return ExpertBlock::adopt(config, arithmetic, bytes);
    };
    std::vector<std::byte> bytes{block.bytes().begin(), block.bytes().end()};

    const auto twin = must(adopt(bytes));
    CHECK(twin.layer() == 1);
    CHECK(twin.expert() == ExpertId{5});
    CHECK(twin.weights_version() == block.weights_version());
    CHECK(std::memcmp(twin.bytes().data(), bytes.data(), bytes.size()) == 0);
    CHECK(twin.weights().down.data != block.weights().down.data);
    CHECK(differences(*checkpoint, "model.layers.1.mlp.experts.5.down_proj.weight",
                      twin.weights().down, 0, 0) == 0);

    // Any flipped bit, anywhere.
    const size_t stride = std::max<size_t>(1, bytes.size() / 997);
    for (size_t i = 0; i < bytes.size(); i += i < 256 ? 1 : stride) {
      CAPTURE(i);
      bytes[i] ^= std::byte{0x10};
      REQUIRE_FALSE(adopt(bytes));
      bytes[i] ^= std::byte{0x10};
    }
    for (const size_t size : {size_t{0}, size_t{1}, size_t{255}, size_t{256}, bytes.size() - 1})
      CHECK_FALSE(adopt(std::span{bytes}.first(size)));
    auto longer = bytes;
    longer.resize(bytes.size() + 64);
    CHECK_FALSE(adopt(longer));
  }
}

TEST_CASE("a block whose header lies is refused even when its checksums agree") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::bf16};
  const auto block = must(ExpertBlock::load(*checkpoint, Arithmetic{}, 1, ExpertId{5}));
  constexpr size_t kHeader = 256, kLayerAt = 16, kExpertAt = 12, kVersionAt = 24,
                   kPayloadSumAt = 40;
  const auto adopt_edited = [&](size_t at, uint32_t value) {
    std::vector<std::byte> bytes{block.bytes().begin(), block.bytes().end()};
    std::memcpy(bytes.data() + at, &value, 4);
    const uint64_t sum = XXH3_64bits(bytes.data(), kHeader - 8);
    std::memcpy(bytes.data() + kHeader - 8, &sum, 8);
    return ExpertBlock::adopt(checkpoint->config(), Arithmetic{}, bytes);
  };
  for (size_t at = 0; at + 8 < kHeader; at += 4)
    for (const uint32_t value : {0u, 1u, 7u, 64u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
      uint32_t now = 0;
      std::memcpy(&now, block.bytes().data() + at, 4);
      if (now == value)
        continue;
      CAPTURE(at);
      CAPTURE(value);
      const auto result = adopt_edited(at, value);
      // Another expert of the model, or another version of it, is a true header.
      const bool names_another = (at == kLayerAt && value < 5 && value > 0) ||
                                 (at == kExpertAt && value < 16) || at == kVersionAt ||
                                 at == kVersionAt + 4;
      REQUIRE(result.operator bool() == names_another);
      if (!result && at != kPayloadSumAt && at != kPayloadSumAt + 4)
        CHECK(text_of(result.error()).find("expert block") == 0);
    }
}

TEST_CASE("a block of another arithmetic is refused") {
  const RandomCheckpoint checkpoint{"tiny-v3", WeightFormat::f32};
  Arithmetic f32;
  f32.activations = DType::f32;
  const auto block = must(ExpertBlock::load(*checkpoint, f32, 1, ExpertId{0}));
  const auto refused = ExpertBlock::adopt(checkpoint->config(), Arithmetic{}, block.bytes());
  REQUIRE_FALSE(refused);
  CHECK(code_of(refused.error()) == Errc::mismatch);
}

TEST_CASE("memory that no machine has is refused by name, none is a block without data") {
  const auto block = MemoryBlock::allocate(std::numeric_limits<size_t>::max() - 5);
  REQUIRE_FALSE(block);
  CHECK(code_of(block.error()) == Errc::out_of_memory);
  const std::array<size_t, 2> two{std::numeric_limits<size_t>::max() / 3,
                                  std::numeric_limits<size_t>::max() / 3};
  CHECK(code_of(MemoryBlock::allocate_together(two).error()) == Errc::out_of_memory);
  const auto empty = must(MemoryBlock::allocate(0));
  CHECK(empty.size() == 0);
  CHECK(empty.data() == nullptr);
}

TEST_CASE("blocks side by side are apart, and given back alone") {
  const std::array<size_t, 5> bytes{3 << 20, 100, 0, 1 << 20, 4097};
  auto blocks = must(MemoryBlock::allocate_together(bytes));
  REQUIRE(blocks.size() == bytes.size());
  CHECK(blocks[2].data() == nullptr);
  for (size_t i = 0; i < bytes.size(); ++i) {
    REQUIRE(blocks[i].size() == bytes[i]);
    CHECK(reinterpret_cast<uintptr_t>(blocks[i].data()) % 4096 == 0);
    CHECK(std::all_of(blocks[i].data(), blocks[i].data() + bytes[i],
                      [](std::byte b) { return b == std::byte{0}; }));
    std::fill_n(blocks[i].data(), bytes[i], static_cast<std::byte>(i + 1));
  }
  blocks[0] = {};
  blocks[3] = {};
  for (const size_t i : {1u, 4u})
    CHECK(std::all_of(blocks[i].data(), blocks[i].data() + bytes[i],
                      [&](std::byte b) { return b == static_cast<std::byte>(i + 1); }));
}
