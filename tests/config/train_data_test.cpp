#include "config/train_data.hpp"

#include "config/dataset.hpp"
#include "config/permutation.hpp"
#include "config/tokenizer.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

using namespace troupe;

namespace {

namespace fs = std::filesystem;
using Data = std::shared_ptr<const TrainData>;

void write_rows(const fs::path& path, std::vector<int64_t> shape, const std::vector<int32_t>& ids,
                const char* name = "tokens", DType dtype = DType::i32) {
  auto writer = SafetensorsWriter::create(path, {{name, dtype, std::move(shape)}});
  REQUIRE(writer);
  REQUIRE(!(*writer)->append(std::as_bytes(std::span{ids})));
  REQUIRE(!(*writer)->finish());
}

// Tokens 0 1 2 … in shards of a hundred.
void write_shards(const fs::path& folder, int32_t num_tokens, boost::json::object more = {}) {
  auto writer = ShardWriter::create(folder, 100);
  REQUIRE(writer);
  for (int32_t at = 0; at < num_tokens; at += 10) {
    std::vector<int32_t> document(static_cast<size_t>(std::min(10, num_tokens - at)));
    std::iota(document.begin(), document.end(), at);
    REQUIRE(!writer->append(document));
  }
  REQUIRE(!writer->finish(std::move(more)));
}

TrainConfig data_config(const fs::path& path, int64_t length, uint64_t seed = 7) {
  TrainConfig c;
  c.data = path;
  c.sequence_length = length;
  c.seed = seed;
  return c;
}

TrainConfig tokens_config(const fs::path& path) {
  TrainConfig c;
  c.tokens = path;
  return c;
}

Data opened(const TrainConfig& config, int64_t vocab_size, const Tokenizer* tokenizer = nullptr) {
  auto data = TrainData::open(config, vocab_size, tokenizer);
  REQUIRE_MESSAGE(data, text_of(data.error()));
  return *data;
}

std::string refusal(const TrainConfig& config, int64_t vocab_size,
                    const Tokenizer* tokenizer = nullptr) {
  const auto data = TrainData::open(config, vocab_size, tokenizer);
  return data ? "no error" : text_of(data.error());
}

TrainRow row_of(const TrainData& data, int64_t index) {
  auto row = data.row(index);
  REQUIRE_MESSAGE(row, text_of(row.error()));
  return *row;
}

void says(const std::string& text, const std::string& what) {
  CAPTURE(text);
  CAPTURE(what);
  CHECK(text.find(what) != std::string::npos);
}

// The number of a row of write_shards' data.
int32_t number_of(const TrainData& data, int64_t index) {
  return row_of(data, index).ids[0] / static_cast<int32_t>(data.sequence_length());
}

std::shared_ptr<const Tokenizer> small_tokenizer(const char* name = "deepseek") {
  auto tokenizer =
      Tokenizer::load(std::string{TROUPE_SOURCE_DIR} + "/tests/reference/data/tokenizer/" + name);
  REQUIRE_MESSAGE(tokenizer, text_of(tokenizer.error()));
  return *tokenizer;
}

} // namespace

// ---- packed text and rows ---------------------------------------------------------------------

