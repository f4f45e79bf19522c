// What is wrong ends within seconds, with one message on stderr and a non-zero exit code.
#include "tests/apps/run_program.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <string_view>

namespace troupe::test {

namespace {

// One line on stderr that starts as ours do and says `text`.
void check_refused(const Outcome& o, int code, const std::string& text) {
  CAPTURE(o.err);
  CAPTURE(o.out);
  CHECK_FALSE(o.timed_out);
  CHECK(o.code == code);
  CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
  CHECK(o.err.starts_with("troupe: error: "));
  CHECK(o.err.find(text) != std::string::npos);
  CHECK(o.left_behind == 0);
}

struct Case {
  std::vector<std::string> args;
  int code;
  std::string text;
};

void write(const std::string& path, const std::string& text) {
  std::ofstream{path, std::ios::binary} << text;
}

} // namespace

TEST_CASE("wrong usage exits with 2 and says what was wrong") {
  const Scratch s;
  const std::vector<Case> cases{
      {{"bogus"}, 2, "\"bogus\" is no command"},
      {{"generate"}, 2, "MODEL is required"},
      {{"generate", s.model}, 2, "--tokens"},
      {{"generate", s.model, "--tokens", "5", "--prompt", "x"}, 2, "--tokens"},
      {{"generate", s.model, "--tokens", "5", "--bogus"}, 2, "--bogus"},
      {{"generate", s.model, "--tokens", "5,x"}, 2, "\"x\" is no token id"},
      {{"generate", s.model, "--tokens", ""}, 2, "tokens: empty"},
      {{"generate", s.model, "--tokens", "5", "--temperature", "-1"}, 2, "temperature: -1"},
      {{"generate", s.model, "--tokens", "5", "--temperature", "nan"}, 2, "temperature: nan"},
      {{"generate", s.model, "--tokens", "5", "--top-p", "0"}, 2, "top-p: 0"},
      {{"generate", s.model, "--tokens", "5", "--min-p", "2"}, 2, "min-p: 2"},
      {{"generate", s.model, "--tokens", "5", "--top-k", "-1"}, 2, "--top-k"},
      {{"generate", s.model, "--tokens", "5", "--repetition-penalty", "0"}, 2, "penalty: 0"},
      {{"generate", s.model, "--tokens", "5", "--max-tokens", "0"}, 2, "--max-tokens"},
      {{"generate", s.model, "--tokens", "5", "--threads", "100000"}, 2, "--threads"},
      {{"generate", s.model, "--tokens", "5", "--attach", "nowhere:99999"}, 2, "HOST:PORT"},
      {{"score", s.model, "--tokens", "5", "--hidden-states"}, 2, "--logits"},
      {{"generate", s.model, "--tokens", "5", "--seed", "-1"}, 2, "--seed: \"-1\" given"},
      {{"generate", s.model, "--tokens", "5", "--seed", "99999999999999999999"}, 2, "--seed"},
      {{"generate", s.model, "--tokens", "5", "--temperature", ""}, 2, "--temperature: \"\""},
      {{"generate", s.model, "--tokens", "5", "--attach", ""}, 2, "--attach: empty"},
      {{"generate", s.model, "--tokens", "5", "--logits", ""}, 2, "--logits: empty"},
      {{"generate", s.model, "--tokens", "5", "--attach", "x:1", "--ranks", "2"}, 2, "--ranks"},
      {{"tokenize", s.model}, 2, "--text"},
      {{"tokenize", TROUPE_SOURCE_DIR "/config/models/tiny", "--decode", ""}, 2, "tokens: empty"},
  };
  for (const auto& c : cases)
    check_refused(run(c.args), c.code, c.text);
}

TEST_CASE("a request that the model or the machine can't serve is refused in one line") {
  const Scratch s;
  std::string long_prompt = "5";
  for (int i = 1; i < 5000; ++i)
    long_prompt += ",5";
  const std::vector<std::string> generate{"generate", s.model, "-n", "2"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), generate.begin(), generate.end());
    return run(more);
  };
  check_refused(with({"--tokens", "5,99999"}), 1, "token 99999");
  check_refused(with({"--tokens", long_prompt}), 1, "5000 tokens do not fit a context of 4096");
  check_refused(with({"--prompt", "hi"}), 1, "no tokenizer");
  check_refused(with({"--tokens", "5", "--stop", "x"}), 1, "no tokenizer");
  check_refused(with({"--tokens", "5", "--ranks", "64"}), 1, "16 experts");
  check_refused(with({"--tokens", "5", "--ranks", "3", "--tp", "3"}), 1, "tp: 3");
  check_refused(with({"--tokens", "5", "--layout", "2+x"}), 1, "layout: \"2+x\"");
  check_refused(with({"--tokens", "5", "--backend", "none"}), 1, "backend");
  check_refused(with({"--tokens", "5", "--kv-tokens", "1000000000000"}), 1, "memory");
  check_refused(with({"--tokens", "5", "--attach", "127.0.0.1:1"}), 1, "127.0.0.1:1");
  check_refused(with({"--tokens", "5", "--logits", s.path("none/x")}), 1, "No such file");
  check_refused(with({"--tokens", "5", "--logits", "/dev/full"}), 1, "not a regular file");
  CHECK(std::filesystem::is_character_file("/dev/full"));
}

