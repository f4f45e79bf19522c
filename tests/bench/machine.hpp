// What this machine can do: the ceilings that benchmarks compare with, and how they take time.
#pragma once

#include "config/random.hpp"
#include "kernels/stream.hpp"

#include <oneapi/dnnl/dnnl.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace troupe::bench {

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best time of one call: at least three calls, and as many as fit `seconds`.
template <class F>
double best_time(double seconds, F&& call) {
  constexpr int kMost = 5000;
  double best = 1e30;
  const double start = now();
  for (int i = 0; i < 3 || (now() - start < seconds && i < kMost); ++i) {
    const double begin = now();
    call();
    best = std::min(best, now() - begin);
  }
  return best;
}

// Runs `body` with the stream's workers on its thread.
inline void on_stream(ComputeStream& stream, const std::function<void(Workers&)>& body) {
  std::promise<void> ended;
  stream.start("bench", body, [&](const JobTiming&) { ended.set_value(); });
  ended.get_future().wait();
}

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// How many cores are busy during a second in which this process sleeps: what others take, and ranks
// that should be idle.
inline double busy_cores() {
  const auto ticks = [] {
    std::ifstream stat{"/proc/stat"};
    std::string cpu;
    std::array<double, 8> t{}; // user nice system idle iowait irq softirq steal
    stat >> cpu;
    for (auto& v : t)
      stat >> v;
    return t[0] + t[1] + t[2] + t[5] + t[6] + t[7];
  };
  const double before = ticks(), start = now();
  std::this_thread::sleep_for(std::chrono::seconds{1});
  return (ticks() - before) / static_cast<double>(::sysconf(_SC_CLK_TCK)) / (now() - start);
}

// Bytes per second at which `threads` threads read a gigabyte of random data.
class MemoryReader {
public:
  explicit MemoryReader(int threads) : threads_(threads), data_(size_t{1} << 27) {
    KeyedStream random{1};
    for (auto& v : data_)
      v = random.next();
  }
  double rate() {
    std::vector<std::thread> team;
    std::atomic<uint64_t> sink{0};
    const double start = now();
    for (int t = 0; t < threads_; ++t)
      team.emplace_back([&, t] {
        const size_t n = data_.size() / static_cast<size_t>(threads_);
        const uint64_t* p = data_.data() + static_cast<size_t>(t) * n;
        uint64_t a[32] = {};
        for (size_t i = 0; i + 32 <= n; i += 32)
          for (size_t j = 0; j < 32; ++j)
            a[j] ^= p[i + j];
        uint64_t all = 0;
        for (const auto v : a)
          all ^= v;
        sink ^= all;
      });
    for (auto& t : team)
      t.join();
    return static_cast<double>(data_.size() * 8) / (now() - start);
  }

private:
  int threads_;
  std::vector<uint64_t> data_;
};

// FLOP per second of oneDNN's BF16 matmul [512, k] x [k, n].
class OneDnnGemm {
public:
  double rate() {
    const double start = now();
    int calls = 0;
    for (; calls < 3 || now() - start < 0.2; ++calls) {
      matmul_.execute(stream_, arguments_);
      stream_.wait();
    }
    return 2.0 * kM * kN * kK * calls / (now() - start);
  }

private:
  using Memory = dnnl::memory;
  static constexpr int64_t kM = 512, kN = 2048, kK = 2048;
  static Memory::desc desc(int64_t r, int64_t c, Memory::data_type t) {
    return {{r, c}, t, Memory::format_tag::ab};
  }
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul::primitive_desc description_{
      dnnl::matmul::desc{desc(kM, kK, Memory::data_type::bf16),
                         Memory::desc{{kK, kN}, Memory::data_type::bf16, Memory::format_tag::any},
                         desc(kM, kN, Memory::data_type::f32)},
      engine_};
  Memory a_{description_.src_desc(), engine_}, b_{description_.weights_desc(), engine_},
      c_{description_.dst_desc(), engine_};
  dnnl::matmul matmul_{description_};
  std::unordered_map<int, Memory> arguments_{
      {DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}};
};

// Makes the kernel forget its cached pages of the files.
inline void drop_cached(const std::vector<std::filesystem::path>& files) {
  for (const auto& file : files) {
    const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    ::fdatasync(fd); // dirty pages would stay
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

// Seconds to read the files once, one behind the other, into newly mapped memory. Less than 0 where
// one can't be read.
inline double seconds_to_read(const std::vector<std::filesystem::path>& files) {
  size_t total = 0;
  for (const auto& file : files)
    total += std::filesystem::file_size(file);
  const double start = now();
  void* const memory =
      ::mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    return -1;
  size_t at = 0;
  for (const auto& file : files) {
    const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    for (ssize_t n = 1; n > 0; at += static_cast<size_t>(n))
      if (n = ::read(fd, static_cast<char*>(memory) + at, std::min(total - at, size_t{8} << 20));
          n < 0)
        break;
    ::close(fd);
  }
  const double seconds = now() - start;
  ::munmap(memory, total);
  return at == total ? seconds : -1;
}

} // namespace troupe::bench
