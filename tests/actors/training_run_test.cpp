// Whole training runs: every actor of training, from rows and settings to logs and checkpoints,
// against a recording of PyTorch and against themselves under other layouts, stops and schedules of
// the messages.
#include "actors/in_process_cluster.hpp"
#include "actors/simulated_cluster.hpp"
#include "actors/train_checkpoint.hpp"
#include "config/safetensors.hpp"
#include "tests/actors/small_models.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

using namespace troupe;
using namespace troupe::test;

namespace {

namespace fs = std::filesystem;

// Rows [num_rows, length + 1] as `--tokens` takes them.
void write_rows(const fs::path& path, int64_t num_rows, const std::vector<int32_t>& ids) {
  auto file = SafetensorsWriter::create(
      path, {{"tokens", DType::i32, {num_rows, static_cast<int64_t>(ids.size()) / num_rows}}});
  REQUIRE(file);
  REQUIRE(!(*file)->append(std::as_bytes(std::span{ids})));
  REQUIRE(!(*file)->finish());
}

// A folder with a small model's shape, rows to train on and rows held out.
class Workshop {
public:
  Workshop() {
    auto model = *preset("tiny-v3");
    model.num_hidden_layers = 4;
    model.first_k_dense_replace = 1;
    write_file(folder_ / "config.json", to_json(model));
    write_rows(folder_ / "rows", 16, random_prompt(16 * 13, 5, model.vocab_size));
    write_rows(folder_ / "held-out", 9, random_prompt(9 * 13, 6, model.vocab_size));
  }
  [[nodiscard]] TrainConfig config() const {
    TrainConfig c;
    c.init = (folder_ / "config.json").string();
    c.init_std = 0.05;
    c.seed = 3;
    c.tokens = folder_ / "rows";
    c.batch.first = 8;
    c.steps = 3;
    c.lr = 3e-3;
    c.compute = ComputePrecision::f32;
    c.balance_alpha = 0.01;
    c.bias_gamma.first = 0.01;
    c.grad_lanes = 4;
    c.grad_groups = 2;
    c.threads = 1;
    return c;
  }
  [[nodiscard]] fs::path path(const std::string& name) const { return folder_ / name; }

private:
  ScratchFolder folder_;
};

ClusterOptions options_of(const TrainConfig& config) {
  auto setup = load_train_setup(config);
  if (!setup)
    FAIL(text_of(setup.error()));
  ClusterOptions options;
  options.cluster_token = "test";
  options.num_threads = 1;
  options.train = *setup;
  return options;
}

struct Ran {
  std::vector<TrainRecord> records;
  TrainingDone done;
};

// On virtual time; seeds other than 0 delay, reorder and double messages.
Ran simulate(const TrainConfig& config, uint64_t seed = 0, int64_t stop_at = 0) {
  SimulatedClusterOptions simulation;
  simulation.cluster = options_of(config);
  simulation.seed = seed;
  if (seed != 0)
    simulation.links = {Nanoseconds{1'000}, Nanoseconds{400'000}, 0, 5, true};
  auto cluster = SimulatedCluster::start_training(simulation);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  (*cluster)->train(stop_at);
  if (const auto error = (*cluster)->run())
    FAIL(text_of(error));
  const auto& training = (*cluster)->training();
  REQUIRE(training.finished);
  return {training.records, training.done};
}

// In threads, on real time.
Ran run_in_process(const TrainConfig& config) {
  auto cluster = InProcessCluster::start_training(options_of(config));
  if (!cluster)
    FAIL(text_of(cluster.error()));
  Ran ran;
  auto done = (*cluster)->client().train(
      [&](const TrainRecord& record) { ran.records.push_back(record); }, {});
  if (!done)
    FAIL(text_of(done.error()));
  ran.done = *done;
  return ran;
}

// All tensors of the safetensors files in a folder, by name.
std::map<std::string, std::vector<std::byte>> tensors_in(const fs::path& folder) {
  std::map<std::string, std::vector<std::byte>> all;
  for (const auto& entry : fs::directory_iterator{folder}) {
    if (entry.path().extension() != ".safetensors")
      continue;
    auto file = SafetensorsFile::open(entry.path());
    REQUIRE(file);
    for (const auto& tensor : (*file)->header().entries) {
      const auto bytes = (*file)->bytes(tensor);
      CHECK(all.emplace(tensor.name, std::vector(bytes.begin(), bytes.end())).second);
    }
  }
  return all;
}

// Weights, masters, moments and averages.
void check_same_tensors(const fs::path& a, const fs::path& b) {
  for (const std::string part : {"", "training", "ema"}) {
    CAPTURE(part);
    REQUIRE(fs::exists(a / part) == fs::exists(b / part));
    if (!fs::exists(a / part))
      continue;
    const auto one = tensors_in(a / part), other = tensors_in(b / part);
    REQUIRE(!one.empty());
    REQUIRE(one.size() == other.size());
    for (const auto& [name, bytes] : one) {
      CAPTURE(name);
      REQUIRE(other.contains(name));
      CHECK(bytes == other.at(name));
    }
  }
}

// Everything that does not depend on time or layout.
void check_same(const TrainRecord& a, const TrainRecord& b) {
  CHECK(a.step == b.step);
  CHECK(a.evaluated_tokens == b.evaluated_tokens);
  CHECK(a.main_loss == b.main_loss);
  CHECK(a.mtp_loss == b.mtp_loss);
  CHECK(a.balance_loss == b.balance_loss);
  CHECK(a.total_loss == b.total_loss);
  CHECK(a.grad_norm == b.grad_norm);
  CHECK(a.lr == b.lr);
  CHECK(a.max_vio == b.max_vio);
  CHECK(a.load == b.load);
  CHECK(a.tokens == b.tokens);
}

void check_same(const std::vector<TrainRecord>& a, const std::vector<TrainRecord>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    CAPTURE(a[i].step);
    check_same(a[i], b[i]);
  }
}