TEST_CASE("damaged checkpoints are refused, naming the file") {
  const Scratch s;
  namespace fs = std::filesystem;
  const auto copy = [&](const std::string& name) {
    fs::copy(s.model, s.path(name));
    return s.path(name);
  };
  const auto generate = [&](const std::string& model) {
    return run({"generate", model, "--tokens", "5", "-n", "2", "--ranks", "2"});
  };
  check_refused(generate(s.path("nothere")), 1, "nothere");
  for (const auto* command : {"generate", "score", "tokenize"}) {
    CAPTURE(command);
    const auto* text = std::string_view{command} == "generate" ? "--prompt" : "--text";
    check_refused(run({command, s.path("nothere"), text, "x"}), 1, "nothere: No such file");
    check_refused(run({command, s.model + "/config.json", text, "x"}), 1, "is no folder");
  }

  const auto truncated = copy("truncated");
  fs::resize_file(truncated + "/model.safetensors",
                  fs::file_size(truncated + "/model.safetensors") / 2);
  check_refused(generate(truncated), 1, "model.safetensors");

  const auto lying = copy("lying");
  std::fstream{lying + "/model.safetensors", std::ios::in | std::ios::out | std::ios::binary}
      << std::string(8, '\xff');
  check_refused(generate(lying), 1, "model.safetensors");

  const auto empty = copy("empty");
  fs::remove(empty + "/model.safetensors");
  check_refused(generate(empty), 1, "safetensors");

  const auto unknown = copy("unknown");
  write(unknown + "/config.json", R"({"model_type": "llama"})");
  check_refused(generate(unknown), 1, "llama");

  const auto plain = copy("no-mtp");
  std::ifstream in{plain + "/config.json"};
  std::string config{std::istreambuf_iterator<char>{in}, {}};
  const std::string modules = "\"num_nextn_predict_layers\": 2";
  REQUIRE(config.find(modules) != std::string::npos);
  config.replace(config.find(modules), modules.size(), "\"num_nextn_predict_layers\": 0");
  write(plain + "/config.json", config);
  check_refused(run({"generate", plain, "--tokens", "5", "--speculate", "1"}), 1, "MTP");
}

TEST_CASE("text that is no UTF-8 is refused, naming the file") {
  const Scratch s;
  const std::string tokenizer =
      TROUPE_SOURCE_DIR "/tests/reference/data/tokenizer/deepseek/tokenizer.json";
  if (!std::filesystem::exists(tokenizer))
    return;
  std::filesystem::copy(tokenizer, s.model);
  write(s.path("broken.txt"), "good \xff\xfe bad");
  check_refused(run({"generate", s.model, "--prompt-file", s.path("broken.txt")}), 1, "broken.txt");
  check_refused(run({"tokenize", s.model, "--file", s.path("broken.txt")}), 1, "broken.txt");
  check_refused(run({"tokenize", s.model, "--file", s.path("none.txt")}), 1, "none.txt");
}

