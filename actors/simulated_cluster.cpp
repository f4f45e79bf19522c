#include "actors/simulated_cluster.hpp"

#include "actors/membership.hpp"

#include <caf/actor_cast.hpp>
#include <caf/event_based_actor.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <algorithm>

namespace troupe {

void EventQueue::schedule(Nanoseconds delay, std::function<void()> deliver) {
  events_.push({clock_.now() + delay, next_number_++, std::move(deliver)});
}

void EventQueue::run_next() {
  const auto run = events_.top().run;
  clock_.advance_to(events_.top().at);
  events_.pop();
  run();
}

// What clients saw; filled by an actor on rank 0's system.
struct SimulatedCluster::Client {
  caf::actor actor;
  std::vector<SimulatedAnswer> answers;
  std::map<RequestId, size_t> index;
  SimulatedTraining training;
  size_t finished = 0;
};

struct SimulatedCluster::Member {
  RankSystemConfig config{/*testing=*/true};
  std::unique_ptr<caf::actor_system> system;
  std::unique_ptr<Fabric> fabric;
  std::unique_ptr<ComputeStream> stream, background;
  std::unique_ptr<Rank> rank;

  [[nodiscard]] caf::scheduler::test_coordinator& scheduler() const {
    return dynamic_cast<caf::scheduler::test_coordinator&>(system->scheduler());
  }
};

namespace {

// Collects the news of the requests it submits; takes rows at once.
caf::behavior simulated_client(caf::event_based_actor* self, caf::actor gateway, std::string token,
                               std::vector<SimulatedAnswer>* answers,
                               std::map<RequestId, size_t>* index, size_t* finished) {
  const auto of = [=](RequestId id) -> SimulatedAnswer& { return (*answers)[index->at(id)]; };
  return {
      [=](const RequestSpec& spec) {
        const size_t place = answers->size();
        answers->emplace_back();
        SubmitRequest submit{token, spec, caf::actor_cast<caf::actor>(self)};
        self->request(gateway, caf::infinite, std::move(submit)).await([=](RequestId id) {
          (*index)[id] = place;
        });
      },
      [=](const TokensReady& news) {
        auto& answer = of(news.id);
        answer.tokens.insert(answer.tokens.end(), news.tokens.begin(), news.tokens.end());
        answer.prompt_logprobs.insert(answer.prompt_logprobs.end(), news.prompt_logprobs.begin(),
                                      news.prompt_logprobs.end());
      },
      [=](const RowsReady& news) {
        auto& rows = of(news.id).rows[news.name];
        rows.insert(rows.end(), news.bytes.begin(), news.bytes.end());
        self->send(gateway, RowsTaken{news.id, static_cast<int64_t>(news.bytes.size())});
      },
      [=](const RequestDone& done) {
        auto& answer = of(done.id);
        answer.done = done;
        answer.finished = true;
        ++*finished;
      },
  };
}

// Collects the news of a training run; told to begin with the step at which to ask for the end.
caf::behavior training_client(caf::event_based_actor* self, caf::actor trainer, std::string token,
                              SimulatedTraining* training, size_t* finished) {
  const auto stop_at = std::make_shared<int64_t>(0);
  return {
      [=](int64_t step) {
        *stop_at = step;
        self->request(trainer, caf::infinite,
                      StartTraining{token, caf::actor_cast<caf::actor>(self)})
            .await([] {});
      },
      [=](const TrainRecord& record) {
        training->records.push_back(record);
        if (!record.evaluated() && record.step == *stop_at)
          self->send(trainer, StopTraining{token});
      },
      [=](const TrainingDone& done) {
        training->done = done;
        training->finished = true;
        ++*finished;
      },
  };
}

} // namespace

SimulatedCluster::SimulatedCluster(const SimulatedClusterOptions& options)
    : options_(options), events_(clock_), random_(options.seed, 1) {}

caf::expected<std::unique_ptr<SimulatedCluster>>
SimulatedCluster::start(const SimulatedClusterOptions& options,
                        std::shared_ptr<const Checkpoint> checkpoint) {
  std::unique_ptr<SimulatedCluster> cluster{new SimulatedCluster{options}};
  auto gateway = cluster->form(checkpoint);
  if (!gateway)
    return gateway.error();
  auto& client = *cluster->client_;
  client.actor =
      cluster->members_[0]->system->spawn(simulated_client, *gateway, options.cluster.cluster_token,
                                          &client.answers, &client.index, &client.finished);
  return cluster;
}

caf::expected<std::unique_ptr<SimulatedCluster>>
SimulatedCluster::start_training(const SimulatedClusterOptions& options) {
  std::unique_ptr<SimulatedCluster> cluster{new SimulatedCluster{options}};
  cluster->options_.cluster.shape.num_ranks = options.cluster.train->config.num_ranks();
  auto trainer = cluster->form(nullptr);
  if (!trainer)
    return trainer.error();
  auto& client = *cluster->client_;
  client.actor = cluster->members_[0]->system->spawn(
      training_client, *trainer, options.cluster.cluster_token, &client.training, &client.finished);
  return cluster;
}

std::unique_ptr<ComputeStream> SimulatedCluster::make_stream() {
  return make_inline_stream(
      clock_,
      [this](Nanoseconds delay, std::function<void()> done) {
        events_.schedule(delay, std::move(done));
      },
      [this](const char*) {
        return Nanoseconds{static_cast<int64_t>(
            random_.below(static_cast<uint64_t>(2 * options_.mean_job.count()) + 1))};
      });
}

// A rank that serves the checkpoint, or one that trains.
caf::error SimulatedCluster::add_member(RankId self,
                                        const std::shared_ptr<const Checkpoint>& checkpoint) {
  auto member = std::make_unique<Member>();
  member->system = std::make_unique<caf::actor_system>(member->config);
  FabricOptions fabric;
  fabric.self = self;
  fabric.incarnation = 1;
  fabric.cluster_token = options_.cluster.cluster_token;
  fabric.heartbeat_period_ms = 0;
  fabric.pool = BufferPool::make(size_t{1} << 30);
  auto endpoint = hub_->endpoint(fabric);
  if (!endpoint)
    return endpoint.error();
  member->fabric = std::move(*endpoint);
  member->stream = make_stream();
  RankEnvironment environment{member->system.get(), member->fabric.get(), member->stream.get(),
                              &clock_};
  const auto& setup = options_.cluster.train;
  if (setup) {
    member->background = make_stream();
    environment.background = member->background.get();
  }
  auto rank = setup ? Rank::make_training(self, options_.cluster, setup, environment)
                    : Rank::make(self, options_.cluster, checkpoint, environment);
  if (!rank)
    return rank.error();
  member->rank = std::move(*rank);
  member->rank->supervise([this](const caf::error& why) {
    if (why && !failed_)
      failed_ = why;
  });
  if (auto error = member->fabric->start(&member->rank->postman()))
    return error;
  members_.push_back(std::move(member));
  return {};
}

// Answers whom a client talks to.
caf::expected<caf::actor>
SimulatedCluster::form(const std::shared_ptr<const Checkpoint>& checkpoint) {
  const auto num_ranks = options_.cluster.shape.num_ranks;
  SimulationOptions network;
  network.seed = options_.seed;
  network.links = options_.links;
  hub_ = LoopbackHub::simulated(num_ranks, events_, network);
  for (int32_t r = 0; r < num_ranks; ++r)
    if (auto error = add_member(RankId{r}, checkpoint))
      return error;
  auto group = start_forming(members_[0]->rank->planned_view());
  for (auto& member : members_)
    group = advance(std::move(group), member->rank->join_request());
  if (group.phase != FormingPhase::loading)
    return make_error(Errc::mismatch, group.why);
  for (auto& member : members_)
    if (auto error = member->rank->start(Welcome{group.view}, {}))
      return error;
  client_ = std::make_shared<Client>();
  return members_[0]->rank->open_gateway();
}

void SimulatedCluster::train(int64_t stop_at) {
  ++num_submitted_;
  caf::anon_send(client_->actor, stop_at);
}

const SimulatedTraining& SimulatedCluster::training() const { return client_->training; }

void SimulatedCluster::submit(RequestSpec spec) {
  ++num_submitted_;
  caf::anon_send(client_->actor, std::move(spec));
}

void SimulatedCluster::cancel(size_t index, Nanoseconds delay) {
  events_.schedule(delay, [this, index] {
    for (const auto& [id, place] : client_->index)
      if (place == index)
        caf::send_as(client_->actor, members_[0]->rank->postman().route(Route::gateway),
                     CancelRequest{id});
  });
}

// Runs one ready actor, chosen by the seed, or else the next event. False when nothing is left.
bool SimulatedCluster::step() {
  std::vector<size_t> ready;
  for (size_t r = 0; r < members_.size(); ++r)
    if (members_[r]->scheduler().has_job())
      ready.push_back(r);
  // Events are let in among ready actors, too: on real ranks they do not wait for each other.
  const bool event = !events_.empty() && (ready.empty() || random_.below(8) == 0);
  if (event) {
    events_.run_next();
    return true;
  }
  if (ready.empty())
    return false;
  const size_t r = ready[random_.below(ready.size())];
  auto& scheduler = members_[r]->scheduler();
  const auto chosen = random_.below(scheduler.jobs.size());
  std::rotate(scheduler.jobs.begin(), scheduler.jobs.begin() + static_cast<std::ptrdiff_t>(chosen),
              scheduler.jobs.begin() + static_cast<std::ptrdiff_t>(chosen) + 1);
  trace_hash_ = (trace_hash_ ^ (r * 1024 + chosen)) * 1099511628211u;
  scheduler.run_once();
  return true;
}

caf::error SimulatedCluster::run() {
  for (;;) {
    if (failed_)
      return failed_;
    if (client_->finished == num_submitted_)
      return {};
    if (++num_steps_ > options_.max_events)
      return make_error(Errc::timeout, "the simulation does not come to an end");
    if (!step())
      return make_error(Errc::timeout,
                        fmt::format("nothing can happen any more, and {} requests wait",
                                    num_submitted_ - client_->finished));
  }
}

const std::vector<SimulatedAnswer>& SimulatedCluster::answers() const { return client_->answers; }

Rank& SimulatedCluster::rank(size_t r) { return *members_.at(r)->rank; }

// Lets everything that is still on its way arrive.
void SimulatedCluster::drain() {
  for (uint64_t i = 0; i < options_.max_events && step(); ++i) {
  }
}

SimulatedCluster::~SimulatedCluster() {
  if (client_ && client_->actor) {
    caf::anon_send_exit(client_->actor, caf::exit_reason::user_shutdown);
    client_->actor = nullptr;
  }
  for (auto& member : members_)
    if (member->rank)
      member->rank->stop();
  drain();
  for (auto& member : members_)
    if (member->fabric)
      member->fabric->stop(false, 0);
  drain();
  for (auto& member : members_) {
    member->rank.reset();
    member->stream.reset();
    member->background.reset();
    member->fabric.reset();
    member->system.reset();
  }
}

} // namespace troupe
