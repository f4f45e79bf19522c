#include "tests/transport/fabric_helpers.hpp"

#include "transport/loopback_fabric.hpp"

#include <algorithm>
#include <map>
#include <set>

using namespace troupe;
using namespace troupe::test;

namespace {

// Virtual time: fires what is scheduled in order of time, then of scheduling.
struct TestScheduler final : DeliveryScheduler {
  void schedule(Nanoseconds delay, std::function<void()> deliver) override {
    due.emplace(std::pair{now + delay, count++}, std::move(deliver));
  }
  void run() {
    while (!due.empty()) {
      auto next = due.extract(due.begin());
      now = next.key().first;
      next.mapped()();
    }
  }
  Nanoseconds now{0};
  uint64_t count = 0;
  std::map<std::pair<Nanoseconds, uint64_t>, std::function<void()>> due;
};

// N endpoints that all know each other.
struct Cluster {
  explicit Cluster(int n, std::shared_ptr<LoopbackHub> the_hub, size_t credit = size_t{64} << 20)
      : hub(std::move(the_hub)), sinks(static_cast<size_t>(n)) {
    for (int r = 0; r < n; ++r) {
      auto o = options_for(r);
      o.credit_bytes = credit;
      fabrics.push_back(std::move(*hub->endpoint(o)));
    }
    for (int r = 0; r < n; ++r)
      REQUIRE_FALSE(fabrics[static_cast<size_t>(r)]->start(&sinks[static_cast<size_t>(r)]));
    for (auto& from : fabrics)
      for (auto& to : fabrics)
        REQUIRE_FALSE(from->connect(to->self(), 1, to->address()));
  }
  Fabric& at(int r) { return *fabrics[static_cast<size_t>(r)]; }
  RecordingSink& sink(int r) { return sinks[static_cast<size_t>(r)]; }

  std::shared_ptr<LoopbackHub> hub;
  std::vector<RecordingSink> sinks;
  std::vector<std::unique_ptr<Fabric>> fabrics;
};

std::vector<uint64_t> steps(const RecordingSink& sink, RankId source) {
  std::vector<uint64_t> result;
  for (const auto& m : sink.messages)
    if (m.header.source == source)
      result.push_back(m.header.step);
  return result;
}

// Runs one seeded exchange and returns what rank 1 saw, in order.
std::vector<uint64_t> chaos(uint64_t seed) {
  TestScheduler time;
  SimulationOptions options;
  options.seed = seed;
  options.links = {Nanoseconds{0}, Nanoseconds{1'000'000}, 10, 10, true};
  Cluster cluster{2, LoopbackHub::simulated(2, time, options)};
  for (uint64_t i = 0; i < 200; ++i)
    REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::control, i), {}));
  time.run();
  CHECK(cluster.at(0).stats().queued_bytes == 0);
  return steps(cluster.sink(1), RankId{0});
}

} // namespace

TEST_CASE("the threaded loopback delivers every kind by reference, in order, also to oneself") {
  Cluster cluster{2, LoopbackHub::threaded(2)};
  auto& a = cluster.at(0);
  a.set_epoch(7);
  std::vector<BufferRef> sent;
  for (const int to : {0, 1})
    for (auto kind = WireKind::dispatch; kind <= WireKind::bulk;
         kind = static_cast<WireKind>(static_cast<int>(kind) + 1)) {
      auto header = header_of(kind, 5);
      header.layer = 3;
      header.attempt = 2;
      header.aux = 99;
      header.flags = 4;
      sent.push_back(filled(a.pool(), 1000, 1));
      REQUIRE_FALSE(a.send(RankId{to}, header, sent.back()));
    }
  for (const int to : {0, 1}) {
    auto& sink = cluster.sink(to);
    REQUIRE(sink.wait_for_messages(8));
    for (size_t i = 0; i < 8; ++i) {
      const auto& m = sink.messages[i];
      CHECK(static_cast<int>(m.header.kind) ==
            static_cast<int>(WireKind::dispatch) + static_cast<int>(i));
      CHECK(m.header.step == 5);
      CHECK(m.header.layer == 3);
      CHECK(m.header.attempt == 2);
      CHECK(m.header.aux == 99);
      CHECK(m.header.flags == 4);
      CHECK(m.header.epoch == 7);
      CHECK(m.header.source == RankId{0});
      CHECK(m.header.incarnation == 1);
      CHECK(m.header.sequence == i);
      CHECK(m.payload == sent[static_cast<size_t>(to) * 8 + i]);
    }
  }
  CHECK(a.stats().messages_sent == 16);
  CHECK(a.stats().bytes_sent == 16 * (1000 + kWireHeaderBytes));
  CHECK(cluster.at(1).stats().messages_received == 8);
}

