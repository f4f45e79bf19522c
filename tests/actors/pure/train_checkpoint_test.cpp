#include "actors/train_checkpoint.hpp"
#include "config/json.hpp"
#include "config/presets.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <string>
#include <vector>

using namespace troupe;

namespace {

namespace fs = std::filesystem;

TrainSetup small_setup() {
  TrainSetup setup;
  setup.model = *preset("tiny-v3");
  setup.config.compute = ComputePrecision::bf16;
  return setup;
}

// What two ranks would have written.
std::vector<ShardSaved> write_shards(const fs::path& folder, int64_t step) {
  fs::create_directories(folder / "training");
  std::vector<ShardSaved> shards;
  for (int32_t r = 0; r < 2; ++r) {
    ShardSaved shard;
    shard.step = step;
    shard.rank = RankId{r};
    shard.tensors = {"tensor." + std::to_string(r)};
    shard.bytes = 100 + r;
    write_file(folder / ("model-0000" + std::to_string(r + 1) + "-of-00002.safetensors"),
               "weights of step " + std::to_string(step));
    write_file(folder / "training" / ("rank-000" + std::to_string(r) + ".safetensors"),
               "moments of step " + std::to_string(step));
    shards.push_back(shard);
  }
  return shards;
}

caf::expected<fs::path> save(const fs::path& out, int64_t step, int32_t keep,
                             const TrainSetup& setup = small_setup()) {
  const auto shards = write_shards(temporary_checkpoint(out, step), step);
  const TrainState state{step, step * 1000, 0x123456789abcdef0, {{"lr", 0.5}, {"seed", 7}}};
  return commit_checkpoint(out, setup, state, shards, keep);
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator{folder})
    names.push_back(entry.path().filename().string());
  std::ranges::sort(names);
  return names;
}

} // namespace

