#include "config/cluster_spec.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

using namespace troupe;

namespace {

const std::string kControl = "control { token: \"0123456789\" }\n";
const std::string kLeast = "model: \"m\"\n" + kControl;

std::string complaint(std::string_view text) {
  const auto spec = parse_cluster_spec(text, "c.textproto", "/etc");
  return spec ? std::string{} : text_of(spec.error());
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("a cluster file needs a model and a token, the rest has defaults") {
  const auto spec = parse_cluster_spec(kLeast, "c.textproto", "/etc");
  REQUIRE_MESSAGE(spec, complaint(kLeast));
  CHECK(spec->model == "/etc/m");
  CHECK(spec->layout.num_ranks == 1);
  CHECK(spec->layout.joint);
  CHECK(spec->compute.empty());
  CHECK(spec->kv_tokens == 16384);
  CHECK(spec->fabric == "ucx");
  CHECK(!spec->two_hop);
  CHECK(spec->control.host == "127.0.0.1");
  CHECK(!spec->control.tls());
}

TEST_CASE("every field of a cluster file is read") {
  const std::string text = R"(# six ranks on two hosts
model: "/models/v3"  ranks: 6  layout: "2+4"  tp: 2  nodes: 2
compute: "bf16"  fp8: "activations"
kv_tokens: 4096  batch: 8  prefill_chunk: 64  threads: 2
fabric: "ucx"  backend: "reference"  dispatch: "two-hop"
placement_seed: 18446744073709551615  speculate: 2
control { host: "10.0.0.1" port: 7000 token: "0123456789"
          certificate: "c.pem" key: "/k.pem" ca: "ca.pem" }
hosts { name: "a" ranks: 3 }
hosts { name: "b" ranks: 3 }
)";
  const auto spec = parse_cluster_spec(text, "c.textproto", "/etc");
  REQUIRE_MESSAGE(spec, complaint(text));
  CHECK(spec->model == "/models/v3");
  CHECK(spec->layout.attention_ranks == 2);
  CHECK(spec->layout.expert_ranks == 4);
  CHECK(spec->layout.tp == 2);
  CHECK(spec->layout.nodes == 2);
  CHECK(spec->compute == "bf16");
  CHECK(spec->fp8 == "activations");
  CHECK(spec->kv_tokens == 4096);
  CHECK(spec->batch == 8);
  CHECK(spec->prefill_chunk == 64);
  CHECK(spec->threads == 2);
  CHECK(spec->backend == "reference");
  CHECK(spec->two_hop);
  CHECK(spec->placement_seed == 18446744073709551615u);
  CHECK(spec->speculate == 2);
  CHECK(spec->control.tls());
  CHECK(spec->control.port == 7000);
  CHECK(spec->control.certificate == "/etc/c.pem");
  CHECK(spec->control.key == "/k.pem");
  REQUIRE(spec->hosts.size() == 2);
  CHECK(spec->hosts[1].name == "b");
  CHECK(spec->hosts[1].ranks == 3);
}

TEST_CASE("errors of syntax say where and what was expected") {
  const auto unknown = complaint("model: \"m\"\nrank: 4");
  CHECK(contains(unknown, "c.textproto:2:5: "));
  CHECK(contains(unknown, "has no field named \"rank\""));
  CHECK(contains(complaint("model: \"m\"\n  ranks: four"), "c.textproto:2:10: Expected integer"));
  CHECK(contains(complaint("model: 5"), "c.textproto:1:8: Expected string"));
  CHECK(contains(complaint("model: \"m"), "c.textproto:1:"));
  CHECK(contains(complaint("ranks: 99999999999"), "c.textproto:1:8: Integer out of range"));
  CHECK(contains(complaint("ranks: 1\nranks: 2"), "c.textproto:2:"));
  CHECK(contains(complaint("control {\n token: \"x\""), "c.textproto:2:"));
  CHECK(contains(complaint(std::string((1 << 20) + 1, ' ')), "at most"));
}

TEST_CASE("errors of meaning say where and what was expected") {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"ranks: 0", "c.textproto:4:3: ranks: expected 1 to 4096, got 0"},
      {"ranks: 5000", "c.textproto:4:3: ranks: expected 1 to 4096"},
      {"layout: \"3x4\"", "c.textproto:4:3: layout \"3x4\": expected joint, A+E"},
      {"layout: \"2+4\" ranks: 4", "c.textproto:4:3: layout 2+4 has 6 ranks, but ranks is 4"},
      {"ranks: 4 tp: 3", "c.textproto:4:12: tp: 3 does not divide the 4 attention ranks"},
      {"tp: 16", "c.textproto:4:3: tp: expected 1 to 8"},
      {"ranks: 4 nodes: 3", "c.textproto:4:12: nodes: 3 does not divide"},
      {"compute: \"f16\"", "c.textproto:4:3: compute: expected f32 or bf16, got \"f16\""},
      {"fp8: \"yes\"", "c.textproto:4:3: fp8: expected weights or activations"},
      {"compute: \"f32\" fp8: \"activations\"", "c.textproto:4:18: fp8: activations need"},
      {"kv_tokens: 0", "c.textproto:4:3: kv_tokens: expected 1 to"},
      {"batch: -1", "c.textproto:4:3: batch: expected"},
      {"prefill_chunk: 0", "c.textproto:4:3: prefill_chunk: expected"},
      {"threads: -1", "c.textproto:4:3: threads: expected"},
      {"fabric: \"tcp\"", "c.textproto:4:3: fabric: expected ucx or loopback"},
      {"dispatch: \"hop\"", "c.textproto:4:3: dispatch: expected direct or two-hop"},
      {"speculate: 65", "c.textproto:4:3: speculate: expected 0 to 64"},
      {"hosts { name: \"a\" ranks: 2 }", "c.textproto:4:3: hosts: have 2 ranks together"},
      {"hosts { ranks: 1 }", "c.textproto:4:3: hosts[0].name: expected a host's name"},
      {"hosts { name: \"a\" ranks: -1 }", "c.textproto:4:21: hosts[0].ranks: expected 1 to"},
      {"ranks: 2 fabric: \"loopback\" hosts { name: \"a\" ranks: 1 } hosts { name: \"b\" ranks: 1 "
       "}",
       "c.textproto:4:12: fabric: loopback joins"},
  };
  for (const auto& [line, expected] : cases) {
    const auto text = complaint(kLeast + "\n  " + line);
    CAPTURE(text);
    CHECK(contains(text, expected));
  }
}

