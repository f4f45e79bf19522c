// troupe score: log-probabilities and perplexity of a text under a model.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/option_checks.hpp"
#include "apps/session.hpp"
#include "config/model_config.hpp"
#include "config/safetensors.hpp"
#include "config/tokenizer.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <memory>

namespace troupe {

namespace {

struct ScoreOptions {
  SessionOptions session;
  std::string file, text, tokens;
  std::string logits_file;
  bool has_tokens = false;
  bool hidden_states = false;
  bool json = false;
};

caf::expected<std::vector<int32_t>> text_ids(const ScoreOptions& o) {
  if (o.has_tokens)
    return parse_ids(o.tokens);
  if (auto error = check_folder(o.session.cluster.model))
    return error;
  auto tokenizer = Tokenizer::load(o.session.cluster.model);
  if (!tokenizer)
    return tokenizer.error();
  auto text = o.text;
  if (!o.file.empty()) {
    auto contents = read_file(o.file);
    if (!contents)
      return contents.error();
    text = std::move(*contents);
  }
  auto ids = (*tokenizer)->encode(text, false);
  if (!ids)
    return with_context(o.file.empty() ? "text" : o.file, ids.error());
  if (ids->empty())
    return make_error(Errc::invalid_argument, "the text to score is empty");
  return ids;
}

// Writes rows of several tensors to one file as they come.
class RowsFile {
public:
  static caf::expected<std::unique_ptr<RowsFile>> create(const ScoreOptions& o, int64_t num_rows) {
    auto config = load_model_config(o.session.cluster.model);
    if (!config)
      return config.error();
    auto file = std::make_unique<RowsFile>();
    std::vector<TensorDeclaration> tensors{{"logits", DType::f32, {num_rows, config->vocab_size}}};
    for (int64_t l = 0; o.hidden_states && l <= config->num_hidden_layers; ++l)
      tensors.push_back({fmt::format("hidden.{}", l), DType::f32, {num_rows, config->hidden_size}});
    auto writer = SafetensorsWriter::create(o.logits_file, tensors);
    if (!writer)
      return writer.error();
    file->writer_ = std::move(*writer);
    for (size_t i = 0; i < tensors.size(); ++i)
      file->places_[tensors[i].name] = file->writer_->position_of(i);
    return file;
  }
  void take(const RowsReady& rows) {
    const auto place = places_.find(rows.name);
    if (place == places_.end() || error_)
      return;
    const auto row_bytes = rows.num_cols * static_cast<int64_t>(sizeof(float));
    error_ = writer_->write_at(place->second + rows.first_row * row_bytes,
                               std::as_bytes(std::span{rows.bytes}));
  }
  caf::error finish() { return error_ ? error_ : writer_->finish(); }

private:
  std::unique_ptr<SafetensorsWriter> writer_;
  std::map<std::string, int64_t> places_;
  caf::error error_;
};

void print_scores(const ScoreOptions& o, const RequestSpec& spec,
                  const std::vector<double>& logprobs, double perplexity) {
  if (!o.json) {
    fmt::print("{} tokens, {} predictions, perplexity {:.6g}\n", spec.prompt.size(),
               logprobs.size(), perplexity);
    return;
  }
  boost::json::array values{nullptr};
  for (const double p : logprobs)
    values.push_back(p);
  boost::json::object json;
  json["tokens"] = boost::json::array(spec.prompt.begin(), spec.prompt.end());
  json["logprobs"] = std::move(values);
  if (logprobs.empty())
    json["perplexity"] = nullptr;
  else
    json["perplexity"] = perplexity;
  fmt::print("{}\n", boost::json::serialize(json));
}

int run(const ScoreOptions& o, const RequestSpec& spec, ClusterClient& client) {
  const auto total = static_cast<int64_t>(spec.prompt.size());
  std::unique_ptr<RowsFile> rows;
  if (!o.logits_file.empty()) {
    auto file = RowsFile::create(o, total);
    if (!file)
      return complain(file.error());
    rows = std::move(*file);
  }
  ProgressLine progress{!o.json};
  std::vector<double> logprobs;
  RequestHandlers handlers;
  handlers.on_tokens = [&](const TokensReady& news) {
    logprobs.insert(logprobs.end(), news.prompt_logprobs.begin(), news.prompt_logprobs.end());
    progress.show(fmt::format("{}/{} tokens", news.prompt_done, total));
  };
  handlers.on_rows = [&](const RowsReady& ready) {
    if (rows)
      rows->take(ready);
  };
  auto id = client.submit(spec);
  if (!id)
    return complain(id.error());
  auto done = client.wait(handlers);
  progress.clear();
  if (!done)
    return complain(done.error());
  if (!done->error.empty())
    return complain(done->error);
  if (rows)
    if (auto error = rows->finish())
      return complain(error);
  double sum = 0;
  for (const double p : logprobs)
    sum += p;
  print_scores(o, spec, logprobs,
               std::exp(-sum / static_cast<double>(std::max<size_t>(logprobs.size(), 1))));
  return 0;
}

int score(ScoreOptions& o) {
  if (o.hidden_states && o.logits_file.empty())
    return wrong_usage("hidden-states: needs --logits OUT, the file they are written to");
  auto ids = text_ids(o);
  if (!ids)
    return o.has_tokens ? wrong_usage(ids.error()) : complain(ids.error());
  if (!o.logits_file.empty())
    if (auto error = check_writable(o.logits_file))
      return complain(error);
  RequestSpec spec;
  spec.prompt = std::move(*ids);
  spec.prompt_logprobs = true;
  spec.logits = !o.logits_file.empty();
  spec.hidden_states = o.hidden_states;
  need_context(o.session, static_cast<int64_t>(spec.prompt.size()), 0);
  return with_cluster(o.session, [&](ClusterClient& client) { return run(o, spec, client); });
}

} // namespace

void add_score(CLI::App& app, int& code) {
  auto o = std::make_shared<ScoreOptions>();
  auto* command = app.add_subcommand("score", "Log-probability of each token, and perplexity");
  command->add_option("MODEL", o->session.cluster.model, "Folder of a Hugging Face checkpoint")
      ->required();
  auto* input = command->add_option_group("Text", "one of");
  input->add_option("--file,-f", o->file, "File with the text; - is standard input")
      ->check(not_empty());
  input->add_option("--text", o->text, "The text itself");
  auto* tokens = input->add_option("--tokens", o->tokens, "Ids, taken as they are: 5,7,9");
  input->require_option(1);
  command
      ->add_option("--logits", o->logits_file,
                   "Write raw logits [tokens, vocab], F32, to this safetensors file")
      ->check(not_empty());
  command->add_flag("--hidden-states", o->hidden_states,
                    "Add hidden.0 … hidden.L to that file: before each layer, the last after the "
                    "final norm");
  command->add_flag("--json", o->json, "Print one JSON object");
  add_cluster_options(*command, o->session);
  command->callback([o, tokens, &code] {
    o->has_tokens = tokens->count() > 0;
    code = score(*o);
  });
}

} // namespace troupe
