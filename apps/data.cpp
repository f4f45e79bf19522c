// troupe data: text files to shards of tokens, with a tokenizer trained on them or given.
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "config/bpe_trainer.hpp"
#include "config/dataset.hpp"
#include "config/json.hpp"
#include "config/random.hpp"
#include "config/tokenizer.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace troupe {

namespace {

namespace fs = std::filesystem;
namespace json = boost::json;

struct DataOptions {
  std::vector<std::string> inputs;
  std::string out, tokenizer, separator;
  int32_t train_tokenizer = 0;
  int64_t min_frequency = 2;
  int64_t shard_tokens = int64_t{32} << 20;
  double fim_rate = 0, held_out = 0;
  uint64_t seed = 0;
  bool shuffle = true;
  bool json = false;
};

struct Document {
  std::string text;
  std::string source; // for errors: FILE or FILE:LINE
};

// A number from 0 to 1. CLI::Range lets NaN through.
const CLI::Validator share{[](const std::string& text) {
                             double value = 0;
                             return CLI::detail::lexical_cast(text, value) && value >= 0 &&
                                            value <= 1
                                        ? std::string{}
                                        : fmt::format("expected 0 to 1, got {}", text);
                           },
                           "in [0 - 1]"};

// ---- documents --------------------------------------------------------------------------------

caf::expected<std::vector<std::string>> files_below(const std::vector<std::string>& inputs) {
  std::vector<std::string> files;
  for (const auto& input : inputs) {
    std::error_code error;
    if (!fs::is_directory(input, error)) {
      if (fs::is_character_file(input, error) || fs::is_block_file(input, error))
        return make_error(Errc::invalid_argument,
                          fmt::format("{}: is a device, expected text", input));
      files.push_back(input);
      continue;
    }
    const auto before = files.size();
    for (const auto& entry : fs::recursive_directory_iterator{input, error}) {
      const auto extension = entry.path().extension();
      if (entry.is_regular_file() && (extension == ".txt" || extension == ".jsonl"))
        files.push_back(entry.path().string());
    }
    if (error)
      return make_error(Errc::io_error, fmt::format("{}: {}", input, error.message()));
    if (files.size() == before)
      return make_error(Errc::not_found, fmt::format("{}: no .txt or .jsonl files in it", input));
    std::sort(files.begin() + static_cast<std::ptrdiff_t>(before), files.end());
  }
  return files;
}

// Calls `take` with every piece of `text` between two separators; blank ones are left out.
caf::error split_text(const std::string& text, const std::string& separator,
                      const std::function<caf::error(std::string_view, size_t)>& take) {
  size_t begin = 0;
  for (size_t number = 1; begin <= text.size(); ++number) {
    auto end = separator.empty() ? std::string::npos : text.find(separator, begin);
    end = std::min(end, text.size());
    const auto piece = std::string_view{text}.substr(begin, end - begin);
    if (piece.find_first_not_of(" \t\r\n") != std::string_view::npos)
      if (auto error = take(piece, number))
        return error;
    begin = end + std::max<size_t>(separator.size(), 1);
  }
  return {};
}

caf::error read_documents(const std::string& file, const std::string& separator,
                          std::vector<Document>& documents) {
  auto text = read_file(file);
  if (!text)
    return text.error();
  if (!file.ends_with(".jsonl"))
    return split_text(*text, separator, [&](std::string_view piece, size_t) {
      documents.push_back({std::string{piece}, file});
      return caf::error{};
    });
  return split_text(*text, "\n", [&](std::string_view line, size_t number) -> caf::error {
    const auto source = fmt::format("{}:{}", file, number);
    const auto object = parse_json_object(line, source);
    if (!object)
      return object.error();
    JsonFields fields{*object, source};
    auto document = fields.string("text");
    if (!fields.ok())
      return fields.error();
    documents.push_back({std::move(document), source});
    return {};
  });
}

// In the order of keyed random numbers, so that a corpus of several sources is mixed.
void shuffle(std::vector<Document>& documents, uint64_t seed) {
  KeyedStream random{seed, UINT64_MAX}; // documents' own streams are their numbers
  for (size_t i = documents.size(); i > 1; --i)
    std::swap(documents[i - 1], documents[static_cast<size_t>(random.below(i))]);
}

// ---- tokenizer --------------------------------------------------------------------------------

caf::error train_tokenizer(const DataOptions& o, const std::vector<Document>& documents,
                           ProgressLine& progress) {
  auto trainer = BpeTrainer::make({o.train_tokenizer, o.min_frequency, default_special_tokens()});
  if (!trainer)
    return with_context("--train-tokenizer", trainer.error());
  for (size_t i = 0; i < documents.size(); ++i) {
    if (auto error = trainer->add_text(documents[i].text))
      return with_context(documents[i].source, error);
    if (i % 256 == 0)
      progress.show(fmt::format("counting words: {} %", 100 * i / documents.size()));
  }
  const auto trained = trainer->train([&](int32_t size) {
    progress.show(fmt::format("training the tokenizer: {} of {} tokens", size, o.train_tokenizer));
  });
  const fs::path folder{o.out};
  if (auto error = write_text_file(folder / "tokenizer.json", trained.tokenizer_json()))
    return error;
  return write_text_file(folder / "tokenizer_config.json", trained.tokenizer_config());
}

// The tokenizer's files stand beside the shards, so that training can pass them on.
caf::error copy_tokenizer(const fs::path& from, const fs::path& to) {
  for (const char* name :
       {"tokenizer.json", "tiktoken.model", "tokenizer_config.json", "chat_template.jinja"}) {
    std::error_code error;
    if (!fs::exists(from / name, error))
      continue;
    fs::copy_file(from / name, to / name, fs::copy_options::overwrite_existing, error);
    if (error)
      return make_error(Errc::io_error,
                        fmt::format("{}: {}", (to / name).string(), error.message()));
  }
  return {};
}

// ---- tokens -----------------------------------------------------------------------------------

class DocumentEncoder {
public:
  static caf::expected<DocumentEncoder> make(std::shared_ptr<const Tokenizer> tokenizer,
                                             double fim_rate, uint64_t seed) {
    DocumentEncoder encoder;
    encoder.tokenizer_ = std::move(tokenizer);
    encoder.fim_rate_ = fim_rate;
    encoder.seed_ = seed;
    const auto& t = *encoder.tokenizer_;
    if (!t.eos_token_id())
      return make_error(Errc::unsupported,
                        "tokenizer: it has no end token to close documents with");
    encoder.end_ = *t.eos_token_id();
    if (t.add_bos_token() && t.bos_token_id())
      encoder.begin_.push_back(*t.bos_token_id());
    if (fim_rate == 0)
      return encoder;
    for (const char* name : {"<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"}) {
      const auto id = t.token_id(name);
      if (!id)
        return make_error(Errc::unsupported,
                          fmt::format("--fim-rate: the tokenizer has no {}", name));
      encoder.fim_.push_back(*id);
    }
    return encoder;
  }

