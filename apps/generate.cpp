// troupe generate: streams text from a model.
#include "apps/answer.hpp"
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/option_checks.hpp"
#include "apps/session.hpp"
#include "config/checkpoint.hpp"
#include "config/safetensors.hpp"
#include "config/tokenizer.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>

namespace troupe {

namespace {

struct GenerateOptions {
  SessionOptions session;
  std::string prompt, prompt_file, tokens;
  bool has_tokens = false;
  bool chat = false;
  RequestSpec spec;
  std::string logits_file;
  bool json = false;
  bool quiet = false;
};

// The prompt as ids. Text follows add_bos_token; ids are taken as they are.
caf::expected<std::vector<int32_t>> prompt_ids(const GenerateOptions& o,
                                               const Tokenizer* tokenizer) {
  if (o.has_tokens)
    return parse_ids(o.tokens);
  if (!tokenizer)
    return make_error(Errc::not_found,
                      fmt::format("{}: has no tokenizer (tokenizer.json or tiktoken.model); give "
                                  "ids with --tokens",
                                  o.session.cluster.model));
  auto text = o.prompt;
  if (!o.prompt_file.empty()) {
    auto file = read_file(o.prompt_file);
    if (!file)
      return file.error();
    text = std::move(*file);
  }
  if (o.chat)
    return chat_prompt(*tokenizer, text);
  auto ids = tokenizer->encode(text, true);
  if (!ids)
    return with_context(o.prompt_file.empty() ? "prompt" : o.prompt_file, ids.error());
  const auto bos = tokenizer->bos_token_id();
  if (tokenizer->add_bos_token() && bos && (ids->empty() || ids->front() != *bos))
    ids->insert(ids->begin(), *bos);
  if (ids->empty())
    return make_error(Errc::invalid_argument, "prompt: empty, and the model adds no start token");
  return ids;
}

caf::error check_sampling(const RequestSpec& spec) {
  const auto& p = spec.sampling;
  const auto bad = [](const char* flag, double value, const char* expected) {
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: {} given, {} expected", flag, value, expected));
  };
  if (!(p.temperature >= 0) || !std::isfinite(p.temperature))
    return bad("temperature", p.temperature, "0 (greedy) or more");
  if (!(p.top_p > 0 && p.top_p <= 1))
    return bad("top-p", p.top_p, "more than 0, at most 1");
  if (!(p.min_p >= 0 && p.min_p <= 1))
    return bad("min-p", p.min_p, "0 to 1");
  if (!(p.repetition_penalty > 0) || !std::isfinite(p.repetition_penalty))
    return bad("repetition-penalty", p.repetition_penalty, "more than 0");
  if (!std::isfinite(p.presence_penalty))
    return bad("presence-penalty", p.presence_penalty, "a finite number");
  if (!std::isfinite(p.frequency_penalty))
    return bad("frequency-penalty", p.frequency_penalty, "a finite number");
  for (const auto& stop : spec.stop)
    if (stop.empty())
      return make_error(Errc::invalid_argument, "stop: empty string given");
  return {};
}

// Raw logits of the answer, kept until their number is known.
struct LogitsFile {
  std::string path;
  std::vector<uint8_t> bytes;
  int64_t num_rows = 0, num_cols = 0;

