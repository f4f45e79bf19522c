// Pipeline stages and experts of a training step, without optimizer: losses and gradients against
// autograd's recording, and against themselves under other layouts, by bits. Real actors on virtual
// time; messages are delayed, reordered and doubled.
#include "actors/pipeline_stage.hpp"
#include "actors/rank.hpp"
#include "actors/simulated_cluster.hpp"
#include "actors/train_experts.hpp"
#include "config/safetensors.hpp"
#include "kernels/train_parameters.hpp"
#include "tests/actors/small_models.hpp"
#include "transport/loopback_fabric.hpp"

#include <caf/actor_cast.hpp>
#include <caf/event_based_actor.hpp>
#include <caf/scheduler/test_coordinator.hpp>
#include <caf/send.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace troupe;

namespace {

std::filesystem::path recording(const std::string& name) {
  return std::filesystem::path{TROUPE_SOURCE_DIR "/tests/reference/data"} / name;
}

template <class T>
std::vector<T> values_of(const SafetensorsFile& file, const std::string& name,
                         std::vector<int64_t>* shape = nullptr) {
  for (const auto& entry : file.header().entries)
    if (entry.name == name) {
      const auto bytes = file.bytes(entry);
      std::vector<T> list(bytes.size() / sizeof(T));
      std::memcpy(list.data(), bytes.data(), bytes.size());
      if (shape != nullptr)
        *shape = entry.shape;
      return list;
    }
  FAIL("no tensor " << name);
  return {};
}

// The recorded rows, used in order.
class RecordedRows final : public TrainData {
public:
  explicit RecordedRows(const SafetensorsFile& file) {
    std::vector<int64_t> shape;
    ids_ = values_of<int32_t>(file, "rows", &shape);
    rows_ = shape[0];
    length_ = shape[1] - 1;
  }
  [[nodiscard]] int64_t sequence_length() const override { return length_; }
  [[nodiscard]] int64_t num_rows() const override { return rows_; }
  [[nodiscard]] caf::expected<TrainRow> row(int64_t index) const override {
    TrainRow row;
    const auto n = static_cast<size_t>(length_ + 1);
    const auto begin = ids_.begin() + static_cast<int64_t>(n) * (index % rows_);
    row.ids.assign(begin, begin + static_cast<int64_t>(n));
    row.has_loss.assign(n, 1);
    row.first_key.assign(n, 0);
    for (size_t i = 0; i < n; ++i)
      row.positions.push_back(static_cast<int32_t>(i));
    return row;
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t) const override { return length_; }
  [[nodiscard]] uint64_t digest() const override { return 0; }

private:
  int64_t rows_ = 0, length_ = 0;
  std::vector<int32_t> ids_;
};

struct Heard {
  std::vector<StageReport> reports;
  int gradients_ready = 0;
};

caf::behavior listener(caf::event_based_actor*, Heard* heard) {
  return {[=](const StageReport& report) { heard->reports.push_back(report); },
          [=](const GradientsReady&) { ++heard->gradients_ready; }};
}

// The ranks of a training run, all in this thread.
class StageLab {
public:
  StageLab(const TrainConfig& config, const Checkpoint& checkpoint,
           std::shared_ptr<const TrainData> data, uint64_t seed = 0, RankId slow = {})
      : random_(seed, 1), events_(clock_), slow_(slow) {
    const int32_t ranks = config.num_ranks();
    SimulationOptions network;
    network.seed = seed;
    if (seed != 0)
      network.links = {Nanoseconds{1'000}, Nanoseconds{400'000}, 0, 5, true};
    hub_ = LoopbackHub::simulated(ranks, events_, network);
    for (int32_t r = 0; r < ranks; ++r)
      members_.push_back(std::make_unique<Member>());
    for (int32_t r = 0; r < ranks; ++r)
      add(RankId{r}, config, checkpoint, data);
    for (auto& a : members_)
      for (auto& b : members_)
        if (a != b)
          REQUIRE(!a->fabric->connect(b->context.self, 1, b->fabric->address()));
  }
  ~StageLab() {
    for (auto& m : members_) {
      m->postman->clear_routes();
      for (const auto& actor : m->actors)
        caf::anon_send_exit(actor, caf::exit_reason::user_shutdown);
      m->actors.clear();
      while (m->scheduler().try_run_once())
        ;
    }
  }

