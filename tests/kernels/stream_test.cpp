// Worker pools and streams: every index once, jobs in order, ends told once, nobody left waiting.
#include "kernels/stream.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>

using namespace troupe;

namespace {

// Lets a test wait for what happens on a stream's thread.
class Gate {
public:
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_; });
  }

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

void run(ComputeStream& stream, Job job) {
  Gate ended;
  stream.start("test", std::move(job), [&](const JobTiming&) { ended.open(); });
  ended.wait();
}

// How often each index was covered, and whether chunks kept the rules.
void check_coverage(Workers& workers, int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
  std::atomic<int> broken{0};
  workers.parallel_for(n, grain, [&](int64_t begin, int64_t end, int worker) {
    broken +=
        !(0 <= begin && begin < end && end <= n && end - begin <= std::max<int64_t>(grain, 1));
    broken += !(0 <= worker && worker < workers.num_threads());
    for (int64_t i = begin; i < end; ++i)
      ++seen[static_cast<size_t>(i)];
  });
  CHECK(broken == 0);
  int64_t once = 0;
  for (const auto& count : seen)
    once += count == 1;
  CHECK(once == n);
}

} // namespace

TEST_CASE("a parallel loop visits every index exactly once") {
  InlineWorkers here;
  for (const int64_t n : {0, 1, 7, 64, 1000})
    for (const int64_t grain : {-1, 0, 1, 3, 64, 5000})
      check_coverage(here, n, grain);
  for (const int threads : {1, 2, 4}) {
    const auto stream = make_cpu_stream(threads);
    CHECK(stream->num_threads() == threads);
    run(*stream, [&](Workers& workers) {
      CHECK(workers.num_threads() == threads);
      for (const int64_t n : {0, 1, 7, 64, 1000})
        for (const int64_t grain : {-1, 0, 1, 3, 64, 5000})
          check_coverage(workers, n, grain);
    });
  }
}

TEST_CASE("no worker runs two chunks at once") {
  const auto stream = make_cpu_stream(3);
  run(*stream, [](Workers& workers) {
    std::atomic<int> busy[3] = {}, clashes{0};
    for (int round = 0; round < 300; ++round)
      workers.parallel_for(20, 1, [&](int64_t, int64_t, int worker) {
        clashes += busy[worker].exchange(1);
        busy[worker] = 0;
      });
    CHECK(clashes == 0);
  });
}

TEST_CASE("thousands of short loops in a row neither hang nor lose work") {
  const auto stream = make_cpu_stream(3);
  run(*stream, [](Workers& workers) {
    std::atomic<int64_t> sum{0};
    for (int64_t round = 0; round < 3000; ++round) {
      workers.parallel_for(5, 1, [&](int64_t begin, int64_t, int) { sum += begin + round; });
      if (round % 500 == 0) // long enough for the helpers to fall asleep
        std::this_thread::sleep_for(std::chrono::milliseconds{1});
    }
    CHECK(sum == 5 * (2999 * 3000 / 2) + 3000 * 10);
  });
}

TEST_CASE("writes of a loop are seen by the next one") {
  const auto stream = make_cpu_stream(4);
  run(*stream, [](Workers& workers) {
    std::vector<int64_t> x(999, 0);
    for (int64_t round = 0; round < 200; ++round)
      workers.parallel_for(999, 10, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) // plain memory, mostly another thread's last time
          x[static_cast<size_t>(998 - i)] += 1;
      });
    CHECK(x == std::vector<int64_t>(999, 200));
  });
}

TEST_CASE("helpers really help") {
  const auto stream = make_cpu_stream(2);
  run(*stream, [](Workers& workers) {
    // Two chunks that wait for each other: one thread alone would never finish.
    std::atomic<int> arrived{0};
    workers.parallel_for(2, 1, [&](int64_t, int64_t, int) {
      ++arrived;
      while (arrived < 2)
        std::this_thread::yield();
    });
    CHECK(arrived == 2);
  });
}

TEST_CASE("jobs run in the order they were started, and their ends are told in that order") {
  const auto stream = make_cpu_stream(2);
  std::vector<int> log; // touched by the stream's thread only, until the last end
  Gate last, hold;
  stream->start(
      "hold", [&](Workers&) { hold.wait(); }, nullptr);
  for (int i = 0; i < 50; ++i)
    stream->start(
        "job", [&log, i](Workers&) { log.push_back(2 * i); },
        [&log, &last, i](const JobTiming& t) {
          log.push_back(2 * i + 1);
          CHECK(t.queued <= t.started);
          CHECK(t.started <= t.finished);
          CHECK(t.queued.count() > 0);
          if (i == 49)
            last.open();
        });
  hold.open();
  last.wait();
  REQUIRE(log.size() == 100);
  for (int i = 0; i < 100; ++i)
    CHECK(log[static_cast<size_t>(i)] == i);
}