  void take(const RowsReady& rows) {
    bytes.insert(bytes.end(), rows.bytes.begin(), rows.bytes.end());
    num_rows += rows.num_rows;
    num_cols = rows.num_cols;
  }
  caf::error write() const {
    auto writer = SafetensorsWriter::create(path, {{"logits", DType::f32, {num_rows, num_cols}}});
    if (!writer)
      return writer.error();
    if (auto error = (*writer)->append(std::as_bytes(std::span{bytes})))
      return error;
    return (*writer)->finish();
  }
};

boost::json::object to_json(const RequestDone& done, const ClusterStats& stats,
                            const Answer& answer, const ClusterInfo& info) {
  boost::json::object json;
  json["text"] = answer.text();
  json["tokens"] = boost::json::array(answer.tokens().begin(), answer.tokens().end());
  json["finish_reason"] = done.finish_reason;
  json["prompt_tokens"] = done.prompt_tokens;
  json["answer_tokens"] = done.answer_tokens;
  json["drafted"] = done.drafted;
  json["accepted"] = done.accepted;
  json["steps"] = done.steps;
  json["prefill_s"] = done.prefill_s;
  json["decode_s"] = done.decode_s;
  json["tokens_per_s"] = decode_rate(done);
  json["prefill_tokens_per_s"] =
      done.prefill_s > 0 ? static_cast<double>(done.prompt_tokens) / done.prefill_s : 0;
  json["arithmetic"] = info.arithmetic;
  json["backend"] = info.backend;
  json["ranks"] = ranks_json(stats);
  uint64_t wire = 0;
  for (const auto& r : stats.ranks)
    wire += r.bytes_sent;
  json["wire_bytes"] = wire;
  return json;
}

int run(GenerateOptions& o, ClusterClient& client, std::shared_ptr<const Tokenizer> tokenizer) {
  auto info = client.info(std::chrono::seconds{60});
  if (!info)
    return complain(info.error());
  ProgressLine progress{!o.json && !o.quiet};
  Answer answer{std::move(tokenizer), o.spec.stop, !o.json};
  LogitsFile logits{o.logits_file, {}, 0, 0};
  const auto num_prompt = static_cast<int64_t>(o.spec.prompt.size());
  auto id = client.submit(o.spec);
  if (!id)
    return complain(id.error());
  RequestHandlers handlers;
  handlers.on_tokens = [&](const TokensReady& news) {
    if (news.tokens.empty()) {
      progress.show(fmt::format("prompt {}/{} tokens", news.prompt_done, num_prompt));
      return;
    }
    progress.clear();
    answer.add(news.tokens);
  };
  handlers.on_rows = [&](const RowsReady& rows) { logits.take(rows); };
  auto done = client.wait(handlers, [] { return std::ferror(stdout) != 0; });
  progress.clear();
  if (std::ferror(stdout))
    return after_output(0);
  if (!answer.tokens().empty() || (done && done->error.empty())) // else there is no answer to end
    answer.finish(done && done->finish_reason == "stop");
  if (!done)
    return complain(done.error());
  if (!done->error.empty())
    return complain(done->error);
  if (!o.logits_file.empty())
    if (auto error = logits.write())
      return complain(error);
  auto stats = client.stats();
  if (!stats)
    return complain(stats.error());
  if (o.json)
    fmt::print("{}\n", boost::json::serialize(to_json(*done, *stats, answer, *info)));
  else if (!o.quiet)
    note(summary(*done, *stats, *info));
  return 0;
}

int generate(GenerateOptions& o) {
  if (auto error = check_sampling(o.spec))
    return wrong_usage(error);
  if (o.has_tokens)
    if (auto ids = parse_ids(o.tokens); !ids)
      return wrong_usage(ids.error());
  auto tokenizer = Tokenizer::load(o.session.cluster.model);
  if (!tokenizer && code_of(tokenizer.error()) != Errc::not_found)
    return complain(tokenizer.error());
  if (auto error = check_folder(o.session.cluster.model); error && !tokenizer)
    return complain(error);
  const auto loaded = tokenizer ? *tokenizer : nullptr;
  auto ids = prompt_ids(o, loaded.get());
  if (!ids)
    return complain(ids.error());
  o.spec.prompt = std::move(*ids);
  o.spec.logits = !o.logits_file.empty();
  need_context(o.session, static_cast<int64_t>(o.spec.prompt.size()) + o.spec.max_tokens,
               o.spec.speculate);
  if (o.spec.logits)
    if (auto error = check_writable(o.logits_file))
      return complain(error);
  return with_cluster(o.session, [&](ClusterClient& client) { return run(o, client, loaded); });
}

} // namespace

void add_generate(CLI::App& app, int& code) {
  auto o = std::make_shared<GenerateOptions>();
  auto* command = app.add_subcommand("generate", "Stream text from a model");
  command->add_option("MODEL", o->session.cluster.model, "Folder of a Hugging Face checkpoint")
      ->required();
  auto* prompt = command->add_option_group("Prompt", "one of");
  prompt->add_option("--prompt,-p", o->prompt, "Text to continue");
  prompt->add_option("--prompt-file,-f", o->prompt_file, "File with it; - is standard input")
      ->check(not_empty());
  auto* tokens = prompt->add_option("--tokens", o->tokens, "Ids, taken as they are: 5,7,9");
  prompt->require_option(1);
  command->add_flag("--chat", o->chat, "The prompt is a user's message: apply the chat template");
  auto& s = o->spec.sampling;
  command->add_option("--max-tokens,-n", o->spec.max_tokens, "Tokens to generate at most")
      ->default_val(128)
      ->check(CLI::Range(1, std::numeric_limits<int32_t>::max()));
  command->add_flag("--ignore-eos", o->spec.ignore_eos, "Go on after an end token");
  command->add_option("--temperature", s.temperature, "0: greedy")
      ->check(real_number())
      ->capture_default_str();
  command->add_option("--top-k", s.top_k, "Sample from the k likeliest; 0: all")
      ->check(CLI::Range(0, std::numeric_limits<int32_t>::max()))
      ->capture_default_str();
  command->add_option("--top-p", s.top_p, "Sample from the likeliest that hold this probability")
      ->check(real_number())
      ->capture_default_str();
  command->add_option("--min-p", s.min_p, "Drop what is this much less likely than the likeliest")
      ->check(real_number())
      ->capture_default_str();
  command
      ->add_option("--repetition-penalty", s.repetition_penalty,
                   "Divide the logits of ids seen before; 1: off")
      ->capture_default_str();
  command
      ->add_option("--presence-penalty", s.presence_penalty,
                   "Lower the logits of ids in the answer; 0: off")
      ->capture_default_str();
  command
      ->add_option("--frequency-penalty", s.frequency_penalty,
                   "Lower them by this for each occurrence; 0: off")
      ->capture_default_str();
  command->add_option("--seed", s.seed, "Equal seeds, equal answers")
      ->check(unsigned_number())
      ->capture_default_str();
  command->add_option("--stop", o->spec.stop, "End before this text; may be given several times")
      ->allow_extra_args(false);
  command->add_option("--speculate", o->spec.speculate, "Draft this many tokens with MTP; 0: none")
      ->check(CLI::Range(0, 16))
      ->capture_default_str();
  command
      ->add_option("--logits", o->logits_file,
                   "Write raw logits [answer tokens, vocab] to this safetensors file")
      ->check(not_empty());
  command->add_flag("--json", o->json, "Print one JSON object instead of text");
  command->add_flag("--quiet,-q", o->quiet, "Print the text only");
  add_cluster_options(*command, o->session);
  command->callback([o, tokens, &code] {
    o->has_tokens = tokens->count() > 0;
    code = generate(*o);
  });
}

} // namespace troupe
