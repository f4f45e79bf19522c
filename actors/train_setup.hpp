// What every rank of a training run reads before it starts: model, where weights come from, data.
#pragma once

#include "actors/optimizer_state.hpp"
#include "config/checkpoint.hpp"
#include "config/model_config.hpp"
#include "config/train_config.hpp"
#include "config/train_data.hpp"

#include <boost/json.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace troupe {

// In OUT: whoever trains into it holds a lock on this file.
inline constexpr const char* kLockFile = ".lock";

struct TrainSetup {
  TrainConfig config;
  ModelConfig model; // as it is trained: MTP modules there are, YaRN where asked for
  std::shared_ptr<const TrainData> data, held_out; // held_out may be null
  std::filesystem::path resume_from;               // a checkpoint's folder; empty: a new run
  int64_t first_step = 1;
  ValueSource source;
  std::filesystem::path tokenizer; // folder to copy it from; empty: none known
  // Ranks that work together have equal ones: of model and weights, and of all else they must agree
  // on.
  uint64_t digest = 0, settings_digest = 0;
  std::vector<std::string> warnings; // for a person: what is not as it might be expected

  // Rows of a micro-batch.
  [[nodiscard]] int64_t rows() const { return config.micro_batch * data->sequence_length(); }
};

// Errors name file or field. With config.resume, OUT's newest whole checkpoint decides where to go
// on; there must be one.
[[nodiscard]] caf::expected<std::shared_ptr<const TrainSetup>>
load_train_setup(const TrainConfig& config);

// Settings that change what comes out, for state.json. Layout and threads are not among them.
[[nodiscard]] boost::json::object settings_json(const TrainConfig& config);

// Memory of each rank's weights, gradients, optimizer and one micro-batch: the least it takes.
[[nodiscard]] std::vector<int64_t> train_memory_bytes(const TrainSetup& setup,
                                                      const TrainPlan& plan);

// What travels between two ranks at most, and what all of it together may take.
[[nodiscard]] size_t train_credit_bytes(const TrainSetup& setup);
[[nodiscard]] size_t train_pool_bytes(const TrainSetup& setup);

} // namespace troupe