struct Layout {
  PipelineSchedule schedule;
  int32_t pp, ep, dp;
};

void set_layout(TrainConfig& config, const Layout& layout) {
  config.schedule = layout.schedule;
  config.pp = layout.pp;
  config.ep = layout.ep;
  config.dp = layout.dp;
}

constexpr auto kDualPipe = PipelineSchedule::dualpipe;

std::vector<uint64_t> seeds(uint64_t count) {
  if (const char* one = std::getenv("TROUPE_SEED"))
    return {std::strtoull(one, nullptr, 10)};
  std::vector<uint64_t> list;
  for (uint64_t s = 1; s <= count; ++s)
    list.push_back(s);
  return list;
}

// A tensor of a recording.
template <class T>
std::vector<T> recorded(const SafetensorsFile& file, const std::string& name) {
  for (const auto& entry : file.header().entries)
    if (entry.name == name) {
      const auto bytes = file.bytes(entry);
      std::vector<T> list(bytes.size() / sizeof(T));
      std::memcpy(list.data(), bytes.data(), bytes.size());
      return list;
    }
  FAIL("no tensor " << name);
  return {};
}

} // namespace

TEST_CASE("ten AdamW steps are those of PyTorch") {
  for (const std::string name : {"v3_mtp", "v3_mtp2", "v3_plain"}) {
    CAPTURE(name);
    const fs::path model{TROUPE_SOURCE_DIR "/tests/reference/data/" + name};
    auto file = SafetensorsFile::open(model / "training.safetensors");
    REQUIRE(file);
    const ScratchFolder scratch;
    write_rows(scratch / "rows", 8, recorded<int32_t>(**file, "rows"));
    const auto s = recorded<double>(**file, "settings");
    TrainConfig config;
    config.model = model;
    config.tokens = scratch / "rows";
    config.out = scratch / "out";
    config.steps = 10;
    config.compute = ComputePrecision::f32;
    config.grad_lanes = 1;
    config.batch.first = s[0];
    config.lr = s[1];
    config.weight_decay = s[2];
    config.clip = s[3];
    config.mtp_lambda.first = s[4];
    config.balance_alpha = s[5];
    config.bias_gamma.first = s[6];
    const auto ran = simulate(config);
    REQUIRE(ran.records.size() == 10);

    const auto losses = recorded<float>(**file, "losses"); // [10, main mtp balance total]
    const auto norms = recorded<float>(**file, "grad_norm");
    const auto counts = recorded<int32_t>(**file, "counts"); // [10, layers, experts]
    size_t count = 0;
    for (size_t i = 0; i < 10; ++i) {
      const auto& r = ran.records[i];
      CAPTURE(r.step);
      double mtp = 0; // recorded as a sum over depths
      for (const double loss : r.mtp_loss)
        mtp += loss;
      CHECK(r.main_loss == doctest::Approx(losses[4 * i]).epsilon(1e-4));
      CHECK(mtp == doctest::Approx(losses[4 * i + 1]).epsilon(1e-4));
      CHECK(r.balance_loss == doctest::Approx(losses[4 * i + 2]).epsilon(1e-4));
      CHECK(r.total_loss == doctest::Approx(losses[4 * i + 3]).epsilon(1e-4));
      CHECK(r.grad_norm == doctest::Approx(norms[i]).epsilon(1e-3));
      for (const auto& layer : r.load)
        for (const int64_t tokens : layer)
          CHECK(tokens == counts.at(count++));
    }
    CHECK(count == counts.size());

    auto written = Checkpoint::open(ran.done.checkpoint);
    REQUIRE(written);
    const auto biases = recorded<float>(**file, "biases");
    const auto num_experts = static_cast<size_t>((*written)->config().n_routed_experts);
    const size_t num_layers = biases.size() / 10 / num_experts;
    const auto masters = tensors_in(fs::path{ran.done.checkpoint} / "training");
    size_t at = 9 * num_layers * num_experts, compared = 0;
    for (int64_t layer = 0; compared < num_layers; ++layer) {
      const auto found = masters.find(
          fmt::format("master/model.layers.{}.mlp.gate.e_score_correction_bias", layer));
      REQUIRE(layer < 100);
      if (found == masters.end())
        continue;
      CHECK(std::memcmp(found->second.data(), &biases[at], num_experts * sizeof(float)) == 0);
      at += num_experts;
      ++compared;
    }
  }
}

