// Ranks in one process, each with its own UcxFabric, over TCP loopback.
#include "tests/transport/fabric_helpers.hpp"

#include "transport/ucx_fabric.hpp"

#include <algorithm>
#include <array>

using namespace troupe;
using namespace troupe::test;
using namespace std::chrono_literals;

namespace {

// Messages of these tests go both ways, eager and by rendezvous. Read by UCX when it starts.
[[maybe_unused]] const int g_early_rendezvous = ::setenv("UCX_RNDV_THRESH", "100K", 0);

struct Cluster {
  using Tweak = std::function<void(FabricOptions&)>;
  explicit Cluster(int n, const Tweak& tweak = {}, UcxOptions ucx = {})
      : sinks(static_cast<size_t>(n)) {
    for (int r = 0; r < n; ++r) {
      auto o = options_for(r);
      if (tweak)
        tweak(o);
      auto fabric = make_ucx_fabric(o, ucx);
      REQUIRE(fabric);
      fabrics.push_back(std::move(*fabric));
    }
    for (int r = 0; r < n; ++r)
      REQUIRE_FALSE(at(r).start(&sinks[static_cast<size_t>(r)]));
    for (auto& from : fabrics)
      for (auto& to : fabrics)
        REQUIRE_FALSE(from->connect(to->self(), 1, to->address()));
  }
  ~Cluster() {
    // At the same time, as processes do.
    std::vector<std::thread> leaving;
    for (auto& fabric : fabrics)
      leaving.emplace_back([&fabric] { fabric->stop(true, 2000); });
    for (auto& thread : leaving)
      thread.join();
  }
  Fabric& at(int r) { return *fabrics[static_cast<size_t>(r)]; }
  RecordingSink& sink(int r) { return sinks[static_cast<size_t>(r)]; }

  std::vector<RecordingSink> sinks;
  std::vector<std::unique_ptr<Fabric>> fabrics;
};

// True when the payloads and numbers of all messages from `source` are those sent by `flood`.
bool in_order(const RecordingSink& sink, RankId source, uint64_t count) {
  uint64_t next = 0;
  for (const auto& m : sink.messages)
    if (m.header.source == source && (m.header.step != next++ || !is_filled(m, m.header.aux)))
      return false;
  return next == count;
}

void flood(Fabric& fabric, int num_ranks, uint64_t count, uint64_t seed, size_t max_bytes) {
  KeyedStream draws{seed, static_cast<uint64_t>(fabric.self().value)};
  for (uint64_t i = 0; i < count; ++i)
    for (int to = 0; to < num_ranks; ++to) {
      // Small and large in turns, so that eager messages get the chance to overtake.
      const size_t size = draws.below(3) == 0 ? draws.below(max_bytes + 1) : draws.below(600);
      auto header = header_of(WireKind::control, i);
      header.aux = draws.next();
      const auto payload = size == 0 ? BufferRef{} : filled(fabric.pool(), size, header.aux);
      if (send_patiently(fabric, RankId{to}, header, payload))
        return;
    }
}

} // namespace

TEST_CASE("over UCX every kind of message arrives whole, also at oneself") {
  Cluster cluster{2};
  auto& a = cluster.at(0);
  a.set_epoch(9);
  for (const int to : {0, 1})
    for (auto kind = WireKind::dispatch; kind <= WireKind::bulk;
         kind = static_cast<WireKind>(static_cast<int>(kind) + 1)) {
      auto header = header_of(kind, 5);
      header.layer = 3;
      header.attempt = 2;
      header.aux = 77;
      header.flags = 4;
      const auto size = 1000 * static_cast<size_t>(kind);
      REQUIRE_FALSE(a.send(RankId{to}, header, filled(a.pool(), size, 77)));
    }
  for (const int to : {0, 1}) {
    auto& sink = cluster.sink(to);
    REQUIRE(sink.wait_for_messages(8));
    for (size_t i = 0; i < 8; ++i) {
      const auto& h = sink.messages[i].header;
      CHECK(static_cast<size_t>(h.kind) == static_cast<size_t>(WireKind::dispatch) + i);
      CHECK(h.step == 5);
      CHECK(h.layer == 3);
      CHECK(h.attempt == 2);
      CHECK(h.aux == 77);
      CHECK(h.flags == 4);
      CHECK(h.epoch == 9);
      CHECK(h.source == RankId{0});
      CHECK(h.destination == RankId{to});
      CHECK(sink.messages[i].payload->size() == 1000 * static_cast<size_t>(h.kind));
      CHECK(is_filled(sink.messages[i], 77));
    }
  }
  const auto stats = cluster.at(1).stats();
  CHECK(stats.messages_received == 8);
  CHECK(stats.bytes_received == 8 * kWireHeaderBytes + 1000 * (5 + 6 + 7 + 8 + 9 + 10 + 11 + 12));
  CHECK(stats.refused == 0);
}

