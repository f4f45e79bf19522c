#include "config/train_config.hpp"

#include "config/json.hpp"
#include "config/text_proto.hpp"
#include "config/train.pb.h"

#include <fmt/format.h>

#include <bit>
#include <charconv>
#include <cmath>
#include <limits>

namespace troupe {

namespace pb = google::protobuf;
namespace fs = std::filesystem;

namespace {

constexpr int64_t kMany = int64_t{1} << 40;
constexpr int32_t kMaxParallel = 4096;
constexpr int64_t kDefaultSequence = 512; // with tokens, the file's

// ---- flags ------------------------------------------------------------------------------------

template <class T>
std::optional<T> number(const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size())
    return std::nullopt;
  return value;
}

// Sets one plain field from a flag's text; false when it is no value of the field's type.
bool set_field(pb::Message& message, const pb::FieldDescriptor& field, const std::string& text) {
  const auto& reflection = *message.GetReflection();
  const auto put = [&](auto value, auto setter) {
    if (value)
      (reflection.*setter)(&message, &field, *value);
    return value.has_value();
  };
  switch (field.cpp_type()) {
  case pb::FieldDescriptor::CPPTYPE_INT32:
    return put(number<int32_t>(text), &pb::Reflection::SetInt32);
  case pb::FieldDescriptor::CPPTYPE_INT64:
    return put(number<int64_t>(text), &pb::Reflection::SetInt64);
  case pb::FieldDescriptor::CPPTYPE_UINT64:
    return put(number<uint64_t>(text), &pb::Reflection::SetUInt64);
  case pb::FieldDescriptor::CPPTYPE_DOUBLE:
    return put(number<double>(text), &pb::Reflection::SetDouble);
  case pb::FieldDescriptor::CPPTYPE_BOOL:
    if (text != "true" && text != "false")
      return false;
    reflection.SetBool(&message, &field, text == "true");
    return true;
  case pb::FieldDescriptor::CPPTYPE_STRING:
    reflection.SetString(&message, &field, text);
    return true;
  default:
    return false;
  }
}

const char* type_of(const pb::FieldDescriptor& field) {
  switch (field.cpp_type()) {
  case pb::FieldDescriptor::CPPTYPE_DOUBLE:
    return "FLOAT";
  case pb::FieldDescriptor::CPPTYPE_STRING:
    return "TEXT";
  default:
    return "INT";
  }
}

std::string_view kind_of(const pb::FieldDescriptor& field) {
  switch (field.cpp_type()) {
  case pb::FieldDescriptor::CPPTYPE_DOUBLE:
    return "a number";
  case pb::FieldDescriptor::CPPTYPE_BOOL:
    return "true or false";
  default:
    return "a whole number";
  }
}

// A flag replaces what the file says in its stead, too.
const std::vector<std::vector<const char*>> kAlternatives = {{"model", "init"},
                                                             {"data", "tokens", "chat"}};

caf::error apply(const TrainOverrides& flags, proto::TrainConfig& message) {
  for (const auto& [name, text] : flags) {
    const auto* field = proto::TrainConfig::descriptor()->FindFieldByName(name);
    if (!field || field->is_repeated())
      return make_error(Errc::invalid_argument, fmt::format("{}: no such flag", flag_of(name)));
    for (const auto& group : kAlternatives)
      if (std::ranges::find(group, name) != group.end())
        for (const auto* other : group)
          message.GetReflection()->ClearField(
              &message, proto::TrainConfig::descriptor()->FindFieldByName(other));
    if (!set_field(message, *field, text))
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: expected {}, got \"{}\"", flag_of(name), kind_of(*field),
                                    text.substr(0, 60)));
  }
  return {};
}

// ---- fields -----------------------------------------------------------------------------------

// Paths of a file are relative to it, those of flags are as given.
class Paths {
public:
  Paths(fs::path folder, std::set<std::string> flags)
      : folder_(std::move(folder)), flags_(std::move(flags)) {}
  [[nodiscard]] fs::path operator()(const std::string& field, const std::string& path) const {
    return path.empty() || flags_.contains(field) ? fs::path{path} : folder_ / path;
  }

private:
  fs::path folder_;
  std::set<std::string> flags_;
};

using Changes = pb::RepeatedPtrField<proto::Change>;