TEST_CASE("a run gives the same bits on every layout and schedule") {
  const Workshop shop;
  using enum PipelineSchedule;
  const std::vector<Layout> layouts{{dualpipe, 2, 1, 1},    {dualpipe, 2, 2, 1},
                                    {dualpipev, 2, 1, 1},   {dualpipe, 1, 2, 2},
                                    {one_f_one_b, 2, 1, 2}, {zb1p, 4, 1, 1}};
  for (const auto compute :
       {ComputePrecision::f32, ComputePrecision::bf16, ComputePrecision::fp8}) {
    CAPTURE(name_of(compute));
    auto config = shop.config();
    config.compute = compute;
    config.held_out = shop.path("held-out");
    config.eval_every = 2;
    config.ema = 0.9;
    config.out = shop.path("one");
    const auto one = simulate(config);
    REQUIRE(one.records.size() == 5); // three steps, two evaluations
    CHECK(std::ranges::count_if(one.records, &TrainRecord::evaluated) == 2);
    CHECK(one.records.front().wire_bytes == 0);
    CHECK(one.records[1].main_loss < one.records[0].main_loss + 1);
    for (size_t l = 0; l < layouts.size(); ++l) {
      if (compute != ComputePrecision::f32 && l > 1 && !long_tier())
        break;
      CAPTURE(l);
      set_layout(config, layouts[l]);
      config.recompute = l == 1;
      config.out = shop.path("other");
      const auto other = simulate(config, l + 1);
      check_same(one.records, other.records);
      CHECK(other.records.front().wire_bytes > 0);
      check_same_tensors(one.done.checkpoint, other.done.checkpoint);
      fs::remove_all(config.out);
    }
    fs::remove_all(shop.path("one"));
  }
}

