#include "kernels/train_parameters.hpp"

#include "config/presets.hpp"
#include "tests/kernels/checkpoints.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <string>

using namespace troupe;

namespace {

std::shared_ptr<const TrainLayout> whole(const ModelConfig& config) {
  return std::make_shared<TrainLayout>(config, config.num_nextn_predict_layers,
                                       [](const TensorSpec&) { return true; });
}

} // namespace

TEST_CASE("a layout holds every tensor once, aligned, without the copies of MTP") {
  const auto config = *preset("tiny-v3");
  const auto layout = whole(config);
  int64_t elements = 0, end = 0;
  std::set<std::string> names;
  for (const auto& t : layout->tensors()) {
    CHECK(t.begin % 16 == 0);
    CHECK(t.begin >= end);
    end = t.begin + t.size;
    elements += t.size;
    CHECK(names.insert(t.spec.name).second);
    CHECK(layout->find(t.spec.name) == &t);
  }
  const auto counts = count_parameters(config);
  CHECK(elements == counts.total + counts.mtp_unique);
  CHECK(layout->find("model.layers.99.x") == nullptr);
  const auto part = TrainLayout{config, 0, [](const TensorSpec& s) { return s.layer == 1; }};
  for (const auto& t : part.tensors())
    CHECK(t.spec.name.starts_with("model.layers.1."));
  CHECK(!part.tensors().empty());
}

TEST_CASE("random masters do not depend on who holds them") {
  const auto config = *preset("tiny-v3");
  const auto all = TrainArena::make(whole(config));
  const auto some = TrainArena::make(std::make_shared<TrainLayout>(
      config, config.num_nextn_predict_layers, [](const TensorSpec& s) { return s.expert == 3; }));
  REQUIRE(all);
  REQUIRE(some);
  for (const auto* arena : {&*all, &*some})
    for (const auto& t : arena->layout().tensors())
      init_master(5, 0.006f, t.spec, arena->of(t));
  for (const auto& t : some->layout().tensors()) {
    const auto values = some->of(t), same = all->of(*all->layout().find(t.spec.name));
    CHECK(std::memcmp(values.data(), same.data(), values.size_bytes()) == 0);
    double sum = 0;
    for (const float v : values)
      sum += static_cast<double>(v) * v;
    CHECK(std::sqrt(sum / static_cast<double>(t.size)) == doctest::Approx(0.006).epsilon(0.1));
  }
  const auto* norm = all->layout().find("model.norm.weight");
  REQUIRE(norm != nullptr);
  CHECK(all->of(*norm)[0] == 1.0f);
}

TEST_CASE("masters are read from F32, BF16 and FP8 checkpoints") {
  for (const char* name : {"v3_mtp", "v3_mtp2", "v3_fp8"}) {
    CAPTURE(name);
    const auto checkpoint =
        Checkpoint::open(std::string{TROUPE_SOURCE_DIR} + "/tests/reference/data/" + name);
    REQUIRE(checkpoint);
    const auto& config = (*checkpoint)->config();
    const auto masters = TrainArena::make(whole(config));
    REQUIRE(masters);
    double largest = 0;
    for (const auto& t : masters->layout().tensors()) {
      REQUIRE(!load_master(**checkpoint, t.spec, masters->of(t)));
      double sum = 0;
      for (const float v : masters->of(t)) {
        REQUIRE(std::isfinite(v));
        sum += std::abs(v);
        largest = std::max(largest, static_cast<double>(std::abs(v)));
      }
      CHECK(sum > 0);
    }
    CHECK(largest < 10);
  }
}

TEST_CASE("a block's norm is summed in F64, in order") {
  std::vector<float> g(kNormBlock, 2.0f);
  CHECK(squared_norm(g) == 4.0 * kNormBlock);
  CHECK(squared_norm(std::vector<float>{0x1p26f, 1.0f}) == 0x1p52 + 1); // not so in F32
  CHECK(squared_norm({}) == 0);
}
