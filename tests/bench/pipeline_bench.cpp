// How near a pipeline's idle time comes to its schedule's formula: the real stage actors on real
// threads and a loopback fabric, with jobs that sleep for a given time (two cores can't compute on
// four ranks at once, but they can sleep). For the real cost of a model see `troupe train --trace`
// and `troupe plot timeline`.
//
//   bench_pipeline [milliseconds of F, 20]
//
// A stage is one dense layer: F = b = W, B = 2 F, and a pair F&B = 3 F, since one rank's stream
// runs one job at a time. Idle is the step's time less the mean of what ranks slept.
#include "actors/pipeline_stage.hpp"
#include "actors/rank.hpp"
#include "actors/train_experts.hpp"
#include "config/presets.hpp"
#include "transport/loopback_fabric.hpp"

#include <caf/actor_cast.hpp>
#include <caf/event_based_actor.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

using namespace troupe;

namespace {

// Runs each job and then sleeps until its cost is over.
class SleepingStream final : public ComputeStream {
public:
  SleepingStream(std::function<Nanoseconds(const std::string&)> cost)
      : cost_(std::move(cost)), thread_([this] { loop(); }) {}
  ~SleepingStream() override {
    {
      const std::lock_guard lock{mutex_};
      stop_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  void start(const char* name, Job job, std::function<void(const JobTiming&)> done) override {
    const std::lock_guard lock{mutex_};
    jobs_.push_back({name, std::move(job), std::move(done)});
    changed_.notify_one();
  }
  [[nodiscard]] int num_threads() const override { return 1; }

private:
  struct Item {
    const char* name;
    Job job;
    std::function<void(const JobTiming&)> done;
  };
  void loop() {
    InlineWorkers workers;
    std::unique_lock lock{mutex_};
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty())
        return;
      auto item = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      JobTiming timing;
      timing.started = clock_.now();
      item.job(workers);
      std::this_thread::sleep_until(std::chrono::steady_clock::time_point{timing.started} +
                                    cost_(item.name));
      timing.finished = clock_.now();
      item.done(timing);
      lock.lock();
    }
  }

  std::function<Nanoseconds(const std::string&)> cost_;
  SteadyClock clock_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> jobs_;
  bool stop_ = false;
  std::thread thread_;
};

class ZeroRows final : public TrainData {
public:
  static constexpr int64_t kLength = 8;
  [[nodiscard]] int64_t sequence_length() const override { return kLength; }
  [[nodiscard]] int64_t num_rows() const override { return 1; }
  [[nodiscard]] caf::expected<TrainRow> row(int64_t) const override {
    TrainRow row;
    row.ids.assign(kLength + 1, 1);
    row.has_loss.assign(kLength + 1, 1);
    row.first_key.assign(kLength + 1, 0);
    for (int32_t i = 0; i <= kLength; ++i)
      row.positions.push_back(i);
    return row;
  }
  [[nodiscard]] caf::expected<int64_t> num_loss_tokens(int64_t) const override {
    return int64_t{kLength};
  }
  [[nodiscard]] uint64_t digest() const override { return 0; }
};

// Reports of a step.
struct Heard {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<StageReport> reports;
};

caf::behavior listener(caf::event_based_actor*, Heard* heard) {
  return {[=](const StageReport& report) {
            const std::lock_guard lock{heard->mutex};
            heard->reports.push_back(report);
            heard->changed.notify_one();
          },
          [](const GradientsReady&) {}};
}

struct Member {
  SteadyClock clock;
  RankSystemConfig config;
  std::unique_ptr<caf::actor_system> system;
  std::unique_ptr<Fabric> fabric;
  std::unique_ptr<ComputeStream> stream;
  std::unique_ptr<Postman> postman;
  Trace trace;
  RankContext context;
  std::shared_ptr<TrainContext> train;
  std::vector<caf::actor> actors;
};

[[noreturn]] void fail(const std::string& what) {
  fmt::print(stderr, "bench_pipeline: {}\n", what);
  std::exit(1);
}

template <class T>
T value_of(caf::expected<T> result) {
  if (!result)
    fail(text_of(result.error()));
  return std::move(*result);
}

class Pipeline {
public:
  Pipeline(const TrainConfig& config, const ModelConfig& model, Nanoseconds unit) {
    hub_ = LoopbackHub::threaded(config.num_ranks());
    const auto data = std::make_shared<ZeroRows>();
    for (int32_t r = 0; r < config.num_ranks(); ++r) {
      auto rank = std::make_unique<Member>();
      rank->system = std::make_unique<caf::actor_system>(rank->config);
      FabricOptions fabric;
      fabric.self = RankId{r};
      fabric.incarnation = 1;
      fabric.cluster_token = "bench";
      fabric.heartbeat_period_ms = 0;
      fabric.pool = BufferPool::make(size_t{1} << 28);
      rank->fabric = value_of(hub_->endpoint(fabric));
      rank->stream = std::make_unique<SleepingStream>([unit](const std::string& name) {
        const bool costs = name == "attention" || name == "block backward" || name == "weights";
        return costs ? unit : Nanoseconds{0};
      });
      rank->postman = std::make_unique<Postman>(*rank->system, RankId{r});
      rank->postman->set_fabric(rank->fabric.get());
      auto& c = rank->context;
      c.self = RankId{r};
      c.config = model;
      c.fabric = rank->fabric.get();
      c.stream = rank->stream.get();
      c.clock = &rank->clock;
      c.postman = rank->postman.get();
      c.trace = &rank->trace;
      rank->train = value_of(make_train_context(&c, config, model, data, nullptr));
      InlineWorkers workers;
      for (const auto& phase : rank->train->phases)
        phase.weights->prepare(workers);
      adopt(*rank, Route::pipeline_stage,
            rank->system->spawn(pipeline_stage, std::shared_ptr<const TrainContext>{rank->train}));
      adopt(*rank, Route::expert_shard,
            rank->system->spawn(train_experts, std::shared_ptr<const TrainContext>{rank->train}));
      adopt(*rank, Route::optimizer, rank->system->spawn(listener, &heard_));
      adopt(*rank, Route::trainer, rank->system->spawn(listener, &heard_));
      if (auto error = rank->fabric->start(rank->postman.get()))
        fail(text_of(error));
      ranks_.push_back(std::move(rank));
    }
    for (auto& a : ranks_)
      for (auto& b : ranks_)
        if (a != b)
          if (auto error = a->fabric->connect(b->context.self, 1, b->fabric->address()))
            fail(text_of(error));
  }
  ~Pipeline() {
    for (auto& rank : ranks_) {
      rank->postman->clear_routes();
      for (const auto& actor : rank->actors)
        caf::anon_send_exit(actor, caf::exit_reason::user_shutdown);
      rank->actors.clear();
      rank->system->await_all_actors_done();
      rank->stream.reset();
      rank->fabric->stop(true, 1000);
    }
  }

