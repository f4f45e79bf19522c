// troupe init: a random checkpoint in Hugging Face format.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/option_checks.hpp"
#include "config/checkpoint_init.hpp"
#include "config/presets.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

namespace troupe {

namespace {

struct InitCommand {
  std::string what, out, dtype = "bf16";
  bool json = false;
  uint64_t seed = 0;
};

volatile std::sig_atomic_t ended_by = 0; // the first signal that asked for the end

void end_by_signals() {
  for (const int s : {SIGINT, SIGTERM, SIGHUP})
    if (std::signal(s, [](int signal) { ended_by = signal; }) == SIG_IGN)
      std::signal(s, SIG_IGN); // as under nohup
}

caf::expected<ModelConfig> config_of(const std::string& what) {
  if (auto known = preset(what))
    return *known;
  if (std::filesystem::exists(what))
    return load_model_config(what);
  return make_error(Errc::not_found,
                    fmt::format("\"{}\" is neither a preset nor a config.json; presets: {}", what,
                                fmt::join(preset_names(), ", ")));
}

int init(const InitCommand& o) {
  auto config = config_of(o.what);
  if (!config)
    return complain(config.error());
  ProgressLine progress{true};
  InitOptions options;
  options.format = *weight_format_from_name(o.dtype);
  options.seed = o.seed;
  options.num_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  options.progress = [&](int64_t done, int64_t total) {
    progress.show(fmt::format("{} of {}", bytes_text(done), bytes_text(total)));
  };
  end_by_signals();
  options.interrupted = [] { return ended_by != 0; };
  const auto error = init_checkpoint(*config, o.out, options);
  if (error && ended_by != 0) { // its files are gone; now end as whoever sent it expects
    progress.clear();
    std::signal(ended_by, SIG_DFL);
    std::raise(ended_by);
  }
  if (error)
    return complain(error);
  progress.clear();
  const auto parameters = count_parameters(*config).total;
  if (o.json)
    fmt::print(
        "{}\n",
        boost::json::serialize(boost::json::object{
            {"path", o.out}, {"parameters", parameters}, {"dtype", o.dtype}, {"seed", o.seed}}));
  else
    fmt::print("{}: {} parameters, {}\n", o.out, with_commas(parameters), o.dtype);
  return 0;
}

} // namespace

void add_init(CLI::App& app, int& code) {
  auto o = std::make_shared<InitCommand>();
  auto* command = app.add_subcommand("init", "Write a random checkpoint in Hugging Face format");
  command
      ->add_option("PRESET_OR_CONFIG", o->what,
                   fmt::format("A config.json, a folder with one, or a preset: {}",
                               fmt::join(preset_names(), ", ")))
      ->required();
  command->add_option("OUT", o->out, "Folder to create")->required();
  command->add_option("--dtype", o->dtype, "f32, bf16 or fp8 (128×128 blocks)")
      ->check(CLI::IsMember({"f32", "bf16", "fp8"}))
      ->capture_default_str();
  command->add_option("--seed", o->seed, "Equal seeds, equal files")
      ->check(unsigned_number())
      ->capture_default_str();
  command->add_flag("--json", o->json, "Print one JSON object: path, parameters, dtype, seed");
  command->callback([o, &code] { code = init(*o); });
}

} // namespace troupe