  // [start] text end, or the three parts of fill-in-the-middle with their marks.
  [[nodiscard]] caf::expected<std::vector<int32_t>> encode(std::string_view text,
                                                           uint64_t number) const {
    std::vector<int32_t> ids = begin_;
    const auto cut = fim_cut(text, fim_rate_, seed_, number);
    if (!cut) {
      if (auto error = append(text, ids))
        return error;
    } else {
      const std::string_view parts[] = {
          text.substr(0, cut->prefix_end), text.substr(cut->middle_end),
          text.substr(cut->prefix_end, cut->middle_end - cut->prefix_end)};
      for (size_t i = 0; i < 3; ++i) {
        ids.push_back(fim_[i]);
        if (auto error = append(parts[i], ids))
          return error;
      }
    }
    ids.push_back(end_);
    return ids;
  }

private:
  caf::error append(std::string_view text, std::vector<int32_t>& ids) const {
    auto more = tokenizer_->encode(text, /*match_special=*/false); // a corpus is not to be trusted
    if (!more)
      return more.error();
    ids.insert(ids.end(), more->begin(), more->end());
    return {};
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
  double fim_rate_ = 0;
  uint64_t seed_ = 0;
  std::vector<int32_t> begin_, fim_;
  int32_t end_ = 0;
};

struct Written {
  int64_t text_bytes = 0;
  json::object description;
  std::optional<ShardWriter> train, held_out;
};

caf::error write_shards(const DataOptions& o, const std::vector<Document>& documents,
                        const DocumentEncoder& encoder, Written& written, ProgressLine& progress) {
  auto train = ShardWriter::create(o.out, o.shard_tokens);
  if (!train)
    return train.error();
  written.train = std::move(*train);
  const auto num_held_out = static_cast<size_t>(static_cast<double>(documents.size()) * o.held_out);
  if (o.held_out > 0) {
    auto held_out = ShardWriter::create(fs::path{o.out} / "held-out", o.shard_tokens);
    if (!held_out)
      return held_out.error();
    written.held_out = std::move(*held_out);
    if (num_held_out == 0 || num_held_out == documents.size())
      return make_error(Errc::invalid_argument,
                        fmt::format("--held-out: {} of {} documents leaves one part empty",
                                    o.held_out, documents.size()));
  }
  for (size_t i = 0; i < documents.size(); ++i) {
    const auto ids = encoder.encode(documents[i].text, i);
    if (!ids)
      return with_context(documents[i].source, ids.error());
    auto& writer = i < num_held_out ? *written.held_out : *written.train;
    if (auto error = writer.append(*ids))
      return error;
    written.text_bytes += static_cast<int64_t>(documents[i].text.size());
    if (i % 256 == 0)
      progress.show(fmt::format("tokenizing: {} %", 100 * i / documents.size()));
  }
  if (written.held_out)
    if (auto error = written.held_out->finish(written.description))
      return error;
  return written.train->finish(written.description);
}

void print_summary(const DataOptions& o, const Written& w, size_t num_documents) {
  const int64_t held_out = w.held_out ? w.held_out->num_tokens() : 0;
  const int64_t tokens = w.train->num_tokens() + held_out;
  const double bytes_per_token = static_cast<double>(w.text_bytes) / static_cast<double>(tokens);
  if (o.json) {
    json::object result = w.description;
    result["num_documents"] = num_documents;
    result["num_tokens"] = w.train->num_tokens();
    result["held_out_tokens"] = held_out;
    result["bytes_per_token"] = bytes_per_token;
    result["num_shards"] = w.train->num_shards();
    fmt::print("{}\n", json::serialize(result));
    return;
  }
  fmt::print("{} documents, {} of text, {} tokens ({:.2f} bytes each)\n",
             with_commas(static_cast<int64_t>(num_documents)), bytes_text(w.text_bytes),
             with_commas(tokens), bytes_per_token);
  if (w.held_out)
    fmt::print("held out: {} tokens in {}/held-out\n", with_commas(held_out), o.out);
  fmt::print("wrote {} shard{} to {}\n", w.train->num_shards(),
             w.train->num_shards() == 1 ? "" : "s", o.out);
}

caf::error make_data(const DataOptions& o) {
  if (o.out.empty())
    return make_error(Errc::invalid_argument, "--out: expected a folder");
  ProgressLine progress{!o.json};
  const auto files = files_below(o.inputs);
  if (!files)
    return files.error();
  std::vector<Document> documents;
  for (const auto& file : *files) {
    progress.show(fmt::format("reading {}", file));
    if (auto error = read_documents(file, o.separator, documents))
      return error;
  }
  if (documents.empty())
    return make_error(Errc::invalid_argument, "the files hold no text");
  if (o.shuffle)
    shuffle(documents, o.seed);
  if (!o.tokenizer.empty()) // names its folder if it is none
    if (const auto given = Tokenizer::load(o.tokenizer); !given)
      return given.error();
  // Claims the folder before anything is written to it.
  if (const auto claim = ShardWriter::create(o.out, o.shard_tokens); !claim)
    return claim.error();
  if (auto error = o.tokenizer.empty() ? train_tokenizer(o, documents, progress)
                                       : copy_tokenizer(o.tokenizer, o.out))
    return error;
  auto tokenizer = Tokenizer::load(o.out);
  if (!tokenizer)
    return tokenizer.error();
  const auto encoder = DocumentEncoder::make(*tokenizer, o.fim_rate, o.seed);
  if (!encoder)
    return encoder.error();
  Written written;
  written.description = {{"vocab_size", (*tokenizer)->num_ids()},
                         {"vocabulary", vocabulary_digest(**tokenizer)},
                         {"fim_rate", o.fim_rate},
                         {"seed", o.seed}};
  if (auto error = write_shards(o, documents, *encoder, written, progress))
    return error;
  progress.clear();
  print_summary(o, written, documents.size());
  return {};
}

// "\n\n" as typed in a shell.
std::string unescape(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char next = text[i] == '\\' && i + 1 < text.size() ? text[i + 1] : '\0';
    const size_t known = std::string_view{"nrt\\"}.find(next);
    if (next != '\0' && known != std::string_view::npos) {
      out += "\n\r\t\\"[known];
      ++i;
    } else {
      out += text[i];
    }
  }
  return out;
}

} // namespace

