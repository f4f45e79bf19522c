// A coroutine that an actor runs: what would be a state machine, written down in order. It waits
// with co_await for jobs and messages, which its owner hands it from handlers; it never blocks.
//
// A task starts when it is awaited, or by `start` (then it can be awaited later, and two tasks can
// take turns). Whoever owns a Task owns its frame; exceptions come out of co_await.
#pragma once

#include <coroutine>
#include <exception>
#include <utility>

namespace troupe {

class [[nodiscard]] Task {
public:
  struct promise_type {
    std::coroutine_handle<> waiting;
    std::exception_ptr thrown;
    bool started = false;

    Task get_return_object() {
      return Task{std::coroutine_handle<promise_type>::from_promise(*this)};
    }
    std::suspend_always initial_suspend() noexcept { return {}; }
    struct Final {
      bool await_ready() noexcept { return false; }
      std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> self) noexcept {
        return self.promise().waiting ? self.promise().waiting : std::noop_coroutine();
      }
      void await_resume() noexcept {}
    };
    Final final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { thrown = std::current_exception(); }
  };

  Task() = default;
  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Task() {
    if (handle_)
      handle_.destroy();
  }

  // Runs it up to its first wait. An empty task is done.
  void start() {
    if (handle_ && !std::exchange(handle_.promise().started, true))
      handle_.resume();
  }
  [[nodiscard]] bool done() const { return !handle_ || handle_.done(); }
  // Throws what the finished task threw.
  void check() const {
    if (handle_ && handle_.promise().thrown)
      std::rethrow_exception(handle_.promise().thrown);
  }

  auto operator co_await() & noexcept { return Awaiter{handle_}; }
  auto operator co_await() && noexcept { return Awaiter{handle_}; }

private:
  struct Awaiter {
    std::coroutine_handle<promise_type> task;
    bool await_ready() noexcept { return !task || task.done(); }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> waiting) noexcept {
      task.promise().waiting = waiting;
      if (!std::exchange(task.promise().started, true))
        return task;
      return std::noop_coroutine();
    }
    void await_resume() const {
      if (task && task.promise().thrown)
        std::rethrow_exception(task.promise().thrown);
    }
  };
  explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
  std::coroutine_handle<promise_type> handle_;
};

} // namespace troupe