Stepwise stepwise(TextChecker& check, const std::string& field, double first,
                  const Changes& changes, double high) {
  Stepwise result{first, {}};
  int64_t last = 1;
  for (const auto& change : changes) {
    if (change.step() <= last)
      check.fail(field,
                 fmt::format("expected ascending steps from 2 on, got step {}", change.step()));
    if (!(change.value() >= 0 && change.value() <= high))
      check.fail(field, fmt::format("expected values from 0 to {}, got {}", high, change.value()));
    last = change.step();
    result.changes.emplace_back(change.step(), change.value());
  }
  return result;
}

void read_sources(const proto::TrainConfig& m, const Paths& path, TextChecker& check,
                  TrainConfig& c) {
  c.model = path("model", m.model());
  // A preset is a name; a file stands somewhere.
  c.init = m.init().find_first_of("./") == std::string::npos ? m.init()
                                                             : path("init", m.init()).string();
  if (m.model().empty() == m.init().empty())
    check.fail(m.model().empty() ? "model" : "init",
               "expected either model (a checkpoint) or init (a preset or config.json)");
  c.seed = m.seed();
  c.init_std = check.in_range("init_std", m.has_init_std(), m.init_std(), 0.0, 10.0, c.init_std);
  c.data = path("data", m.data());
  c.tokens = path("tokens", m.tokens());
  c.chat = path("chat", m.chat());
  if (int{m.data().empty()} + int{m.tokens().empty()} + int{m.chat().empty()} != 2)
    check.fail("data", "expected exactly one of data, tokens and chat");
  if (m.has_sequence_length())
    c.sequence_length = check.in_range("sequence_length", true, m.sequence_length(), 2, 1 << 24, 2);
  else if (m.tokens().empty())
    c.sequence_length = kDefaultSequence;
  c.held_out = path("held_out", m.held_out());
  c.eval_every =
      check.in_range<int64_t>("eval_every", m.has_eval_every(), m.eval_every(), 0, kMany, 0);
}

void read_step(const proto::TrainConfig& m, TextChecker& check, TrainConfig& c) {
  constexpr int32_t kMaxBatch = 1 << 24;
  c.micro_batch =
      check.in_range("micro_batch", m.has_micro_batch(), m.micro_batch(), 1, kMaxBatch, 1);
  const auto batch = check.in_range("batch", m.has_batch(), m.batch(), 1, kMaxBatch, 8);
  c.batch = stepwise(check, "batch_changes", batch, m.batch_changes(), kMaxBatch);
  const auto whole = [&](const char* field, double value) {
    if (value < 1 || std::fmod(value, static_cast<double>(c.micro_batch)) != 0)
      check.fail(field, fmt::format("expected a multiple of micro_batch ({}), got {}",
                                    c.micro_batch, value));
  };
  whole("batch", batch);
  for (const auto& [step, value] : c.batch.changes)
    whole("batch_changes", value);
  c.steps = check.in_range<int64_t>("steps", m.has_steps(), m.steps(), 1, kMany, 1);
  if (!m.has_steps())
    check.fail("steps", "expected the number of optimizer steps, but it is absent");
  const auto compute =
      check.one_of("compute", m.has_compute(), m.compute(), {"f32", "bf16", "fp8"}, "bf16");
  c.compute = compute == "f32"   ? ComputePrecision::f32
              : compute == "fp8" ? ComputePrecision::fp8
                                 : ComputePrecision::bf16;
  c.recompute = m.recompute();
}