void add_data(CLI::App& app, int& code) {
  auto o = std::make_shared<DataOptions>();
  auto* command = app.add_subcommand(
      "data", "Text files to shards of tokens for training; trains a tokenizer or takes one");
  command
      ->add_option("FILES", o->inputs,
                   "Text files, .jsonl files (a \"text\" in every line), or folders of .txt and "
                   ".jsonl")
      ->required();
  command->add_option("--out,-o", o->out, "Folder for shards and tokenizer")->required();
  auto* which = command->add_option_group("Tokenizer", "one of");
  which->add_option("--tokenizer", o->tokenizer, "Folder with tokenizer.json or tiktoken.model");
  which->add_option("--train-tokenizer", o->train_tokenizer,
                    "Train a byte-level BPE of so many tokens on these files");
  which->require_option(1);
  command
      ->add_option("--min-frequency", o->min_frequency,
                   "Pairs rarer than this are not merged (with --train-tokenizer)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--separator", o->separator,
                      "What stands between two documents of a text file, \\n is a line's end "
                      "(default: a file is a document)");
  command
      ->add_option("--fim-rate", o->fim_rate,
                   "Share of documents laid out as prefix, suffix, middle")
      ->check(share)
      ->capture_default_str();
  command->add_option("--held-out", o->held_out, "Share of documents kept apart, in OUT/held-out")
      ->check(share)
      ->capture_default_str();
  command->add_flag("!--no-shuffle", o->shuffle, "Keep the documents in their order");
  command->add_option("--seed", o->seed, "Of the order and the cuts")->capture_default_str();
  command->add_option("--shard-tokens", o->shard_tokens, "Tokens of one shard")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 33))
      ->capture_default_str();
  command->add_flag("--json", o->json, "Print one JSON object at the end");
  command->callback([o, &code] {
    o->separator = unescape(o->separator);
    const auto error = make_data(*o);
    code = error ? complain(error) : 0;
  });
}

} // namespace troupe
