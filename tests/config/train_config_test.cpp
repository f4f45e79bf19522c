#include "config/train_config.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

using namespace troupe;

namespace {

const std::string kFile = R"(init: "tiny-v3"
data: "shards"
sequence_length: 64
steps: 100
)";

std::string error_of(const std::string& more, const TrainOverrides& flags = {}) {
  const auto config = parse_train_config(kFile + more, "t.textproto", "conf", flags);
  return config ? "" : text_of(config.error());
}

} // namespace

TEST_CASE("a training config has the report's settings where it is silent") {
  const auto c = parse_train_config(kFile, "t.textproto", "conf", {});
  REQUIRE(c);
  CHECK(c->init == "tiny-v3");
  CHECK(c->data == "conf/shards");
  CHECK(c->sequence_length == 64);
  CHECK(c->beta2 == 0.95);
  CHECK(c->weight_decay == 0.1);
  CHECK(c->clip == 1);
  CHECK(c->mtp_lambda.at(1) == 0.3);
  CHECK(c->balance_alpha == 1e-4);
  CHECK(c->bias_gamma.at(99) == 0.001);
  CHECK(c->grad_lanes == 1);
  CHECK(c->num_ranks() == 1);
  CHECK(c->log.empty());
}

TEST_CASE("flags win over the file, and over what they stand in for") {
  const auto c = parse_train_config(kFile + "lr: 0.1\nout: \"runs\"\n", "t.textproto", "conf",
                                    {{"lr", "3e-4"},
                                     {"model", "weights"},
                                     {"tokens", "rows.safetensors"},
                                     {"recompute", "true"},
                                     {"ep", "3"}});
  REQUIRE(c);
  CHECK(c->lr == 3e-4);
  CHECK(c->init.empty());
  CHECK(c->model == "weights"); // of the working directory, not of the file's
  CHECK(c->data.empty());
  CHECK(c->tokens == "rows.safetensors");
  CHECK(c->recompute);
  CHECK(c->grad_lanes == 4);
  CHECK(c->log == "conf/runs/log.jsonl");
}

TEST_CASE("settings change at the steps they name") {
  const auto c = parse_train_config(kFile + R"(batch: 4 micro_batch: 2
batch_changes { step: 10 value: 8 } batch_changes { step: 20 value: 16 }
mtp_lambda_changes { step: 50 value: 0.1 })",
                                    "t.textproto", "", {});
  REQUIRE(c);
  CHECK(c->batch.at(9) == 4);
  CHECK(c->batch.at(10) == 8);
  CHECK(c->batch.at(1000) == 16);
  CHECK(c->mtp_lambda.at(49) == 0.3);
  CHECK(c->mtp_lambda.at(50) == 0.1);
}

TEST_CASE("a sequence has 512 tokens, or as many as a file of rows says") {
  const auto length = [](const std::string& text) {
    const auto c = parse_train_config("init: \"tiny-v3\" steps: 1 " + text, "t", "", {});
    REQUIRE(c);
    return c->sequence_length;
  };
  CHECK(length("data: \"d\"") == 512);
  CHECK(length("chat: \"c\"") == 512);
  CHECK(length("tokens: \"t\"") == std::nullopt);
  CHECK(length("tokens: \"t\" sequence_length: 64") == 64);
}

TEST_CASE("what is wrong in a training config is said with its place") {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"lr: -1", "t.textproto:5:1: lr: expected 0 to 1000, got -1"},
      {"lr: nan", "t.textproto:5:1: lr: expected 0 to 1000, got nan"},
      {"lr: x", "t.textproto:5:5: "},
      {"learning: 1", "t.textproto:5:9: Message type"},
      {"model: \"m\"", "expected either model"},
      {"tokens: \"t\"", "exactly one of data, tokens and chat"},
      {"batch: 9 micro_batch: 2",
       "t.textproto:5:1: batch: expected a multiple of micro_batch (2), got 9"},
      {"batch_changes { step: 1 value: 8 }", "expected ascending steps"},
      {"mtp_lambda_changes { step: 3 value: -1 }", "expected values from 0"},
      {"decay_steps: 3", "only lr_schedule wsd"},
      {"min_lr: 1e-5", "never comes down"},
      {"schedule: \"gpipe\"", "expected dualpipe or dualpipev or 1f1b or zb1p, got \"gpipe\""},
      {"pp: 64 ep: 64 dp: 64", "262144 ranks"},
      {"ep: -5", "ep: expected 1 to 4096, got -5"},
      {"pp: 2147483647 ep: 2147483647 dp: 2147483647", "pp: expected 1 to 4096"},
      {"save_every: 5", "needs out"},
      {"resume: true", "needs out"},
      {"yarn_factor: 4", "come together"},
      {"beta1: 1", "beta1: expected 0 to"},
  };
  for (const auto& [text, expected] : cases) {
    CAPTURE(text);
    const auto error = error_of(text);
    CAPTURE(error);
    CHECK(error.find(expected) != std::string::npos);
  }
  CHECK(error_of("", {{"steps", "many"}}) == "--steps: expected a whole number, got \"many\"");
  CHECK(error_of("", {{"weight_decay", "-3"}}) == "--weight-decay: expected 0 to 1000, got -3");
  CHECK(error_of("", {{"recompute", "maybe"}}) ==
        "--recompute: expected true or false, got \"maybe\"");
  CHECK(error_of("", {{"bogus", "1"}}) == "--bogus: no such flag");
  CHECK(error_of("", {{"batch_changes", "1"}}) == "--batch-changes: no such flag");
  const auto nothing = load_train_config(std::nullopt, {});
  REQUIRE(!nothing);
  CHECK(text_of(nothing.error()).find("expected either model") != std::string::npos);
}

TEST_CASE("every plain field is a flag that says what it is for") {
  const auto flags = train_flags();
  CHECK(flags.size() > 40);
  for (const auto& flag : flags) {
    CAPTURE(flag.field);
    CHECK(flag.help.size() > 4);
  }
  const auto has = [&](const char* name) {
    return std::ranges::any_of(flags, [&](const auto& f) { return flag_name(f.field) == name; });
  };
  for (const char* name : {"--model",        "--init",
                           "--seed",         "--data",
                           "--tokens",       "--batch",
                           "--micro-batch",  "--steps",
                           "--lr",           "--lr-schedule",
                           "--weight-decay", "--clip",
                           "--mtp-lambda",   "--balance-alpha",
                           "--bias-gamma",   "--compute",
                           "--pp",           "--ep",
                           "--dp",           "--grad-lanes",
                           "--grad-groups",  "--schedule",
                           "--recompute",    "--out",
                           "--log",          "--dump-gradients",
                           "--resume"})
    CHECK(has(name));
}
