#include "kernels/stream.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

namespace troupe {

namespace {

// How long a wait spins before it sleeps: longer than a futex wake, far shorter than a time slice.
constexpr auto kSpin = std::chrono::microseconds{20};

Nanoseconds now() { return std::chrono::steady_clock::now().time_since_epoch(); }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until `ready()` or the budget is spent; says which.
template <class Ready>
bool spin_until(Ready ready) {
  const auto end = now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready())
        return true;
      relax();
    }
  } while (now() < end);
  return ready();
}

void name_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

// A parallel loop that helpers may join while it runs. `generation` tells loops apart; a helper
// enters by adding itself to `inside` and re-checking the generation, so that the owner, who waits
// for `inside` to be zero, never lets the callable die under it.
class Team final : public Workers {
public:
  explicit Team(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; ++i)
      helpers_.emplace_back([this, i] { help(i); });
  }
  ~Team() override {
    {
      const std::lock_guard lock{mutex_};
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& t : helpers_)
      t.join();
  }
  [[nodiscard]] int num_threads() const override { return num_threads_; }

  void parallel_for(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> f) override {
    grain = std::max<int64_t>(grain, 1);
    if (n <= 0)
      return;
    if (num_threads_ == 1 || n <= grain) {
      for (int64_t i = 0; i < n; i += grain)
        f(i, std::min(i + grain, n), 0);
      return;
    }
    function_ = &f;
    size_ = n;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst); // odd: open
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard lock{mutex_};
      wake_.notify_all();
    }
    run_chunks(0);
    generation_.fetch_add(1, std::memory_order_seq_cst); // even: closed to newcomers
    const auto empty = [&] { return inside_.load(std::memory_order_seq_cst) == 0; };
    if (!spin_until(empty)) {
      std::unique_lock lock{mutex_};
      owner_waits_ = true;
      done_.wait(lock, empty);
      owner_waits_ = false;
    }
  }

private:
  void run_chunks(int worker) {
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= size_)
        return;
      (*function_)(begin, std::min(begin + grain_, size_), worker);
    }
  }

  void help(int worker) {
    name_thread("troupe-compute");
    uint64_t seen = 0;
    for (;;) {
      const auto open = [&] {
        const auto g = generation_.load(std::memory_order_seq_cst);
        return (g & 1) != 0 && g != seen;
      };
      if (!spin_until(open)) {
        std::unique_lock lock{mutex_};
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return stop_ || open(); });
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
        if (stop_)
          return;
      }
      const auto generation = generation_.load(std::memory_order_seq_cst);
      inside_.fetch_add(1, std::memory_order_seq_cst);
      if (generation_.load(std::memory_order_seq_cst) == generation && (generation & 1) != 0) {
        seen = generation;
        run_chunks(worker);
      }
      if (inside_.fetch_sub(1, std::memory_order_seq_cst) == 1) {
        const std::lock_guard lock{mutex_};
        if (owner_waits_)
          done_.notify_one();
      }
    }
  }

  int num_threads_;
  std::vector<std::thread> helpers_;
  FunctionRef<void(int64_t, int64_t, int)>* function_ = nullptr;
  int64_t size_ = 0, grain_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stop_ = false;
  bool owner_waits_ = false;
};

class CpuStream final : public ComputeStream {
public:
  explicit CpuStream(int num_threads)
      : num_threads_(std::max(num_threads, 1)), leader_([this] { lead(); }) {}
  ~CpuStream() override {
    {
      const std::lock_guard lock{mutex_};
      stop_ = true;
    }
    changed_.notify_one();
    leader_.join();
  }
  void start(const char* name, Job job, std::function<void(const JobTiming&)> done) override {
    static_cast<void>(name);
    {
      const std::lock_guard lock{mutex_};
      jobs_.push_back({std::move(job), std::move(done), now()});
      size_.store(jobs_.size(), std::memory_order_release);
    }
    changed_.notify_one();
  }
  [[nodiscard]] int num_threads() const override { return num_threads_; }

private:
  struct Started {
    Job job;
    std::function<void(const JobTiming&)> done;
    Nanoseconds queued{0};
  };

  void lead() {
    name_thread("troupe-stream");
    Team team{num_threads_};
    for (;;) {
      spin_until([&] { return size_.load(std::memory_order_acquire) > 0; });
      Started started;
      {
        std::unique_lock lock{mutex_};
        changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
        if (jobs_.empty())
          return;
        started = std::move(jobs_.front());
        jobs_.pop_front();
        size_.store(jobs_.size(), std::memory_order_release);
      }
      JobTiming timing{started.queued, now(), {}};
      started.job(team);
      timing.finished = now();
      if (started.done)
        started.done(timing);
    }
  }

  int num_threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Started> jobs_;
  std::atomic<size_t> size_{0};
  bool stop_ = false;
  std::thread leader_; // last: starts when the rest is there
};

// Runs a job where it is started; its end is an event of the simulation.
class InlineStream final : public ComputeStream {
public:
  InlineStream(const Clock& clock, std::function<void(Nanoseconds, std::function<void()>)> schedule,
               std::function<Nanoseconds(const char*)> cost)
      : clock_(clock), schedule_(std::move(schedule)), cost_(std::move(cost)),
        queue_(std::make_shared<Queue>()) {}
  void start(const char* name, Job job, std::function<void(const JobTiming&)> done) override {
    InlineWorkers workers;
    job(workers);
    queue_->waiting.push_back({std::move(done), clock_.now()});
    // Whichever end comes due first is the oldest job's: jobs end in the order they started.
    schedule_(cost_(name), [queue = queue_, &clock = clock_] {
      auto ended = std::move(queue->waiting.front());
      queue->waiting.pop_front();
      if (ended.done)
        ended.done(JobTiming{ended.started, ended.started, clock.now()});
    });
  }
  [[nodiscard]] int num_threads() const override { return 1; }

private:
  struct Queue {
    struct Started {
      std::function<void(const JobTiming&)> done;
      Nanoseconds started;
    };
    std::deque<Started> waiting;
  };
  const Clock& clock_;
  std::function<void(Nanoseconds, std::function<void()>)> schedule_;
  std::function<Nanoseconds(const char*)> cost_;
  std::shared_ptr<Queue> queue_;
};

} // namespace

void InlineWorkers::parallel_for(int64_t n, int64_t grain,
                                 FunctionRef<void(int64_t, int64_t, int)> f) {
  grain = std::max<int64_t>(grain, 1);
  for (int64_t i = 0; i < n; i += grain)
    f(i, std::min(i + grain, n), 0);
}

std::unique_ptr<ComputeStream> make_cpu_stream(int num_threads) {
  return std::make_unique<CpuStream>(num_threads);
}

std::unique_ptr<ComputeStream>
make_inline_stream(const Clock& clock,
                   std::function<void(Nanoseconds, std::function<void()>)> schedule,
                   std::function<Nanoseconds(const char*)> cost) {
  return std::make_unique<InlineStream>(clock, std::move(schedule), std::move(cost));
}

} // namespace troupe