TEST_CASE("a file of rows is read in order, wraps around, and all of it has loss") {
  const ScratchFolder folder;
  const auto path = folder / "rows.safetensors";
  write_rows(path, {3, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  const auto data = opened(tokens_config(path), 12);
  CHECK(data->sequence_length() == 3);
  CHECK(data->num_rows() == 3);
  for (int64_t i = 0; i < 8; ++i) {
    const auto row = row_of(*data, i);
    const auto first = static_cast<int32_t>(i % 3 * 4);
    CHECK(row.ids == std::vector<int32_t>{first, first + 1, first + 2, first + 3});
    CHECK(row.has_loss == std::vector<uint8_t>(4, 1));
    CHECK(row.first_key == std::vector<int32_t>(4, 0));
    CHECK(row.positions == std::vector<int32_t>{0, 1, 2, 3});
    CHECK(*data->num_loss_tokens(i) == 3);
  }
  CHECK(data->warning().empty());
}

TEST_CASE("each round through packed text visits every row once, in an order of its own") {
  const ScratchFolder folder;
  write_shards(folder / "data", 1001);
  const auto data = opened(data_config(folder / "data", 10), 1001);
  const int64_t n = data->num_rows();
  REQUIRE(n == 100);
  std::vector<std::vector<int32_t>> rounds;
  for (int64_t round = 0; round < 3; ++round) {
    std::vector<int32_t> order;
    for (int64_t i = 0; i < n; ++i)
      order.push_back(number_of(*data, round * n + i));
    CHECK(std::set<int32_t>{order.begin(), order.end()}.size() == 100);
    CHECK(!std::ranges::is_sorted(order));
    rounds.push_back(std::move(order));
  }
  CHECK(rounds[0] != rounds[1]);
  CHECK(rounds[1] != rounds[2]);

  const auto again = opened(data_config(folder / "data", 10), 1001);
  const auto other = opened(data_config(folder / "data", 10, 8), 1001);
  int same = 0;
  for (int64_t i = 0; i < 3 * n; ++i) {
    CHECK(row_of(*again, i).ids == row_of(*data, i).ids);
    same += number_of(*other, i) == number_of(*data, i) ? 1 : 0;
  }
  CHECK(same < 20); // of 300, by chance 3
  CHECK(again->digest() == data->digest());
  CHECK(other->digest() != data->digest());
}

TEST_CASE("a keyed order permutes whatever the count, and hardly keeps neighbours together") {
  for (const uint64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097})
    for (uint64_t key = 0; key < 5; ++key) {
      CAPTURE(n);
      const KeyedPermutation order{n, key};
      std::vector<uint64_t> images;
      for (uint64_t i = 0; i < n; ++i)
        images.push_back(order(i));
      if (n > 999) {
        int neighbours = 0;
        for (size_t i = 1; i < images.size(); ++i)
          neighbours += images[i] == images[i - 1] + 1 ? 1 : 0;
        CHECK(neighbours < 10); // by chance 1
      }
      std::ranges::sort(images);
      for (uint64_t i = 0; i < n; ++i)
        CHECK(images[i] == i);
    }
  const KeyedPermutation large{uint64_t{1} << 61, 3};
  CHECK(large(12) < uint64_t{1} << 61);
  CHECK(large(12) != large(13));
}

TEST_CASE("held-out text is read in order, from shards or rows") {
  const ScratchFolder folder;
  write_shards(folder / "data", 101);
  const auto shards = TrainData::open_held_out(folder / "data", 10, 101);
  REQUIRE(shards);
  for (int32_t i = 0; i < 25; ++i)
    CHECK(number_of(**shards, i) == i % 10);
  const auto path = folder / "rows.safetensors";
  write_rows(path, {2, 4}, {0, 1, 2, 3, 4, 5, 6, 7});
  CHECK(TrainData::open_held_out(path, 3, 8));
  const auto wrong = TrainData::open_held_out(path, 5, 8);
  REQUIRE(!wrong);
  says(text_of(wrong.error()), "held_out: " + path.string());
  const auto foreign = TrainData::open_held_out(path, 3, 7); // found before the first evaluation
  REQUIRE(!foreign);
  says(text_of(foreign.error()), "7 is not in the vocabulary");
}

TEST_CASE("the digest tells data apart by their tokens, counts and lengths") {
  const ScratchFolder folder;
  const auto digest_of = [&](std::vector<int64_t> shape, const std::vector<int32_t>& ids) {
    const auto path = folder / "rows.safetensors";
    write_rows(path, std::move(shape), ids);
    return opened(tokens_config(path), 100)->digest();
  };
  const std::set<uint64_t> digests{
      digest_of({2, 3}, {1, 2, 3, 4, 5, 6}), digest_of({2, 3}, {1, 2, 3, 4, 5, 7}),
      digest_of({3, 2}, {1, 2, 3, 4, 5, 6}), digest_of({1, 3}, {1, 2, 3}),
      digest_of({1, 6}, {1, 2, 3, 4, 5, 6})};
  CHECK(digests.size() == 5);
  CHECK(digests.contains(digest_of({2, 3}, {1, 2, 3, 4, 5, 6})));
  write_shards(folder / "data", 101);
  CHECK(opened(data_config(folder / "data", 10), 101)->digest() !=
        opened(data_config(folder / "data", 20), 101)->digest());
}

TEST_CASE("a file of rows that can't be trained on is refused with its place") {
  const ScratchFolder folder;
  const auto path = folder / "rows.safetensors";
  const auto refused = [&](const std::string& what, std::optional<int64_t> length = {}) {
    auto config = tokens_config(path);
    config.sequence_length = length;
    const auto text = refusal(config, 100);
    says(text, "tokens: " + path.string());
    says(text, what);
  };
  refused("No such file");
  write_file(path, "");
  refused("0 bytes are no safetensors file");
  write_file(path, std::string(64, '\xff'));
  refused("header");
  write_rows(path, {2, 3}, {1, 2, 3, 4, 100, 6});
  refused("tokens[4]: 100 is not in the vocabulary of 100 ids");
  write_rows(path, {2, 3}, {1, -1, 3, 4, 5, 6});
  refused("tokens[1]: -1 is not in the vocabulary");
  write_rows(path, {2, 3}, {1, 2, 3, 4, 5, 6});
  refused("rows of 2 tokens and a target, not of 3", 3);
  write_rows(path, {0, 3}, {});
  refused("expected at least one row of two tokens");
  write_rows(path, {6, 1}, {1, 2, 3, 4, 5, 6});
  refused("expected at least one row of two tokens");
  write_rows(path, {6}, {1, 2, 3, 4, 5, 6});
  refused("how many make a row was not said");
  write_rows(path, {1, 2, 3}, {1, 2, 3, 4, 5, 6});
  refused("expected I32 [n] or [rows, T + 1]");
  write_rows(path, {2, 3}, {1, 2, 3, 4, 5, 6}, "tokens", DType::f32);
  refused("tokens: F32 [2, 3], expected I32");
  write_rows(path, {2, 3}, {1, 2, 3, 4, 5, 6}, "ids");
  refused("no tensor \"tokens\"");
  says(refusal(tokens_config(folder.path()), 100), "a folder of shards is given as data");
}

TEST_CASE("micro-batches and runs too large to count are refused") {
  const ScratchFolder folder;
  const auto path = folder / "rows.safetensors";
  write_rows(path, {2, 3}, {1, 2, 3, 4, 5, 6});
  auto config = tokens_config(path);
  config.micro_batch = int64_t{1} << 29;
  CHECK(refusal(config, 100) == "no error");
  config.micro_batch += 1;
  says(refusal(config, 100), "micro_batch: 536870913 sequences of 2 tokens");
  config.micro_batch = 1;
  config.steps = int64_t{1} << 40;
  config.batch = {8, {{2, 1 << 19}}};
  CHECK(refusal(config, 100) == "no error");
  config.batch.changes.emplace_back(3, (1 << 19) + 1);
  says(refusal(config, 100), "steps: 1099511627776 of 524289 sequences of 2 tokens");
}

TEST_CASE("cut and altered files of rows are refused or read, whatever the byte") {
  const ScratchFolder folder;
  const auto path = folder / "rows.safetensors";
  write_rows(path, {2, 3}, {1, 2, 3, 4, 5, 6});
  const auto whole = read_file(path);
  int read = 0;
  const auto try_bytes = [&](const std::string& bytes) {
    write_file(path, bytes);
    const auto data = TrainData::open(tokens_config(path), 100, nullptr);
    if (!data) {
      CHECK(text_of(data.error()).find(path.string()) != std::string::npos);
      return;
    }
    ++read;
    for (int64_t i = 0; i < (*data)->num_rows(); ++i)
      for (const int32_t id : row_of(**data, i).ids)
        CHECK((id >= 0 && id < 100));
  };
  for (size_t n = 0; n < whole.size(); ++n)
    try_bytes(whole.substr(0, n));
  CHECK(read == 0);
  for (size_t at = 0; at < whole.size(); ++at)
    for (const char flip : {'\x01', '\x10', '\x80'}) {
      auto bytes = whole;
      bytes[at] = static_cast<char>(bytes[at] ^ flip);
      try_bytes(bytes);
    }
  CHECK(read > 0); // a token that became another
}

TEST_CASE("folders that hold no finished data of this model are refused by name") {
  const ScratchFolder folder;
  const auto path = folder / "data";
  const auto refused = [&](const std::string& what, int64_t vocab_size = 301, int64_t length = 10) {
    const auto text = refusal(data_config(path, length), vocab_size);
    says(text, "data: " + path.string());
    says(text, what);
  };
  refused("No such file");
  fs::create_directories(path);
  refused("no shard-*.safetensors in it; `troupe data` makes them");
  write_shards(path, 301);
  CHECK(refusal(data_config(path, 10), 301) == "no error");
  refused("holds token 300, and the model's vocabulary 300 ids", 300);
  refused("301 tokens do not fill a row of 301", 301, 301);

  const auto description = read_file(path / "dataset.json");
  fs::remove(path / "shard-00001.safetensors");
  refused("but dataset.json counts 301 in 4");
  write_file(path / "dataset.json", "{\"num_tokens\": \"many\"");
  refused("dataset.json");
  write_file(path / "dataset.json", "{\"num_tokens\": 201}");
  refused("num_shards");
  write_file(path / "dataset.json", description);
  fs::remove(path / "dataset.json");
  refused("`troupe data` has not finished it");
}

TEST_CASE("shards of another tokenizer are refused by name where both are known") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer(), other = small_tokenizer("kimi");
  CHECK(vocabulary_digest(*tokenizer) != vocabulary_digest(*other));
  CHECK(vocabulary_digest(*tokenizer).size() == 16);
  write_shards(folder / "named", 101, {{"vocabulary", vocabulary_digest(*tokenizer)}});
  const auto config = data_config(folder / "named", 10);
  CHECK(refusal(config, 101, tokenizer.get()) == "no error");
  CHECK(refusal(config, 101, nullptr) == "no error");
  says(refusal(config, 101, other.get()),
       "data: " + (folder / "named").string() + ": was made with another tokenizer");
  const auto held_out = TrainData::open_held_out(folder / "named", 10, 101, other.get());
  REQUIRE(!held_out);
  says(text_of(held_out.error()), "held_out: " + (folder / "named").string());
  write_shards(folder / "unnamed", 101);
  CHECK(refusal(data_config(folder / "unnamed", 10), 101, other.get()) == "no error");
}

