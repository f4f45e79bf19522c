// Small random models, and requests that fit them, for tests of running actors.
#pragma once

#include "actors/rank.hpp"
#include "config/checkpoint_init.hpp"
#include "config/presets.hpp"
#include "config/random.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

namespace troupe::test {

// A checkpoint of random weights that is gone at the end.
class TemporaryModel {
public:
  explicit TemporaryModel(const ModelConfig& config, WeightFormat format = WeightFormat::f32) {
    auto pattern = (std::filesystem::temp_directory_path() / "troupe-test-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    folder_ = pattern;
    InitOptions options;
    options.format = format;
    options.seed = 7;
    if (const auto error = init_checkpoint(config, model(), options))
      FAIL(text_of(error));
  }
  TemporaryModel(const TemporaryModel&) = delete;
  TemporaryModel& operator=(const TemporaryModel&) = delete;
  ~TemporaryModel() {
    std::error_code ignored; // a folder that stays behind fails no test
    std::filesystem::remove_all(folder_, ignored);
  }
  // The tokenizer of config/models/tiny: 2,048 ids.
  void add_tokenizer() const {
    const std::filesystem::path from{TROUPE_SOURCE_DIR "/config/models/tiny"};
    for (const auto* name : {"tokenizer.json", "tokenizer_config.json"})
      std::filesystem::copy(from / name, model());
  }
  [[nodiscard]] std::string path() const { return model().string(); }

private:
  [[nodiscard]] std::filesystem::path model() const { return folder_ / "model"; }
  std::filesystem::path folder_;
};

inline std::vector<int32_t> random_prompt(size_t n, uint64_t seed, int64_t vocab) {
  KeyedStream random{seed};
  std::vector<int32_t> ids;
  for (size_t i = 0; i < n; ++i)
    ids.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
  return ids;
}

inline ClusterOptions one_rank(const std::string& model, DType compute) {
  ClusterOptions o;
  o.model = model;
  o.compute = compute;
  o.num_threads = 1;
  o.limits.kv_tokens = 4096;
  o.limits.max_speculate = 2;
  o.cluster_token = "test";
  return o;
}

inline void set_shape(ClusterOptions& o, int32_t ranks, bool joint, int32_t attention, int32_t tp) {
  o.shape.num_ranks = ranks;
  o.shape.joint = joint;
  o.shape.attention_ranks = attention;
  o.shape.tp = tp;
}

// Everything that may bend a distribution before it is sampled from.
inline SamplingParams warm_sampling() {
  SamplingParams s;
  s.temperature = 1;
  s.top_p = 0.9f;
  s.repetition_penalty = 1.1f;
  s.presence_penalty = 0.2f;
  s.frequency_penalty = 0.1f;
  s.seed = 11;
  return s;
}

inline bool long_tier() { return std::getenv("TROUPE_LONG") != nullptr; }

} // namespace troupe::test
