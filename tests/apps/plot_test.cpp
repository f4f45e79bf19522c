// `troupe plot`: pictures of training from its logs and traces, and what it says of broken ones.
#include "tests/apps/pictures.hpp"

#include <boost/json.hpp>

namespace troupe::test {

namespace {

std::string step_line(int step, double loss, const std::string& load = "[[3,1],[2,2]]") {
  return "{\"step\":" + std::to_string(step) + ",\"main_loss\":" + std::to_string(loss) +
         ",\"mtp_loss\":[" + std::to_string(loss + 1) + "],\"max_vio\":[0.5,0],\"load\":" + load +
         "}\n";
}

std::string log_of(int steps, double first_loss) {
  std::string text;
  for (int s = 1; s <= steps; ++s)
    text += step_line(s, first_loss / s);
  return text;
}

// The trace that ranks would write if they ran a plan as drawn, in milliseconds.
struct Rehearsal {
  std::string schedule = "dualpipe";
  int pp = 2, chunks = 4;
  std::vector<std::string> costs; // flags of the plan
  int columns = 1;                // pipelines beside each other
  int64_t step = 3;
};
using Events = std::vector<std::vector<std::string>>; // by rank

std::string event(const std::string& name, const std::string& category, double begin_ms,
                  double end_ms, int rank, int64_t step) {
  const boost::json::object json{{"name", name},
                                 {"cat", category},
                                 {"ph", "X"},
                                 {"ts", begin_ms * 1000},
                                 {"dur", (end_ms - begin_ms) * 1000},
                                 {"pid", rank},
                                 {"tid", category},
                                 {"args", {{"layer", -1}, {"step", step}}}};
  return boost::json::serialize(json);
}

Events rehearse(const Rehearsal& r) {
  std::vector<std::string> flags{
      "plan",  "schedule",           "--schedule", r.schedule,
      "--pp",  std::to_string(r.pp), "--chunks",   std::to_string(r.chunks),
      "--json"};
  flags.insert(flags.end(), r.costs.begin(), r.costs.end());
  const auto o = run(flags);
  REQUIRE(o.code == 0);
  const auto plan = boost::json::parse(o.out);
  Events events(static_cast<size_t>(r.pp * r.columns));
  for (int rank = 0; rank < r.pp * r.columns; ++rank) {
    const auto& line = plan.at("ranks").as_array()[static_cast<size_t>(rank / r.columns)];
    const auto& ops = line.at("ops").as_array();
    double free_at = 0;
    for (size_t i = 0; i < ops.size(); ++i) {
      const std::string name{ops[i].as_string()};
      const auto start = line.at("starts").as_array()[i].to_number<double>();
      const auto end = line.at("ends").as_array()[i].to_number<double>();
      auto& list = events[static_cast<size_t>(rank)];
      // An op's span begins with its turn; until its rows come, the rank waits.
      constexpr double kClock = 5e6;
      list.push_back(event(name, "op", kClock + free_at, kClock + end, rank, r.step));
      if (start > free_at)
        list.push_back(event("stage rows", "wire", kClock + free_at, kClock + start, rank, r.step));
      list.push_back(event("attention", "compute", kClock + start, kClock + end, rank, -1));
      free_at = end;
    }
  }
  return events;
}

std::string as_list(const std::vector<std::string>& events) {
  std::string text = "[\n";
  for (size_t i = 0; i < events.size(); ++i)
    text += (i == 0 ? "" : ",\n") + events[i];
  return text + "\n]\n";
}

void write_ranks(const Folder& folder, const std::string& prefix, const Events& events) {
  for (size_t rank = 0; rank < events.size(); ++rank)
    (void)folder.with(prefix + "." + std::to_string(rank) + ".json", as_list(events[rank]));
}

void check_says(const Outcome& o, const std::string& text) {
  CAPTURE(o.out);
  CAPTURE(o.err);
  CAPTURE(text);
  CHECK(o.code == 0);
  CHECK(o.out.find(text) != std::string::npos);
}

} // namespace

// ---- loss ---------------------------------------------------------------------------------------

TEST_CASE("a log becomes curves of loss, MTP loss and MaxVio") {
  const Folder folder;
  const auto log = folder.with("run.jsonl", log_of(40, 8) + "\n" +
                                                R"({"step":20,"main_loss":5,"evaluated":true})"
                                                "\n" +
                                                R"({"step":40,"main_loss":4.5,"evaluated":true})");
  const auto out = folder.path("loss.svg");
  const auto o = run({"plot", "loss", log, "--out", out});
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(o.out.empty());
  const auto svg = contents(out);
  check_svg(svg);
  for (const char* text : {">Loss<", ">MTP loss<", ">MaxVio, the worst MoE layer", ">run<",
                           ">on held-out data<", ">0.200<", ">1.200<", ">0.500<"})
    CHECK_MESSAGE(svg.find(text) != std::string::npos, std::string{text});
  CHECK(count_of(svg, "<circle") == 1 + 2); // in the legend, and the two evaluations
  // loss, held-out, MTP loss, two layers and the worst of them
  CHECK(count_of(svg, "<polyline") == 6);
  CHECK(run({"plot", "loss", log}).out == svg); // without --out: to standard output
}

TEST_CASE("several logs are curves of several colours under names that tell them apart") {
  const Folder folder;
  std::filesystem::create_directories(folder.path("with"));
  std::filesystem::create_directories(folder.path("without"));
  const auto a = folder.with("with/log.jsonl", log_of(200, 8));
  const auto b = folder.with("without/log.jsonl", log_of(150, 9));
  const auto o = run({"plot", "loss", a, b, "--title", "Balance & <loss>"});
  REQUIRE(o.code == 0);
  check_svg(o.out);
  for (const char* text :
       {">with/log.jsonl<", ">without/log.jsonl<", "Balance &amp; &lt;loss&gt;", "bold: mean of"})
    CHECK_MESSAGE(o.out.find(text) != std::string::npos, std::string{text});
}

TEST_CASE("of a resumed run the later lines of a step count") {
  const Folder folder;
  const auto log = folder.with("log.jsonl", step_line(1, 9) + step_line(2, 8) + step_line(3, 700) +
                                                step_line(4, 700) + step_line(3, 7));
  const auto o = run({"plot", "loss", log});
  REQUIRE(o.code == 0);
  CHECK(o.out.find(">7.000<") != std::string::npos);
  CHECK(o.out.find("700") == std::string::npos);
  const auto late = run({"plot", "loss", log, "--from", "3"});
  REQUIRE(late.code == 0);
  check_svg(late.out); // a single step
  check_refusal(run({"plot", "loss", log, "--from", "4"}), 1, "no steps from 4 on");
}

TEST_CASE("extreme values still make a picture") {
  const Folder folder;
  for (const char* losses : {"0,0,0", "1e29,-1e29,1", "1e-300,2e-300,3e-300", "5,5,5",
                             "1000000,1000000.0000001,1000000", "-3,-2,-1"}) {
    CAPTURE(std::string{losses});
    std::string text, rest = losses;
    for (int step = 0; !rest.empty(); ++step) {
      const auto comma = std::min(rest.find(','), rest.size());
      text += "{\"step\":" + std::to_string(step * 1000000000000LL) +
              ",\"main_loss\":" + rest.substr(0, comma) + "}\n";
      rest.erase(0, comma + 1);
    }
    const auto o = run({"plot", "loss", folder.with("log.jsonl", text)});
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    check_svg(o.out);
    CHECK(o.out.size() < 20'000);
  }
}

TEST_CASE("a panel shows what there is: no MTP, no MoE, several depths") {
  const Folder folder;
  const auto picture = [&](const std::string& fields) {
    std::string text;
    for (int s = 1; s <= 3; ++s)
      text += "{\"step\":" + std::to_string(s) + ",\"main_loss\":3" + fields + "}\n";
    const auto o = run({"plot", "loss", folder.with("log.jsonl", text)});
    REQUIRE(o.code == 0);
    check_svg(o.out);
    return o.out;
  };
  for (const char* none : {"", ",\"mtp_loss\":0,\"max_vio\":[]", ",\"mtp_loss\":null"}) {
    const auto svg = picture(none);
    CHECK(svg.find("MTP loss") == std::string::npos);
    CHECK(svg.find("MaxVio") == std::string::npos);
    CHECK(count_of(svg, "<polyline") == 1);
  }
  const auto deep = picture(",\"mtp_loss\":4.5,\"mtp_losses\":[4,5]");
  CHECK(deep.find(">4.000<") != std::string::npos);
  CHECK(deep.find(">5.000<") != std::string::npos);
  CHECK(deep.find(">4.500<") == std::string::npos);
}

// ---- load ---------------------------------------------------------------------------------------

TEST_CASE("expert loads become a map for each MoE layer, relative to its mean") {
  const Folder folder;
  std::string text;
  for (int s = 1; s <= 10; ++s)
    text += step_line(s, 3, s <= 5 ? "[[30,10],[20,20]]" : "[[22,18],[20,20]]");
  text += R"({"step":10,"main_loss":5,"evaluated":true})";
  const auto log = folder.with("log.jsonl", text);
  const auto o = run({"plot", "load", log});
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  check_svg(o.out);
  CHECK(o.out.find(">MoE layer 0<") != std::string::npos);
  CHECK(o.out.find("MaxVio 0.50 → 0.10") != std::string::npos);
  CHECK(o.out.find("MaxVio 0.00 → 0.00") != std::string::npos);
  // Layer 0: expert 0 above the mean for five steps, expert 1 below; then less so.
  CHECK(count_of(o.out, "\"M0 0h5v1h-5z\"") == 1);
  CHECK(count_of(o.out, "\"M0 1h5v1h-5z\"") == 1);
  CHECK(count_of(o.out, "\"M5 0h5v1h-5z\"") == 1);
  CHECK(count_of(o.out, "\"M5 1h5v1h-5z\"") == 1);
  CHECK(count_of(o.out, "\"M0 0h10v1h-10zM0 1h10v1h-10z\"") == 1); // layer 1: the mean's colour
  const auto one = run({"plot", "load", log, "--layer", "1"});
  CHECK(one.out.find(">MoE layer 0<") == std::string::npos);
  CHECK(one.out.find(">MoE layer 1<") != std::string::npos);
  check_refusal(run({"plot", "load", log, "--layer", "2"}), 1, "--layer: 2 given, expected 0 to 1");
}

TEST_CASE("long logs are averaged to as many columns as a picture shows") {
  const Folder folder;
  std::string text;
  for (int s = 1; s <= 1000; ++s)
    text += step_line(s, 3, s % 2 == 0 ? "[[40,0]]" : "[[0,40]]");
  text += step_line(990, 3, "[[0,0]]"); // resumed; a step without tokens
  const auto o = run({"plot", "load", folder.with("log.jsonl", text)});
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  check_svg(o.out);
  CHECK(o.out.size() < 30'000);
}

// ---- timeline -----------------------------------------------------------------------------------

TEST_CASE("a step that ran as planned shows no idle time beyond the formula") {
  const std::vector<std::string> costs{"--cost-f", "10"};
  const std::vector<Rehearsal> rehearsals{
      {"dualpipe", 2, 4, costs},    {"dualpipe", 4, 10, costs},   {"dualpipev", 2, 6, costs},
      {"1f1b", 4, 9, costs},        {"zb1p", 4, 9, costs},        {"1f1b", 1, 3, costs},
      {"dualpipe", 4, 8, costs, 2}, {"dualpipev", 3, 7, costs, 2}};
  for (const auto& r : rehearsals) {
    CAPTURE(r.schedule);
    CAPTURE(r.pp);
    const Folder folder;
    const auto events = rehearse(r);
    write_ranks(folder, "trace", events);
    const auto out = folder.path("timeline.svg");
    const auto o = run({"plot", "timeline", folder.path("trace"), "--step", "3", "--out", out});
    check_says(o, "step 3: " + r.schedule + " on " + std::to_string(r.pp) + " ranks, " +
                      std::to_string(r.chunks) + " micro-batches");
    check_says(o, "idle beyond the formula: 0.0 % of the step");
    if (r.columns > 1)
      check_says(o, ", 2 pipelines");
    const auto svg = contents(out);
    check_svg(svg);
    CHECK(svg.find(">As it ran: ") != std::string::npos);
    CHECK(svg.find(">Ideal: ") != std::string::npos);
  }
}

TEST_CASE("a timeline tells the real times and the ideal ones apart") {
  const Folder folder;
  auto events = rehearse({"dualpipe", 4, 8, {"--cost-f", "10"}});
  write_ranks(folder, "trace", events);
  const auto plot = [&](std::vector<std::string> more) {
    more.insert(more.begin(),
                {"plot", "timeline", folder.path("trace"), "--out", folder.path("timeline.svg")});
    return run(more);
  };
  const auto measured = plot({});
  check_says(measured,
             "real       260.00 ms, 7.7 % idle, at most 20.00 ms on a rank; jobs ran 92.3 %");
  check_says(measured, "ideal      260.00 ms, by the formula 20.00 ms idle");
  // Costs that are given replace the medians.
  check_says(plot({"--cost-fb", "20"}), "by the formula 10.00 ms idle");
  const auto json =
      boost::json::parse(run({"plot", "timeline", folder.path("trace"), "--json"}).out);
  CHECK(json.at("total_ms").to_number<double>() == doctest::Approx(260));
  CHECK(json.at("idle_ms").to_number<double>() == doctest::Approx(20));
  CHECK(json.at("computing_ms").to_number<double>() == doctest::Approx(240));
  CHECK(json.at("formula_ms").to_number<double>() == doctest::Approx(20));
  CHECK(json.at("excess").to_number<double>() == doctest::Approx(0));
  CHECK(json.at("costs_ms").at("fb").to_number<double>() == doctest::Approx(30));
  check_refusal(plot({"--cost-f", "-1"}), 2, "--cost-f: -1 given");
  check_refusal(plot({"--pp", "2"}), 1, "no schedule's programs");
}

TEST_CASE("all ranks may be in one file, and an evaluation is not taken for the training") {
  const Folder folder;
  std::vector<std::string> all{R"({"ph":"M","name":"process_name","pid":0,"args":{"name":"x"}})"};
  const auto events = rehearse({"1f1b", 2, 4, {"--cost-f", "10"}});
  for (size_t rank = 0; rank < events.size(); ++rank) {
    // The same program of the same step without backward work, before and after.
    const auto evaluate = [&](double at) {
      for (const auto& text : events[rank]) {
        const auto e = boost::json::parse(text);
        const std::string name{e.at("name").as_string()};
        if (e.at("cat").as_string() != "op")
          continue;
        all.push_back(
            event(name, "op", at, at + (name[0] == 'F' ? 5 : 0), static_cast<int>(rank), 3));
        at += 5;
      }
    };
    evaluate(4e6);
    all.insert(all.end(), events[rank].begin(), events[rank].end());
    evaluate(6e6);
  }
  const auto trace =
      folder.with("trace.json", "{\"displayTimeUnit\":\"ms\",\"traceEvents\":" + as_list(all) +
                                    ",\"otherData\":{\"a\":[1]}}");
  const auto o = run({"plot", "timeline", trace, "--out", folder.path("t.svg")});
  check_says(o, "step 3: 1f1b on 2 ranks, 4 micro-batches");
  check_says(o, "real       150.00 ms");
}

// ---- what is wrong ------------------------------------------------------------------------------

TEST_CASE("of a run that writes its log or crashed, the last line may be half there") {
  const Folder folder;
  const auto log = folder.with("log.jsonl", step_line(1, 3) + step_line(2, 3) + "{\"step\":3,\"ma");
  for (const char* what : {"loss", "load"})
    CHECK(run({"plot", what, log, "--out", folder.path("x.svg")}).code == 0);
}

TEST_CASE("broken logs are refused, naming file, line and field") {
  const Folder folder;
  const auto good = step_line(1, 3);
  const auto refused = [&](const char* what, const std::string& log, const std::string& text) {
    const auto path = folder.with("log.jsonl", log);
    check_refusal(run({"plot", what, path, "--out", folder.path("x.svg")}), 1, path + text);
    CHECK(!std::filesystem::exists(folder.path("x.svg")));
  };
  for (const char* what : {"loss", "load"}) {
    refused(what, "", ": is empty");
    refused(what, " \n\n", ": is empty");
    refused(what, good + "{\"step\":2,\n", ":2:");
    refused(what, "{\"step\":2,", ":1:");
    refused(what, good + "loss 3\n" + good, ":2:");
    refused(what, good + "[1]\n", ":2:");
    refused(what, good + "{\"step\":2}\n", ":2: main_loss: expected a number");
    refused(what, "{\"main_loss\":2}\n", ":1: step: expected an integer");
    refused(what, "{\"step\":-1,\"main_loss\":2}\n", ":1: step: expected an integer");
    refused(what, "{\"step\":1,\"main_loss\":\"2\"}\n", ":1: main_loss: expected a number");
    refused(what, "{\"step\":1,\"main_loss\":2,\"mtp_loss\":[\"x\"]}\n", ":1: mtp_loss: expected");
    refused(what, good + std::string(3, '\0') + "\n", ":2:");
  }
  refused("load", "{\"step\":1,\"main_loss\":2}\n", ":1: load: expected a list");
  refused("load", step_line(1, 3, "[1,2]"), ":1: load: expected a list");
  refused("load", step_line(1, 3, "[[]]"), ":1: load: expected a list");
  refused("load", step_line(1, 3, "[]"), ":1: load: no MoE layers");
  refused("load", step_line(1, 3, "[[1,-2]]"), ":1: load: -2 tokens");
  refused("load", good + step_line(2, 3, "[[1,2]]"), ":2: load: other layers or experts");
  refused("load", R"({"step":1,"main_loss":2,"evaluated":true})", ": holds evaluations only");
  check_refusal(run({"plot", "loss", folder.path("none")}), 1, "none: can't be read");
  check_refusal(run({"plot", "load", folder.path("")}), 1, "is a folder");
}

TEST_CASE("broken traces are refused, saying what is wrong with them") {
  const Folder folder;
  const auto refused = [&](const std::string& trace, const std::string& text) {
    const auto path = folder.with("trace.json", trace);
    check_refusal(run({"plot", "timeline", path}), 1, text);
  };
  const std::string op = event("F0.0", "op", 1, 2, 0, 3);
  const auto without = [&](const std::string& field) {
    auto object = boost::json::parse(op).as_object();
    object.erase(field);
    return as_list({boost::json::serialize(object)});
  };
  const auto with = [&](const std::string& field, const boost::json::value& value) {
    auto object = boost::json::parse(op).as_object();
    object[field] = value;
    return as_list({boost::json::serialize(object)});
  };
  refused("", "is no JSON");
  refused("[" + op, "is no JSON");
  refused("[\n" + op + "\n] x", "trace.json:3: is no JSON");
  refused("[\n" + op + ",\n!]", "trace.json:3: is no JSON");
  refused(std::string(100, '['), "is no JSON");
  refused("{}", "is no Chrome trace");
  refused("3", "is no Chrome trace");
  refused("[]", "no spans of pipeline ops");
  refused(as_list({event("attention", "compute", 1, 2, 0, -1)}), "no spans of pipeline ops");
  refused(without("ts"), "event 1: \"F0.0\" without a usable ts");
  refused(without("dur"), "event 1: \"F0.0\" without a usable dur");
  refused(without("pid"), "event 1: \"F0.0\" without a usable pid");
  refused(without("args"), "event 1: \"F0.0\" without args.step");
  refused(with("ts", "soon"), "without a usable ts");
  refused(with("ts", 1e300), "without a usable ts");
  refused(with("dur", -5), "negative dur");
  refused(with("pid", -1), "pid: -1 is no rank");
  refused(with("pid", 1.5), "pid: 1.5 is no rank");
  refused(with("pid", 1e12), "is no rank");
  refused(as_list({op}), "no schedule's programs: 1 ranks with 1 to 1 ops");
  refused(as_list({event("what?", "op", 1, 2, 0, 3)}), "no schedule's programs");
  refused(as_list({event("F0.0", "op", 1, 2, 1, 3)}), "no ops of rank 0 in step 3");
  check_refusal(run({"plot", "timeline", folder.with("one.json", as_list({op})), "--step", "9"}), 1,
                "no ops of step 9; there are 3 to 3");
  check_refusal(run({"plot", "timeline", folder.path("none")}), 1, "none: can't be read");
  check_refusal(run({"plot", "timeline", folder.path("")}), 1, "is a folder");

  // A rank whose file is missing, and clocks of several hosts.
  auto events = rehearse({"1f1b", 4, 4, {}});
  write_ranks(folder, "part", {events[0], events[1], events[2]});
  check_refusal(run({"plot", "timeline", folder.path("part")}), 1, "is a rank's file missing");
  std::vector<std::string> later;
  for (const auto& text : events[3]) {
    auto e = boost::json::parse(text).as_object();
    e["ts"] = e["ts"].to_number<double>() + 1e9;
    later.push_back(boost::json::serialize(e));
  }
  write_ranks(folder, "clocks", {events[0], events[1], events[2], later});
  check_refusal(run({"plot", "timeline", folder.path("clocks")}), 1, "on several clocks");
}

TEST_CASE("pictures that can't be written are a failure") {
  const Folder folder;
  const auto log = folder.with("log.jsonl", log_of(5, 3));
  write_ranks(folder, "trace", rehearse({"1f1b", 2, 4, {}}));
  const std::vector<std::vector<std::string>> commands{
      {"plot", "loss", log}, {"plot", "load", log}, {"plot", "timeline", folder.path("trace")}};
  const auto full = [] { dup2(open("/dev/full", O_WRONLY), STDOUT_FILENO); };
  for (auto command : commands) {
    check_refusal(run(command, full), 1, "standard output");
    command.insert(command.end(), {"--out", folder.path("no/such/folder.svg")});
    check_refusal(run(command), 1, "no/such/folder.svg");
    command.back() = "/dev/full";
    check_refusal(run(command), 1, "/dev/full: is not a regular file");
  }
  check_refusal(run({"plot", "loss"}), 2, "LOG is required");
  check_refusal(run({"plot"}), 2, "subcommand");
  check_refusal(run({"plot", "los"}), 2, "\"los\" is no command; `troupe plot --help` lists them");
}

} // namespace troupe::test