TEST_CASE("held-out rows are judged as a step judges them") {
  const Workshop shop;
  auto config = shop.config();
  config.lr = 0;
  config.bias_gamma.first = 0;
  config.steps = 2; // once through the sixteen rows
  config.held_out = config.tokens;
  const auto ran = simulate(config).records;
  REQUIRE(ran.size() == 3);
  REQUIRE(ran[2].evaluated());
  const auto mean = [&](auto field) { return (field(ran[0]) + field(ran[1])) / 2; };
  CHECK(ran[2].main_loss ==
        doctest::Approx(mean([](const auto& r) { return r.main_loss; })).epsilon(1e-12));
  CHECK(ran[2].mtp_loss[1] ==
        doctest::Approx(mean([](const auto& r) { return r.mtp_loss[1]; })).epsilon(1e-12));
  CHECK(ran[2].total_loss ==
        doctest::Approx(mean([](const auto& r) { return r.total_loss; })).epsilon(1e-12));
  for (size_t l = 0; l < ran[2].load.size(); ++l)
    for (size_t e = 0; e < ran[2].load[l].size(); ++e)
      CHECK(ran[2].load[l][e] == ran[0].load[l][e] + ran[1].load[l][e]);
}

TEST_CASE("an evaluation counts every held-out row once, whatever the batch") {
  const Workshop shop;
  const auto judge = [&](int64_t batch, int32_t pp) {
    auto config = shop.config();
    config.lr = 0;
    config.bias_gamma.first = 0;
    config.steps = 1;
    config.batch.first = static_cast<double>(batch);
    config.pp = pp;
    config.held_out = shop.path("held-out"); // nine rows of twelve tokens
    const auto ran = simulate(config).records;
    REQUIRE(ran.size() == 2);
    return ran[1];
  };
  const auto one = judge(4, 1), two = judge(8, 2), three = judge(16, 1);
  CHECK(one.evaluated_tokens == 9 * 12);
  CHECK(std::accumulate(one.load[0].begin(), one.load[0].end(), int64_t{0}) == 9 * 12 * 4);
  for (const auto& other : {two, three}) {
    CHECK(other.evaluated_tokens == one.evaluated_tokens);
    CHECK(other.main_loss == one.main_loss);
    CHECK(other.mtp_loss == one.mtp_loss);
    CHECK(other.load == one.load);
    CHECK(other.max_vio == one.max_vio);
    CHECK(other.balance_loss == doctest::Approx(one.balance_loss).epsilon(1e-6));
  }
}

TEST_CASE("a run in threads gives the bits of a simulated one") {
  const Workshop shop;
  auto config = shop.config();
  config.out = shop.path("simulated");
  const auto simulated = simulate(config);
  config.out = shop.path("threads");
  set_layout(config, {kDualPipe, 2, 2, 1});
  const auto threads = run_in_process(config);
  CHECK(threads.done.error_code == 0);
  check_same(simulated.records, threads.records);
  check_same_tensors(simulated.done.checkpoint, threads.done.checkpoint);
  for (const auto& record : threads.records) {
    CHECK(record.seconds > 0);
    CHECK(record.tokens_per_s == doctest::Approx(8 * 12 / record.seconds));
    CHECK(record.bubble > 0);
    CHECK(record.bubble < 1);
  }
}

TEST_CASE("delays, reordering and duplicates change no loss") {
  const Workshop shop;
  auto config = shop.config();
  config.steps = 2;
  const auto expected = simulate(config);
  set_layout(config, {kDualPipe, 2, 2, 1});
  for (const uint64_t seed : seeds(long_tier() ? 500 : 50)) {
    CAPTURE(seed);
    check_same(expected.records, simulate(config, seed).records);
  }
}

