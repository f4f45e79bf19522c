// `troupe train` as a user runs it: what it prints, writes and refuses.
#include "tests/apps/run_program.hpp"

#include "config/safetensors.hpp"

#include <boost/json.hpp>
#include <doctest/doctest.h>

#include <sys/stat.h>

#include <cmath>
#include <sstream>

namespace troupe::test {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

// A folder with rows for tiny-v3, of 256 ids.
class TrainFolder {
public:
  TrainFolder() {
    std::string name = (fs::temp_directory_path() / "troupe-train-XXXXXX").string();
    if (!mkdtemp(name.data()))
      std::abort();
    folder_ = name;
    write_rows("rows", 16, 1);
    write_rows("held-out", 8, 2);
  }
  TrainFolder(const TrainFolder&) = delete;
  TrainFolder& operator=(const TrainFolder&) = delete;
  ~TrainFolder() { fs::remove_all(folder_); }

  void write_rows(const std::string& name, int64_t rows, uint32_t seed) const {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < rows * 17; ++i)
      ids.push_back(static_cast<int32_t>((seed = seed * 1664525 + 1013904223) >> 24));
    auto file = SafetensorsWriter::create(path(name), {{"tokens", DType::i32, {rows, 17}}});
    REQUIRE(file);
    REQUIRE(!(*file)->append(std::as_bytes(std::span{ids})));
    REQUIRE(!(*file)->finish());
  }
  [[nodiscard]] std::string path(const std::string& name) const {
    return (folder_ / name).string();
  }
  // `troupe train` with these flags, and some where they say nothing else.
  [[nodiscard]] std::vector<std::string> command(std::vector<std::string> flags) const {
    const std::vector<std::pair<std::string, std::string>> others{
        {"--init", "tiny-v3"}, {"--tokens", path("rows")}, {"--batch", "8"}, {"--steps", "2"},
        {"--grad-lanes", "2"}, {"--compute", "f32"},       {"--seed", "3"}};
    for (const auto& [flag, value] : others)
      if (std::ranges::find(flags, flag) == flags.end())
        flags.insert(flags.end(), {flag, value});
    flags.insert(flags.begin(), "train");
    return flags;
  }

private:
  fs::path folder_;
};

// Whole lines; the last may be under way.
std::vector<json::object> read_log(const std::string& path) {
  std::vector<json::object> lines;
  std::ifstream file{path};
  for (std::string line; std::getline(file, line) && !file.eof();)
    lines.push_back(json::parse(line).as_object());
  return lines;
}

std::string bytes_of(const fs::path& path) {
  std::ifstream file{path, std::ios::binary};
  return {std::istreambuf_iterator<char>{file}, {}};
}

void check_refused(const Outcome& outcome, const std::string& why, int code = 1) {
  CAPTURE(outcome.err);
  CHECK(outcome.code == code);
  CHECK(outcome.err.find("troupe: error: ") != std::string::npos);
  CHECK(outcome.err.find(why) != std::string::npos);
  CHECK(std::count(outcome.err.begin(), outcome.err.end(), '\n') == 1);
  CHECK(outcome.out.empty());
  CHECK(outcome.left_behind == 0);
}

// Waits until a run has logged `lines` steps.
void await_lines(const std::string& log, size_t lines) {
  for (int i = 0; i < 3000 && read_log(log).size() < lines; ++i)
    usleep(10'000);
  REQUIRE(read_log(log).size() >= lines);
}

} // namespace

