#include "apps/op_trace.hpp"

#include <boost/json/basic_parser_impl.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <string_view>

namespace troupe {

namespace {

namespace json = boost::json;

constexpr int32_t kMaxRank = 1 << 20;
constexpr size_t kMaxSpans = size_t{1} << 25; // of all files, some GB
constexpr double kMaxMicroseconds = 1e15;

// ---- reading ------------------------------------------------------------------------------------

struct Event {
  std::string name, category, phase;
  std::optional<double> ts, dur, pid, step;
};

// Takes events out of a trace as it is parsed: traces are larger than a tree of them should be.
class EventHandler {
public:
  static constexpr size_t max_object_size = SIZE_MAX;
  static constexpr size_t max_array_size = SIZE_MAX;
  static constexpr size_t max_key_size = 1 << 12;
  static constexpr size_t max_string_size = 1 << 20;
  using error_code = boost::system::error_code;

  EventHandler(std::string path, Traces& traces) : path_(std::move(path)), traces_(traces) {
    for (const auto& [rank, trace] : traces)
      num_spans_ += trace.ops.size() + trace.computing.size() + trace.waiting.size();
  }
  [[nodiscard]] const caf::error& error() const { return error_; }
  [[nodiscard]] bool saw_events() const { return saw_events_; }

  // What the parser calls. Depth counts what is open; an event is an object in the list of events.
  bool on_document_begin(error_code&) { return true; }
  bool on_document_end(error_code&) { return true; }
  bool on_object_begin(error_code&) {
    if (depth_ == events_depth_)
      event_ = {};
    ++depth_;
    path_of_keys_.resize(depth_);
    return true;
  }
  bool on_object_end(size_t, error_code& code) {
    --depth_;
    path_of_keys_.resize(depth_);
    return depth_ != events_depth_ || take_event(code);
  }
  bool on_array_begin(error_code&) {
    const bool list = depth_ == 0 || (depth_ == 1 && path_of_keys_[0] == "traceEvents");
    ++depth_;
    path_of_keys_.resize(depth_);
    if (list && events_depth_ == kNone) {
      events_depth_ = depth_;
      saw_events_ = true;
    }
    return true;
  }
  bool on_array_end(size_t, error_code&) {
    if (depth_ == events_depth_)
      events_depth_ = kNone;
    --depth_;
    path_of_keys_.resize(depth_);
    return true;
  }
  bool on_key_part(json::string_view text, size_t, error_code&) {
    part_ += text;
    return true;
  }
  bool on_key(json::string_view text, size_t, error_code&) {
    path_of_keys_[depth_ - 1] = part_.append(text);
    part_.clear();
    return true;
  }
  bool on_string_part(json::string_view text, size_t, error_code&) {
    part_ += text;
    return true;
  }
  bool on_string(json::string_view text, size_t, error_code&) {
    part_ += text;
    if (in_event()) {
      const auto& key = path_of_keys_.back();
      if (key == "name")
        event_.name = part_;
      else if (key == "cat")
        event_.category = part_;
      else if (key == "ph")
        event_.phase = part_;
    }
    part_.clear();
    return true;
  }
  bool on_number_part(json::string_view, error_code&) { return true; }
  bool on_int64(int64_t x, json::string_view, error_code&) {
    return on_number(static_cast<double>(x));
  }
  bool on_uint64(uint64_t x, json::string_view, error_code&) {
    return on_number(static_cast<double>(x));
  }
  bool on_double(double x, json::string_view, error_code&) { return on_number(x); }
  bool on_bool(bool, error_code&) { return true; }
  bool on_null(error_code&) { return true; }
  bool on_comment_part(json::string_view, error_code&) { return true; }
  bool on_comment(json::string_view, error_code&) { return true; }

private:
  static constexpr size_t kNone = SIZE_MAX;

  [[nodiscard]] bool in_event() const {
    return events_depth_ != kNone && depth_ == events_depth_ + 1;
  }
  [[nodiscard]] bool in_args() const {
    return events_depth_ != kNone && depth_ == events_depth_ + 2 &&
           path_of_keys_[depth_ - 2] == "args";
  }
  bool on_number(double x) {
    if (depth_ == 0)
      return true;
    const auto& key = path_of_keys_.back();
    if (in_event()) {
      if (key == "ts")
        event_.ts = x;
      else if (key == "dur")
        event_.dur = x;
      else if (key == "pid")
        event_.pid = x;
    } else if (in_args() && key == "step") {
      event_.step = x;
    }
    return true;
  }