TEST_CASE("on the threaded loopback every pair of ranks keeps its order under load") {
  Cluster cluster{4, LoopbackHub::threaded(4)};
  constexpr uint64_t kEach = 2000;
  std::vector<std::thread> senders;
  for (int from = 0; from < 4; ++from)
    senders.emplace_back([&, from] {
      for (uint64_t i = 0; i < kEach; ++i)
        for (int to = 0; to < 4; ++to)
          (void)cluster.at(from).send(RankId{to}, header_of(WireKind::control, i), {});
    });
  for (auto& sender : senders)
    sender.join();
  for (int to = 0; to < 4; ++to) {
    REQUIRE(cluster.sink(to).wait_for_messages(4 * kEach));
    for (int from = 0; from < 4; ++from) {
      const auto seen = steps(cluster.sink(to), RankId{from});
      CHECK(seen.size() == kEach);
      CHECK(std::ranges::is_sorted(seen));
    }
  }
}

TEST_CASE("a loopback receiver that stops reading stops its sender, and only that") {
  Cluster cluster{3, LoopbackHub::threaded(3), /*credit=*/10'000};
  std::mutex gate;
  std::unique_lock closed{gate};
  cluster.sink(1).before_message = [&](const Envelope&) { const std::lock_guard wait{gate}; };
  auto payload = filled(cluster.at(0).pool(), 1000, 1);
  int accepted = 0;
  caf::error refusal;
  while (!(refusal = cluster.at(0).send(RankId{1}, header_of(WireKind::bulk), payload)))
    ++accepted;
  CHECK(code_of(refusal) == Errc::overloaded);
  CHECK(accepted == 10'000 / (1000 + static_cast<int>(kWireHeaderBytes)));
  CHECK_FALSE(cluster.at(0).send(RankId{2}, header_of(WireKind::bulk), payload));
  closed.unlock();
  REQUIRE(cluster.sink(1).wait_for_messages(static_cast<size_t>(accepted)));
  // The credit comes back just after the last delivery.
  CHECK_FALSE(send_patiently(cluster.at(0), RankId{1}, header_of(WireKind::bulk), payload));
}

TEST_CASE("a message larger than all credit passes when nothing else is on its way") {
  Cluster cluster{2, LoopbackHub::threaded(2), /*credit=*/1000};
  auto payload = filled(cluster.at(0).pool(), 100'000, 1);
  CHECK_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::bulk), payload));
  CHECK(cluster.sink(1).wait_for_messages(1));
}

TEST_CASE("a stranger on the loopback is refused and heard of") {
  auto hub = LoopbackHub::threaded(2);
  auto mine = options_for(0);
  auto theirs = options_for(1);
  theirs.cluster_token = "another token";
  RecordingSink sink, stranger_sink;
  auto fabric = std::move(*hub->endpoint(mine));
  auto stranger = std::move(*hub->endpoint(theirs));
  REQUIRE_FALSE(fabric->start(&sink));
  REQUIRE_FALSE(stranger->start(&stranger_sink));
  REQUIRE_FALSE(stranger->connect(RankId{0}, 1, fabric->address()));
  REQUIRE_FALSE(stranger->send(RankId{0}, header_of(WireKind::control), {}));
  CHECK(sink.wait([&] { return sink.refused.size() == 2; }));
  CHECK(sink.num_messages == 0);
  CHECK(fabric->stats().refused == 2);
}