TEST_CASE("over UCX four ranks keep the order of every pair, whatever the sizes") {
  for (const uint64_t seed : seeds(1)) {
    for (const int channels : {1, 2}) {
      CAPTURE(seed);
      CAPTURE(channels);
      Cluster cluster{4, {}, {channels, 0}};
      constexpr uint64_t kEach = 60;
      std::vector<std::thread> senders;
      for (int r = 0; r < 4; ++r)
        senders.emplace_back([&, r] { flood(cluster.at(r), 4, kEach, seed, 300 << 10); });
      for (auto& sender : senders)
        sender.join();
      for (int r = 0; r < 4; ++r) {
        REQUIRE(cluster.sink(r).wait_for_messages(4 * kEach));
        for (int from = 0; from < 4; ++from)
          CHECK(in_order(cluster.sink(r), RankId{from}, kEach));
        CHECK(cluster.sink(r).refused.empty());
        CHECK(cluster.sink(r).lost.empty());
      }
    }
  }
}

TEST_CASE("a burst right after connect arrives, however early it is") {
  for (int round = 0; round < 5; ++round) {
    Cluster cluster{2, {}, {1, round == 4 ? 50 : 0}};
    constexpr uint64_t kEach = 300;
    std::thread other{[&] { flood(cluster.at(1), 2, kEach, 2, 2000); }};
    flood(cluster.at(0), 2, kEach, 1, 2000);
    other.join();
    for (const int r : {0, 1}) {
      REQUIRE(cluster.sink(r).wait_for_messages(2 * kEach));
      CHECK(in_order(cluster.sink(r), RankId{1 - r}, kEach));
    }
  }
}

TEST_CASE("a message of 100 MB goes straight into the pool") {
  Cluster cluster{2};
  constexpr size_t kBytes = 100'000'000;
  auto header = header_of(WireKind::bulk);
  header.aux = 5;
  REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header, filled(cluster.at(0).pool(), kBytes, 5)));
  REQUIRE(cluster.sink(1).wait_for_messages(1));
  CHECK(cluster.sink(1).messages[0].payload->size() == kBytes);
  CHECK(is_filled(cluster.sink(1).messages[0], 5));
  CHECK(cluster.at(1).pool().stats().high_water == BufferPool::capacity_for(kBytes));
}