  bool fail(error_code& code, std::string text) {
    error_ = make_error(Errc::malformed, fmt::format("{}: event {}: {}", path_, count_, text));
    code = boost::system::errc::make_error_code(boost::system::errc::invalid_argument);
    return false;
  }

  bool take_event(error_code& code) {
    ++count_;
    const bool op = event_.category == "op";
    const bool computing = event_.category == "compute";
    const bool waiting = event_.category == "wire" && event_.name == "stage rows";
    if (event_.phase != "X" || (!op && !computing && !waiting))
      return true;
    const std::pair<const char*, std::optional<double>> needed[] = {
        {"ts", event_.ts}, {"dur", event_.dur}, {"pid", event_.pid}};
    for (const auto& [name, value] : needed)
      if (!value || !(std::abs(*value) <= kMaxMicroseconds))
        return fail(code, fmt::format("\"{}\" without a usable {}", event_.name, name));
    if (*event_.dur < 0)
      return fail(code, fmt::format("\"{}\" with a negative dur", event_.name));
    if (*event_.pid < 0 || *event_.pid >= kMaxRank || *event_.pid != std::floor(*event_.pid))
      return fail(code, fmt::format("\"{}\": pid: {} is no rank", event_.name, *event_.pid));
    if (op && (!event_.step || !(std::abs(*event_.step) <= kMaxMicroseconds)))
      return fail(code, fmt::format("\"{}\" without args.step", event_.name));
    if (++num_spans_ > kMaxSpans)
      return fail(code, fmt::format("more than {} spans", kMaxSpans));
    auto& trace = traces_[static_cast<int32_t>(*event_.pid)];
    const TimeSpan time{*event_.ts / 1000, (*event_.ts + *event_.dur) / 1000};
    if (op)
      trace.ops.push_back({event_.name, static_cast<int64_t>(*event_.step), time});
    else
      (computing ? trace.computing : trace.waiting).push_back(time);
    return true;
  }

  std::string path_;
  Traces& traces_;
  caf::error error_;
  Event event_;
  std::string part_;                      // of a key or string that comes in pieces
  std::vector<std::string> path_of_keys_; // the key last seen at each depth
  size_t depth_ = 0, events_depth_ = kNone;
  size_t count_ = 0, num_spans_ = 0;
  bool saw_events_ = false;
};

void join(std::vector<TimeSpan>& spans) {
  std::ranges::sort(spans);
  std::vector<TimeSpan> joined;
  for (const auto& span : spans) {
    if (!joined.empty() && span.first <= joined.back().second)
      joined.back().second = std::max(joined.back().second, span.second);
    else
      joined.push_back(span);
  }
  spans = std::move(joined);
}

// ---- recognizing --------------------------------------------------------------------------------

struct Pass {
  std::vector<std::string> names;
  std::vector<TimeSpan> times;
  double backward = 0; // time in ops that only go back
};

// A rank's ops of a step, cut where the program begins again: evaluations run it as well, without
// backward work. The pass that trained is the one whose backward took longest.
Pass training_pass(const RankTrace& trace, int64_t step) {
  std::vector<Pass> passes;
  std::string first;
  for (const auto& op : trace.ops) {
    if (op.step != step)
      continue;
    if (passes.empty())
      first = op.name;
    if (op.name == first)
      passes.emplace_back();
    auto& pass = passes.back();
    pass.names.push_back(op.name);
    pass.times.push_back(op.time);
    if (op.name[0] == 'B' || op.name[0] == 'b' || op.name[0] == 'W')
      pass.backward += op.time.second - op.time.first;
  }
  const auto longest = std::ranges::max_element(passes, {}, &Pass::backward);
  return longest == passes.end() ? Pass{} : std::move(*longest);
}

// Micro-batches of a pipeline in which a rank has this program, whatever the schedule.
int32_t chunks_of(ScheduleKind kind, const Pass& pass) {
  int64_t forwards = 0, first_phase = 0;
  for (const auto& name : pass.names) {
    const auto at = name.find('F');
    if (at == std::string::npos)
      continue;
    ++forwards;
    first_phase += name.compare(at, 3, "F0.") == 0;
  }
  return static_cast<int32_t>(kind == ScheduleKind::dualpipev ? first_phase : forwards);
}

bool same_ops(const Program& program, const Pass& pass) {
  return program.size() == pass.names.size() &&
         std::ranges::equal(program, pass.names, {},
                            [](const ScheduleOp& op) { return to_string(op); });
}

// The programs of all ranks, if `kind` with pipelines of `pp` ranks has these.
std::vector<Program> match(ScheduleKind kind, int32_t pp, const std::vector<Pass>& passes) {
  const auto num_ranks = static_cast<int32_t>(passes.size());
  const int32_t columns = num_ranks / pp, chunks = chunks_of(kind, passes[0]);
  if (check_schedule(kind, pp, chunks))
    return {};
  std::vector<Program> programs;
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    programs.push_back(make_program(kind, rank / columns, pp, chunks));
    if (!same_ops(programs.back(), passes[static_cast<size_t>(rank)]))
      return {};
  }
  return programs;
}

caf::error no_schedule(int64_t step, const std::vector<Pass>& passes) {
  std::set<size_t> sizes;
  for (const auto& pass : passes)
    sizes.insert(pass.names.size());
  return make_error(
      Errc::malformed,
      fmt::format("the ops of step {} are no schedule's programs: {} ranks with {} to {} ops; is a "
                  "rank's file missing, or was the trace cut short?",
                  step, passes.size(), *sizes.begin(), *sizes.rbegin()));
}

} // namespace

