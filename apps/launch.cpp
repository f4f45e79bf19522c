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

int launch(const std::string& file, SessionOptions options) {
  auto spec = load_cluster_spec(file);
  if (!spec)
    return complain(spec.error());
  apply(*spec, options);
  return run_cluster(options, spec->control.host, spec->control.port);
}

} // namespace

void add_launch(CLI::App& app, int& code) {
  struct Options {
    std::string file;
    SessionOptions session;
  };
  auto o = std::make_shared<Options>();
  auto* command =
    app.add_subcommand("launch", "Start a cluster and keep it up until Ctrl-C or SIGTERM");
  command->add_option("CLUSTER", o->file, "Cluster file (textproto); docs/cluster.md lists its fields")
    ->required();
  command->add_option("--trace", o->session.trace, "Write a trace per rank: PREFIX.RANK.json");
  command->callback([o, &code] { code = launch(o->file, o->session); });
}

} // namespace troupe