// ---- conversations ----------------------------------------------------------------------------

namespace {

using Turns = std::vector<std::pair<std::string, std::string>>;

std::string line_of(const Turns& turns) {
  boost::json::array messages;
  for (const auto& [role, content] : turns)
    messages.push_back({{"role", role}, {"content", content}});
  return boost::json::serialize(boost::json::object{{"messages", messages}}) + "\n";
}

std::string lines_of(const std::vector<Turns>& samples) {
  std::string text;
  for (const auto& turns : samples)
    text += line_of(turns);
  return text;
}

TrainConfig chat_config(const fs::path& path, int64_t length) {
  TrainConfig c;
  c.chat = path;
  c.sequence_length = length;
  return c;
}

// What of a row is to be learned, and the whole of its samples.
struct Decoded {
  std::string learned;
  std::vector<std::string> samples; // padding is not among them
};

Decoded decode(const TrainRow& row, const Tokenizer& tokenizer) {
  Decoded result;
  std::vector<int32_t> learned;
  for (size_t i = 0; i < row.ids.size();) {
    const auto first = static_cast<size_t>(row.first_key[i]);
    REQUIRE(first == i); // a sample begins where it says
    std::vector<int32_t> ids;
    for (; i < row.ids.size() && static_cast<size_t>(row.first_key[i]) == first; ++i) {
      CHECK(row.positions[i] == static_cast<int32_t>(i - first));
      ids.push_back(row.ids[i]);
      if (row.has_loss[i] != 0)
        learned.push_back(row.ids[i]);
    }
    result.samples.push_back(*tokenizer.decode(ids, false));
  }
  const auto padding = *tokenizer.token_bytes(*tokenizer.eos_token_id());
  if (result.samples.back().starts_with(padding))
    result.samples.pop_back();
  result.learned = *tokenizer.decode(learned, false);
  return result;
}

const std::string kBos = "<｜begin▁of▁sentence｜>", kEos = "<｜end▁of▁sentence｜>";

// As V3's template has it.
std::string rendered(const Turns& turns) {
  std::string text = kBos;
  for (const auto& [role, content] : turns)
    text += role == "user"        ? "<｜User｜>" + content
            : role == "assistant" ? "<｜Assistant｜>" + content + kEos
                                  : content;
  return text;
}

} // namespace

