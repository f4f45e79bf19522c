// troupe launch: a cluster that stays up until told to stop.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/session.hpp"
#include "config/cluster_spec.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <unistd.h>

#include <memory>
#include <string>

namespace troupe {

namespace {

void apply(const ClusterSpec& spec, SessionOptions& o) {
  o.cluster.model = spec.model.string();
  o.layout = spec.layout.name;
  o.ranks = spec.layout.num_ranks;
  o.tp = spec.layout.tp;
  o.nodes = spec.layout.nodes;
  o.compute = spec.compute;
  o.fp8 = spec.fp8;
  o.dispatch = spec.two_hop ? "two-hop" : "direct";
  if (!spec.backend.empty())
    o.cluster.backend = spec.backend;
  o.cluster.num_threads = spec.threads;
  o.cluster.shape.placement_seed = spec.placement_seed;
  o.cluster.limits.kv_tokens = spec.kv_tokens;
  o.cluster.limits.batch = spec.batch;
  o.cluster.limits.prefill_chunk = spec.prefill_chunk;
  o.cluster.limits.overlap_rows = spec.overlap_rows;
  o.cluster.limits.max_speculate = spec.speculate;
  o.cluster.cluster_token = spec.control.token;
}

// The ranks of a host, by name; without a name those of the host this is.
caf::expected<LocalPart> part_of(const ClusterSpec& spec, const std::string& name) {
  LocalPart part;
  if (spec.hosts.empty()) {
    if (!name.empty())
      return make_error(Errc::invalid_argument,
                        "host: \"" + name + "\" given, but the file names no hosts");
    return part;
  }
  char own[256] = {};
  if (gethostname(own, sizeof own - 1) != 0)
    own[0] = '\0';
  const std::string wanted = name.empty() ? own : name;
  std::string names;
  for (const auto& host : spec.hosts) {
    if (host.name == wanted) {
      part.host = host.name;
      part.num_ranks = host.ranks;
      return part;
    }
    part.first_rank += host.ranks;
    names += (names.empty() ? "" : ", ") + host.name;
  }
  return make_error(Errc::invalid_argument,
                    name.empty()
                        ? fmt::format("hosts: this one (\"{}\") is none of {}; name it "
                                      "with --host",
                                      own, names)
                        : fmt::format("host: \"{}\" given, expected one of {}", name, names));
}

int launch(const std::string& file, const std::string& host, SessionOptions options, bool json) {
  auto spec = load_cluster_spec(file);
  if (!spec)
    return complain(spec.error());
  const auto part = part_of(*spec, host);
  if (!part)
    return wrong_usage(with_context(file, part.error()));
  if (spec->hosts.size() > 1 && spec->control.port == 0)
    return complain(file + ": control.port: hosts have to know it before they start, expected 1 to "
                           "65535");
  if (spec->fabric != "ucx")
    return complain(file + ": fabric: launch runs a process per rank, \"ucx\" expected");
  apply(*spec, options);
  options.cluster.tls = tls_of(spec->control);
  if (auto error = check_tls(options.cluster.tls, file))
    return complain(error);
  return run_cluster(options, spec->control.host, static_cast<uint16_t>(spec->control.port), *part,
                     json);
}

} // namespace

void add_launch(CLI::App& app, int& code) {
  struct Options {
    std::string file, host;
    SessionOptions session;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  auto* command =
      app.add_subcommand("launch", "Start a cluster and keep it up until Ctrl-C or SIGTERM");
  command
      ->add_option("CLUSTER", o->file, "Cluster file (textproto); docs/cluster.md lists its fields")
      ->required();
  command->add_option(
      "--host", o->host,
      "Start the ranks of this one of the file's hosts (default: the machine's name)");
  command->add_option("--join-timeout", o->session.join_timeout_s, "Seconds to wait for all ranks")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str();
  command->add_option("--trace", o->session.trace, "Write a trace per rank: PREFIX.RANK.json");
  command->add_flag("--json", o->json,
                    "Say where to attach as one JSON object: attach, token, ranks, model");
  command->callback([o, &code] { code = launch(o->file, o->host, o->session, o->json); });
}

} // namespace troupe