TEST_CASE("a receiver that hangs stops its sender after the credit, and nobody else") {
  constexpr size_t kCredit = 1 << 20;
  std::mutex gate; // held while the receiver hangs
  Cluster cluster{3, [](FabricOptions& o) {
                    o.credit_bytes = kCredit;
                    o.heartbeat_period_ms = 0;
                  }};
  std::unique_lock closed{gate};
  cluster.sink(1).before_message = [&](const Envelope&) { const std::lock_guard wait{gate}; };
  cluster.sink(1).keep_messages = false;
  const auto payload = filled(cluster.at(0).pool(), 10'000, 1);
  size_t accepted = 0;
  caf::error refusal;
  while (!(refusal = cluster.at(0).send(RankId{1}, header_of(WireKind::bulk), payload)))
    ++accepted;
  CHECK(code_of(refusal) == Errc::overloaded);
  CHECK(accepted <= kCredit / 10'000);
  CHECK(cluster.at(0).stats().queued_bytes <= kCredit);
  CHECK_FALSE(cluster.at(0).send(RankId{2}, header_of(WireKind::bulk), payload));
  CHECK(cluster.sink(2).wait_for_messages(1));
  closed.unlock();
  REQUIRE(cluster.sink(1).wait_for_messages(accepted));
  CHECK_FALSE(send_patiently(cluster.at(0), RankId{1}, header_of(WireKind::bulk), payload));
}

TEST_CASE("a receiver whose pool is full makes messages wait, in bounded memory, and loses none") {
  // Eager and by rendezvous; the pool holds about four of them.
  for (const size_t size : {size_t{60'000}, size_t{400'000}}) {
    CAPTURE(size);
    const size_t pool_bytes = 4 * BufferPool::capacity_for(size);
    const size_t credit = 10 * (size + kWireHeaderBytes);
    Cluster cluster{2, [&](FabricOptions& o) {
                      o.credit_bytes = credit;
                      if (o.self == RankId{1})
                        o.pool = BufferPool::make(pool_bytes);
                    }};
    auto& sink = cluster.sink(1);
    size_t sent = 0;
    std::vector<Envelope> held;
    const auto send_until_refused = [&] {
      while (true) {
        auto header = header_of(WireKind::bulk, sent);
        header.aux = sent;
        if (cluster.at(0).send(RankId{1}, header, filled(cluster.at(0).pool(), size, sent)))
          return;
        ++sent;
      }
    };
    send_until_refused();
    REQUIRE(sink.wait_for_messages(4)); // then the pool is full: the sink keeps what it got
    const auto deadline = std::chrono::steady_clock::now() + 500ms;
    while (std::chrono::steady_clock::now() < deadline) {
      send_until_refused();
      std::this_thread::sleep_for(10ms);
    }
    // Four were delivered and acknowledged, ten more are on their way; nothing else moved.
    CHECK(sent == 14);
    CHECK(sink.num_messages == 4);
    CHECK(cluster.at(1).stats().waiting_bytes == 10 * size);
    CHECK(cluster.at(1).pool().stats().high_water <= pool_bytes);
    CHECK(cluster.at(0).pool().stats().bytes_lent <= 10 * BufferPool::capacity_for(size));
    // Room comes back one by one.
    for (size_t i = 0; i < sent; ++i) {
      REQUIRE(sink.wait([&] { return sink.num_messages > i; }));
      sink.wait([&] {
        CHECK(sink.messages[i].header.step == i);
        CHECK(is_filled(sink.messages[i], i));
        sink.messages[i].payload = {};
        return true;
      });
    }
    CHECK(cluster.at(1).stats().waiting_bytes == 0);
    CHECK(sink.lost.empty());
  }
}

TEST_CASE(
    "a message larger than the receiver's whole pool loses the sender, it waits for nothing") {
  Cluster cluster{2, [](FabricOptions& o) {
                    if (o.self == RankId{1})
                      o.pool = BufferPool::make(100'000);
                  }};
  for (const size_t size : {size_t{200'000}}) {
    REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::bulk),
                                     filled(cluster.at(0).pool(), size, 1)));
    auto& sink = cluster.sink(1);
    REQUIRE(sink.wait([&] { return sink.lost.size() == 1; }));
    CHECK(sink.lost[0].second.find("200000") != std::string::npos);
    CHECK(sink.num_messages == 0);
  }
}

TEST_CASE("a stranger's hello and messages are refused, and what it sends harms nobody") {
  Cluster cluster{2};
  auto o = options_for(2);
  o.cluster_token = "the token of another test";
  auto stranger = std::move(*make_ucx_fabric(o));
  RecordingSink stranger_sink;
  REQUIRE_FALSE(stranger->start(&stranger_sink));
  REQUIRE_FALSE(stranger->connect(RankId{0}, 1, cluster.at(0).address()));
  REQUIRE_FALSE(stranger->send(RankId{0}, header_of(WireKind::control), {}));
  REQUIRE_FALSE(stranger->send(RankId{0}, header_of(WireKind::bulk),
                               filled(stranger->pool(), 1'000'000, 1))); // by rendezvous
  auto& sink = cluster.sink(0);
  CHECK(sink.wait([&] { return sink.refused.size() >= 3; }));
  CHECK(sink.num_messages == 0);
  CHECK(cluster.at(0).stats().refused >= 3);
  REQUIRE_FALSE(cluster.at(1).send(RankId{0}, header_of(WireKind::control), {}));
  CHECK(sink.wait_for_messages(1));
  stranger->stop(true, 500);
}

TEST_CASE("wrong uses of the UCX fabric are errors that say what is wrong") {
  CHECK(code_of(make_ucx_fabric(options_for(-1)).error()) == Errc::invalid_argument);
  CHECK(code_of(make_ucx_fabric(options_for(0), {0, 0}).error()) == Errc::invalid_argument);
  CHECK(code_of(make_ucx_fabric(options_for(0), {1, -1}).error()) == Errc::invalid_argument);
  { const auto never_started = std::move(*make_ucx_fabric(options_for(0))); }
  auto fabric = std::move(*make_ucx_fabric(options_for(0)));
  CHECK(code_of(fabric->send(RankId{0}, header_of(WireKind::control), {})) == Errc::cancelled);
  CHECK(code_of(fabric->connect(RankId{1}, 1, "")) == Errc::cancelled);
  RecordingSink sink;
  REQUIRE_FALSE(fabric->start(&sink));
  CHECK(fabric->start(&sink));
  const auto address = fabric->address();
  CHECK(code_of(fabric->connect(RankId{1}, 1, "nonsense")) == Errc::malformed);
  CHECK(code_of(fabric->connect(RankId{1}, 1, "")) == Errc::malformed);
  CHECK(code_of(fabric->connect(RankId{1}, 1, address)) == Errc::mismatch); // it is rank 0's
  for (size_t i = 0; i < address.size(); ++i) {
    auto bent = address;
    bent[i] = static_cast<char>(bent[i] ^ 0x10);
    CHECK(code_of(fabric->connect(RankId{1}, 1, bent)) == Errc::malformed);
    CHECK(code_of(fabric->connect(RankId{1}, 1, address.substr(0, i))) == Errc::malformed);
  }
  CHECK_FALSE(fabric->connect(RankId{0}, 1, address)); // itself
  CHECK(code_of(fabric->send(RankId{1}, header_of(WireKind::control), {})) == Errc::peer_lost);
  CHECK(code_of(fabric->send(RankId{0}, header_of(WireKind::credit), {})) ==
        Errc::invalid_argument);
  fabric->stop(true, 100);
  fabric->stop(true, 100);
  CHECK(code_of(fabric->send(RankId{0}, header_of(WireKind::control), {})) == Errc::cancelled);
}

TEST_CASE("over UCX a clean leave comes after the last message and is no loss") {
  auto cluster = std::make_unique<Cluster>(3);
  constexpr size_t kBytes = 3'000'000;
  const auto payload = filled(cluster->at(0).pool(), kBytes, 0);
  for (uint64_t i = 0; i < 5; ++i)
    for (const int to : {1, 2})
      REQUIRE_FALSE(cluster->at(0).send(RankId{to}, header_of(WireKind::bulk, i), payload));
  cluster->at(0).stop(true, 5000);
  for (const int r : {1, 2}) {
    auto& sink = cluster->sink(r);
    REQUIRE(sink.wait([&] { return sink.left.size() == 1; }));
    CHECK(sink.num_messages == 5);
    CHECK(code_of(cluster->at(r).send(RankId{0}, header_of(WireKind::control), {})) ==
          Errc::peer_lost);
  }
  // The others live on, and the closed connection is no news.
  REQUIRE_FALSE(cluster->at(1).send(RankId{2}, header_of(WireKind::control), {}));
  REQUIRE(cluster->sink(2).wait_for_messages(6));
  std::this_thread::sleep_for(100ms);
  for (const int r : {1, 2})
    CHECK(cluster->sink(r).lost.empty());
  CHECK(cluster->sink(0).lost.empty());
  CHECK(payload->size() == kBytes);
}

TEST_CASE("over UCX a broken connection is a loss, and a new incarnation is welcome") {
  Cluster cluster{2};
  cluster.at(1).stop(false, 0);
  auto& sink = cluster.sink(0);
  REQUIRE(sink.wait([&] { return sink.lost.size() == 1; }, 5s));
  CHECK(sink.left.empty());
  CHECK(code_of(cluster.at(0).send(RankId{1}, header_of(WireKind::control), {})) ==
        Errc::peer_lost);
  const auto old_address = cluster.at(1).address();
  CHECK(code_of(cluster.at(0).connect(RankId{1}, 1, old_address)) == Errc::peer_lost);
  auto o = options_for(1);
  o.incarnation = 2;
  auto reborn = std::move(*make_ucx_fabric(o));
  RecordingSink reborn_sink;
  REQUIRE_FALSE(reborn->start(&reborn_sink));
  REQUIRE_FALSE(cluster.at(0).connect(RankId{1}, 2, reborn->address()));
  REQUIRE_FALSE(reborn->connect(RankId{0}, 1, cluster.at(0).address()));
  CHECK(code_of(cluster.at(0).connect(RankId{1}, 1, old_address)) == Errc::stale);
  REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::control, 8), {}));
  REQUIRE_FALSE(reborn->send(RankId{0}, header_of(WireKind::control, 9), {}));
  REQUIRE(reborn_sink.wait_for_messages(1));
  CHECK(reborn_sink.messages[0].header.step == 8);
  REQUIRE(sink.wait_for_messages(1));
  CHECK(sink.messages[0].header.step == 9);
  CHECK(sink.messages[0].header.incarnation == 2);
  reborn->stop(true, 1000);
  CHECK(sink.wait([&] { return sink.left.size() == 1; }));
}