void read_optimizer(const proto::TrainConfig& m, TextChecker& check, TrainConfig& c) {
  c.lr = check.in_range("lr", m.has_lr(), m.lr(), 0.0, 1e3, c.lr);
  c.min_lr = check.in_range("min_lr", m.has_min_lr(), m.min_lr(), 0.0, c.lr, c.min_lr);
  const auto schedule = check.one_of("lr_schedule", m.has_lr_schedule(), m.lr_schedule(),
                                     {"constant", "wsd", "cosine"}, "constant");
  c.lr_schedule = schedule == "wsd"      ? LrSchedule::wsd
                  : schedule == "cosine" ? LrSchedule::cosine
                                         : LrSchedule::constant;
  c.warmup_steps = check.in_range<int64_t>("warmup_steps", m.has_warmup_steps(), m.warmup_steps(),
                                           0, c.steps, 0);
  c.decay_steps = check.in_range<int64_t>("decay_steps", m.has_decay_steps(), m.decay_steps(), 0,
                                          c.steps - c.warmup_steps, 0);
  if (c.lr_schedule == LrSchedule::wsd && !m.has_decay_steps())
    c.decay_steps = (c.steps - c.warmup_steps) / 10;
  if (c.lr_schedule != LrSchedule::wsd && m.has_decay_steps())
    check.fail("decay_steps", "only lr_schedule wsd has a decay of its own");
  if (c.lr_schedule == LrSchedule::constant && m.has_min_lr())
    check.fail("min_lr", "a constant learning rate never comes down to it");
  c.weight_decay = check.in_range("weight_decay", m.has_weight_decay(), m.weight_decay(), 0.0, 1e3,
                                  c.weight_decay);
  const double below_one = std::nextafter(1.0, 0.0);
  c.beta1 = check.in_range("beta1", m.has_beta1(), m.beta1(), 0.0, below_one, c.beta1);
  c.beta2 = check.in_range("beta2", m.has_beta2(), m.beta2(), 0.0, below_one, c.beta2);
  c.eps = check.in_range("eps", m.has_eps(), m.eps(), 1e-30, 1.0, c.eps);
  c.clip = check.in_range("clip", m.has_clip(), m.clip(), 0.0, 1e30, c.clip);
  c.ema = check.in_range("ema", m.has_ema(), m.ema(), 0.0, below_one, c.ema);
  const auto lambda = check.in_range("mtp_lambda", m.has_mtp_lambda(), m.mtp_lambda(), 0.0, 1e3,
                                     c.mtp_lambda.first);
  c.mtp_lambda = stepwise(check, "mtp_lambda_changes", lambda, m.mtp_lambda_changes(), 1e3);
  const auto gamma = check.in_range("bias_gamma", m.has_bias_gamma(), m.bias_gamma(), 0.0, 1e3,
                                    c.bias_gamma.first);
  c.bias_gamma = stepwise(check, "bias_gamma_changes", gamma, m.bias_gamma_changes(), 1e3);
  c.balance_alpha = check.in_range("balance_alpha", m.has_balance_alpha(), m.balance_alpha(), 0.0,
                                   1e3, c.balance_alpha);
}

void read_layout(const proto::TrainConfig& m, TextChecker& check, TrainConfig& c) {
  c.pp = check.in_range("pp", m.has_pp(), m.pp(), 1, kMaxParallel, 1);
  c.ep = check.in_range("ep", m.has_ep(), m.ep(), 1, kMaxParallel, 1);
  c.dp = check.in_range("dp", m.has_dp(), m.dp(), 1, kMaxParallel, 1);
  if (int64_t{c.pp} * c.ep * c.dp > kMaxParallel)
    check.fail("pp", fmt::format("pp · ep · dp is {} ranks, at most {} are possible",
                                 int64_t{c.pp} * c.ep * c.dp, kMaxParallel));
  const auto columns = static_cast<uint32_t>(std::min<int64_t>(int64_t{c.ep} * c.dp, kMaxParallel));
  c.grad_lanes = check.in_range("grad_lanes", m.has_grad_lanes(), m.grad_lanes(), 1, kMaxParallel,
                                static_cast<int32_t>(std::bit_ceil(columns)));
  c.grad_groups =
      check.in_range("grad_groups", m.has_grad_groups(), m.grad_groups(), 1, kMaxParallel, 1);
  const auto schedule = check.one_of("schedule", m.has_schedule(), m.schedule(),
                                     {"dualpipe", "dualpipev", "1f1b", "zb1p"}, "dualpipe");
  c.schedule = schedule == "dualpipev" ? PipelineSchedule::dualpipev
               : schedule == "1f1b"    ? PipelineSchedule::one_f_one_b
               : schedule == "zb1p"    ? PipelineSchedule::zb1p
                                       : PipelineSchedule::dualpipe;
  c.fabric = check.one_of("fabric", m.has_fabric(), m.fabric(), {"ucx", "loopback"}, "ucx");
  if (m.has_backend())
    c.backend = m.backend();
  c.threads = check.in_range("threads", m.has_threads(), m.threads(), 0, 4096, 0);
  if (m.has_yarn_factor() != m.has_yarn_original_length())
    check.fail(m.has_yarn_factor() ? "yarn_factor" : "yarn_original_length",
               "yarn_factor and yarn_original_length come together");
  c.yarn_factor =
      check.in_range("yarn_factor", m.has_yarn_factor(), m.yarn_factor(), 1.0, 1e4, 1.0);
  if (m.has_yarn_original_length())
    c.yarn_original_length = check.in_range<int64_t>("yarn_original_length", true,
                                                     m.yarn_original_length(), 1, kMany, 1);
}

