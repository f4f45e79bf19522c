// Compute streams: where kernels run. An actor starts a job and goes on; the job's end comes back
// through a callback, which sends the actor a message. A CPU worker pool and, in a simulation, an
// inline stream with virtual cost stand behind one interface (a CUDA stream will be the third).
#pragma once

#include "config/clock.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

namespace troupe {

// A non-owning reference to a callable; the callable outlives the call it is passed to.
template <class Signature>
class FunctionRef;
template <class R, class... Args>
class FunctionRef<R(Args...)> {
public:
  template <class F>
  requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
      FunctionRef(F&& f) // NOLINT: implicit on purpose, like std::function_ref
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

private:
  void* object_;
  R (*call_)(void*, Args...);
};

// The threads of one running job. How work is cut never changes a result (contract, 1.1).
class Workers {
public:
  virtual ~Workers() = default;
  [[nodiscard]] virtual int num_threads() const = 0;
  // Calls f(begin, end, worker) over [0, n) in chunks of at most `grain` (the last may be
  // shorter), each index exactly once, and returns when all are done. worker < num_threads(), and
  // no worker runs two chunks at once. Not to be called from inside f.
  virtual void parallel_for(int64_t n, int64_t grain,
                            FunctionRef<void(int64_t, int64_t, int)> f) = 0;
};

// Runs everything on the calling thread.
class InlineWorkers final : public Workers {
public:
  [[nodiscard]] int num_threads() const override { return 1; }
  void parallel_for(int64_t n, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> f) override;
};

using Job = std::function<void(Workers&)>;

// What a finished job cost, for traces.
struct JobTiming {
  Nanoseconds queued{0}, started{0}, finished{0};
};

class ComputeStream {
public:
  virtual ~ComputeStream() = default;
  // Jobs run one after another in the order started. `done` is called once the job has ended, on
  // the stream's thread; it must only hand the news on. A job must not throw. Callable from any
  // thread.
  virtual void start(const char* name, Job job, std::function<void(const JobTiming&)> done) = 0;
  [[nodiscard]] virtual int num_threads() const = 0;
};

// A stream of `num_threads` CPU threads (the one that runs jobs included). Waits spin briefly and
// then sleep, and chunks are claimed one by one, so that a descheduled thread delays a job by at
// most one chunk. The destructor finishes the jobs already started.
[[nodiscard]] std::unique_ptr<ComputeStream> make_cpu_stream(int num_threads);

// A stream for simulations: a job runs at once on the calling thread, its end is scheduled
// `cost(name)` later. Ends come in the order of the starts. `clock` outlives the scheduled ends.
[[nodiscard]] std::unique_ptr<ComputeStream>
make_inline_stream(const Clock& clock,
                   std::function<void(Nanoseconds delay, std::function<void()> done)> schedule,
                   std::function<Nanoseconds(const char* name)> cost);

} // namespace troupe
