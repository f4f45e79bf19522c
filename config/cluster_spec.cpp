#include "config/cluster_spec.hpp"

#include "config/cluster.pb.h"
#include "config/json.hpp"
#include "config/text_proto.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>

namespace troupe {

namespace pb = google::protobuf;
namespace fs = std::filesystem;

namespace {

constexpr size_t kMinTokenLength = 8;
constexpr int64_t kMaxKvTokens = int64_t{1} << 32;

fs::path resolve(const fs::path& folder, const std::string& path) {
  return path.empty() ? fs::path{} : folder / path; // an absolute path replaces the folder
}

ControlSpec read_control(const proto::Control& message, const fs::path& folder,
                         TextChecker& check) {
  ControlSpec control;
  if (message.has_host())
    control.host = message.host();
  if (control.host.empty())
    check.fail("host", "expected a name or an address");
  control.port = check.in_range("port", message.has_port(), message.port(), 0, 65535, 0);
  control.token = message.token();
  if (control.token.size() < kMinTokenLength)
    check.fail("token", control.token.empty()
                            ? "expected the cluster's token, but it is absent"
                            : fmt::format("expected at least {} characters", kMinTokenLength));
  control.certificate = resolve(folder, message.certificate());
  control.key = resolve(folder, message.key());
  control.ca = resolve(folder, message.ca());
  const bool any =
      !message.certificate().empty() || !message.key().empty() || !message.ca().empty();
  for (const auto& [name, value] : {std::pair{"certificate", message.certificate()},
                                    std::pair{"key", message.key()}, std::pair{"ca", message.ca()}})
    if (any && value.empty())
      check.fail(name, "expected a file; TLS takes certificate, key and ca together");
  if (!any && !is_loopback(control.host))
    check.fail("host", fmt::format("expected a loopback address, got {}; other addresses need "
                                   "certificate, key and ca",
                                   control.host));
  return control;
}

std::vector<HostSpec> read_hosts(const proto::ClusterSpec& message, const TextPlace& place,
                                 int32_t num_ranks, TextChecker& check) {
  std::vector<HostSpec> hosts;
  int64_t total = 0;
  for (int i = 0; i < message.hosts_size(); ++i) {
    const auto& host = message.hosts(i);
    const auto inner_place = place.element(host, "hosts", i);
    TextChecker inner{inner_place};
    if (host.name().empty())
      inner.fail("name", "expected a host's name or address");
    inner.in_range("ranks", true, host.ranks(), 1, kMaxRanks, 1);
    check.adopt(inner.error());
    total += host.ranks();
    hosts.push_back({host.name(), host.ranks()});
  }
  if (!hosts.empty() && total != num_ranks)
    check.fail("hosts",
               fmt::format("have {} ranks together, but the layout has {}", total, num_ranks));
  return hosts;
}

// parse_layout names the field first ("tp: …"): that is where the error is.
ClusterLayout read_layout(const proto::ClusterSpec& m, const TextPlace& place, TextChecker& check) {
  const auto ranks = check.in_range("ranks", m.has_ranks(), m.ranks(), 1, kMaxRanks, 0);
  const auto tp = check.in_range("tp", m.has_tp(), m.tp(), 1, 8, 0);
  const auto nodes = check.in_range("nodes", m.has_nodes(), m.nodes(), 1, kMaxRanks, 1);
  auto layout = parse_layout(m.has_layout() ? m.layout() : "joint", ranks, tp, nodes);
  if (layout)
    return *layout;
  const auto text = text_of(layout.error());
  const std::string field = text.starts_with("tp:")      ? "tp"
                            : text.starts_with("nodes:") ? "nodes"
                                                         : "layout";
  check.adopt(make_error(Errc::invalid_argument, fmt::format("{}: {}", place.of(field), text)));
  return {};
}

ClusterSpec read_spec(const proto::ClusterSpec& m, const TextPlace& place, const fs::path& folder,
                      TextChecker& check) {
  constexpr int32_t kMany = 1 << 20;
  ClusterSpec spec;
  if (m.model().empty())
    check.fail("model", "expected the checkpoint's folder, but it is absent");
  spec.model = resolve(folder, m.model());
  spec.layout = read_layout(m, place, check);
  spec.compute = check.one_of("compute", m.has_compute(), m.compute(), {"f32", "bf16"}, "");
  spec.fp8 = check.one_of("fp8", m.has_fp8(), m.fp8(), {"weights", "activations"}, "");
  if (spec.fp8 == "activations" && spec.compute == "f32")
    check.fail("fp8", "activations need compute: \"bf16\"");
  spec.kv_tokens = check.in_range<int64_t>("kv_tokens", m.has_kv_tokens(), m.kv_tokens(), 1,
                                           kMaxKvTokens, spec.kv_tokens);
  spec.batch = check.in_range("batch", m.has_batch(), m.batch(), 1, kMany, spec.batch);
  spec.prefill_chunk = check.in_range("prefill_chunk", m.has_prefill_chunk(), m.prefill_chunk(), 1,
                                      kMany, spec.prefill_chunk);
  spec.overlap_rows = check.in_range("overlap_rows", m.has_overlap_rows(), m.overlap_rows(), 0,
                                     kMany, spec.overlap_rows);
  spec.threads = check.in_range("threads", m.has_threads(), m.threads(), 0, 4096, 0);
  spec.fabric = check.one_of("fabric", m.has_fabric(), m.fabric(), {"ucx", "loopback"}, "ucx");
  spec.backend = m.backend();
  spec.two_hop = check.one_of("dispatch", m.has_dispatch(), m.dispatch(), {"direct", "two-hop"},
                              "direct") == "two-hop";
  spec.placement_seed = m.placement_seed();
  spec.speculate = check.in_range("speculate", m.has_speculate(), m.speculate(), 0, 64, 0);
  const auto control_place = place.inside(m.control(), "control");
  TextChecker control{control_place};
  spec.control = read_control(m.control(), folder, control);
  check.adopt(control.error());
  spec.hosts = read_hosts(m, place, spec.layout.num_ranks, check);
  if (spec.fabric == "loopback" && spec.hosts.size() > 1)
    check.fail("fabric", "loopback joins the ranks of one process, not of several hosts");
  return spec;
}

} // namespace

bool is_loopback(std::string_view host) {
  return host == "localhost" || host == "::1" || host.starts_with("127.");
}

caf::expected<ClusterSpec> parse_cluster_spec(std::string_view text, std::string_view source,
                                              const fs::path& folder) {
  proto::ClusterSpec message;
  pb::TextFormat::ParseInfoTree tree;
  if (auto error = parse_text_proto(text, source, message, tree))
    return error;
  const TextPlace place{message, &tree, std::string{source}};
  TextChecker check{place};
  auto spec = read_spec(message, place, folder, check);
  if (check.error())
    return check.error();
  return spec;
}

caf::expected<ClusterSpec> load_cluster_spec(const fs::path& path) {
  auto text = read_text_file(path, kMaxTextProto);
  if (!text)
    return text.error();
  return parse_cluster_spec(*text, path.string(), path.parent_path());
}

} // namespace troupe
