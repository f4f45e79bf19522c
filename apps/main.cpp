// troupe: trains and serves DeepSeek-V3-class models as a cluster of actors.
#include "apps/commands.hpp"
#include "apps/session.hpp"

#include "actors/rank.hpp"

#include <CLI/CLI.hpp>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  troupe::set_transport_defaults();
  CLI::App app{"Runs DeepSeek-V3-class models on a cluster of actors.\n"
               "`troupe COMMAND --help` tells about a command.",
               "troupe"};
  app.set_version_flag("--version", std::string{"troupe "} + troupe::kVersion);
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  int code = 0;
  troupe::add_generate(app, code);
  troupe::add_score(app, code);
  troupe::add_tokenize(app, code);
  troupe::add_inspect(app, code);
  troupe::add_init(app, code);
  troupe::add_launch(app, code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) // --help, --version
      return app.exit(error);
    std::fprintf(stderr, "troupe: error: %s\n", error.what());
    return 2;
  }
  return code;
}
