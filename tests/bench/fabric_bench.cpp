// What the fabrics cost beside what carries them: TCP over the loopback device for UCX, memory for
// the in-process loopback. Both ends are threads of this process.
//
//   bench_fabric [seconds per measurement]
//
// Back of the envelope: a message crosses two threads (sender, progress) on either side, and waking
// one takes about 5 us, so a small round trip over UCX is raw TCP's (10 us with blocking sockets)
// plus four wake-ups: 30 us. A large one is bound by copies (kernel in, kernel out) and two
// checksums of about 10 GB/s on top: half of raw TCP's rate. The loopback moves references; its
// rate is that of the two checksums alone, 5 GB/s or more.
//
// The machine may be shared: only ratios within a run mean anything.
#include "transport/loopback_fabric.hpp"
#include "transport/ucx_fabric.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

using namespace troupe;

namespace {

double g_seconds = 0.2;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void must(bool ok, const char* what) {
  if (ok)
    return;
  fmt::print(stderr, "bench_fabric: {} failed\n", what);
  std::exit(1);
}

struct Result {
  double rtt_us = 0; // median
  double gbps = 0;   // one way, 10^9 bytes per second
};

double median_us(std::vector<double>& seconds) {
  std::ranges::nth_element(seconds,
                           seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2));
  return 1e6 * seconds[seconds.size() / 2];
}

template <class F>
double median_rtt_us(F&& round_trip) {
  std::vector<double> times;
  for (const double start = now(); times.size() < 5 || now() - start < g_seconds;) {
    const double begin = now();
    round_trip();
    times.push_back(now() - begin);
  }
  return median_us(times);
}

// ── fabrics ──

class CountingSink final : public FabricSink {
public:
  void on_message(Envelope message) override {
    if (echo)
      (void)echo->send(message.header.source, message.header, message.payload);
    const std::lock_guard lock{mutex_};
    ++received_;
    changed_.notify_one();
  }
  void on_peer_lost(RankId, const caf::error& why) override { must(false, text_of(why).c_str()); }
  void on_peer_left(RankId) override {}
  void on_refused(const caf::error& why) override { must(false, text_of(why).c_str()); }
  void wait_for(size_t total) {
    std::unique_lock lock{mutex_};
    changed_.wait(lock, [&] { return received_ >= total; });
  }
  Fabric* echo = nullptr; // set before anything is sent

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t received_ = 0;
};

struct Pair {
  std::array<CountingSink, 3> sinks; // 0 sends; 1 echoes; 2 counts
  std::vector<std::unique_ptr<Fabric>> fabrics;
  size_t echoed = 0, counted = 0;

  template <class Make>
  explicit Pair(Make&& make) {
    for (int r = 0; r < 3; ++r) {
      FabricOptions o;
      o.self = RankId{r};
      o.incarnation = 1;
      o.cluster_token = "bench";
      o.pool = BufferPool::make(size_t{1} << 30);
      auto fabric = make(o);
      must(static_cast<bool>(fabric), "making a fabric");
      fabrics.push_back(std::move(*fabric));
    }
    sinks[1].echo = fabrics[1].get();
    for (size_t r = 0; r < 3; ++r)
      must(!fabrics[r]->start(&sinks[r]), "starting");
    for (const auto& [from, to] : {std::pair{0, 1}, {1, 0}, {0, 2}, {2, 0}}) {
      auto& peer = *fabrics[static_cast<size_t>(to)];
      must(!fabrics[static_cast<size_t>(from)]->connect(peer.self(), 1, peer.address()),
           "connecting");
    }
  }
  ~Pair() {
    for (auto& fabric : fabrics)
      fabric->stop(true, 1000);
  }
  void send(int to, const BufferRef& payload) {
    WireHeader header;
    header.kind = WireKind::bulk;
    while (fabrics[0]->send(RankId{to}, header, payload))
      std::this_thread::yield();
  }
  Result measure(size_t size) {
    auto payload = fabrics[0]->pool().acquire(size);
    must(static_cast<bool>(payload), "taking a buffer");
    std::memset((*payload)->data(), 1, size);
    const auto round_trip = [&] {
      send(1, *payload);
      sinks[0].wait_for(++echoed);
    };
    for (int i = 0; i < 3; ++i)
      round_trip();
    Result result;
    result.rtt_us = median_rtt_us(round_trip);
    const size_t burst = std::clamp<size_t>((size_t{32} << 20) / size, 4, 2000);
    size_t sent = 0;
    const double begin = now();
    while (sent == 0 || now() - begin < g_seconds) {
      for (size_t i = 0; i < burst; ++i)
        send(2, *payload);
      sent += burst;
      sinks[2].wait_for(counted += burst);
    }
    result.gbps = static_cast<double>(sent * size) / (now() - begin) / 1e9;
    return result;
  }
};

