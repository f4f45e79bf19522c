// Fine-tuning on conversations, as a user runs it: samples that share a row do not see each other,
// and the layout changes no bit.
#include "tests/apps/run_program.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <boost/json.hpp>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

namespace troupe::test {

namespace {

namespace json = boost::json;

const std::string kFirst =
    R"({"messages": [{"role": "user", "content": "What is the name of the first book?"},)"
    R"( {"role": "assistant", "content": "Genesis."}]})"
    "\n";
const std::string kSecond =
    R"({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content":)"
    R"( "And who wrote it?"}, {"role": "assistant", "content": "Tradition names Moses."},)"
    R"( {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Farewell!"}]})"
    "\n";

struct Losses {
  double main = 0, mtp = 0;
  friend bool operator==(const Losses&, const Losses&) = default;
};

int64_t sum(const json::value& counts) {
  int64_t all = 0;
  for (const auto& n : counts.as_array())
    all += n.as_int64();
  return all;
}

class Conversations {
public:
  Outcome train(const std::string& lines, const std::vector<std::string>& more) const {
    write_file(folder_ / "chat.jsonl", lines);
    std::vector<std::string> args{"train",
                                  "--init",
                                  std::string{TROUPE_SOURCE_DIR} + "/config/models/tiny",
                                  "--chat",
                                  (folder_ / "chat.jsonl").string(),
                                  "--compute",
                                  "f32",
                                  "--fabric",
                                  "loopback",
                                  "--threads",
                                  "1",
                                  "--init-std",
                                  "0.05",
                                  "--json"};
    args.insert(args.end(), more.begin(), more.end());
    if (std::ranges::find(more, "--sequence-length") == more.end())
      args.insert(args.end(), {"--sequence-length", "160"});
    return run(args);
  }
  // The log of one step, with rows of so many tokens.
  json::object step(const std::string& lines, const std::string& length) const {
    const auto log = (folder_ / "log.jsonl").string();
    const auto outcome = train(lines, {"--steps", "1", "--batch", "1", "--balance-alpha", "0.1",
                                       "--sequence-length", length, "--log", log});
    CAPTURE(outcome.err);
    REQUIRE(outcome.code == 0);
    std::ifstream file{log};
    std::string line;
    REQUIRE(std::getline(file, line));
    return json::parse(line).as_object();
  }
  Losses losses(const std::string& lines, const std::vector<std::string>& more) const {
    const auto outcome = train(lines, more);
    CAPTURE(outcome.err);
    REQUIRE(outcome.code == 0);
    const auto object = json::parse(outcome.out).as_object();
    return {object.at("main_loss").to_number<double>(), object.at("mtp_loss").to_number<double>()};
  }

private:
  ScratchFolder folder_;
};

} // namespace

TEST_CASE("samples that share a row do not see each other, in the main model and in MTP") {
  const Conversations chat;
  const std::vector<std::string> one_step{"--steps", "1", "--batch", "1", "--balance-alpha", "0"};
  const auto first = chat.losses(kFirst, one_step), second = chat.losses(kSecond, one_step);
  const auto both = chat.losses(kFirst + kSecond, one_step);
  // Were they blind, the row's loss is the mean of theirs, weighted by the tokens that count: one
  // share for both losses, whatever the numbers. F32 sums of some ten terms agree to 1e-6.
  const double share = (both.main - second.main) / (first.main - second.main);
  const double mtp_share = (both.mtp - second.mtp) / (first.mtp - second.mtp);
  CHECK(share > 0);
  CHECK(share < 0.5); // the first has fewer tokens
  CHECK(mtp_share == doctest::Approx(share).epsilon(1e-4));
  CHECK(chat.losses(kSecond + kFirst, one_step).main == doctest::Approx(both.main).epsilon(1e-6));
}

TEST_CASE("padding is no expert's load, and changes neither biases nor gradients") {
  const Conversations chat;
  const auto shorter = chat.step(kFirst, "160"), longer = chat.step(kFirst, "224");
  CHECK(shorter.at("load") == longer.at("load"));
  CHECK(shorter.at("max_vio") == longer.at("max_vio"));
  const auto& load = shorter.at("load").as_array();
  const auto text = sum(load.front()); // four experts for each token of the sample
  CHECK(text > 0);
  CHECK(text < 4 * 100);
  CHECK(sum(load.back()) ==
        text - 4); // the MTP module takes in the next token, and the last has none
  for (const char* name : {"main_loss", "mtp_loss", "balance_loss", "grad_norm"}) {
    CAPTURE(name);
    CHECK(shorter.at(name).as_double() ==
          doctest::Approx(longer.at(name).as_double()).epsilon(1e-6));
  }
}

TEST_CASE("fine-tuning gives the same losses to the bit on one rank and in a pipeline") {
  const Conversations chat;
  std::string lines;
  for (int i = 0; i < 12; ++i)
    lines += kFirst + kSecond;
  const std::vector<std::string> steps{"--steps", "3", "--batch", "4", "--lr", "1e-3"};
  const auto with = [&](const char* pp) {
    auto args = steps;
    args.insert(args.end(), {"--pp", pp});
    return chat.losses(lines, args);
  };
  const auto one = with("1");
  CHECK(one == with("2"));
  CHECK(one.main > 0);
}

TEST_CASE("conversations that can't be used end the program with line and field") {
  const Conversations chat;
  const auto says = [&](const std::string& lines, const std::string& what) {
    const auto outcome = chat.train(lines, {"--steps", "1", "--batch", "1"});
    CAPTURE(outcome.err);
    CHECK(outcome.code == 1);
    CHECK(outcome.err.find(what) != std::string::npos);
  };
  says(kFirst + "{\"messages\": [{\"role\": \"user\"}]}\n", "chat.jsonl:2: messages[0].content");
  says(R"({"messages": [{"role": "user", "content": "x"}]})", "no answer");
}

} // namespace troupe::test
