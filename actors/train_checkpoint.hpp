// Checkpoints of a training run.
//
//   OUT/step-00001000/   what `transformers` and Troupe open (config.json, weights, tokenizer), and
//                        training/ to resume from (train_shard.hpp), with state.json
//   OUT/latest           a link to the newest
//   OUT/config.json …    links into latest, so that OUT itself opens as a model
//
// A checkpoint is written under a temporary name, synchronized, and renamed: what has its name is
// whole, and a crash or a full disk leaves the one before valid.
#pragma once

#include "actors/train_messages.hpp"
#include "actors/train_setup.hpp"

#include <boost/json.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

struct TrainState {
  int64_t step = 0;         // optimizer steps made
  int64_t tokens = 0;       // trained on
  uint64_t data_digest = 0; // TrainData::digest
  boost::json::object settings;
};

// "OUT/.tmp-step-00001000": where ranks write their files.
[[nodiscard]] std::filesystem::path temporary_checkpoint(const std::filesystem::path& out,
                                                         int64_t step);
// Completes a temporary checkpoint and gives it its name; returns its folder. Older ones beyond
// `keep` (0: none) go. Errors name the file; the temporary folder then stays, and the checkpoints
// before are untouched.
[[nodiscard]] caf::expected<std::filesystem::path>
commit_checkpoint(const std::filesystem::path& out, const TrainSetup& setup,
                  const TrainState& state, const std::vector<ShardSaved>& shards, int32_t keep);

// Whether a name is that of a checkpoint that never became one.
[[nodiscard]] bool is_temporary_checkpoint(const std::filesystem::path& folder);
// Removes what runs left that ended while they saved. Before a run begins.
[[nodiscard]] caf::error remove_temporary_checkpoints(const std::filesystem::path& out);

// The newest checkpoint in `out` whose files are as state.json says. Errc::not_found: there is
// none.
struct FoundCheckpoint {
  std::filesystem::path folder;
  TrainState state;
  std::vector<std::string> skipped; // why newer ones are not taken
};
[[nodiscard]] caf::expected<FoundCheckpoint> newest_checkpoint(const std::filesystem::path& out);
// Reads and checks one.
[[nodiscard]] caf::expected<TrainState> read_train_state(const std::filesystem::path& folder);

// Lines that differ between the settings of a checkpoint and of the run that resumes it.
[[nodiscard]] std::vector<std::string> changed_settings(const boost::json::object& then,
                                                        const boost::json::object& now);

} // namespace troupe