// ── raw TCP: blocking sockets, the far thread echoes the first half and drains the second ──

void write_all(int fd, const char* data, size_t size) {
  while (size > 0) {
    const auto n = ::write(fd, data, size);
    must(n > 0, "write");
    data += n;
    size -= static_cast<size_t>(n);
  }
}

bool read_all(int fd, char* data, size_t size) {
  while (size > 0) {
    const auto n = ::read(fd, data, size);
    if (n <= 0)
      return false;
    data += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

std::array<int, 2> connected_sockets() {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  auto* any = reinterpret_cast<sockaddr*>(&address);
  must(::bind(listener, any, length) == 0 && ::listen(listener, 1) == 0, "listen");
  must(::getsockname(listener, any, &length) == 0, "getsockname");
  const int near = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  must(::connect(near, any, length) == 0, "connect");
  const int far = ::accept(listener, nullptr, nullptr);
  must(far >= 0, "accept");
  ::close(listener);
  for (const int fd : {near, far}) {
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  return {near, far};
}

Result measure_tcp(size_t size) {
  Result result;
  std::vector<char> out(size), in(size);
  {
    const auto [near, far] = connected_sockets();
    std::thread echo{[far = far, size] {
      std::vector<char> bytes(size);
      while (read_all(far, bytes.data(), size))
        write_all(far, bytes.data(), size);
      ::close(far);
    }};
    result.rtt_us = median_rtt_us([&, near = near] {
      write_all(near, out.data(), size);
      must(read_all(near, in.data(), size), "read");
    });
    ::close(near);
    echo.join();
  }
  const auto [near, far] = connected_sockets();
  std::thread drain{[far = far, size] {
    std::vector<char> bytes(size);
    while (read_all(far, bytes.data(), size)) {
    }
    write_all(far, "x", 1); // all is read
    ::close(far);
  }};
  size_t sent = 0;
  const double begin = now();
  for (; sent == 0 || now() - begin < g_seconds; ++sent)
    write_all(near, out.data(), size);
  ::shutdown(near, SHUT_WR);
  must(read_all(near, in.data(), 1), "read");
  result.gbps = static_cast<double>(sent * size) / (now() - begin) / 1e9;
  drain.join();
  ::close(near);
  return result;
}

double memcpy_gbps(size_t size) {
  std::vector<char> from(size, 1), to(size, 2);
  size_t copies = 0;
  const double begin = now();
  for (; copies == 0 || now() - begin < g_seconds / 4; ++copies) {
    std::memcpy(to.data(), from.data(), size);
    asm volatile("" : : "r"(to.data()) : "memory");
  }
  return static_cast<double>(copies * size) / (now() - begin) / 1e9;
}

} // namespace

int main(int argc, char** argv) {
  if (argc > 1)
    g_seconds = std::max(0.01, std::atof(argv[1]));
  Pair ucx{[](const FabricOptions& o) { return make_ucx_fabric(o); }};
  const auto hub = LoopbackHub::threaded(3);
  Pair loopback{[&](const FabricOptions& o) { return hub->endpoint(o); }};
  fmt::print("{} cores; {}\n", std::thread::hardware_concurrency(), ucx_settings());
  fmt::print("{:>10} | {:>9} {:>9} {:>9} | {:>8} {:>8} {:>6} | {:>8} {:>8}\n", "bytes", "TCP us",
             "UCX us", "loop us", "TCP GB/s", "UCX GB/s", "ratio", "loop", "memcpy");
  for (const size_t size : {size_t{64}, size_t{7} << 10, size_t{64} << 10, size_t{256} << 10,
                            size_t{1} << 20, size_t{16} << 20}) {
    const auto raw = measure_tcp(size);
    const auto over_ucx = ucx.measure(size);
    const auto looped = loopback.measure(size);
    fmt::print(
        "{:>10} | {:>9.1f} {:>9.1f} {:>9.1f} | {:>8.3f} {:>8.3f} {:>6.2f} | {:>8.3f} {:>8.3f}\n",
        size, raw.rtt_us, over_ucx.rtt_us, looped.rtt_us, raw.gbps, over_ucx.gbps,
        over_ucx.gbps / raw.gbps, looped.gbps, memcpy_gbps(size));
  }
  return 0;
}
