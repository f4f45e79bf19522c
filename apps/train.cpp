// troupe train: trains a model on a cluster of ranks started here.
#include "actors/train_setup.hpp"
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/session.hpp"
#include "config/json.hpp"
#include "config/train_config.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace troupe {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;
using Clock = std::chrono::steady_clock;

struct TrainOptions {
  SessionOptions session;
  std::string config;
  TrainOverrides overrides;
  bool json = false, quiet = false;
};

double mean(const std::vector<double>& values) {
  if (values.empty())
    return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double largest(const std::vector<double>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

// A number for one depth, a list for several; 0 without MTP.
json::value mtp_loss(const TrainRecord& r) {
  if (r.mtp_loss.size() > 1)
    return json::value_from(r.mtp_loss);
  return r.mtp_loss.empty() ? 0.0 : r.mtp_loss.front();
}

json::object to_json(const TrainRecord& r) {
  json::object line{{"step", r.step},
                    {"main_loss", r.main_loss},
                    {"mtp_loss", mtp_loss(r)},
                    {"balance_loss", r.balance_loss},
                    {"total_loss", r.total_loss}};
  if (r.evaluated()) {
    line["evaluated"] = true;
    line["evaluated_tokens"] = r.evaluated_tokens;
  } else {
    line["grad_norm"] = r.grad_norm;
    line["lr"] = r.lr;
  }
  line["max_vio"] = json::value_from(r.max_vio);
  line["load"] = json::value_from(r.load);
  if (!r.evaluated()) {
    line["tokens_per_s"] = r.tokens_per_s;
    line["bubble"] = r.bubble;
    line["wire_bytes"] = r.wire_bytes;
    line["seconds"] = r.seconds;
  }
  line["tokens"] = r.tokens;
  return line;
}

// The log: JSON lines, written as steps end.
class TrainLog {
public:
  // A resumed run's log goes on after step `last`; what a run without that checkpoint wrote beyond
  // is cut off.
  static caf::expected<TrainLog> open(const fs::path& path, int64_t last) {
    TrainLog log;
    log.path_ = path;
    if (path.empty())
      return log;
    std::error_code error;
    if (path.has_parent_path())
      fs::create_directories(path.parent_path(), error);
    if (error)
      return make_error(Errc::io_error,
                        fmt::format("{}: {}", path.parent_path().string(), error.message()));
    std::string kept;
    if (last > 0) {
      std::ifstream before{path};
      for (std::string line; std::getline(before, line);) {
        const auto object = parse_json_object(line, path.string());
        const auto* step = object ? object->if_contains("step") : nullptr;
        if (step && step->is_int64() && step->as_int64() <= last)
          kept += line + '\n';
      }
    }
    // A terminal, a pipe or a device is written to as it is.
    if (fs::exists(path, error) && !fs::is_regular_file(path, error)) {
      log.file_.open(path, std::ios::binary);
      if (!log.file_)
        return make_error(Errc::io_error, fmt::format("{}: can't be written", path.string()));
      return log;
    }
    // In one step, so that a full disk does not cost the lines that are there. A link stays one.
    const auto target = fs::weakly_canonical(path, error);
    if (error)
      return make_error(Errc::io_error, fmt::format("{}: {}", path.string(), error.message()));
    auto temporary = target;
    temporary += ".new";
    log.file_.open(temporary, std::ios::binary | std::ios::trunc);
    log.file_ << kept << std::flush;
    if (log.file_)
      fs::rename(temporary, target, error);
    if (!log.file_ || error)
      return make_error(Errc::io_error, fmt::format("{}: can't be written", path.string()));
    return log;
  }
  void add(const TrainRecord& record) {
    if (path_.empty() || !file_)
      return;
    file_ << json::serialize(to_json(record)) << '\n' << std::flush;
    if (!file_) // told now, as the run goes on; it fails at its end
      note(fmt::format("troupe: warning: {}: can't be written; step {} and those after it are not "
                       "logged\n",
                       path_.string(), record.step));
  }
  [[nodiscard]] caf::error error() const {
    return path_.empty() || file_
               ? caf::error{}
               : make_error(Errc::io_error, fmt::format("{}: can't be written", path_.string()));
  }

private:
  fs::path path_;
  std::ofstream file_;
};

std::string duration_text(double seconds) {
  const auto s = std::llround(seconds);
  if (s >= 3600)
    return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

// What a person sees of the run: a bar on a terminal, a line every ten seconds elsewhere.
class TrainProgress {
public:
  explicit TrainProgress(bool enabled)
      : enabled_(enabled), terminal_(isatty(STDERR_FILENO) != 0), line_(enabled) {}
  void show(const TrainRecord& r) {
    if (!enabled_)
      return;
    if (r.evaluated()) {
      line_.clear();
      note(fmt::format(
          "step {}: held-out loss {:.4f} (perplexity {:.2f}){}, MaxVio {:.3f}, {} tokens\n", r.step,
          r.main_loss, std::exp(r.main_loss),
          r.mtp_loss.empty() ? "" : fmt::format(", MTP {:.4f}", mean(r.mtp_loss)),
          largest(r.max_vio), with_commas(r.evaluated_tokens)));
      return;
    }
    // Recent steps say best how long the others will take.
    seconds_per_step_ =
        seconds_per_step_ == 0 ? r.seconds : 0.9 * seconds_per_step_ + 0.1 * r.seconds;
    const auto left = static_cast<double>(r.num_steps - r.step) * seconds_per_step_;
    const auto text = fmt::format(
        "step {}/{}  loss {:.4f}{}  MaxVio {:.2f}  {} tokens/s  bubble {:.1f} %  {} left", r.step,
        r.num_steps, r.main_loss,
        r.mtp_loss.empty() ? "" : fmt::format("  MTP {:.4f}", mean(r.mtp_loss)), largest(r.max_vio),
        with_commas(std::llround(r.tokens_per_s)), 100 * r.bubble, duration_text(left));
    if (terminal_) {
      const auto with_bar = bar(r.step, r.num_steps) + " " + text;
      return line_.show(with_bar.size() <= ProgressLine::width() ? with_bar : text);
    }
    const auto now = Clock::now();
    if (r.step != r.num_steps && last_ && now - *last_ < std::chrono::seconds{10})
      return;
    last_ = now;
    note(text + "\n");
  }
  void clear() { line_.clear(); }

private:
  static std::string bar(int64_t done, int64_t all) {
    constexpr int64_t kWidth = 20;
    const auto full = static_cast<size_t>(kWidth * done / std::max<int64_t>(all, 1));
    return "[" + std::string(full, '#') + std::string(kWidth - full, '.') + "]";
  }

  bool enabled_, terminal_;
  ProgressLine line_;
  double seconds_per_step_ = 0;
  std::optional<Clock::time_point> last_;
};

int run(const TrainOptions& o, const TrainSetup& setup, ClusterClient& client) {
  auto log = TrainLog::open(setup.config.log, setup.first_step - 1);
  if (!log)
    return complain(log.error());
  for (const auto& warning : setup.warnings)
    note(fmt::format("troupe: warning: {}\n", warning));
  TrainProgress progress{!o.quiet && !o.json};
  TrainRecord last, held_out;
  caf::expected<TrainingDone> done{
      TrainingDone{0, {}, setup.first_step - 1, setup.resume_from.string()}};
  if (!interrupted()) // while it loaded
    done = client.train(
        [&](const TrainRecord& record) {
          log->add(record);
          progress.show(record);
          (record.evaluated() ? held_out : last) = record;
        },
        interrupted);
  progress.clear();
  if (!done)
    return complain(done.error());
  if (done->error_code != 0)
    return complain(make_error(static_cast<Errc>(done->error_code), done->error));
  if (auto error = log->error())
    return complain(error);
  if (o.json) {
    auto object = to_json(last);
    object.erase("load");
    object["checkpoint"] = done->checkpoint;
    object["steps"] = done->step;
    if (held_out.evaluated()) {
      object["held_out_loss"] = held_out.main_loss;
      object["held_out_perplexity"] = std::exp(held_out.main_loss);
      object["held_out_max_vio"] = json::value_from(held_out.max_vio);
    }
    fmt::print("{}\n", json::serialize(object));
  } else if (!o.quiet) {
    note(fmt::format("{} after step {}{}\n",
                     done->step < last.num_steps || interrupted() ? "Stopped" : "Done", done->step,
                     done->checkpoint.empty() ? "; nothing is kept" : ": " + done->checkpoint));
  }
  return 0;
}

// Two runs in one folder would mix their checkpoints. The lock is the process's and of the ranks it
// starts, which inherit it: a run can't begin while the one before still ends.
caf::error lock_folder(const fs::path& out) {
  std::error_code error;
  fs::create_directories(out, error);
  if (error)
    return make_error(Errc::io_error, fmt::format("out: {}: {}", out.string(), error.message()));
  const auto path = out / kLockFile;
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0)
    return make_error(Errc::io_error, fmt::format("out: {}: {}", path.string(), strerror(errno)));
  // What can't lock, as some network folders, does not keep a run from training.
  if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    close(fd);
    return make_error(Errc::invalid_argument,
                      fmt::format("out: another run is writing into {}", out.string()));
  }
  return {}; // open until the end
}

// Makes one file of those that ranks wrote.
caf::error merge_traces(const std::string& prefix, int32_t num_ranks) {
  std::string merged = "[\n";
  for (int32_t r = 0; r < num_ranks; ++r) {
    const auto path = fmt::format("{}.{}.json", prefix, r);
    auto text = read_file(path);
    if (!text)
      return text.error();
    const auto first = text->find('[') + 1, last = text->rfind(']');
    const auto events = text->substr(first, last - first);
    if (events.find('{') != std::string::npos)
      merged += (merged.size() > 2 ? ",\n" : "") +
                events.substr(events.find('{'), events.rfind('}') + 1 - events.find('{'));
    std::error_code ignored; // a part left behind harms nobody
    fs::remove(path, ignored);
  }
  std::ofstream file{prefix, std::ios::binary};
  file << merged << "\n]\n";
  file.close();
  return file ? caf::error{} : make_error(Errc::io_error, prefix + ": can't be written");
}

int train(TrainOptions& o) {
  const auto file = o.config.empty() ? std::nullopt : std::optional<fs::path>{o.config};
  auto config = load_train_config(file, o.overrides);
  if (!config)
    return file && code_of(config.error()) != Errc::invalid_argument ? complain(config.error())
                                                                     : wrong_usage(config.error());
  auto setup = load_train_setup(*config);
  if (!setup)
    return complain(setup.error());
  o.session.cluster.train = *setup;
  o.session.cluster.num_threads = config->threads;
  o.session.cluster.backend = config->backend;
  o.session.fabric = config->fabric;
  o.session.trace = config->trace.string();
  if (!o.session.trace.empty())
    if (auto error = check_writable(o.session.trace))
      return complain(error);
  // Of a launcher's tasks, the one that writes the log.
  const auto detected = this_task(config->fabric);
  if (!detected)
    return complain(detected.error());
  const auto& task = *detected;
  if (!config->out.empty() && (!task || task->rank == 0))
    if (auto error = lock_folder(config->out))
      return complain(error);
  const int code =
      with_cluster(o.session, [&](ClusterClient& client) { return run(o, **setup, client); });
  // Tasks of a launcher may have their files on other hosts.
  const bool all_here = !task;
  if (code == 0 && !o.session.trace.empty() && all_here)
    if (auto error = merge_traces(o.session.trace, config->num_ranks()))
      return complain(error);
  return code;
}

} // namespace

void add_train(CLI::App& app, int& code) {
  auto o = std::make_shared<TrainOptions>();
  auto* command = app.add_subcommand("train", "Train a model on ranks of this machine, or as tasks "
                                              "of Slurm, mpirun or torchrun");
  command->add_option("--config", o->config,
                      "Settings in text format (config/train.proto); flags override it");
  for (const auto& flag : train_flags()) {
    const auto field = flag.field;
    if (flag.is_bool)
      command
          ->add_flag_function(
              flag_name(field),
              [o, field](int64_t count) {
                o->overrides.emplace_back(field, count > 0 ? "true" : "false");
              },
              flag.help)
          ->group("Settings");
    else
      command
          ->add_option_function<std::string>(
              flag_name(field),
              [o, field](const std::string& text) { o->overrides.emplace_back(field, text); },
              flag.help)
          ->type_name(flag.type)
          ->group("Settings");
  }
  command->add_option("--join-timeout", o->session.join_timeout_s, "Seconds to wait for all ranks")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str();
  command->add_flag("--json", o->json, "Print one JSON object at the end instead of progress");
  command->add_flag("--quiet,-q", o->quiet, "Print nothing but errors");
  command->callback([o, &code] { code = train(*o); });
}

} // namespace troupe