TEST_CASE("a prompt that can't be read is refused with the system's reason, and leaves no output") {
  const Scratch s;
  const std::string tiny = TROUPE_SOURCE_DIR "/config/models/tiny";
  check_refused(run({"tokenize", tiny, "--file", "/"}), 1, "/: can't be read: Is a directory");
  check_refused(run({"tokenize", tiny, "--file", s.path("no")}), 1, "no: can't be read: No such");
  const auto o = run({"generate", s.model, "--tokens", "5,99999"});
  check_refused(o, 1, "token 99999");
  CHECK(o.out.empty());
}

TEST_CASE("weights that are no numbers end a run in one line, and stdout stays clean") {
  const Scratch s;
  const auto file = s.model + "/model.safetensors";
  uint64_t header = 0;
  std::ifstream{file, std::ios::binary}.read(reinterpret_cast<char*>(&header), sizeof header);
  std::fstream weights{file, std::ios::in | std::ios::out | std::ios::binary};
  weights.seekp(static_cast<std::streamoff>(sizeof header + header));
  weights << std::string(std::filesystem::file_size(file) - sizeof header - header, '\xff');
  weights.close();
  for (const auto* fabric : {"loopback", "ucx"}) {
    const auto o = run({"score", s.model, "--tokens", "5,6", "--json", "--fabric", fabric});
    check_refused(o, 1, "not finite");
    CHECK(o.out.empty());
  }
}

TEST_CASE("a checkpoint is made in a folder of its own, and an interrupted one leaves nothing") {
  const Scratch s;
  const auto folder = s.path("somebody's");
  std::filesystem::create_directory(folder);
  write(folder + "/letter.txt", "dear");
  check_refused(run({"init", "tiny-v3", folder}), 1, "holds letter.txt");
  std::filesystem::remove(folder + "/letter.txt");
  write(folder + "/tokenizer.json", "{}");
  CHECK(run({"init", "tiny-v3", folder}).code == 0);
  check_refused(run({"init", "tiny-v3", ""}), 1, "empty name");
  check_refused(run({"init", "kimi-k2", s.path("huge"), "--dtype", "f32"}), 1, "the disk has room");
  Program p{{"init", "bench-1b", s.path("cut")}};
  while (!std::filesystem::exists(s.path("cut")) || std::filesystem::is_empty(s.path("cut")))
    usleep(1000);
  kill(p.pid(), SIGTERM);
  const auto o = p.finish();
  CHECK(o.code == 128 + SIGTERM);
  CHECK(o.err.empty());
  CHECK(std::filesystem::is_empty(s.path("cut")));
}

TEST_CASE("a trace that can't be written is a failure, before or after the answer") {
  const Scratch s;
  for (const auto* fabric : {"ucx", "loopback"})
    check_refused(run({"generate", s.model, "--tokens", "5", "-n", "2", "-q", "--fabric", fabric,
                       "--trace", s.path("none/t")}),
                  1, "none/t.0.json");
  const auto small_files = [] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{64, 64};
    setrlimit(RLIMIT_FSIZE, &limit);
  };
  check_refused(run({"generate", s.model, "--tokens", "5", "-n", "2", "-q", "--ranks", "2",
                     "--trace", s.path("t")},
                    small_files),
                1, "can't be written");
}

TEST_CASE("results that can't be written are a failure, not a success") {
  const Scratch s;
  const auto full = [] { dup2(open("/dev/full", O_WRONLY), STDOUT_FILENO); };
  check_refused(run({"generate", s.model, "--tokens", "5", "-n", "4", "-q"}, full), 1, "");
  check_refused(run({"inspect", s.model, "--json"}, full), 1, "standard output");
  const auto no_reader = [] {
    int fds[2];
    if (pipe(fds) == 0)
      dup2(fds[1], STDOUT_FILENO);
    close(fds[0]);
    close(fds[1]);
  };
  check_refused(run({"generate", s.model, "--tokens", "5", "-n", "4", "-q"}, no_reader), 1, "");
  const auto small_files = [] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1024, 1024};
    setrlimit(RLIMIT_FSIZE, &limit);
  };
  check_refused(
      run({"generate", s.model, "--tokens", "5", "-n", "4", "--logits", s.path("l"), "-q"},
          small_files),
      1, s.path("l"));
  CHECK_FALSE(std::filesystem::exists(s.path("l")));
}

} // namespace troupe::test