TEST_CASE("a checkpoint holds a model, and what the run needs to go on") {
  const ScratchFolder out;
  const ScratchFolder model;
  write_file(model / "tokenizer.json", "{}");
  auto setup = small_setup();
  setup.tokenizer = model.path();
  const auto folder = save(out.path(), 10, 2, setup);
  REQUIRE(folder);
  CHECK(*folder == out / "step-00000010");
  CHECK(names_in(*folder) ==
        std::vector<std::string>{"config.json", "model-00001-of-00002.safetensors",
                                 "model-00002-of-00002.safetensors", "model.safetensors.index.json",
                                 "tokenizer.json", "training"});
  auto config = load_model_config(*folder);
  REQUIRE(config);
  CHECK(config->torch_dtype == "bfloat16");
  CHECK(config->num_nextn_predict_layers == 2);
  const auto text = read_file(*folder / "model.safetensors.index.json");
  const auto index = parse_json_object(text, "index");
  REQUIRE(index);
  CHECK(index->at("metadata").at("total_size").as_int64() == 201);
  CHECK(index->at("weight_map").at("tensor.1").as_string() == "model-00002-of-00002.safetensors");

  const auto state = read_train_state(*folder);
  REQUIRE(state);
  CHECK(state->step == 10);
  CHECK(state->tokens == 10'000);
  CHECK(state->data_digest == 0x123456789abcdef0);
  CHECK(changed_settings(state->settings, {{"lr", 0.5}, {"seed", 7}}).empty());
  CHECK(changed_settings(state->settings, {{"lr", 0.25}, {"seed", 7}, {"eps", 1}}) ==
        std::vector<std::string>{"lr: 0.25 now, 0.5 before", "eps: 1 now, nothing before"});
}

TEST_CASE("the newest checkpoints stay, and the run's folder leads to the newest of all") {
  const ScratchFolder out;
  write_file(out / "log.jsonl", "{}");
  fs::create_symlink("log.jsonl", out / "mine"); // a link of the user's
  for (const int64_t step : {2, 4, 6})
    REQUIRE(save(out.path(), step, 2));
  CHECK(names_in(out.path()) == std::vector<std::string>{"config.json", "latest", "log.jsonl",
                                                         "mine", "model-00001-of-00002.safetensors",
                                                         "model-00002-of-00002.safetensors",
                                                         "model.safetensors.index.json",
                                                         "step-00000004", "step-00000006"});
  CHECK(fs::read_symlink(out / "latest") == "step-00000006");
  CHECK(read_file(out / "model-00001-of-00002.safetensors") == "weights of step 6");
  const auto found = newest_checkpoint(out.path());
  REQUIRE(found);
  CHECK(found->state.step == 6);
  REQUIRE(save(out.path(), 8, 0));
  CHECK(fs::exists(out / "step-00000004"));
}

TEST_CASE("a damaged checkpoint is passed over, named, and does not cost a whole one") {
  const ScratchFolder out;
  CHECK(code_of(newest_checkpoint(out.path()).error()) == Errc::not_found);
  for (const int64_t step : {2, 4})
    REQUIRE(save(out.path(), step, 0));
  const auto damage = [&](const std::string& file, const auto& how) {
    const auto whole = read_file(out / file);
    how(out / file, whole);
    const auto found = newest_checkpoint(out.path());
    REQUIRE(found);
    CHECK(found->state.step == 2);
    REQUIRE(found->skipped.size() == 1);
    CHECK(found->skipped[0].find(file) != std::string::npos);
    write_file(out / file, whole);
  };
  const auto flip = [](const fs::path& path, std::string bytes) {
    bytes[bytes.size() / 2] ^= 1;
    write_file(path, bytes);
  };
  const auto cut = [](const fs::path& path, const std::string& bytes) {
    write_file(path, bytes.substr(0, bytes.size() / 2));
  };
  const auto remove = [](const fs::path& path, const std::string&) { fs::remove(path); };
  for (const std::string file : {"step-00000004/model-00002-of-00002.safetensors",
                                 "step-00000004/training/rank-0001.safetensors"}) {
    damage(file, flip);
    damage(file, cut);
    damage(file, remove);
  }
  damage("step-00000004/training/state.json", cut);
  damage("step-00000004/training/state.json", remove);

  // The run goes on from step 2; what it saves next is kept, whatever comes after it by name.
  fs::remove(out / "step-00000004/config.json");
  REQUIRE(save(out.path(), 3, 1));
  const auto found = newest_checkpoint(out.path());
  REQUIRE(found);
  CHECK(found->state.step == 3);
  CHECK_FALSE(fs::exists(out / "step-00000002"));
  REQUIRE(save(out.path(), 4, 1)); // in the place of the damaged one
  CHECK(newest_checkpoint(out.path())->state.step == 4);
}

TEST_CASE("a rank's file that is not there makes no checkpoint") {
  const ScratchFolder out;
  REQUIRE(save(out.path(), 1, 1));
  const TrainState state{2, 0, 0, {}};
  const auto temporary = temporary_checkpoint(out.path(), 2);
  for (const std::string file :
       {"model-00002-of-00002.safetensors", "training/rank-0001.safetensors"}) {
    CAPTURE(file);
    const auto shards = write_shards(temporary, 2);
    fs::remove(temporary / file); // as if rank 1 had written to a disk of its own
    const auto folder = commit_checkpoint(out.path(), small_setup(), state, shards, 1);
    REQUIRE_FALSE(folder);
    CHECK(text_of(folder.error()).find(file) != std::string::npos);
    CHECK(text_of(folder.error()).find("rank 1") != std::string::npos);
    CHECK(newest_checkpoint(out.path())->state.step == 1);
  }
  auto shards = write_shards(temporary, 2);
  fs::remove(temporary / "model-00002-of-00002.safetensors");
  fs::remove(temporary / "training/rank-0001.safetensors");
  shards[1].tensors.clear(); // owns nothing, and writes nothing
  CHECK(commit_checkpoint(out.path(), small_setup(), state, shards, 1));
}

TEST_CASE("a state that is none is an error that names file and field") {
  const ScratchFolder out;
  const auto folder = *save(out.path(), 1, 0);
  const auto path = folder / "training/state.json";
  const auto refused = [&](const std::string& text, const std::string& why) {
    write_file(path, text);
    const auto state = read_train_state(folder);
    REQUIRE_FALSE(state);
    CAPTURE(text_of(state.error()));
    CHECK(text_of(state.error()).find("state.json") != std::string::npos);
    CHECK(text_of(state.error()).find(why) != std::string::npos);
  };
  refused("", "");
  refused("[]", "");
  refused(R"({"step": -1, "tokens": 0, "data_digest": "0", "settings": {}, "files": []})", "step");
  refused(R"({"step": 1, "tokens": 0, "data_digest": "0", "settings": {}})", "files");
  refused(R"({"step": 1, "tokens": 0, "data_digest": "0", "settings": {}, "files": [3]})", "files");
  refused(R"({"step": 1, "tokens": 0, "data_digest": "0", "settings": {}, "files": [{}]})", "name");
  refused(R"({"step": 1, "tokens": 0, "data_digest": "xyz", "settings": {}, "files": []})",
          "data_digest");
  // Files outside the checkpoint are none of its own.
  refused(R"({"step": 1, "tokens": 0, "data_digest": "0", "settings": {}, "files":
              [{"name": "../../x", "bytes": 1, "xxh3": "0"}]})",
          "name");
}

TEST_CASE("a disk that is full leaves the checkpoint before, and says which file") {
  const ScratchFolder out;
  REQUIRE(save(out.path(), 1, 1));
  const auto shards = write_shards(temporary_checkpoint(out.path(), 2), 2);
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{256, before.rlim_max};
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  const auto folder = commit_checkpoint(out.path(), small_setup(), {2, 0, 0, {}}, shards, 1);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  REQUIRE_FALSE(folder);
  CHECK(code_of(folder.error()) == Errc::io_error);
  CHECK(text_of(folder.error()).find("config.json") != std::string::npos);
  const auto found = newest_checkpoint(out.path());
  REQUIRE(found);
  CHECK(found->state.step == 1);
  CHECK(fs::read_symlink(out / "latest") == "step-00000001");

  CHECK(is_temporary_checkpoint(out / ".tmp-step-00000002"));
  CHECK_FALSE(is_temporary_checkpoint(out / ".tmp"));
  REQUIRE(!remove_temporary_checkpoints(out.path()));
  CHECK_FALSE(fs::exists(out / ".tmp-step-00000002"));
  CHECK(!remove_temporary_checkpoints(out / "none"));
}