TEST_CASE("of a conversation the answers and their ends have loss, and nothing else") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer();
  const Turns turns{{"system", "Be brief."}, {"user", "Hello, 3 cats?"}, {"assistant", "Yes: 3."},
                    {"user", "And then"},    {"assistant", "No more."},  {"user", "Bye"}};
  write_file(folder / "chat.jsonl", fmt::format("\n{} \r\n", line_of(turns)));
  const auto data = opened(chat_config(folder / "chat.jsonl", 120), 100000, tokenizer.get());
  REQUIRE(data->num_rows() == 1);
  const auto row = row_of(*data, 0);
  REQUIRE(row.ids.size() == 121);
  CHECK(row.has_loss.size() == 121);
  CHECK(row.positions.size() == 121);
  const auto decoded = decode(row, *tokenizer);
  REQUIRE(decoded.samples.size() == 1);
  CHECK(decoded.samples[0] == rendered(turns));
  CHECK(decoded.learned == "Yes: 3." + kEos + "No more." + kEos);
  CHECK(*data->num_loss_tokens(0) == std::ranges::count(row.has_loss, 1));
  CHECK(row.ids.back() == *tokenizer->eos_token_id());
  CHECK(data->warning().empty());
}

TEST_CASE("a system message that stands late changes nothing about what is learned") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer();
  write_file(folder / "chat.jsonl", line_of({{"user", "U"},
                                             {"assistant", "first"},
                                             {"system", "late"},
                                             {"user", "V"},
                                             {"assistant", "second"}}));
  const auto data = opened(chat_config(folder / "chat.jsonl", 120), 100000, tokenizer.get());
  const auto decoded = decode(row_of(*data, 0), *tokenizer);
  CHECK(decoded.learned == "first" + kEos + "second" + kEos);
  CHECK(decoded.samples[0].starts_with(kBos + "late<｜User｜>U"));
}

