// `troupe plan schedule`: a layout judged before machines are rented.
#include "tests/apps/pictures.hpp"

#include <boost/json.hpp>

#include <sstream>

namespace troupe::test {

namespace {

boost::json::object plan_json(std::vector<std::string> flags) {
  flags.insert(flags.begin(), {"plan", "schedule", "--json"});
  const auto o = run(flags);
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(std::ranges::count(o.out, '\n') == 1);
  return boost::json::parse(o.out).as_object();
}

std::string ops_of(const boost::json::value& rank) {
  std::string text;
  for (const auto& op : rank.at("ops").as_array())
    text.append(text.empty() ? "" : " ").append(op.as_string());
  return text;
}

double number_of(const boost::json::value& v) { return v.to_number<double>(); }

} // namespace

TEST_CASE("a plan as JSON holds every rank's program and when its ops run") {
  const auto plan = plan_json({"--schedule", "dualpipe", "--pp", "4", "--chunks", "8"});
  CHECK(number_of(plan.at("total")) == 26);
  CHECK(number_of(plan.at("formula")) == 2);
  CHECK(number_of(plan.at("bubble")) == doctest::Approx(2.0 / 26));
  CHECK(plan.at("peak_live").as_int64() == 5);
  CHECK(plan.at("parameters").as_int64() == 2);
  const auto& ranks = plan.at("ranks").as_array();
  REQUIRE(ranks.size() == 4);
  CHECK(ops_of(ranks[0]) == "F0.0 F0.1 F0.2 F1.0 b1.0 W F1.1 [F0.3 B1.1] [F1.2 B0.0] B1.2 "
                            "[F1.3 B0.1] B1.3 b0.2 W b0.3 W");
  for (int64_t r = 0; r < 4; ++r) {
    const auto& rank = ranks[static_cast<size_t>(r)];
    CHECK(rank.at("rank").as_int64() == r);
    CHECK(number_of(rank.at("idle")) == 2);
    CHECK(rank.at("peak_live").as_int64() == 5);
    CHECK(rank.at("starts").as_array().size() == rank.at("ops").as_array().size());
    CHECK(number_of(rank.at("ends").as_array().back()) == 26);
    CHECK(ops_of(rank) == ops_of(ranks[static_cast<size_t>(3 - r)]));
  }
  CHECK(number_of(ranks[1].at("starts").as_array()[6]) == 8); // [F1.2 B0.0]
}

TEST_CASE("a plan takes costs, and derives those that were not given") {
  const std::vector<std::string> layout{"--schedule", "1f1b", "--pp", "4", "--chunks", "8"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), layout.begin(), layout.end());
    return plan_json(more);
  };
  const auto scaled = with({"--cost-f", "2.5"});
  CHECK(number_of(scaled.at("costs").at("b")) == 5);
  CHECK(number_of(scaled.at("costs").at("w")) == 2.5);
  CHECK(number_of(scaled.at("costs").at("fb")) == 7.5);
  CHECK(number_of(scaled.at("formula")) == 3 * 7.5);
  CHECK(number_of(scaled.at("total")) == (8 + 3) * 7.5);
  const auto given = with({"--cost-f", "1", "--cost-b", "3", "--cost-w", "1", "--cost-fb", "3.5"});
  CHECK(number_of(given.at("costs").at("fb")) == 3.5);
  CHECK(number_of(given.at("formula")) == 3 * 4);
}

TEST_CASE("a plan as text names what a layout is judged by") {
  const auto o = run({"plan", "schedule", "--pp", "8", "--chunks", "20"});
  CAPTURE(o.out);
  REQUIRE(o.code == 0);
  for (const std::string& text : std::vector<std::string>{
           "dualpipe on 8 ranks, 20 micro-batches, half of them in each direction; F 1, B 2, W 1",
           "  17:[F0.7 B1.3]\n", "total          66\n", "9.1 % of all ranks' time",
           "6 by the formula", "9 chunks on a rank", "2×: a rank holds 2 of 8 stages",
           "* dualpipe              66    9.1 %          9", "  1f1b                  81   25.9 %",
           "  zb1p                  67   10.4 %"})
    CHECK_MESSAGE(o.out.find(text) != std::string::npos, text);
  // One row for each rank, all of one width.
  size_t rows = 0;
  std::istringstream lines{o.out};
  for (std::string line; std::getline(lines, line);)
    rows += line.ends_with("9.1 %          9");
  CHECK(rows == 8);
  // A schedule that can't run on these ranks is not compared.
  const auto odd = run({"plan", "schedule", "--schedule", "zb1p", "--pp", "3", "--chunks", "4"});
  CHECK(odd.code == 0);
  CHECK(odd.out.find("dualpipe") == std::string::npos);
}

TEST_CASE("a plan draws its timeline, an op a box") {
  const Folder folder;
  const auto svg = folder.path("plan.svg");
  for (const char* schedule : {"dualpipe", "dualpipev", "1f1b", "zb1p"}) {
    CAPTURE(schedule);
    const auto o = run(
        {"plan", "schedule", "--schedule", schedule, "--pp", "4", "--chunks", "8", "--svg", svg});
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    check_svg(contents(svg));
  }
  REQUIRE(run({"plan", "schedule", "--pp", "2", "--chunks", "4", "--svg", svg}).code == 0);
  const auto picture = contents(svg);
  CHECK(count_of(picture, "<title>F0.0: 0 to 1</title>") == 2);            // a box on either rank
  CHECK(count_of(picture, "<title>[F1.1 B0.0]: 5 to 8</title>") == 2 * 2); // in two halves
  CHECK(count_of(picture, "<title>W: 11 to 12</title>") == 2);
}

TEST_CASE("plans that can't be are refused in one line") {
  const auto refused = [](std::vector<std::string> flags, int code, const std::string& text) {
    flags.insert(flags.begin(), {"plan", "schedule"});
    check_refusal(run(flags), code, text);
  };
  refused({"--pp", "7", "--chunks", "20"}, 2, "pp: 7 given");
  refused({"--pp", "0", "--chunks", "20"}, 2, "pp: 0 given");
  refused({"--pp", "4", "--chunks", "7"}, 2, "7 micro-batches given");
  refused({"--pp", "4", "--chunks", "-8"}, 2, "-8 micro-batches given");
  refused({"--pp", "4"}, 2, "--chunks is required");
  refused({"--pp", "99999999999", "--chunks", "8"}, 2, "--pp");
  refused({"--pp", "1024", "--chunks", "100000"}, 2, "at most 1,048,576");
  refused({"--schedule", "gpipe", "--pp", "4", "--chunks", "8"}, 2, "schedule: \"gpipe\"");
  refused({"--pp", "4", "--chunks", "8", "--cost-w", "5"}, 2, "--cost-w: 5 given");
  refused({"--pp", "4", "--chunks", "8", "--cost-f", "-1"}, 2, "--cost-f: -1 given");
  refused({"--pp", "4", "--chunks", "8", "--cost-fb", "nan"}, 2, "--cost-fb: nan given");
  refused({"--pp", "4", "--chunks", "8", "--cost-fb", "1e300"}, 2, "--cost-fb: 1e+300 given");
  refused({"--pp", "4", "--chunks", "8", "--svg", "/dev/full"}, 1, "/dev/full");
  refused({"--pp", "4", "--chunks", "8", "--svg", "no/such/folder/x.svg"}, 1, "no/such/folder");
  refused({"--pp", "64", "--chunks", "8192", "--svg", "x.svg", "--json"}, 1, "too many");
}

} // namespace troupe::test