  void step(const BeginStep& command) {
    for (auto& m : members_)
      caf::anon_send(m->postman->route(Route::pipeline_stage), command);
    const size_t wanted = heard.reports.size() + members_.size();
    while (heard.reports.size() < wanted)
      REQUIRE(run_something());
  }
  // The whole gradient of every tensor, by name.
  [[nodiscard]] std::map<std::string, std::vector<float>> gradients() const;
  [[nodiscard]] std::vector<Span> spans(size_t rank) const { return members_[rank]->trace.spans(); }
  // The most that was ever in use of one rank's buffers. In loopback a message stays its sender's.
  [[nodiscard]] size_t high_water() const {
    size_t most = 0;
    for (const auto& m : members_)
      most = std::max(most, m->fabric->pool().stats().high_water);
    return most;
  }
  // Hands a message to a rank's experts; what that makes them end with, "" for nothing.
  [[nodiscard]] std::string give_to_experts(size_t rank, Envelope message) {
    auto why = std::make_shared<std::string>();
    const auto experts = members_[rank]->postman->route(Route::expert_shard);
    experts->attach_functor([why](const caf::error& error) { *why = text_of(error); });
    caf::anon_send(experts, std::move(message));
    while (why->empty() && run_something())
      ;
    return *why;
  }

  Heard heard;

private:
  struct Member {
    RankSystemConfig config{/*testing=*/true};
    std::unique_ptr<caf::actor_system> system;
    std::unique_ptr<Fabric> fabric;
    std::unique_ptr<ComputeStream> stream;
    std::unique_ptr<Postman> postman;
    Trace trace;
    RankContext context;
    std::shared_ptr<TrainContext> train;
    std::vector<caf::actor> actors;
    [[nodiscard]] caf::scheduler::test_coordinator& scheduler() const {
      return dynamic_cast<caf::scheduler::test_coordinator&>(system->scheduler());
    }
  };
  void add(RankId self, const TrainConfig& config, const Checkpoint& checkpoint,
           const std::shared_ptr<const TrainData>& data);
  bool run_something() {
    for (auto& m : members_)
      if (m->scheduler().try_run_once())
        return true;
    if (events_.empty())
      return false;
    events_.run_next();
    return true;
  }