// UCX asserts on handshakes that meet a closing endpoint, which would end the process.
TEST_CASE("ranks that come and go at any moment harm nobody") {
  for (const uint64_t seed : seeds(6)) {
    CAPTURE(seed);
    KeyedStream draws{seed};
    std::vector<RecordingSink> sinks(4);
    std::vector<std::unique_ptr<Fabric>> fabrics;
    for (int r = 0; r < 4; ++r) {
      fabrics.push_back(std::move(*make_ucx_fabric(options_for(r))));
      REQUIRE_FALSE(fabrics.back()->start(&sinks[static_cast<size_t>(r)]));
    }
    std::vector<std::thread> lives;
    for (size_t r = 0; r < 4; ++r)
      lives.emplace_back([&, r, pause_us = draws.below(3000), clean = draws.below(2) == 0] {
        for (auto& peer : fabrics) {
          (void)fabrics[r]->connect(peer->self(), 1, peer->address());
          (void)fabrics[r]->send(peer->self(), header_of(WireKind::bulk),
                                 filled(fabrics[r]->pool(), 200'000, 1));
        }
        std::this_thread::sleep_for(std::chrono::microseconds{pause_us});
        if (r != 0) // rank 0 sees the others go
          fabrics[r]->stop(clean, 300);
      });
    for (auto& life : lives)
      life.join();
    CAPTURE(sinks[0].left.size());
    CAPTURE(sinks[0].lost.size());
    CHECK(sinks[0].wait([&] { return sinks[0].left.size() + sinks[0].lost.size() == 3; }));
    REQUIRE_FALSE(fabrics[0]->send(RankId{0}, header_of(WireKind::control), {}));
    CHECK(sinks[0].wait_for_messages(2));
  }
}

TEST_CASE("a loss with much in flight gives every buffer back") {
  Cluster cluster{2, [](FabricOptions& o) {
                    if (o.self == RankId{1})
                      o.pool = BufferPool::make(2'000'000); // most of it has to wait
                  }};
  for (int i = 0; i < 20; ++i)
    for (const size_t size : {size_t{1'000'000}, size_t{50'000}, size_t{100}})
      REQUIRE_FALSE(cluster.at(0).send(RankId{1}, header_of(WireKind::bulk),
                                       filled(cluster.at(0).pool(), size, 1)));
  REQUIRE(cluster.sink(1).wait_for_messages(1));
  cluster.at(1).stop(false, 0);
  auto& sink = cluster.sink(0);
  REQUIRE(sink.wait([&] { return sink.lost.size() == 1; }, 5s));
  const auto deadline = std::chrono::steady_clock::now() + 5s;
  while (cluster.at(0).pool().stats().bytes_lent > 0 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(5ms);
  CHECK(cluster.at(0).pool().stats().bytes_lent == 0);
  CHECK(cluster.at(0).stats().queued_bytes == 0);
  cluster.sink(1).messages.clear();
  CHECK(cluster.at(1).pool().stats().bytes_lent == 0);
}