  std::vector<StageReport> step(int64_t number) {
    heard_.reports.clear();
    for (auto& rank : ranks_)
      caf::anon_send(rank->postman->route(Route::pipeline_stage), BeginStep{number, false, 0});
    std::unique_lock lock{heard_.mutex};
    heard_.changed.wait(lock, [&] { return heard_.reports.size() == ranks_.size(); });
    return heard_.reports;
  }
  // Most chunks of which a rank had begun the forward and not ended the backward pass.
  [[nodiscard]] int peak_live(int64_t number) const {
    int peak = 0;
    for (const auto& rank : ranks_) {
      std::vector<std::pair<Nanoseconds, int>> changes;
      for (const auto& span : rank->trace.spans()) {
        if (std::string_view{span.track} != "op" || span.step != number)
          continue;
        if (span.name.find('F') != std::string::npos)
          changes.emplace_back(span.begin, 1);
        if (span.name.find_first_of("Bb") != std::string::npos)
          changes.emplace_back(span.end, -1);
      }
      std::sort(changes.begin(), changes.end());
      int live = 0;
      for (const auto& [at, change] : changes)
        peak = std::max(peak, live += change);
    }
    return peak;
  }

private:
  template <class Handle>
  static void adopt(Member& rank, Route route, const Handle& handle) {
    rank.actors.push_back(caf::actor_cast<caf::actor>(handle));
    rank.postman->set_route(route, rank.actors.back());
  }
  std::shared_ptr<LoopbackHub> hub_;
  Heard heard_;
  std::vector<std::unique_ptr<Member>> ranks_;
};

// §6.5, in units of F, with B = 2, W = 1, F&B = 3.
double formula(PipelineSchedule schedule, int32_t pp) {
  switch (schedule) {
  case PipelineSchedule::one_f_one_b:
    return 3.0 * (pp - 1);
  case PipelineSchedule::zb1p:
    return 1.0 * (pp - 1);
  case PipelineSchedule::dualpipe:
    return 2.0 * (pp / 2.0 - 1);
  case PipelineSchedule::dualpipev:
    return 2.0 * (pp - 1);
  }
  return 0;
}

void measure(PipelineSchedule schedule, int32_t pp, Nanoseconds unit) {
  TrainConfig config;
  config.compute = ComputePrecision::f32;
  config.schedule = schedule;
  config.pp = pp;
  config.grad_lanes = 1;
  config.batch.first = 4 * pp;
  config.threads = 1;
  auto model = *preset("tiny-v3");
  model.num_hidden_layers = schedule == PipelineSchedule::dualpipev ? 2 * pp : pp;
  model.first_k_dense_replace = model.num_hidden_layers;
  model.num_nextn_predict_layers = 0;
  Pipeline pipeline{config, model, unit};
  static_cast<void>(pipeline.step(1)); // touches memory for the first time
  double busy = 0, total = 0;
  for (const auto& report : pipeline.step(2)) {
    busy += report.busy_s / pp;
    total = std::max(total, report.program_s);
  }
  const double idle = total - busy;
  const double f = static_cast<double>(unit.count()) * 1e-9;
  const double ideal = formula(schedule, pp) * f;
  fmt::print("{:<10} PP {}  {:>2} micro-batches  step {:7.1f} ms  idle {:6.1f} ms  formula {:6.1f} "
             "ms  excess / step {:+.3f}  peak live chunks {}\n",
             name_of(schedule), pp, static_cast<int>(config.batch.first), total * 1e3, idle * 1e3,
             ideal * 1e3, (idle - ideal) / total, pipeline.peak_live(2));
}

} // namespace

int main(int argc, char** argv) {
  const double ms = argc > 1 ? std::atof(argv[1]) : 20;
  if (!(ms > 0 && ms < 10'000))
    fail("expected the milliseconds of a forward chunk");
  const Nanoseconds unit{static_cast<int64_t>(ms * 1e6)};
  fmt::print("stage cost: sleeping, F {} ms, B {} ms, W {} ms\n", ms, 2 * ms, ms);
  for (const int32_t pp : {2, 4})
    for (const auto schedule : {PipelineSchedule::one_f_one_b, PipelineSchedule::zb1p,
                                PipelineSchedule::dualpipe, PipelineSchedule::dualpipev})
      measure(schedule, pp, unit);
  return 0;
}