caf::error read_trace(const std::string& path, Traces& traces) {
  std::error_code folder;
  if (std::filesystem::is_directory(path, folder))
    return make_error(Errc::invalid_argument, path + ": is a folder, expected a Chrome trace");
  std::ifstream file{path, std::ios::binary};
  if (!file)
    return make_error(Errc::not_found, fmt::format("{}: can't be read: {}", path, strerror(errno)));
  json::parse_options options;
  options.max_depth = 32;
  json::basic_parser<EventHandler> parser{options, path, traces};
  boost::system::error_code code;
  std::vector<char> buffer(size_t{1} << 16);
  int64_t line = 1;
  while (!code && !file.eof()) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    if (file.bad())
      return make_error(Errc::io_error, path + ": can't be read");
    const auto n = static_cast<size_t>(file.gcount());
    const size_t taken = parser.write_some(!file.eof(), buffer.data(), n, code);
    line += std::count(buffer.data(), buffer.data() + taken, '\n');
    const std::string_view rest{buffer.data() + taken, n - taken};
    if (!code && rest.find_first_not_of(" \t\r\n") != std::string_view::npos)
      code = json::make_error_code(json::error::extra_data);
  }
  if (parser.handler().error())
    return parser.handler().error();
  if (code)
    return make_error(Errc::malformed,
                      fmt::format("{}:{}: is no JSON: {}", path, line, code.message()));
  if (!parser.handler().saw_events())
    return make_error(Errc::malformed,
                      path + ": is no Chrome trace: expected a list of events, or traceEvents");
  return {};
}

void tidy(Traces& traces) {
  for (auto& [rank, trace] : traces) {
    std::ranges::stable_sort(trace.ops, {}, [](const TracedOp& op) { return op.time.first; });
    join(trace.computing);
    join(trace.waiting);
  }
}

caf::expected<TracedStep> find_step(const Traces& traces, std::optional<int64_t> wanted,
                                    std::optional<int32_t> pp) {
  std::set<int64_t> steps;
  int32_t num_ranks = 0;
  for (const auto& [rank, trace] : traces) {
    for (const auto& op : trace.ops)
      steps.insert(op.step);
    if (!trace.ops.empty())
      num_ranks = rank + 1;
  }
  if (steps.empty())
    return make_error(Errc::malformed, "holds no spans of pipeline ops (category \"op\")");
  const int64_t step = wanted.value_or(*steps.rbegin());
  if (!steps.contains(step))
    return make_error(Errc::not_found, fmt::format("no ops of step {}; there are {} to {}", step,
                                                   *steps.begin(), *steps.rbegin()));
  std::vector<Pass> passes;
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    const auto found = traces.find(rank);
    passes.push_back(found == traces.end() ? Pass{} : training_pass(found->second, step));
    if (passes.back().names.empty())
      return make_error(Errc::not_found, fmt::format("no ops of rank {} in step {}, but of rank {}",
                                                     rank, step, num_ranks - 1));
  }
  TracedStep result;
  result.step = step;
  for (auto& pass : passes)
    result.runs.push_back(pass.times);
  for (int32_t depth = num_ranks; depth >= 1; --depth) {
    if (num_ranks % depth != 0 || (pp && *pp != depth))
      continue;
    for (const auto kind : {ScheduleKind::dualpipe, ScheduleKind::dualpipev,
                            ScheduleKind::one_f_one_b, ScheduleKind::zb1p}) {
      result.programs = match(kind, depth, passes);
      if (result.programs.empty())
        continue;
      result.kind = kind;
      result.pp = depth;
      result.columns = num_ranks / depth;
      result.chunks = chunks_of(kind, passes[0]);
      return result;
    }
  }
  return no_schedule(step, passes);
}

} // namespace troupe
