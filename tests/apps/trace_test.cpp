// What --trace writes shows why ranks don't stand still: compute inside the waits for the wire.
#include "tests/apps/run_program.hpp"

#include <boost/json.hpp>
#include <doctest/doctest.h>

#include <iterator>

namespace troupe::test {

namespace {

struct Event {
  std::string name, track;
  double begin = 0, end = 0; // microseconds
};

std::vector<Event> events_of(const std::string& path, int rank) {
  std::ifstream file{path};
  const std::string text{std::istreambuf_iterator<char>{file}, {}};
  const auto trace = boost::json::parse(text);
  std::vector<Event> events;
  for (const auto& value : trace.as_array()) {
    const auto& e = value.as_object();
    REQUIRE(e.at("ph").as_string() == "X");
    REQUIRE(e.at("pid").as_int64() == rank);
    const auto begin = e.at("ts").to_number<double>();
    events.push_back({e.at("name").as_string().c_str(), e.at("cat").as_string().c_str(), begin,
                      begin + e.at("dur").to_number<double>()});
  }
  return events;
}

// Of the waits for the wire, how many saw the whole of a `name`.
struct Waits {
  int all = 0, with_compute = 0;
};
Waits count_waits(const std::vector<Event>& events, const std::string& name) {
  Waits waits;
  for (const auto& wait : events) {
    if (wait.name != "dispatch to combine")
      continue;
    CHECK(wait.track == "wire");
    ++waits.all;
    waits.with_compute += std::ranges::any_of(events, [&](const Event& e) {
      return e.track == "compute" && e.name == name && e.begin >= wait.begin && e.end <= wait.end;
    });
  }
  return waits;
}

} // namespace

TEST_CASE("a trace shows shared experts computed while dispatches are under way") {
  const Scratch s;
  const auto prefix = s.path("trace");
  const auto o = run({"generate", s.model, "--tokens", "5,7,9", "-n", "32", "--ignore-eos",
                      "--layout", "1+2", "-q", "--trace", prefix});
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  const auto attention = events_of(prefix + ".0.json", 0);
  const auto waits = count_waits(attention, "shared experts");
  CHECK(waits.all == 32 * 2); // steps × MoE layers
  // A rank that is not scheduled for a while may miss some.
  CHECK(waits.with_compute >= waits.all / 2);
  for (const int rank : {1, 2}) {
    const auto experts = events_of(prefix + "." + std::to_string(rank) + ".json", rank);
    CHECK(std::ranges::count(experts, "experts", &Event::name) > 0);
    CHECK(count_waits(experts, "shared experts").all == 0); // they wait for nobody
  }
}

} // namespace troupe::test