void read_output(const proto::TrainConfig& m, const Paths& path, TextChecker& check,
                 TrainConfig& c) {
  c.out = path("out", m.out());
  c.save_every =
      check.in_range<int64_t>("save_every", m.has_save_every(), m.save_every(), 0, kMany, 0);
  c.keep = check.in_range("keep", m.has_keep(), m.keep(), 0, 1 << 20, c.keep);
  c.resume = m.resume();
  for (const auto& [field, given] :
       {std::pair{"save_every", m.save_every() > 0}, {"resume", m.resume()}})
    if (given && m.out().empty())
      check.fail(field, "needs out, the folder of the checkpoints");
  c.log = path("log", m.log());
  if (m.log().empty() && !c.out.empty())
    c.log = c.out / "log.jsonl";
  c.dump_gradients = path("dump_gradients", m.dump_gradients());
  c.trace = path("trace", m.trace());
}

} // namespace

double Stepwise::at(int64_t step) const {
  double value = first;
  for (const auto& [from, next] : changes)
    if (step >= from)
      value = next;
  return value;
}

std::vector<TrainFlag> train_flags() {
  std::vector<TrainFlag> flags;
  const auto* descriptor = proto::TrainConfig::descriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const auto* field = descriptor->field(i);
    if (!field->is_repeated())
      flags.push_back({field->name(), field->options().GetExtension(proto::help), type_of(*field),
                       field->cpp_type() == pb::FieldDescriptor::CPPTYPE_BOOL});
  }
  return flags;
}

std::string flag_name(std::string_view field) { return flag_of(std::string{field}); }

caf::expected<TrainConfig> parse_train_config(std::string_view text, std::string_view source,
                                              const fs::path& folder, const TrainOverrides& flags) {
  proto::TrainConfig message;
  pb::TextFormat::ParseInfoTree tree;
  if (auto error = parse_text_proto(text, source, message, tree))
    return error;
  if (auto error = apply(flags, message))
    return error;
  std::set<std::string> given;
  for (const auto& [field, value] : flags)
    given.insert(field);
  const TextPlace place{message, text.empty() ? nullptr : &tree, std::string{source}, given};
  TextChecker check{place};
  const Paths path{folder, given};
  TrainConfig config;
  read_sources(message, path, check, config);
  read_step(message, check, config);
  read_optimizer(message, check, config);
  read_layout(message, check, config);
  read_output(message, path, check, config);
  if (check.error())
    return check.error();
  return config;
}

caf::expected<TrainConfig> load_train_config(const std::optional<fs::path>& file,
                                             const TrainOverrides& flags) {
  if (!file)
    return parse_train_config("", "flags", "", flags);
  const auto text = read_text_file(*file, kMaxTextProto);
  if (!text)
    return text.error();
  return parse_train_config(*text, file->string(), file->parent_path(), flags);
}

std::string_view name_of(ComputePrecision compute) {
  switch (compute) {
  case ComputePrecision::f32:
    return "f32";
  case ComputePrecision::bf16:
    return "bf16";
  case ComputePrecision::fp8:
    return "fp8";
  }
  return "?";
}

std::string_view name_of(LrSchedule schedule) {
  switch (schedule) {
  case LrSchedule::constant:
    return "constant";
  case LrSchedule::wsd:
    return "wsd";
  case LrSchedule::cosine:
    return "cosine";
  }
  return "?";
}

std::string_view name_of(PipelineSchedule schedule) {
  switch (schedule) {
  case PipelineSchedule::dualpipe:
    return "dualpipe";
  case PipelineSchedule::dualpipev:
    return "dualpipev";
  case PipelineSchedule::one_f_one_b:
    return "1f1b";
  case PipelineSchedule::zb1p:
    return "zb1p";
  }
  return "?";
}

} // namespace troupe
