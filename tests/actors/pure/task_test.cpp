#include "actors/task.hpp"

#include <doctest/doctest.h>

#include <stdexcept>
#include <string>

using namespace troupe;

namespace {

// Something to wait for.
struct Gate {
  std::coroutine_handle<> waiting;
  bool await_ready() { return false; }
  void await_suspend(std::coroutine_handle<> handle) { waiting = handle; }
  void await_resume() {}
  void open() { waiting.resume(); }
};

Task step(Gate& gate, std::string& log, char name) {
  log += name; // begins
  co_await gate;
  log += static_cast<char>(name - 'a' + 'A'); // ends
}

Task both(Gate& first, Gate& second, std::string& log) {
  Task a = step(first, log, 'a'), b = step(second, log, 'b');
  a.start();
  b.start();
  co_await a;
  co_await b;
  log += '.';
}

Task failing(Gate& gate) {
  co_await gate;
  throw std::runtime_error{"it broke"};
}

Task around(Gate& gate) {
  Task inner = failing(gate);
  co_await inner;
}

} // namespace

TEST_CASE("two tasks take turns, and who waits for both goes on after the later one") {
  Gate first, second;
  std::string log;
  Task task = both(first, second, log);
  CHECK(log.empty());
  task.start();
  CHECK(log == "ab");
  second.open();
  CHECK(!task.done());
  first.open();
  CHECK(task.done());
  CHECK(log == "abBA.");
}

TEST_CASE("an exception comes out where the task is awaited") {
  Gate gate;
  Task task = around(gate);
  task.start();
  task.check();
  gate.open();
  CHECK(task.done());
  CHECK_THROWS_WITH_AS(task.check(), "it broke", std::runtime_error);
}

TEST_CASE("an empty task is done, and one given up at a wait leaves nothing behind") {
  Task empty;
  empty.start();
  CHECK(empty.done());
  Gate gate;
  std::string log;
  {
    Task task = step(gate, log, 'a');
    task.start();
  }
  CHECK(log == "a");
}