TEST_CASE("jobs can be started from anywhere: other threads, jobs, and ends of jobs") {
  const auto stream = make_cpu_stream(2);
  std::atomic<int> ends{0};
  Gate all;
  const auto count = [&](const JobTiming&) {
    if (++ends == 41)
      all.open();
  };
  {
    std::vector<std::jthread> starters;
    for (int t = 0; t < 4; ++t)
      starters.emplace_back([&] {
        for (int i = 0; i < 10; ++i)
          stream->start(
              "outside", [](Workers&) {}, count);
      });
  }
  stream->start(
      "outer",
      [&](Workers&) {
        stream->start(
            "inner", [](Workers&) {}, count);
      },
      [&](const JobTiming&) {
        stream->start(
            "after", [](Workers&) {}, nullptr);
      });
  all.wait();
  CHECK(ends == 41);
}

TEST_CASE("a stream that goes away finishes what was started") {
  std::atomic<int> ran{0}, ended{0};
  {
    const auto stream = make_cpu_stream(3);
    for (int i = 0; i < 20; ++i)
      stream->start(
          "job",
          [&](Workers& workers) {
            workers.parallel_for(8, 1, [&](int64_t, int64_t, int) { ++ran; });
          },
          [&](const JobTiming&) { ++ended; });
  }
  CHECK(ran == 160);
  CHECK(ended == 20);
  { const auto unused = make_cpu_stream(2); } // nor does an idle one hang
}

TEST_CASE("fewer than one thread is one thread") {
  CHECK(make_cpu_stream(0)->num_threads() == 1);
  CHECK(make_cpu_stream(-3)->num_threads() == 1);
}

TEST_CASE("threads carry names a debugger can show") {
  const auto stream = make_cpu_stream(2);
  run(*stream, [](Workers& workers) {
    std::mutex mutex;
    std::set<std::string> names;
    std::atomic<int> arrived{0};
    workers.parallel_for(2, 1, [&](int64_t, int64_t, int) {
      ++arrived;
      while (arrived < 2)
        std::this_thread::yield();
      char name[16] = {};
      pthread_getname_np(pthread_self(), name, sizeof name);
      const std::lock_guard lock(mutex);
      names.insert(name);
    });
    CHECK(names == std::set<std::string>{"troupe-compute", "troupe-stream"});
  });
}

TEST_CASE("an inline stream computes at once and ends when its cost has passed") {
  VirtualClock clock;
  std::vector<std::pair<Nanoseconds, std::function<void()>>> events;
  const auto stream = make_inline_stream(
      clock,
      [&](Nanoseconds delay, std::function<void()> f) {
        events.emplace_back(clock.now() + delay, std::move(f));
      },
      [](const char* name) { return Nanoseconds{name == std::string("slow") ? 500 : 10}; });
  CHECK(stream->num_threads() == 1);
  std::string log;
  const auto job = [&](char c) { return [&log, c](Workers&) { log += c; }; };
  std::vector<Nanoseconds> took;
  const auto end = [&](char c) {
    return [&, c](const JobTiming& timing) {
      log += c;
      took.push_back(timing.finished - timing.started);
    };
  };
  stream->start("slow", job('a'), end('A'));
  stream->start("fast", job('b'), end('B'));
  stream->start("fast", job('c'), nullptr);
  CHECK(log == "abc");
  REQUIRE(events.size() == 3);
  CHECK(events[0].first == Nanoseconds{500});
  events[1].second(); // whichever comes first in time, ends come in the order of the starts
  CHECK(log == "abcA");
  clock.advance_to(Nanoseconds{500});
  events[2].second();
  events[0].second();
  CHECK(log == "abcAB");
  CHECK(took == std::vector{Nanoseconds{0}, Nanoseconds{500}});
}

TEST_CASE("an inline stream may be gone when its ends come due") {
  VirtualClock clock;
  std::vector<std::function<void()>> events;
  int ends = 0;
  {
    const auto stream = make_inline_stream(
        clock, [&](Nanoseconds, std::function<void()> f) { events.push_back(std::move(f)); },
        [](const char*) { return Nanoseconds{1}; });
    stream->start(
        "job", [](Workers&) {}, [&](const JobTiming&) { ++ends; });
  }
  events[0]();
  CHECK(ends == 1);
}