TEST_CASE("a run logs every step, and leaves a model that generates") {
  const TrainFolder f;
  for (const std::string fabric : {"ucx", "loopback"}) {
    CAPTURE(fabric);
    const auto out = f.path(fabric);
    const auto ran =
        run(f.command({"--steps", "3", "--pp", "2", "--fabric", fabric, "--out", out, "--held-out",
                       f.path("held-out"), "--json", "--trace", f.path(fabric + ".trace")}));
    CAPTURE(ran.err);
    REQUIRE(ran.code == 0);
    CHECK(ran.left_behind == 0);
    const auto lines = read_log(out + "/log.jsonl");
    REQUIRE(lines.size() == 4);
    for (size_t i = 0; i < 3; ++i) {
      const auto& line = lines[i];
      CHECK(line.at("step").as_int64() == static_cast<int64_t>(i) + 1);
      for (const char* name : {"main_loss", "balance_loss", "total_loss", "grad_norm", "lr",
                               "tokens_per_s", "bubble", "seconds"}) {
        CAPTURE(name);
        CHECK(line.at(name).as_double() > 0);
      }
      CHECK(line.at("mtp_loss").as_array().size() == 2); // tiny-v3 has two modules
      CHECK(line.at("max_vio").as_array().size() == 4);
      int64_t tokens = 0;
      for (const auto& n : line.at("load").as_array().at(0).as_array())
        tokens += n.as_int64();
      CHECK(tokens == 8 * 16 * 4); // top 4
      CHECK(line.at("wire_bytes").as_int64() > 0);
      CHECK(line.at("tokens").as_int64() == (static_cast<int64_t>(i) + 1) * 8 * 16);
    }
    CHECK(lines[3].at("evaluated").as_bool());
    CHECK(lines[3].at("evaluated_tokens").as_int64() == 8 * 16);
    const auto told = json::parse(ran.out).as_object();
    CHECK(told.at("steps").as_int64() == 3);
    CHECK(told.at("checkpoint").as_string() == out + "/step-00000003");
    CHECK(told.at("held_out_perplexity").as_double() ==
          doctest::Approx(std::exp(lines[3].at("main_loss").as_double())));
    CHECK(json::parse(bytes_of(f.path(fabric + ".trace"))).as_array().size() > 100);
    const auto said = run({"generate", out, "--tokens", "5,6", "-n", "4", "--json"});
    CHECK(said.code == 0);
  }
  // Wherever ranks run.
  for (const std::string name :
       {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"})
    CHECK(bytes_of(f.path("ucx/" + name)) == bytes_of(f.path("loopback/" + name)));
}

TEST_CASE("a signal ends a run after its step, and it goes on from there to the bit") {
  const TrainFolder f;
  const auto whole = f.path("whole"), parts = f.path("parts");
  const auto command = [&](const std::string& out, const std::string& steps,
                           std::vector<std::string> more) {
    more.insert(more.end(), {"--steps", steps, "--out", out, "-q"});
    return f.command(more);
  };
  int64_t stopped = 0;
  for (const int signal : {SIGINT, SIGTERM}) { // to all processes, as terminals and launchers do
    std::vector<std::string> more{"--pp", "2"};
    if (stopped > 0)
      more.push_back("--resume");
    Program program{command(parts, "100000", more)};
    await_lines(parts + "/log.jsonl", static_cast<size_t>(stopped) + 2);
    program.signal_all(signal);
    const auto ended = program.finish();
    CAPTURE(ended.err);
    CHECK(ended.code == 0);
    CHECK(ended.left_behind == 0);
    stopped = read_log(parts + "/log.jsonl").back().at("step").as_int64();
  }
  auto name = std::to_string(stopped);
  CHECK(fs::exists(parts + "/step-" + std::string(8 - name.size(), '0') + name));
  // What a crash might have left beyond the checkpoint.
  std::ofstream{parts + "/log.jsonl", std::ios::app} << "{\"step\":" << stopped + 1
                                                     << ",\"main_loss\":99}\n{\"step\":";
  const auto steps = std::to_string(stopped + 2);
  REQUIRE(run(command(parts, steps, {"--resume", "--ep", "2"})).code == 0);
  REQUIRE(run(command(whole, steps, {"--ep", "2"})).code == 0);
  const auto one = read_log(whole + "/log.jsonl"), other = read_log(parts + "/log.jsonl");
  REQUIRE(one.size() == static_cast<size_t>(stopped) + 2);
  REQUIRE(other.size() == one.size());
  for (size_t i = 0; i < one.size(); ++i)
    for (const char* field : {"step", "main_loss", "mtp_loss", "grad_norm", "load"})
      CHECK(one[i].at(field) == other[i].at(field));
  for (const auto& entry : fs::recursive_directory_iterator{whole + "/latest/"})
    if (entry.path().extension() == ".safetensors") {
      const auto same = fs::path{parts} / "latest" / fs::relative(entry.path(), whole + "/latest");
      CHECK(bytes_of(entry.path()) == bytes_of(same));
    }
}

TEST_CASE("tasks of a launcher save together when all are told to end") {
  const TrainFolder f;
  const auto out = f.path("out");
  std::string command;
  for (const auto& word : f.command({"--pp", "2", "--steps", "100000", "--out", out, "-q"}))
    command += " " + word;
  const std::string script =
      "trap : TERM; for i in 0 1; do RANK=$i WORLD_SIZE=2 LOCAL_RANK=$i LOCAL_WORLD_SIZE=2 "
      "MASTER_ADDR=127.0.0.1 MASTER_PORT=29473 " TROUPE_PROGRAM +
      command +
      " & pids=\"$pids $!\"; done; for p in $pids; do wait $p; rc=$?; "
      "while kill -0 $p 2>/dev/null; do wait $p; rc=$?; done; echo rc=$rc; done";
  Program program{{"-c", script}, {}, "bash"};
  await_lines(out + "/log.jsonl", 2);
  program.signal_all(SIGTERM);
  const auto ended = program.finish();
  CAPTURE(ended.err);
  CHECK(ended.out == "rc=0\nrc=0\n");
  CHECK(ended.left_behind == 0);
  const auto step = read_log(out + "/log.jsonl").back().at("step").as_int64();
  CHECK(fs::read_symlink(out + "/latest").string().ends_with(std::to_string(step)));
}

TEST_CASE("a signal while ranks load ends the run, too") {
  const TrainFolder f;
  for (int i = 1; i <= 8; ++i) {
    const auto out = f.path("out" + std::to_string(i));
    Program program{f.command({"--pp", "2", "--steps", "100000", "--out", out, "-q"})};
    // Since ranks are there, signals are handled.
    while (program.children().size() < 3)
      usleep(100);
    usleep(static_cast<useconds_t>(i) * 7'000);
    kill(program.pid(), SIGINT);
    const auto ended = program.finish();
    CAPTURE(ended.err);
    CHECK_FALSE(ended.timed_out);
    CHECK(ended.code == 0);
    CHECK(ended.left_behind == 0);
  }
}

TEST_CASE("a second signal ends a run at once") {
  const TrainFolder f;
  for (const std::string fabric : {"ucx", "loopback"}) {
    CAPTURE(fabric);
    // A step that takes minutes.
    Program program{
        f.command({"--fabric", fabric, "--out", f.path(fabric), "-q", "--batch", "1000000"})};
    for (int i = 0; i < 1000 && !fs::exists(f.path(fabric + "/log.jsonl")); ++i)
      usleep(10'000); // until the client has begun
    REQUIRE(fs::exists(f.path(fabric + "/log.jsonl")));
    kill(program.pid(), SIGTERM);
    usleep(300'000);
    CHECK(kill(program.pid(), 0) == 0); // it would have finished its step
    kill(program.pid(), SIGTERM);
    const auto ended = program.finish(std::chrono::seconds{10});
    CHECK_FALSE(ended.timed_out);
    CHECK(ended.code != 0);
    CHECK(ended.left_behind == 0);
  }
}

TEST_CASE("a rank that dies ends the run, and it goes on from the checkpoint before") {
  const TrainFolder f;
  const auto out = f.path("out");
  const auto command = [&](const std::string& steps, std::vector<std::string> more) {
    more.insert(more.end(),
                {"--pp", "2", "--steps", steps, "--save-every", "1", "--out", out, "-q"});
    return f.command(more);
  };
  {
    Program program{command("100000", {})};
    await_lines(out + "/log.jsonl", 4);
    const auto children = program.children();
    REQUIRE(children.size() == 3); // two ranks and the client
    kill(children[1], SIGKILL);
    const auto ended = program.finish();
    CAPTURE(ended.err);
    CHECK(ended.code == 1);
    CHECK(ended.err.find("rank 1 was lost") != std::string::npos);
    CHECK(std::count(ended.err.begin(), ended.err.end(), '\n') == 1);
    CHECK(ended.left_behind == 0);
  }
  const auto latest = fs::read_symlink(out + "/latest").string();
  const auto step = std::stoll(latest.substr(latest.find('-') + 1));
  CHECK(step > 1);
  REQUIRE(run(command(std::to_string(step + 1), {"--resume"})).code == 0);
  const auto lines = read_log(out + "/log.jsonl");
  REQUIRE(lines.size() == static_cast<size_t>(step) + 1); // steps that were not saved are gone
  for (size_t i = 0; i < lines.size(); ++i)
    CHECK(lines[i].at("step").as_int64() == static_cast<int64_t>(i) + 1);
}

TEST_CASE("a disk that is full ends a run, and the checkpoint before stays") {
  const TrainFolder f;
  const auto out = f.path("out");
  REQUIRE(run(f.command({"--steps", "2", "--out", out, "-q"})).code == 0);
  const auto before = bytes_of(out + "/model-00001-of-00001.safetensors");
  const auto small_files = [] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100'000, 100'000};
    setrlimit(RLIMIT_FSIZE, &limit);
  };
  const auto full = run(f.command({"--steps", "4", "--out", out, "--resume", "-q"}), small_files);
  check_refused(full, "checkpoint of step 4");
  CHECK(full.err.find("the last good checkpoint is " + out + "/step-00000002") !=
        std::string::npos);
  CHECK(bytes_of(out + "/model-00001-of-00001.safetensors") == before);
  CHECK(fs::read_symlink(out + "/latest") == "step-00000002");
  CHECK(run(f.command({"--steps", "4", "--out", out, "--resume", "-q"})).code == 0);
  CHECK_FALSE(fs::exists(out + "/.tmp-step-00000004"));
}

TEST_CASE("two runs do not write into one folder") {
  const TrainFolder f;
  const auto out = f.path("out");
  Program first{f.command({"--steps", "100000", "--out", out, "-q"})};
  await_lines(out + "/log.jsonl", 1);
  check_refused(run(f.command({"--out", out, "-q"})), "another run is writing into " + out);
  first.signal_all(SIGTERM);
  REQUIRE(first.finish().code == 0);
  const auto last = read_log(out + "/log.jsonl").back().at("step").as_int64();
  CHECK(
      run(f.command({"--steps", std::to_string(last + 1), "--out", out, "--resume", "-q"})).code ==
      0);
}

TEST_CASE("the state of a run is checked like its tensors") {
  const TrainFolder f;
  const auto out = f.path("out");
  REQUIRE(run(f.command({"--steps", "2", "--save-every", "1", "--out", out, "-q"})).code == 0);
  const auto path = out + "/step-00000002/training/state.json";
  auto state = bytes_of(path);
  const auto tokens = state.find("\"tokens\": ");
  REQUIRE(tokens != std::string::npos);
  state[tokens + 10] ^= 1;
  std::ofstream{path, std::ios::binary} << state;
  const auto resumed = run(f.command({"--steps", "2", "--out", out, "--resume", "-q"}));
  CAPTURE(resumed.err);
  CHECK(resumed.code == 0);
  CHECK(resumed.err.find("state.json: damaged, its checksum is wrong; the run goes on from "
                         "step-00000001") != std::string::npos);
}

TEST_CASE("a log goes where its path leads, be it a link or a pipe") {
  const TrainFolder f;
  const auto link = f.path("link"), pipe = f.path("pipe");
  fs::create_symlink("target", link);
  std::ofstream{f.path("target")} << "old\n";
  REQUIRE(run(f.command({"--log", link, "-q"})).code == 0);
  CHECK(fs::is_symlink(link));
  CHECK(read_log(f.path("target")).size() == 2);
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  const int reader = open(pipe.c_str(), O_RDWR | O_NONBLOCK);
  REQUIRE(reader >= 0);
  CHECK(run(f.command({"--log", pipe, "-q"})).code == 0);
  CHECK(fs::is_fifo(pipe));
  std::string text(1 << 16, '\0');
  const auto got = read(reader, text.data(), text.size());
  close(reader);
  REQUIRE(got > 0);
  CHECK(std::count(text.begin(), text.begin() + got, '\n') == 2);
}

TEST_CASE("a log that can't be written is told, and fails the run that goes on") {
  const TrainFolder f;
  const auto small_files = [] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{300, 300}; // less than a line
    setrlimit(RLIMIT_FSIZE, &limit);
  };
  const auto ran =
      run(f.command({"--log", f.path("log"), "--fabric", "loopback", "-q"}), small_files);
  CAPTURE(ran.err);
  CHECK(ran.code == 1);
  CHECK(ran.err.find("step 1 and those after it are not logged") != std::string::npos);
}

TEST_CASE("a run does not end because nobody reads what it says") {
  const TrainFolder f;
  for (const bool closed : {true, false}) {
    const auto out = f.path(closed ? "closed" : "limited");
    const auto mute = [&] {
      close(STDERR_FILENO);
      if (!closed) // open, but nothing can be written there
        dup2(open("/dev/zero", O_RDONLY), STDERR_FILENO);
    };
    CHECK(run(f.command({"--pp", "2", "--out", out}), mute).code == 0);
    CHECK(read_log(out + "/log.jsonl").size() == 2);
    const auto failed = run(f.command({"--pp", "3", "--fabric", "loopback"}), mute);
    CHECK(failed.code == 1); // and does not crash when it fails
  }
}

TEST_CASE("a loss that is no number ends a run, naming step, layer and rank") {
  const TrainFolder f;
  const auto out = f.path("out");
  const auto ran = run(f.command({"--steps", "99", "--lr", "1000", "--clip", "0", "--pp", "2",
                                  "--save-every", "1", "--out", out, "-q"}));
  check_refused(ran, "not finite");
  for (const char* word : {"step ", "layer ", "rank ", "the last good checkpoint is "})
    CHECK(ran.err.find(word) != std::string::npos);
  CHECK(run({"generate", out, "--tokens", "5", "-n", "1", "-q"}).code == 0);
}

TEST_CASE("settings that can't be are refused before anything starts") {
  const TrainFolder f;
  const auto refused = [&](std::vector<std::string> flags, const std::string& why, int code = 1) {
    check_refused(run(f.command(std::move(flags))), why, code);
  };
  refused({"--tokens", f.path("none")}, "none");
  std::ofstream{f.path("garbage")} << "not a tensor file";
  refused({"--tokens", f.path("garbage")}, "garbage");
  refused({"--init", "no-such"}, "\"no-such\" is neither a preset");
  refused({"--backend", "magic"}, "magic");
  refused({"--pp", "3"}, "pp: 3");
  refused({"--pp", "4"}, "pp: 4");
  refused({"--ep", "2", "--dp", "2"}, "dp");
  refused({"--batch", "6", "--pp", "2"}, "batch");
  refused({"--resume", "--out", f.path("nothing-here")}, "nothing-here");
  refused({"--batch", "6", "--micro-batch", "4"}, "--batch", 2);
  refused({"--grad-lanes", "3"}, "grad_lanes: 3");
  refused({"--steps", "-1"}, "--steps", 2);
  refused({"--recompute=maybe"}, "neither true nor false", 2);
  refused({"--dump-gradients", f.path("rows")}, "dump_gradients");
  refused({"--batch", "16777216", "--micro-batch", "16777216"}, "memory are available");
  const auto train = [&](const std::string& flag, const std::string& value, std::string rows) {
    return run({"train", flag, value, rows == "rows" ? "--tokens" : "--data", f.path(rows),
                "--steps", "1"});
  };
  check_refused(train("--model", f.path("none"), "rows"), "none");
  check_refused(train("--init", "tiny-v3", "none"), "none");
  fs::create_directory(f.path("empty"));
  check_refused(train("--init", "tiny-v3", "empty"), "empty");

  refused({"--init", "v3", "--batch", "8"}, "memory are available");

  // Folders of others stay as they are.
  fs::create_directory(f.path("mine"));
  std::ofstream{f.path("mine/config.json")} << "precious";
  refused({"--out", f.path("mine")}, "config.json");
  CHECK(bytes_of(f.path("mine/config.json")) == "precious");
  refused({"--out", f.path("rows")}, "rows");
}

TEST_CASE("a run is not resumed with another model or other rows") {
  const TrainFolder f;
  const auto out = f.path("out");
  REQUIRE(run(f.command({"--steps", "1", "--out", out, "-q"})).code == 0);
  check_refused(run(f.command({"--steps", "2", "--out", out, "-q"})), "--resume");
  const auto resume = [&](const std::string& model, const std::string& rows) {
    return run(
        f.command({"--init", model, "--tokens", f.path(rows), "--out", out, "--resume", "-q"}));
  };
  check_refused(resume("tiny-v2", "rows"), "another model");
  check_refused(resume("tiny-v3", "held-out"), "other data");
  CHECK(resume("tiny-v3", "rows").code == 0);
}

} // namespace troupe::test