TEST_CASE("a cluster file without model, token or whole TLS is refused where that belongs") {
  CHECK(contains(complaint(kControl), "c.textproto:1:1: model: expected the checkpoint's folder"));
  CHECK(contains(complaint("model: \"m\""), "c.textproto:1:1: control.token: expected"));
  CHECK(contains(complaint("model: \"m\"\ncontrol { port: 1 }"), "c.textproto:2:1: control.token"));
  CHECK(contains(complaint("model: \"m\"\ncontrol { token: \"short\" }"),
                 "c.textproto:2:11: control.token: expected at least 8"));
  const std::string open = "model: \"m\"\ncontrol { token: \"0123456789\" ";
  CHECK(contains(complaint(open + "port: 65536 }"), "c.textproto:2:31: control.port: expected"));
  CHECK(contains(complaint(open + "host: \"0.0.0.0\" }"),
                 "c.textproto:2:31: control.host: expected a loopback address"));
  CHECK(
      contains(complaint(open + "certificate: \"c\" }"), "c.textproto:2:1: control.key: expected"));
}

TEST_CASE("a cluster file is loaded relative to its own folder") {
  const ScratchFolder folder;
  write_file(folder / "c.textproto", kLeast);
  const auto spec = load_cluster_spec(folder / "c.textproto");
  REQUIRE(spec);
  CHECK(spec->model == folder.path() / "m");
  CHECK(code_of(load_cluster_spec(folder / "absent").error()) == Errc::not_found);
}
