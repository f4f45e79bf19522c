// troupe tokenize: text to ids, ids to text.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "apps/option_checks.hpp"
#include "config/tokenizer.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>
#include <string>

namespace troupe {

namespace {

struct TokenizeOptions {
  std::string model, text, file, decode;
  bool decodes = false;
  bool special = true;
  bool json = false;
};

void print(const TokenizeOptions& o, const std::vector<int32_t>& ids, const std::string& text) {
  if (o.json) {
    boost::json::object json;
    json["tokens"] = boost::json::array(ids.begin(), ids.end());
    json["text"] = text;
    fmt::print("{}\n", boost::json::serialize(json));
    return;
  }
  if (o.decodes)
    fmt::print("{}\n", text);
  else
    fmt::print("{}\n", fmt::join(ids, ","));
}

int tokenize(const TokenizeOptions& o) {
  if (auto error = check_folder(o.model))
    return complain(error);
  auto tokenizer = Tokenizer::load(o.model);
  if (!tokenizer)
    return complain(tokenizer.error());
  if (o.decodes) {
    auto ids = parse_ids(o.decode);
    if (!ids)
      return wrong_usage(ids.error());
    auto text = (*tokenizer)->decode(*ids, false);
    if (!text)
      return complain(text.error());
    print(o, *ids, *text);
    return 0;
  }
  auto text = o.text;
  if (!o.file.empty()) {
    auto contents = read_file(o.file);
    if (!contents)
      return complain(contents.error());
    text = std::move(*contents);
  }
  auto ids = (*tokenizer)->encode(text, o.special);
  if (!ids)
    return complain(with_context(o.file.empty() ? "text" : o.file, ids.error()));
  print(o, *ids, text);
  return 0;
}

} // namespace

void add_tokenize(CLI::App& app, int& code) {
  auto o = std::make_shared<TokenizeOptions>();
  auto* command = app.add_subcommand("tokenize", "Text to token ids, or ids to text");
  command->add_option("MODEL", o->model, "Folder with tokenizer.json or tiktoken.model")
      ->required();
  auto* input = command->add_option_group("Input", "one of");
  input->add_option("--text,-t", o->text, "Text to encode; no start token is added");
  input->add_option("--file,-f", o->file, "File with the text; - is standard input")
      ->check(not_empty());
  auto* decode = input->add_option("--decode,-d", o->decode, "Ids to decode: 5,7,9");
  input->require_option(1);
  command->add_flag_callback(
      "--no-special", [o] { o->special = false; },
      "Special tokens written in the text are ordinary text");
  command->add_flag("--json", o->json, "Print one JSON object: tokens, text");
  command->callback([o, decode, &code] {
    o->decodes = decode->count() > 0;
    code = tokenize(*o);
  });
}

} // namespace troupe
