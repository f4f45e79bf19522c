// troupe launch: a cluster that stays up until told to stop.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/session.hpp"
#include "config/cluster_spec.hpp"

#include <CLI/CLI.hpp>

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

int launch(const std::string& file, SessionOptions options, bool json) {
  auto spec = load_cluster_spec(file);
  if (!spec)
    return complain(spec.error());
  if (!spec->hosts.empty())
    return complain(file + ": hosts: ranks on several hosts are started by mpirun, srun or "
                           "torchrun-style variables, not by launch");
  if (spec->fabric != "ucx")
    return complain(file + ": fabric: launch runs a process per rank, \"ucx\" expected");
  apply(*spec, options);
  options.cluster.tls = tls_of(spec->control);
  if (auto error = check_tls(options.cluster.tls, file))
    return complain(error);
  return run_cluster(options, spec->control.host, static_cast<uint16_t>(spec->control.port), json);
}

} // namespace

void add_launch(CLI::App& app, int& code) {
  struct Options {
    std::string file;
    SessionOptions session;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  auto* command =
      app.add_subcommand("launch", "Start a cluster and keep it up until Ctrl-C or SIGTERM");
  command
      ->add_option("CLUSTER", o->file, "Cluster file (textproto); docs/cluster.md lists its fields")
      ->required();
  command->add_option("--trace", o->session.trace, "Write a trace per rank: PREFIX.RANK.json");
  command->add_flag("--json", o->json,
                    "Say where to attach as one JSON object: attach, token, ranks, model");
  command->callback([o, &code] { code = launch(o->file, o->session, o->json); });
}

} // namespace troupe