TEST_CASE("samples lie side by side in the first row with room, and none is lost") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer();
  std::vector<Turns> samples;
  std::multiset<std::string> expected;
  for (int i = 0; i < 200; ++i) {
    samples.push_back({{"user", fmt::format("question {}", i)},
                       {"assistant", std::string(static_cast<size_t>(1 + i * 7 % 40), 'x')}});
    expected.insert(rendered(samples.back()));
  }
  write_file(folder / "chat.jsonl", lines_of(samples));
  const auto data = opened(chat_config(folder / "chat.jsonl", 100), 100000, tokenizer.get());
  const auto again = opened(chat_config(folder / "chat.jsonl", 100), 100000, tokenizer.get());
  const int64_t n = data->num_rows();
  CHECK(n < 100);
  std::multiset<std::string> found, of_next_round;
  for (int64_t i = 0; i < n; ++i) {
    const auto row = row_of(*data, i);
    for (const auto& sample : decode(row, *tokenizer).samples)
      found.insert(sample);
    for (const auto& sample : decode(row_of(*data, n + i), *tokenizer).samples)
      of_next_round.insert(sample);
    CHECK(*data->num_loss_tokens(i) == std::ranges::count(row.has_loss, 1));
    const auto same = row_of(*again, i);
    CHECK(same.ids == row.ids);
    CHECK(same.has_loss == row.has_loss);
    CHECK(same.first_key == row.first_key);
  }
  CHECK(found == expected);
  CHECK(of_next_round == expected);
  CHECK(again->digest() == data->digest());

  // First fit: a short sample goes back to the first row, where the long one has left room.
  const auto ids = [&](const std::string& content) {
    return rendered({{"user", "u"}, {"assistant", content}});
  };
  const std::string middle(30, 'q'), large(60, 'Q'); // of as many tokens: there are no merges
  write_file(folder / "few.jsonl", lines_of({{{"user", "u"}, {"assistant", middle}},
                                             {{"user", "u"}, {"assistant", large}},
                                             {{"user", "u"}, {"assistant", "z"}}}));
  const auto few = opened(chat_config(folder / "few.jsonl", 70), 100000, tokenizer.get());
  REQUIRE(few->num_rows() == 2);
  const auto one = decode(row_of(*few, 0), *tokenizer).samples;
  const auto two = decode(row_of(*few, 1), *tokenizer).samples;
  const auto& first = one.size() == 2 ? one : two;
  REQUIRE(first.size() == 2);
  CHECK(first[0] == ids(middle));
  CHECK(first[1] == ids("z"));
}

