#include "config/parameters.hpp"
#include "config/presets.hpp"

#include <doctest/doctest.h>

#include <array>
#include <map>
#include <set>
#include <string>
#include <utility>

using namespace troupe;

TEST_CASE("parameter counts of the five families are the specification's") {
  struct Row {
    const char* name;
    int64_t total, active, without_embedding;
  };
  const std::array<Row, 5> rows{{
      {"v3", 671'026'419'200, 37'552'297'472, 36'625'618'432},
      {"v2", 235'741'434'880, 21'375'800'320, 20'851'512'320},
      {"v2-lite", 15'706'484'224, 2'661'150'208, 2'451'435'008},
      {"moonlight", 15'960'110'208, 2'914'776'192, 2'579'231'872},
      {"kimi-k2", 1'026'408'232'448, 32'861'500'928, 31'687'095'808},
  }};
  for (const auto& row : rows) {
    CAPTURE(row.name);
    const auto counts = count_parameters(*preset(row.name));
    CHECK(counts.total == row.total);
    CHECK(counts.active == row.active);
    CHECK(counts.active_without_embedding == row.without_embedding);
  }
}

TEST_CASE("V3's remaining counts are the specification's, per dtype too") {
  const auto config = *preset("v3");
  const auto counts = count_parameters(config);
  CHECK(counts.active_without_embedding_and_head == 35'698'939'392);
  CHECK(counts.mtp_unique == 11'610'068'224);
  CHECK(counts.mtp_stored == 13'463'426'304);
  CHECK(counts.scales == 41'540'496);

  std::map<DType, int64_t> elements;
  int64_t main_tensors = 0, mtp_tensors = 0, scale_tensors = 0, bytes = 0;
  for (const auto& spec : enumerate_tensors(config, 1)) {
    const auto dtype = stored_dtype(spec.role, WeightFormat::fp8);
    elements[dtype] += spec.num_elements();
    ++(spec.layer < 61 ? main_tensors : mtp_tensors);
    scale_tensors += dtype == DType::f8_e4m3;
    bytes += stored_bytes(spec, WeightFormat::fp8, *config.quantization);
  }
  CHECK(elements[DType::bf16] == 3'918'786'560);
  CHECK(elements[DType::f8_e4m3] == 680'571'043'840);
  CHECK(elements[DType::f32] + counts.scales == 41'555'600);
  CHECK(main_tensors == 45'395);
  CHECK(mtp_tensors == 788);
  CHECK(scale_tensors == 45'808);
  CHECK(bytes == 688'574'839'360);
}

TEST_CASE("every tensor of every preset has a name of its own and positive sizes") {
  for (const auto name : preset_names()) {
    const auto config = *preset(name);
    std::set<std::string> names;
    int64_t tensors = 0;
    for_each_tensor(config, config.num_nextn_predict_layers, [&](const TensorSpec& spec) {
      names.insert(spec.name);
      ++tensors;
      if (spec.num_elements() <= 0)
        FAIL(spec.name << " is empty");
    });
    CHECK(static_cast<int64_t>(names.size()) == tensors);
  }
}

TEST_CASE("a scale has one entry per block, also for a ragged last one") {
  CHECK(scale_shape({576, 7168}, {}) == std::vector<int64_t>{5, 56});
  CHECK(scale_shape({1, 129}, {}) == std::vector<int64_t>{1, 2});
  CHECK(scale_name("a.weight") == "a.weight_scale_inv");
}

TEST_CASE("tiny presets stay below two megabytes in BF16 and bench-1b has its 1.3 B parameters") {
  for (const auto name : preset_names()) {
    if (!name.starts_with("tiny"))
      continue;
    CAPTURE(name);
    const auto counts = count_parameters(*preset(name));
    CHECK(2 * (counts.total + counts.mtp_stored) < 2'000'000);
  }
  const auto bench = count_parameters(*preset("bench-1b"));
  CHECK(bench.total > 1'250'000'000);
  CHECK(bench.total < 1'350'000'000);
}