TEST_CASE("a resumed run goes on to the bit, on another layout too") {
  const Workshop shop;
  for (const auto compute : {ComputePrecision::f32, ComputePrecision::bf16}) {
    CAPTURE(name_of(compute));
    auto config = shop.config();
    config.compute = compute;
    config.steps = 5;
    config.ema = 0.9;
    config.save_every = 2;
    config.keep = 0;
    config.out = shop.path("whole");
    const auto whole = simulate(config, 3);
    REQUIRE(whole.records.size() == 5);

    config.out = shop.path("parts");
    config.steps = 2;
    set_layout(config, {kDualPipe, 2, 1, 1});
    auto parts = simulate(config).records;
    for (const int64_t step : {2, 4}) {
      const auto state = read_train_state(shop.path(fmt::format("whole/step-{:08}", step)));
      REQUIRE(state);
      CHECK(state->tokens == step * 8 * 12); // those of its own step, not of the one by then
    }
    // One was written while later steps ran, the other at the end.
    check_same_tensors(config.out / "step-00000002", shop.path("whole/step-00000002"));
    config.resume = true;
    config.steps = 5;
    set_layout(config, {kDualPipe, 2, 2, 1});
    CHECK(options_of(config).train->warnings.empty());
    const auto rest = simulate(config, 7);
    parts.insert(parts.end(), rest.records.begin(), rest.records.end());
    check_same(whole.records, parts);
    check_same_tensors(whole.done.checkpoint, rest.done.checkpoint);

    // Nothing is left to do then.
    const auto again = simulate(config);
    CHECK(again.records.empty());
    CHECK(again.done.error_code == 0);
    CHECK(again.done.checkpoint == rest.done.checkpoint);

    // A setting that changes what comes out is said to do so.
    config.grad_lanes = 8;
    const auto warnings = options_of(config).train->warnings;
    CHECK(std::ranges::any_of(warnings, [](const std::string& line) {
      return line.find("grad_lanes: 8 now, 4 before") != std::string::npos;
    }));
    fs::remove_all(shop.path("whole"));
    fs::remove_all(shop.path("parts"));
  }
}

TEST_CASE("a run that is told to stop finishes its step and saves") {
  const Workshop shop;
  auto config = shop.config();
  config.steps = 1000;
  config.save_every = 3;
  config.keep = 0;
  config.out = shop.path("out");
  set_layout(config, {kDualPipe, 2, 1, 1});
  const auto ran = simulate(config, 1, 4);
  CHECK(ran.done.error_code == 0);
  CHECK(ran.done.step >= 4);
  CHECK(ran.done.step <= 6);
  CHECK(ran.records.back().step == ran.done.step);
  auto found = newest_checkpoint(config.out);
  REQUIRE(found);
  CHECK(found->state.step == ran.done.step);
  CHECK(found->state.tokens == ran.done.step * 8 * 12);
  CHECK(found->folder == ran.done.checkpoint);
  CHECK(fs::exists(config.out / "step-00000003"));
  CHECK(Checkpoint::open(config.out.string())); // the folder itself opens as a model
}

TEST_CASE("numbers that are not finite end the run and leave the checkpoint before") {
  const Workshop shop;
  auto config = shop.config();
  config.steps = 1000;
  config.save_every = 1;
  config.lr = 1000;
  config.clip = 0;
  config.out = shop.path("out");
  set_layout(config, {kDualPipe, 2, 1, 1});
  const auto ran = simulate(config, 1);
  CHECK(ran.done.error_code != 0);
  CHECK(ran.done.error.find(fmt::format("step {}: ", ran.done.step + 1)) != std::string::npos);
  CHECK(ran.done.error.find("layer ") != std::string::npos);
  CHECK(ran.done.error.find("rank ") != std::string::npos);
  CHECK(ran.done.error.find(config.out.string()) != std::string::npos);
  const auto found = newest_checkpoint(config.out);
  REQUIRE(found);
  CHECK(found->skipped.empty());
  CHECK(found->state.step <= ran.done.step);
}