TEST_CASE("wrong uses of a loopback are errors that say what is wrong") {
  auto hub = LoopbackHub::threaded(2);
  CHECK(code_of(hub->endpoint(options_for(2)).error()) == Errc::invalid_argument);
  auto bad = options_for(0);
  bad.pool = nullptr;
  CHECK(code_of(hub->endpoint(bad).error()) == Errc::invalid_argument);
  bad = options_for(0);
  bad.heartbeat_timeout_ms = bad.heartbeat_period_ms;
  CHECK(code_of(hub->endpoint(bad).error()) == Errc::invalid_argument);
  auto fabric = std::move(*hub->endpoint(options_for(0)));
  CHECK(code_of(hub->endpoint(options_for(0)).error()) == Errc::invalid_argument);
  RecordingSink sink;
  REQUIRE_FALSE(fabric->start(&sink));
  CHECK(code_of(fabric->connect(RankId{1}, 1, "loopback:1")) == Errc::unreachable);
  CHECK(code_of(fabric->connect(RankId{1}, 1, "nonsense")) == Errc::malformed);
  CHECK(code_of(fabric->send(RankId{1}, header_of(WireKind::control), {})) == Errc::peer_lost);
  CHECK(code_of(fabric->send(RankId{0}, header_of(WireKind::heartbeat), {})) ==
        Errc::invalid_argument);
  fabric->stop(true, 100);
  fabric->stop(true, 100);
}

TEST_CASE("a clean leave is no loss, a broken connection is") {
  for (const bool clean : {true, false}) {
    Cluster cluster{3, LoopbackHub::threaded(3)};
    REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::control, 1), {}));
    if (!clean)
      REQUIRE(cluster.sink(1).wait_for_messages(1));
    cluster.at(0).stop(clean, 100);
    for (const int r : {1, 2}) {
      auto& sink = cluster.sink(r);
      CHECK(sink.wait([&] { return sink.left.size() + sink.lost.size() == 1; }));
      CHECK(sink.left.size() == (clean ? 1 : 0));
      CHECK(code_of(cluster.at(r).send(RankId{0}, header_of(WireKind::control), {})) ==
            Errc::peer_lost);
    }
    CHECK(cluster.sink(1).num_messages == 1);
  }
}

TEST_CASE("a killed loopback rank is reported lost and can return as a new incarnation") {
  Cluster cluster{2, LoopbackHub::threaded(2)};
  cluster.hub->kill(RankId{1});
  auto& sink = cluster.sink(0);
  REQUIRE(sink.wait([&] { return sink.lost.size() == 1; }));
  CHECK(sink.lost[0].first == RankId{1});
  CHECK(code_of(cluster.at(0).send(RankId{1}, header_of(WireKind::control), {})) ==
        Errc::peer_lost);
  cluster.fabrics[1].reset();
  auto again = options_for(1);
  CHECK_FALSE(cluster.hub->endpoint(again));
  again.incarnation = 2;
  auto reborn = std::move(*cluster.hub->endpoint(again));
  RecordingSink reborn_sink;
  REQUIRE_FALSE(reborn->start(&reborn_sink));
  CHECK(code_of(cluster.at(0).connect(RankId{1}, 1, reborn->address())) == Errc::unreachable);
  REQUIRE_FALSE(cluster.at(0).connect(RankId{1}, 2, reborn->address()));
  REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::control, 8), {}));
  CHECK(reborn_sink.wait_for_messages(1));
}

TEST_CASE("the simulated loopback keeps order whatever the delays, unless told to reorder") {
  for (const uint64_t seed : seeds(20)) {
    CAPTURE(seed);
    TestScheduler time;
    SimulationOptions options;
    options.seed = seed;
    options.links.min_delay = Nanoseconds{0};
    options.links.max_delay = Nanoseconds{1'000'000};
    Cluster cluster{3, LoopbackHub::simulated(3, time, options)};
    for (uint64_t i = 0; i < 50; ++i)
      for (int from = 0; from < 3; ++from)
        for (int to = 0; to < 3; ++to)
          REQUIRE_FALSE(cluster.at(from).send(RankId{to}, header_of(WireKind::control, i), {}));
    CHECK(cluster.sink(0).num_messages == 0);
    time.run();
    for (int to = 0; to < 3; ++to)
      for (int from = 0; from < 3; ++from) {
        const auto seen = steps(cluster.sink(to), RankId{from});
        CHECK(seen.size() == 50);
        CHECK(std::ranges::is_sorted(seen));
      }
  }
}

TEST_CASE("the same seed gives the same reordering, losses and duplicates; another one others") {
  std::set<std::vector<uint64_t>> all;
  for (const uint64_t seed : seeds(10)) {
    CAPTURE(seed);
    const auto seen = chaos(seed);
    CHECK(seen == chaos(seed));
    CHECK_FALSE(std::ranges::is_sorted(seen));
    const std::set<uint64_t> distinct(seen.begin(), seen.end());
    CHECK(distinct.size() < 200);         // some were dropped
    CHECK(distinct.size() < seen.size()); // some came twice
    CHECK(distinct.size() > 150);
    all.insert(seen);
  }
  if (!std::getenv("TROUPE_SEED"))
    CHECK(all.size() == 10);
}

