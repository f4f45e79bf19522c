// A sink that remembers, and ways to wait for it; shared by the fabric tests.
#pragma once

#include "config/random.hpp"
#include "transport/fabric.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace troupe::test {

// TROUPE_SEED replays one seed; otherwise `count` of them.
inline std::vector<uint64_t> seeds(int count) {
  if (const char* one = std::getenv("TROUPE_SEED"))
    return {std::strtoull(one, nullptr, 10)};
  std::vector<uint64_t> all;
  for (int i = 0; i < count; ++i)
    all.push_back(static_cast<uint64_t>(i));
  return all;
}

class RecordingSink final : public FabricSink {
public:
  void on_message(Envelope message) override {
    record([&] {
      if (before_message)
        before_message(message);
      if (keep_messages)
        messages.push_back(std::move(message));
      ++num_messages;
    });
  }
  void on_peer_lost(RankId peer, const caf::error& why) override {
    record([&] { lost.emplace_back(peer, text_of(why)); });
  }
  void on_peer_left(RankId peer) override {
    record([&] { left.push_back(peer); });
  }
  void on_refused(const caf::error& why) override {
    record([&] { refused.push_back(text_of(why)); });
  }

  // True when `condition` (evaluated under the lock) became true in time.
  template <class Condition>
  bool wait(Condition condition, std::chrono::milliseconds timeout = std::chrono::seconds{10}) {
    std::unique_lock lock{mutex_};
    return changed_.wait_for(lock, timeout, condition);
  }
  bool wait_for_messages(size_t n) {
    return wait([&] { return num_messages >= n; });
  }

  bool keep_messages = true;
  std::function<void(const Envelope&)> before_message; // on the progress thread
  // Read under wait(), or once the fabric is stopped.
  std::vector<Envelope> messages;
  size_t num_messages = 0;
  std::vector<std::pair<RankId, std::string>> lost;
  std::vector<RankId> left;
  std::vector<std::string> refused;

private:
  template <class F>
  void record(F f) {
    const std::lock_guard lock{mutex_};
    f();
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
};

inline FabricOptions options_for(int rank, size_t pool_bytes = size_t{256} << 20) {
  FabricOptions o;
  o.self = RankId{rank};
  o.incarnation = 1;
  o.cluster_token = "the token of the tests";
  o.pool = BufferPool::make(pool_bytes);
  return o;
}

// A payload that depends on `key` alone.
inline BufferRef filled(BufferPool& pool, size_t size, uint64_t key) {
  auto buffer = pool.acquire(size);
  REQUIRE(buffer);
  KeyedStream draws{key};
  auto bytes = (*buffer)->bytes();
  const uint64_t first = draws.next();
  for (size_t i = 0; i < bytes.size(); i += 8) {
    const uint64_t word = first + i * 0x9E3779B97F4A7C15u;
    std::memcpy(bytes.data() + i, &word, std::min<size_t>(8, bytes.size() - i));
  }
  return std::move(*buffer);
}

inline bool is_filled(const Envelope& envelope, uint64_t key) {
  if (!envelope.payload)
    return true;
  const auto bytes = std::as_const(*envelope.payload).bytes();
  const uint64_t first = KeyedStream{key}.next();
  for (size_t i = 0; i < bytes.size(); i += 8) {
    const uint64_t word = first + i * 0x9E3779B97F4A7C15u;
    if (std::memcmp(bytes.data() + i, &word, std::min<size_t>(8, bytes.size() - i)) != 0)
      return false;
  }
  return true;
}

inline WireHeader header_of(WireKind kind, uint64_t step = 0) {
  WireHeader h;
  h.kind = kind;
  h.step = step;
  return h;
}

// Sends, waiting while the peer's credit is used up.
inline caf::error send_patiently(Fabric& fabric, RankId to, const WireHeader& header,
                                 const BufferRef& payload) {
  while (true) {
    auto error = fabric.send(to, header, payload);
    if (code_of(error) != Errc::overloaded)
      return error;
    std::this_thread::sleep_for(std::chrono::microseconds{200});
  }
}

} // namespace troupe::test