TEST_CASE("a sample longer than a row keeps its beginning, and one line tells") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer();
  const auto path = folder / "chat.jsonl";
  write_file(path, lines_of({{{"user", "a"}, {"assistant", std::string(500, '!')}},
                             {{"user", std::string(500, '!')}, {"assistant", "never seen"}},
                             {{"user", "no answer"}},
                             {{"user", "b"}, {"assistant", "short"}}}));
  const auto data = opened(chat_config(path, 40), 100000, tokenizer.get());
  CHECK(data->warning() == path.string() +
                               ": 2 of 4 samples are longer than 41 tokens and lose their end; 2 "
                               "of 4 samples have no answer to learn from and are left out");
  REQUIRE(data->num_rows() == 2);
  for (int64_t i = 0; i < 2; ++i) {
    const auto row = row_of(*data, i);
    CHECK(row.ids.size() == 41);
    CHECK(*data->num_loss_tokens(i) > 0);
    CHECK(row.has_loss[0] == 0);
  }
}

TEST_CASE("each family of templates learns what its assistant says") {
  const ScratchFolder folder;
  const auto learned = [&](const char* tokenizer_name, const std::string& chat_template,
                           const std::string& lines) {
    const fs::path from =
        std::string{TROUPE_SOURCE_DIR} + "/tests/reference/data/tokenizer/" + tokenizer_name;
    const auto to = folder / tokenizer_name;
    fs::remove_all(to);
    fs::copy(from, to);
    write_file(to / "chat_template.jinja", chat_template);
    const auto tokenizer = Tokenizer::load(to);
    REQUIRE(tokenizer);
    write_file(folder / "chat.jsonl", lines);
    const auto data = opened(chat_config(folder / "chat.jsonl", 300), 100000, tokenizer->get());
    return decode(row_of(*data, 0), **tokenizer).learned;
  };
  const auto simple = line_of({{"user", "U"}, {"assistant", "A b."}});
  const auto thinking = line_of({{"user", "U"}, {"assistant", "<think>t</think>A b."}});
  // " A" is one token or two: the blank before it belongs to the prompt or the answer.
  CHECK(learned("deepseek", "{{ 'User: ' }}{{ 'Assistant:' }}", simple).ends_with("A b." + kEos));
  CHECK(learned("deepseek", "{{ 'User: ' }}{{ 'Assistant:' }}", simple).size() <= 6 + kEos.size());
  const std::string v31 =
      "{% if not thinking %}{{'<｜User｜>'}}{{'<｜Assistant｜>'}}{{'</think>'}}";
  CHECK(learned("deepseek", v31, thinking) == "A b." + kEos);
  const std::string v3 = "<｜User｜><｜Assistant｜><｜tool▁calls▁begin｜>";
  CHECK(learned("deepseek", v3, simple) == "A b." + kEos);
  const std::string kimi = "<|im_middle|><|tool_calls_section_begin|>";
  CHECK(learned("kimi", kimi, simple) == "A b.<|im_end|>");
  const std::string call =
      R"({"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": null,)"
      R"( "tool_calls": [{"id": "functions.f:0", "function": {"name": "f",)"
      R"( "arguments": {"x": 1}}}]}, {"role": "tool", "tool_call_id": "functions.f:0",)"
      R"( "content": "out"}, {"role": "assistant", "content": "done"}]})";
  CHECK(learned("kimi", kimi, call) ==
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        "{\"x\":1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>done<|im_end|>");
}