TEST_CASE("a link's policy changes that direction of that pair alone") {
  TestScheduler time;
  Cluster cluster{3, LoopbackHub::simulated(3, time, {})};
  LinkPolicy deaf;
  deaf.drop_one_in = 1;
  cluster.hub->set_link(RankId{0}, RankId{1}, deaf);
  for (int i = 0; i < 10; ++i) {
    REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::control), {}));
    REQUIRE_FALSE(cluster.at(1).send(RankId{0}, header_of(WireKind::control), {}));
    REQUIRE_FALSE(cluster.at(0).send(RankId{2}, header_of(WireKind::control), {}));
  }
  time.run();
  CHECK(cluster.sink(1).num_messages == 0);
  CHECK(cluster.sink(0).num_messages == 10);
  CHECK(cluster.sink(2).num_messages == 10);
}

TEST_CASE("what a killed rank sent and what it would get vanishes, and its peers hear of it") {
  TestScheduler time;
  Cluster cluster{3, LoopbackHub::simulated(3, time, {})};
  auto payload = filled(cluster.at(0).pool(), 1000, 1);
  REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::bulk), payload));
  REQUIRE_FALSE(cluster.at(1).send(RankId{0}, header_of(WireKind::bulk), payload));
  REQUIRE_FALSE(cluster.at(1).send(RankId{2}, header_of(WireKind::bulk), payload));
  cluster.hub->kill(RankId{0});
  CHECK_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::bulk), payload));
  time.run();
  CHECK(cluster.sink(0).num_messages == 0);
  CHECK(cluster.sink(0).lost.empty());
  CHECK(cluster.sink(1).num_messages == 0);
  CHECK(cluster.sink(2).num_messages == 1);
  for (const int r : {1, 2}) {
    REQUIRE(cluster.sink(r).lost.size() == 1);
    CHECK(cluster.sink(r).lost[0].first == RankId{0});
  }
  CHECK(cluster.at(1).stats().queued_bytes == 0);
}

TEST_CASE("a partition that lasts is a loss on both sides, one that heals at once is not") {
  for (const bool heals : {false, true}) {
    TestScheduler time;
    Cluster cluster{4, LoopbackHub::simulated(4, time, {})};
    const std::vector<RankId> side{RankId{0}, RankId{1}};
    cluster.hub->partition(side);
    for (const int to : {1, 2})
      REQUIRE_FALSE(cluster.at(0).send(RankId{to}, header_of(WireKind::control), {}));
    if (heals)
      time.schedule(Nanoseconds{100'000}, [&] { cluster.hub->heal(); });
    time.run();
    CHECK(cluster.sink(1).num_messages == 1);
    CHECK(cluster.sink(2).num_messages == 0);
    for (int r = 0; r < 4; ++r)
      CHECK(cluster.sink(r).lost.size() == (heals ? 0 : 2));
  }
}

TEST_CASE("a clean leave in the simulation never overtakes what was sent before") {
  for (const uint64_t seed : seeds(20)) {
    CAPTURE(seed);
    TestScheduler time;
    SimulationOptions options;
    options.seed = seed;
    options.links = {Nanoseconds{0}, Nanoseconds{1'000'000}, 0, 0, true};
    Cluster cluster{2, LoopbackHub::simulated(2, time, options)};
    for (uint64_t i = 0; i < 20; ++i)
      REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::control, i), {}));
    cluster.at(0).stop(true, 0);
    time.run();
    CHECK(cluster.sink(1).num_messages == 20);
    CHECK(cluster.sink(1).left.size() == 1);
    CHECK(cluster.sink(1).lost.empty());
    CHECK(cluster.sink(1).refused.empty());
  }
}

TEST_CASE("the receiver of a loopback message notices that its sender wrote to it afterwards") {
  TestScheduler time;
  Cluster cluster{2, LoopbackHub::simulated(2, time, {})};
  auto payload = filled(cluster.at(0).pool(), 1000, 1);
  REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::bulk), payload));
  payload->data()[500] ^= std::byte{1};
  time.run();
  CHECK(cluster.sink(1).num_messages == 0);
  CHECK(cluster.sink(1).refused.size() == 1);
}