  KeyedStream random_;
  VirtualClock clock_;
  EventQueue events_;
  RankId slow_; // its jobs take a hundred times as long
  std::shared_ptr<LoopbackHub> hub_;
  std::vector<std::unique_ptr<Member>> members_;
};

void StageLab::add(RankId self, const TrainConfig& config, const Checkpoint& checkpoint,
                   const std::shared_ptr<const TrainData>& data) {
  auto& m = *members_[static_cast<size_t>(self.value)];
  m.system = std::make_unique<caf::actor_system>(m.config);
  FabricOptions options;
  options.self = self;
  options.incarnation = 1;
  options.cluster_token = "test";
  options.heartbeat_period_ms = 0;
  options.pool = BufferPool::make(size_t{1} << 30);
  auto fabric = hub_->endpoint(options);
  REQUIRE(fabric);
  m.fabric = std::move(*fabric);
  m.stream = make_inline_stream(
      clock_,
      [this](Nanoseconds delay, std::function<void()> done) {
        events_.schedule(delay, std::move(done));
      },
      [this, self](const char*) {
        const auto cost = static_cast<int64_t>(random_.below(100'001));
        return Nanoseconds{self == slow_ ? 100 * cost : cost};
      });
  m.postman = std::make_unique<Postman>(*m.system, self);
  m.postman->set_fabric(m.fabric.get());
  REQUIRE(!m.fabric->start(m.postman.get()));
  m.context.self = self;
  m.context.config = checkpoint.config();
  m.context.fabric = m.fabric.get();
  m.context.stream = m.stream.get();
  m.context.clock = &clock_;
  m.context.postman = m.postman.get();
  m.context.trace = &m.trace;
  auto train = make_train_context(&m.context, config, checkpoint.config(), data, data);
  if (!train)
    FAIL(text_of(train.error()));
  m.train = std::move(*train);
  m.train->background = m.stream.get();
  const ValueSource source{[&](const TensorSpec& spec, std::span<float> to) {
                             return load_master(checkpoint, spec, to);
                           },
                           nullptr};
  std::vector<std::pair<int64_t, int64_t>> progress;
  REQUIRE(make_optimizer_state(
      *m.train, source, [&](int64_t done, int64_t total) { progress.emplace_back(done, total); }));
  REQUIRE(progress.size() > m.train->phases.size());
  CHECK(std::ranges::is_sorted(progress));
  CHECK(progress.back().first == progress.back().second);
  const auto adopt = [&](Route route, const auto& handle) {
    m.actors.push_back(caf::actor_cast<caf::actor>(handle));
    m.postman->set_route(route, m.actors.back());
  };
  const std::shared_ptr<const TrainContext> context = m.train;
  adopt(Route::pipeline_stage, m.system->spawn(pipeline_stage, context));
  adopt(Route::expert_shard, m.system->spawn(train_experts, context));
  adopt(Route::optimizer, m.system->spawn(listener, &heard));
  adopt(Route::trainer, m.system->spawn(listener, &heard));
}

// Binary tree over adjacent ones; the result is in the first.
std::vector<float> tree(std::vector<std::vector<float>> parts) {
  for (size_t half = 1; half < parts.size(); half *= 2)
    for (size_t i = 0; i + half < parts.size(); i += 2 * half)
      for (size_t e = 0; e < parts[i].size(); ++e)
        parts[i][e] += parts[i + half][e];
  return parts.front();
}

std::map<std::string, std::vector<float>> StageLab::gradients() const {
  std::map<std::string, std::vector<float>> all;
  for (const auto& tensor : members_[0]->train->tensors) {
    const auto n = static_cast<size_t>(tensor.spec.num_elements());
    std::vector<std::vector<float>> parts;
    for (const auto& part : tensor.parts) {
      const auto& phase = members_[static_cast<size_t>(part.rank.value)]
                              ->train->phases[static_cast<size_t>(part.phase)];
      const auto begin = phase.weights->layout().gradient_of(tensor.spec.name, part.use);
      REQUIRE(begin >= 0);
      std::vector<std::vector<float>> cells;
      for (int32_t i = part.first; i < part.first + part.count; ++i) {
        const float* from = tensor.spec.expert >= 0 ? phase.experts_of(part.direction, i)
                                                    : phase.dense_of({i, part.direction, 0});
        cells.emplace_back(from + begin, from + begin + n);
      }
      parts.push_back(tree(std::move(cells)));
    }
    if (parts.empty())
      continue;
    std::vector<float*> pointers;
    for (auto& part : parts)
      pointers.push_back(part.data());
    add_parts(tensor, pointers, static_cast<int64_t>(n));
    all.emplace(tensor.spec.name, std::move(parts.front()));
  }
  return all;
}

// A recorded run: its checkpoint, rows and settings.
struct Recorded {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::shared_ptr<const SafetensorsFile> file;
  std::shared_ptr<const TrainData> data;
  TrainConfig config;

  explicit Recorded(const std::string& name) {
    auto opened = Checkpoint::open(recording(name).string());
    REQUIRE(opened);
    checkpoint = *opened;
    auto tensors = SafetensorsFile::open(recording(name) / "training.safetensors");
    REQUIRE(tensors);
    file = *tensors;
    data = std::make_shared<RecordedRows>(*file);
    const auto s = values<double>("settings");
    config.batch.first = s[0];
    config.lr = s[1];
    config.weight_decay = s[2];
    config.clip = s[3];
    config.mtp_lambda.first = s[4];
    config.balance_alpha = s[5];
    config.bias_gamma.first = s[6];
    config.compute = ComputePrecision::f32;
    config.backend = "reference";
    config.grad_lanes = 1;
    config.threads = 1;
  }
  template <class T>
  [[nodiscard]] std::vector<T> values(const std::string& name) const {
    return values_of<T>(*file, name);
  }
};

} // namespace

TEST_CASE("losses and gradients of a step are those of autograd") {
  for (const std::string name : {"v3_mtp", "v3_mtp2", "v3_plain"}) {
    CAPTURE(name);
    const Recorded recorded{name};
    StageLab lab{recorded.config, *recorded.checkpoint, recorded.data};
    lab.step({1});
    const auto& report = lab.heard.reports.front();
    const double divisor =
        recorded.config.batch.first * static_cast<double>(recorded.data->sequence_length());
    double main = 0, mtp = 0, balance = 0;
    for (const auto& loss : report.losses) {
      main += loss.main / divisor;
      for (const double m : loss.mtp)
        mtp += m / divisor;
    }
    for (const auto& loss : report.balance)
      balance += loss.loss;
    const auto losses = recorded.values<float>("losses");
    CHECK(main == doctest::Approx(losses[0]).epsilon(1e-5));
    CHECK(mtp == doctest::Approx(losses[1]).epsilon(1e-5));
    CHECK(balance == doctest::Approx(losses[2]).epsilon(1e-4));
    const auto counts = recorded.values<int32_t>("counts");
    size_t at = 0;
    for (const auto& load : report.loads)
      for (const int64_t count : load.counts)
        CHECK(count == counts[at++]);

    const auto gradients = lab.gradients();
    size_t compared = 0;
    for (const auto& [tensor, mine] : gradients) {
      CAPTURE(tensor);
      const auto theirs = recorded.values<float>("grad." + tensor);
      REQUIRE(theirs.size() == mine.size());
      float largest = 0, difference = 0;
      for (size_t i = 0; i < mine.size(); ++i) {
        largest = std::max(largest, std::abs(theirs[i]));
        difference = std::max(difference, std::abs(theirs[i] - mine[i]));
      }
      CHECK(difference <= 5e-5f * largest);
      ++compared;
    }
    CHECK(compared > 20);
  }
}

namespace {

// Rows that a seed makes up.
class RandomRows final : public TrainData {
public:
  RandomRows(int64_t rows, int64_t length, int64_t vocab) : length_(length) {
    for (int64_t r = 0; r < rows; ++r)
      rows_.push_back(test::random_prompt(static_cast<size_t>(length) + 1,
                                          static_cast<uint64_t>(r) + 77, vocab));
  }
  [[nodiscard]] int64_t sequence_length() const override { return length_; }
  [[nodiscard]] int64_t num_rows() const override { return static_cast<int64_t>(rows_.size()); }
  // Two samples share a row, and a few tokens are no targets.
  [[nodiscard]] caf::expected<TrainRow> row(int64_t index) const override {
    TrainRow row;
    row.ids = rows_[static_cast<size_t>(index % num_rows())];
    const auto half = static_cast<int32_t>(length_ / 2);
    for (int32_t i = 0; i <= length_; ++i) {
      row.first_key.push_back(i < half ? 0 : half);
      row.positions.push_back(i - row.first_key.back());
      row.has_loss.push_back(i % 5 != 3);
    }
    return row;
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t) const override {
    return length_ - length_ / 5;
  }
  [[nodiscard]] uint64_t digest() const override { return 0; }

private:
  int64_t length_;
  std::vector<std::vector<int32_t>> rows_;
};

// What a step says and leaves, as bytes.
struct StepBits {
  std::map<int64_t, std::pair<double, std::vector<double>>> losses;
  std::map<std::pair<int64_t, int64_t>, double> balance;
  std::map<int64_t, std::vector<int64_t>> loads;
  std::map<std::string, std::vector<float>> gradients;
};

StepBits bits_of_step(const TrainConfig& config, const Checkpoint& checkpoint,
                      const std::shared_ptr<const TrainData>& data, uint64_t seed = 0) {
  StageLab lab{config, checkpoint, data, seed};
  lab.step({1, true, 0}); // an evaluation between leaves no trace
  lab.heard.reports.clear();
  lab.step({1});
  StepBits bits;
  for (const auto& report : lab.heard.reports) {
    for (const auto& loss : report.losses)
      CHECK(bits.losses.emplace(loss.micro_batch, std::pair{loss.main, loss.mtp}).second);
    for (const auto& loss : report.balance)
      CHECK(bits.balance.emplace(std::pair{loss.layer, loss.micro_batch}, loss.loss).second);
    for (const auto& load : report.loads) {
      auto& counts = bits.loads[load.layer];
      counts.resize(load.counts.size());
      for (size_t e = 0; e < counts.size(); ++e)
        counts[e] += load.counts[e];
    }
  }
  bits.gradients = lab.gradients();
  return bits;
}

// How many elements of all gradients differ.
size_t num_different(const StepBits& a, const StepBits& b) {
  size_t different = 0;
  for (const auto& [name, gradient] : a.gradients)
    for (size_t i = 0; i < gradient.size(); ++i)
      different += std::memcmp(&gradient[i], &b.gradients.at(name)[i], sizeof(float)) != 0;
  return different;
}

void check_equal(const StepBits& a, const StepBits& b) {
  CHECK(a.losses == b.losses);
  CHECK(a.balance == b.balance);
  CHECK(a.loads == b.loads);
  REQUIRE(a.gradients.size() == b.gradients.size());
  for (const auto& [name, gradient] : a.gradients) {
    CAPTURE(name);
    const auto& other = b.gradients.at(name);
    REQUIRE(gradient.size() == other.size());
    size_t different = 0;
    for (size_t i = 0; i < gradient.size(); ++i)
      different += std::memcmp(&gradient[i], &other[i], sizeof(float)) != 0;
    CHECK(different == 0);
  }
}

struct Layout {
  PipelineSchedule schedule;
  int32_t pp, ep, dp;
};

ModelConfig four_layers() {
  auto config = *preset("tiny-v3");
  config.num_hidden_layers = 4;
  config.first_k_dense_replace = 1;
  return config;
}

TrainConfig sixteen_micro_batches(ComputePrecision compute) {
  TrainConfig config;
  config.batch.first = 16;
  config.compute = compute;
  config.backend = "reference";
  config.grad_lanes = 4;
  config.grad_groups = 2;
  config.balance_alpha = 0.01;
  return config;
}

} // namespace

TEST_CASE("every layout, schedule and interleaving gives the same gradients, to the bit") {
  const test::TemporaryModel model{four_layers()};
  auto checkpoint = Checkpoint::open(model.path());
  REQUIRE(checkpoint);
  const auto data = std::make_shared<RandomRows>(16, 12, (*checkpoint)->config().vocab_size);
  using enum PipelineSchedule;
  const std::vector<Layout> layouts{
      {dualpipe, 2, 1, 1}, {dualpipe, 4, 1, 1},    {dualpipev, 1, 1, 1}, {dualpipev, 2, 1, 1},
      {zb1p, 2, 1, 1},     {one_f_one_b, 4, 1, 1}, {dualpipe, 1, 2, 1},  {dualpipe, 1, 1, 2},
      {dualpipe, 2, 2, 1}, {dualpipe, 2, 1, 2},    {dualpipe, 1, 2, 2},  {zb1p, 2, 2, 1}};
  for (const auto compute :
       {ComputePrecision::f32, ComputePrecision::bf16, ComputePrecision::fp8}) {
    CAPTURE(name_of(compute));
    auto config = sixteen_micro_batches(compute);
    const auto one = bits_of_step(config, **checkpoint, data);
    config.grad_lanes = 2; // another grid adds in another order
    CHECK(num_different(one, bits_of_step(config, **checkpoint, data)) > 1000);
    config.grad_lanes = 4;
    uint64_t seed = 1;
    for (const auto& layout : layouts) {
      CAPTURE(name_of(layout.schedule));
      CAPTURE(layout.pp);
      CAPTURE(layout.ep);
      CAPTURE(layout.dp);
      config.schedule = layout.schedule;
      config.pp = layout.pp;
      config.ep = layout.ep;
      config.dp = layout.dp;
      check_equal(one, bits_of_step(config, **checkpoint, data, seed++));
    }
    config = sixteen_micro_batches(compute);
    config.recompute = true;
    check_equal(one, bits_of_step(config, **checkpoint, data, seed));
  }
}

TEST_CASE("rows of an evaluation do not pile up before a slow stage") {
  const test::TemporaryModel model{four_layers()};
  auto checkpoint = Checkpoint::open(model.path());
  REQUIRE(checkpoint);
  const auto data = std::make_shared<RandomRows>(64, 12, (*checkpoint)->config().vocab_size);
  for (const auto schedule : {PipelineSchedule::one_f_one_b, PipelineSchedule::dualpipe}) {
    auto config = sixteen_micro_batches(ComputePrecision::f32);
    config.schedule = schedule;
    config.backend = "simd";
    config.pp = 4;
    std::vector<size_t> most;
    for (const double batch : {16.0, 48.0}) {
      config.batch.first = batch;
      StageLab lab{config, **checkpoint, data, 3, RankId{3}};
      lab.step({1, true, 0});
      most.push_back(lab.high_water());
    }
    CHECK(most[1] <= most[0]);
  }
}

TEST_CASE("a dispatch that is none ends a rank's experts with a reason") {
  const test::TemporaryModel model{four_layers()};
  auto checkpoint = Checkpoint::open(model.path());
  REQUIRE(checkpoint);
  const auto config = sixteen_micro_batches(ComputePrecision::f32);
  const auto data = std::make_shared<RandomRows>(16, 12, (*checkpoint)->config().vocab_size);
  const auto given = [&](auto change) {
    StageLab lab{config, **checkpoint, data};
    Envelope message;
    message.header.kind = WireKind::dispatch;
    message.header.source = RankId{0};
    message.header.step = 1;
    message.header.layer = 1;
    change(message);
    return lab.give_to_experts(0, std::move(message));
  };
  CHECK(given([](Envelope&) {}).find("dispatch from rank 0: 0 bytes, pass 0") != std::string::npos);
  const auto pool = BufferPool::make(1 << 20);
  const auto with_bytes = [&](Envelope& m) { m.payload = *pool->acquire(64); };
  CHECK(given([&](Envelope& m) {
          with_bytes(m);
          m.header.attempt = 4;
        }).find("pass 4") != std::string::npos);
  CHECK(given([&](Envelope& m) {
          with_bytes(m);
          m.header.layer = 0;
        }).find("layer 0 has no experts") != std::string::npos);
}

TEST_CASE("an overlapped pair computes while it waits for the wire, and the trace shows it") {
  const test::TemporaryModel model{four_layers()};
  auto checkpoint = Checkpoint::open(model.path());
  REQUIRE(checkpoint);
  auto config = sixteen_micro_batches(ComputePrecision::f32);
  config.pp = 2;
  config.ep = 2;
  StageLab lab{config, **checkpoint,
               std::make_shared<RandomRows>(16, 12, (*checkpoint)->config().vocab_size), 5};
  lab.step({1});
  const auto inside = [](const Span& a, const Span& b) {
    return a.begin >= b.begin && a.end <= b.end;
  };
  for (size_t rank = 0; rank < 4; ++rank) {
    const auto spans = lab.spans(rank);
    size_t pairs = 0, overlapped = 0;
    for (const auto& op : spans) {
      if (std::string_view{op.track} != "op" || op.name.front() != '[')
        continue;
      ++pairs;
      // Of the stage itself; the rank's experts work for others at any time.
      overlapped += std::ranges::any_of(spans, [&](const Span& wait) {
        return wait.name == "combine" && std::string_view{wait.track} == "wire" &&
               inside(wait, op) && std::ranges::any_of(spans, [&](const Span& job) {
                 return std::string_view{job.track} == "compute" &&
                        !job.name.starts_with("expert") && job.end > job.begin && inside(job, wait);
               });
      });
    }
    CHECK(pairs >= 4);
    CHECK(overlapped * 2 > pairs);
  }
}
