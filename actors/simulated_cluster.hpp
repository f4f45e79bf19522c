// A whole cluster on one thread from one seed: the unchanged production actors, on virtual time.
//
// Each rank has its own actor system with CAF's testing scheduler; messages between ranks go
// through the loopback fabric, whose deliveries, and the ends of compute jobs, are events on one
// virtual clock. The seed picks which ready actor runs next, how long a message travels and whether
// it is duplicated. Same seed and same code: same run, down to the last message.
#pragma once

#include "actors/rank.hpp"
#include "actors/train_messages.hpp"
#include "config/clock.hpp"
#include "config/random.hpp"
#include "transport/loopback_fabric.hpp"

#include <caf/scheduler/test_coordinator.hpp>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <string>
#include <tuple>
#include <vector>

namespace troupe {

// Events in virtual time; ties in the order they were scheduled.
class EventQueue final : public DeliveryScheduler {
public:
  explicit EventQueue(VirtualClock& clock) : clock_(clock) {}
  void schedule(Nanoseconds delay, std::function<void()> deliver) override;
  [[nodiscard]] bool empty() const { return events_.empty(); }
  // Moves the clock to the next event and runs it. Not when empty.
  void run_next();

private:
  struct Event {
    Nanoseconds at;
    uint64_t number;
    std::function<void()> run;
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return std::tie(a.at, a.number) > std::tie(b.at, b.number);
    }
  };
  VirtualClock& clock_;
  uint64_t next_number_ = 0;
  std::priority_queue<Event, std::vector<Event>, Later> events_;
};

struct SimulatedClusterOptions {
  ClusterOptions cluster;
  uint64_t seed = 1;
  LinkPolicy links;                 // delays, duplicates, reordering
  Nanoseconds mean_job{50'000};     // virtual cost of a compute job; drawn from 0 to twice this
  uint64_t max_events = 50'000'000; // a run that needs more has lost its way
};

// What became of a request.
struct SimulatedAnswer {
  std::vector<int32_t> tokens;
  std::vector<double> prompt_logprobs;
  std::map<std::string, std::vector<uint8_t>> rows; // "logits", "hidden.3": F32, in row order
  RequestDone done;
  bool finished = false;
};

// What a training run told its client.
struct SimulatedTraining {
  std::vector<TrainRecord> records; // evaluations among them
  TrainingDone done;
  bool finished = false;
};

class SimulatedCluster {
public:
  [[nodiscard]] static caf::expected<std::unique_ptr<SimulatedCluster>>
  start(const SimulatedClusterOptions& options, std::shared_ptr<const Checkpoint> checkpoint);
  // One that trains, as options.cluster.train says; `train`, then `run` until it has ended.
  [[nodiscard]] static caf::expected<std::unique_ptr<SimulatedCluster>>
  start_training(const SimulatedClusterOptions& options);
  ~SimulatedCluster();

  // Submits a request; its place in the returned order is its index in answers().
  void submit(RequestSpec spec);
  // Its client gives request number `index` up after `delay` of virtual time.
  void cancel(size_t index, Nanoseconds delay);
  // Begins the training run. Its client asks for an early end when it hears of step `stop_at`.
  void train(int64_t stop_at = 0);
  [[nodiscard]] const SimulatedTraining& training() const;
  // Runs until every request is done or nothing can happen any more (then the error says who
  // waits), or until a rank ends with an error.
  [[nodiscard]] caf::error run();
  [[nodiscard]] const std::vector<SimulatedAnswer>& answers() const;
  [[nodiscard]] Rank& rank(size_t r);
  [[nodiscard]] Nanoseconds now() const { return clock_.now(); }
  // One number over every choice made so far: equal for equal runs.
  [[nodiscard]] uint64_t trace_hash() const { return trace_hash_; }

private:
  struct Member;
  struct Client;
  explicit SimulatedCluster(const SimulatedClusterOptions& options);
  caf::expected<caf::actor> form(const std::shared_ptr<const Checkpoint>& checkpoint);
  caf::error add_member(RankId self, const std::shared_ptr<const Checkpoint>& checkpoint);
  [[nodiscard]] std::unique_ptr<ComputeStream> make_stream();
  bool step();
  void drain();

  SimulatedClusterOptions options_;
  VirtualClock clock_;
  EventQueue events_;
  KeyedStream random_;
  std::shared_ptr<LoopbackHub> hub_;
  std::vector<std::unique_ptr<Member>> members_;
  std::shared_ptr<Client> client_;
  caf::error failed_;
  uint64_t trace_hash_ = 14695981039346656037u;
  uint64_t num_steps_ = 0;
  size_t num_submitted_ = 0;
};

} // namespace troupe
