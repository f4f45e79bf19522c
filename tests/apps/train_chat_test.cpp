// Fine-tuning on conversations, as a user runs it: samples that share a row do not see each other,
// and the layout changes no bit.
#include "tests/apps/run_program.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <boost/json.hpp>

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
                                  "--sequence-length",
                                  "160",
                                  "--init-std",
                                  "0.05",
                                  "--json"};
    args.insert(args.end(), more.begin(), more.end());
    return run(args);
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
