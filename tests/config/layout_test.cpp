#include "config/inspect.hpp"
#include "config/layout.hpp"
#include "config/presets.hpp"

#include <doctest/doctest.h>

#include <array>
#include <string>

using namespace troupe;

namespace {

ClusterLayout layout(std::string_view text, int32_t ranks = 0, int32_t tp = 0, int32_t nodes = 1) {
  auto result = parse_layout(text, ranks, tp, nodes);
  REQUIRE_MESSAGE(result, text_of(result ? caf::error{} : result.error()));
  return *result;
}

std::string complaint(std::string_view text, int32_t ranks = 0, int32_t tp = 0, int32_t nodes = 1) {
  const auto result = parse_layout(text, ranks, tp, nodes);
  return result ? std::string{} : text_of(result.error());
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// Slots of all ranks together.
SlotShare all_slots(const ModelConfig& config, const ClusterLayout& l) {
  SlotShare sum;
  for (int32_t r = 0; r < l.num_ranks; ++r) {
    const auto slots = slots_of(config, l, RankId{r});
    sum.routed += slots.routed;
    sum.shared += slots.shared;
  }
  return sum;
}

} // namespace

TEST_CASE("layouts name their ranks and roles") {
  const auto joint = layout("joint", 4, 2, 2);
  for (int32_t r = 0; r < 4; ++r) {
    const auto role = role_of(joint, RankId{r});
    CHECK(role.attention_group == r / 2);
    CHECK(role.tp_rank == r % 2);
    CHECK(role.expert_index == r);
    CHECK(role.node == NodeId{r / 2});
  }
  const auto apart = layout("2+4", 0, 2, 3);
  CHECK(apart.num_ranks == 6);
  CHECK(role_of(apart, RankId{1}).attention_group == 0);
  CHECK(role_of(apart, RankId{1}).tp_rank == 1);
  CHECK(role_of(apart, RankId{1}).expert_index == -1);
  CHECK(role_of(apart, RankId{2}).attention_group == -1);
  CHECK(role_of(apart, RankId{5}).expert_index == 3);
  CHECK(layout("joint").num_ranks == 1);
}

TEST_CASE("impossible layouts say what contradicts what") {
  for (const char* text : {"", "ep", "ep33", "2+", "+4", "2+4+1", "0+4", "-1+4", "2 + 4", "joint4",
                           "2+99999999999", "5000+1"}) {
    CAPTURE(text);
    CHECK(contains(complaint(text), "expected joint, A+E"));
  }
  CHECK(contains(complaint("4096+4096"), "more than 4096 ranks"));
  CHECK(contains(complaint("2+4", 4), "has 6 ranks, but ranks is 4"));
  CHECK(contains(complaint("ep32", 8), "has 32 ranks, but ranks is 8"));
  CHECK(contains(complaint("joint", -1), "ranks: expected"));
  CHECK(contains(complaint("joint", 4, 3), "tp: 3 does not divide the 4 attention ranks"));
  CHECK(contains(complaint("2+4", 0, 4), "tp: 4 does not divide the 2 attention ranks"));
  CHECK(contains(complaint("joint", 4, -2), "tp: -2"));
  CHECK(contains(complaint("joint", 4, 1, 3), "nodes: 3 does not divide the 4 ranks"));
  CHECK(contains(complaint("joint", 4, 1, -1), "nodes: -1"));
}

TEST_CASE("a model that does not fit a layout is refused") {
  const auto tiny = *preset("tiny-kimi"); // 12 experts, 8 heads
  CHECK(!check_layout(tiny, layout("joint", 12)));
  CHECK(contains(text_of(check_layout(tiny, layout("joint", 13))),
                 "13 ranks are too many for 12 experts"));
  CHECK(!check_layout(tiny, layout("joint", 8, 8)));
  CHECK(contains(text_of(check_layout(tiny, layout("16+4", 0, 16))), "8 heads"));
  CHECK(contains(text_of(check_layout(tiny, layout("3+4", 0, 3))), "8 heads"));
  CHECK(contains(text_of(check_layout(*preset("v2"), layout("ep320"))), "in 224 slots"));
}

TEST_CASE("every slot of the published layouts is dealt out once") {
  const auto v3 = *preset("v3");
  for (const char* name : {"ep32", "ep144", "ep320"}) {
    const auto l = layout(name);
    REQUIRE(!check_layout(v3, l));
    CHECK(all_slots(v3, l).routed == 288);
    CHECK(all_slots(v3, l).shared == l.shared_slots);
  }
  CHECK(slots_of(v3, layout("ep32"), RankId{31}).routed == 9);
  CHECK(slots_of(v3, layout("ep144"), RankId{143}).routed == 2);
  CHECK(slots_of(v3, layout("ep320"), RankId{0}).routed == 1);
  CHECK(slots_of(v3, layout("ep320"), RankId{287}).routed == 1);
  CHECK(slots_of(v3, layout("ep320"), RankId{288}).shared == 1);
  const auto uneven = layout("2+5");
  CHECK(all_slots(*preset("tiny-kimi"), uneven).routed == 12);
}

TEST_CASE("bytes per rank of V3 follow from its parts") {
  const auto v3 = *preset("v3");
  constexpr int64_t kExpert = 44'040'192, kLayers = 58;
  const auto bytes = bytes_of(v3, layout("ep144"), RankId{7}, WeightFormat::bf16, 0);
  CHECK(bytes.routed_experts == 2 * (2 * kExpert * kLayers));
  CHECK(bytes.shared_experts == 2 * (kExpert * kLayers));
  CHECK(bytes.embedding == 2 * 926'679'040);
  CHECK(bytes.head == bytes.embedding);
  CHECK(bytes.dense_ffn == 2 * (3 * 396'361'728ll));
  CHECK(bytes.attention == 2 * (61 * (187'107'328ll + 14'336) + 7'168));
  CHECK(bytes.router == kLayers * (2 * 256 * 7168 + 4 * 256));
  CHECK(bytes.mtp == 0);

  // In FP8 an expert is a byte per weight and four per block; 2048 and 7168 are 16 and 56 blocks.
  const auto fp8 = bytes_of(v3, layout("ep32"), RankId{0}, WeightFormat::fp8, 1);
  CHECK(fp8.routed_experts == 9 * 59 * (kExpert + 4 * 3 * 16 * 56));
  CHECK(fp8.mtp == 2 * (102'760'448 + 3 * 7168));
}

TEST_CASE("one joint rank holds the whole model, and ranks apart hold it between them") {
  for (const auto name : preset_names()) {
    const auto config = *preset(name);
    const auto counts = count_parameters(config);
    int64_t stored = 0;
    for (const auto& spec : enumerate_tensors(config, config.num_nextn_predict_layers))
      stored += spec.mtp_copy ? 0 : stored_bytes(spec, WeightFormat::fp8, {});
    const auto one = bytes_of(config, layout("joint", 1), RankId{0}, WeightFormat::fp8,
                              config.num_nextn_predict_layers);
    CAPTURE(name);
    CHECK(one.total() == stored);
    CHECK(bytes_of(config, layout("joint", 1), RankId{0}, WeightFormat::f32, 0).total() ==
          4 * counts.total);
    int64_t apart = 0;
    for (int32_t r = 0; r < 5; ++r)
      apart += bytes_of(config, layout("1+4"), RankId{r}, WeightFormat::fp8,
                        config.num_nextn_predict_layers)
                   .total();
    CHECK(apart == stored);
  }
}

TEST_CASE("tensor parallelism cuts heads and FFNs but not latents, and leaves the head to one") {
  const auto v3 = *preset("v3");
  const auto whole = bytes_of(v3, layout("joint", 4, 1), RankId{1}, WeightFormat::bf16, 0);
  const auto cut = bytes_of(v3, layout("joint", 4, 4), RankId{1}, WeightFormat::bf16, 0);
  CHECK(whole.dense_ffn == 4 * cut.dense_ffn);
  CHECK(whole.shared_experts == 4 * cut.shared_experts);
  CHECK(whole.routed_experts == cut.routed_experts);
  constexpr int64_t kCut = 37'748'736 + 16'777'216 + 117'440'512; // q_b, kv_b, o
  CHECK(whole.attention - cut.attention == 2 * (61 * (kCut - kCut / 4)));
  CHECK(cut.head == 0);
  CHECK(bytes_of(v3, layout("joint", 4, 4), RankId{0}, WeightFormat::bf16, 0).head > 0);
  // 32 columns are one segment: each of the ranks holds all of it.
  const auto tiny = *preset("tiny-v3");
  CHECK(bytes_of(tiny, layout("joint", 2, 2), RankId{0}, WeightFormat::bf16, 0).shared_experts ==
        bytes_of(tiny, layout("joint", 2, 1), RankId{0}, WeightFormat::bf16, 0).shared_experts);
}

TEST_CASE("an inspection of V3 has the published numbers") {
  const auto v3 = *preset("v3");
  const auto result = inspect_model(v3, layout("ep320"), format_of(v3));
  REQUIRE(result);
  CHECK(result->parameters.total == 671'026'419'200);
  CHECK(result->kv_bytes_per_token == 70'272);
  CHECK(result->kv_bytes_per_token_with_mtp == 71'424);
  CHECK(result->format == WeightFormat::fp8);
  CHECK(result->bytes_fp8 == 688'574'839'360);
  CHECK(result->parts.attention == 187'107'328);
  CHECK(result->parts.dense_ffn == 396'361'728);
  CHECK(result->parts.routed_expert == 44'040'192);
  CHECK(result->parts.router == 1'835'264);
  CHECK(result->parts.num_dense_layers == 3);
  CHECK(result->parts.num_moe_layers == 58);
  size_t ranks = 0;
  for (const auto& group : result->ranks)
    ranks += group.ranks.size();
  CHECK(ranks == 320);
  CHECK(result->ranks.size() == 4); // leaders and others, with a routed or a shared slot
  int64_t tensors = 0;
  bool experts = false;
  for (const auto& row : result->shapes) {
    tensors += row.count;
    experts |= row.name == "model.layers.{3-60}.mlp.experts.{0-255}.up_proj.weight";
  }
  CHECK(tensors == 45'395 + 788);
  CHECK(experts);
  CHECK(!inspect_model(*preset("v2"), layout("ep320"), WeightFormat::bf16));
}
