// troupe: trains and serves DeepSeek-V3-class models as a cluster of actors.
#include "apps/commands.hpp"
#include "apps/console.hpp"

#include "actors/rank.hpp"

#include <CLI/CLI.hpp>

#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

namespace {

// Whether the first words name no command, which is told; the parser would only miss one.
bool is_unknown_command(const CLI::App& app, int argc, char** argv) {
  const auto has_name = [](const CLI::App* c) { return !c->get_name().empty(); }; // no option group
  std::string parent = "troupe";
  const CLI::App* at = &app;
  for (int i = 1; i < argc && argv[i][0] != '-' && !at->get_subcommands(has_name).empty(); ++i) {
    const auto named =
        at->get_subcommands([&](const CLI::App* c) { return c->get_name() == argv[i]; });
    if (named.empty()) {
      std::fprintf(stderr, "troupe: error: \"%s\" is no command; `%s --help` lists them\n", argv[i],
                   parent.c_str());
      return true;
    }
    at = named.front();
    parent.append(" ").append(argv[i]);
  }
  return false;
}

// A file opened later must not take the place of a stream that was closed before. Results can't be
// written to a closed stdout, which is told; what goes to a closed stderr is lost.
void open_standard_streams() {
  for (int fd = 0; fd < 3; ++fd)
    if (fcntl(fd, F_GETFD) < 0)
      static_cast<void>(open("/dev/null", fd == STDERR_FILENO ? O_WRONLY : O_RDONLY));
}

} // namespace

int main(int argc, char** argv) {
  open_standard_streams();
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
  troupe::add_data(app, code);
  troupe::add_train(app, code);
  troupe::add_plan(app, code);
  troupe::add_plot(app, code);
  if (is_unknown_command(app, argc, argv))
    return 2;
  std::signal(SIGPIPE, SIG_IGN); // a closed pipe is a failed write, which is told
  std::signal(SIGXFSZ, SIG_IGN); // and so is a file at the size that is allowed
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) // --help, --version
      return troupe::after_output(app.exit(error));
    std::fprintf(stderr, "troupe: error: %s\n", error.what());
    return 2;
  } catch (const std::bad_alloc&) {
    return troupe::complain("out of memory");
  } catch (const std::invalid_argument& error) {
    if (std::string_view{error.what()} != "stoll") // the parser's word for --json=maybe
      return troupe::complain(error.what());
    std::fprintf(stderr, "troupe: error: a flag's value is neither true nor false\n");
    return 2;
  } catch (const std::exception& error) { // no thread, no file: what the system refuses
    return troupe::complain(error.what());
  }
  return troupe::after_output(code);
}
