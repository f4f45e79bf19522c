// A rank holds its own part of the model, its cache, and next to nothing else.
#include "config/checkpoint_init.hpp"
#include "config/parameters.hpp"
#include "config/presets.hpp"
#include "tests/apps/run_program.hpp"

#include <boost/json.hpp>
#include <doctest/doctest.h>

namespace troupe::test {

namespace {

// What a rank has beside its shard and its cache: 15 % of them for forms of kv_b_proj that are kept
// twice, messages and a step's scratch (here of 72 rows), and about 14 MiB for the program, its
// libraries and UCX, which weigh nothing beside a model of the size of bench-1b.
constexpr double kShare = 1.15;
constexpr double kProgramBytes = 24 << 20;

// As wide as bench-1b, but shallower: 131 M parameters.
ModelConfig shallow() {
  auto c = *preset("bench-1b");
  c.num_hidden_layers = 4;
  c.n_routed_experts = 32;
  c.moe_intermediate_size = 256;
  c.vocab_size = 4096;
  c.num_nextn_predict_layers = 0;
  return c;
}

// BF16 bytes of the checkpoint that a rank among `ranks` joint ones needs.
double shard_bytes(const ModelConfig& c, int64_t ranks) {
  const int64_t routed = (c.num_hidden_layers - c.first_k_dense_replace) * c.n_routed_experts * 3 *
                         c.hidden_size * c.moe_intermediate_size;
  return 2.0 * static_cast<double>(count_parameters(c).total - routed + routed / ranks);
}

std::string long_prompt(int64_t tokens, int64_t vocab) {
  std::string ids = "5";
  for (int64_t i = 1; i < tokens; ++i)
    ids.append(",").append(std::to_string(i * i % vocab));
  return ids;
}

} // namespace

TEST_CASE("a rank holds its part of the model, its cache and little else") {
  const Scratch s;
  const auto config = shallow();
  const auto model = s.path("shallow");
  REQUIRE(!init_checkpoint(config, model, {}));
  for (const int ranks : {1, 4}) {
    // Many chunks fill the messages' buffers, the scratch and most of the cache.
    const auto o =
        run({"generate", model, "--tokens", long_prompt(600, config.vocab_size), "-n", "4",
             "--kv-tokens", "640", "--prefill-chunk", "64", "--batch", "4", "--threads", "1",
             "--json", "--ignore-eos", "--ranks", std::to_string(ranks)});
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    const double shard = shard_bytes(config, ranks);
    const auto json = boost::json::parse(o.out);
    const auto& list = json.at("ranks").as_array();
    REQUIRE(list.size() == static_cast<size_t>(ranks));
    for (const auto& rank : list) {
      CAPTURE(boost::json::serialize(rank));
      const auto number = [&](const char* name) { return rank.at(name).to_number<double>(); };
      CHECK(number("weight_bytes") >= shard);
      CHECK(number("weight_bytes") <= shard * 1.1);
      CHECK(number("kv_bytes") == 640 * 4 * (512 + 64) * 2); // positions, layers, latent, BF16
      CHECK(number("resident_bytes") >= shard);
      CHECK(number("resident_bytes") <= (shard + number("kv_bytes")) * kShare + kProgramBytes);
    }
  }
}

} // namespace troupe::test