TEST_CASE("conversations that can't be used are refused with line and field") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer();
  const auto path = folder / "chat.jsonl";
  const auto config = chat_config(path, 50);
  says(refusal(config, 100000, tokenizer.get()), "chat: " + path.string() + ": No such file");
  const auto good = line_of({{"user", "U"}, {"assistant", "A"}});
  const std::vector<std::pair<std::string, std::string>> cases{
      {"nonsense", "not JSON"},
      {"[]", "expected"},
      {"{}", "messages: expected a list"},
      {R"({"messages": "hi"})", "messages: expected a list"},
      {R"({"messages": []})", "messages: expected at least one"},
      {R"({"messages": [3]})", "messages[0]: expected an object, got 3"},
      {R"({"messages": [{"content": "x"}]})", "messages[0].role"},
      {R"({"messages": [{"role": "user"}]})", "messages[0].content"},
      {R"({"messages": [{"role": "user", "content": ["x"]}]})", "messages[0].content"},
      {R"({"messages": [{"role": "robot", "content": "x"}]})",
       "messages[0].role: role: expected system, user, assistant or tool, got 'robot'"},
      {R"({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]})",
       "messages[0].tool_calls[0].function: expected an object"},
      {R"({"messages": [{"role": "assistant", "tool_calls": {"id": "a"}}]})",
       "messages[0].tool_calls: expected a list"},
      {R"({"messages": [{"role": "user", "content": ""}, {"role": "user", "content": "x",)"
       R"( "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]})",
       "messages[1]: only an assistant's message may hold tool calls"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\"}]}", "not JSON"},
      {R"({"messages": [{"role": "user", "content": "x", "role": "user"}]})", "role"},
  };
  for (const auto& [line, what] : cases) {
    CAPTURE(line);
    write_file(path, good + "\n" + line + "\n" + good);
    const auto text = refusal(config, 100000, tokenizer.get());
    says(text, "chat: " + path.string() + ":3");
    says(text, what);
  }
  write_file(path, good);
  says(refusal(config, 10, tokenizer.get()), path.string() + ":1: token ");
  says(refusal(config, 100000), "conversations need a tokenizer, and the model has none");
  write_file(path, "\n\n");
  says(refusal(config, 100000, tokenizer.get()), "no answer (a message of role assistant)");
  write_file(path, line_of({{"user", "U"}}) + line_of({{"system", "S"}}));
  says(refusal(config, 100000, tokenizer.get()), "to learn from in 2 samples");
  says(refusal(chat_config(folder.path(), 50), 100000, tokenizer.get()), "not a file");
}

TEST_CASE("lines cut anywhere are refused or read, and never crash") {
  const ScratchFolder folder;
  const auto tokenizer = small_tokenizer();
  const auto path = folder / "chat.jsonl";
  const auto line = line_of({{"user", "naïve"}, {"assistant", "漢字 \"quoted\" \\ text"}});
  for (size_t n = 0; n + 1 < line.size(); ++n) {
    write_file(path, line.substr(0, n));
    CHECK(!TrainData::open(chat_config(path, 50), 100000, tokenizer.get()));
  }
  for (size_t at = 0; at + 1 < line.size(); ++at)
    for (const char byte : {'\0', '"', '{', ']', '\xc3', '9'}) {
      auto bytes = line;
      bytes[at] = byte;
      write_file(path, bytes);
      const auto data = TrainData::open(chat_config(path, 50), 100000, tokenizer.get());
      if (data)
        CHECK(row_of(**data, 0).ids.size() == 51);
      else
        CHECK(text_of(data.error()).find(path.string()) != std::string::npos);
    }
}
