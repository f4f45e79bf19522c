#include "config/dataset.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include <unistd.h>

using namespace troupe;

namespace {

namespace fs = std::filesystem;

class TemporaryFolder {
public:
  TemporaryFolder()
      : path_(fs::temp_directory_path() / ("troupe-data-" + std::to_string(getpid()))) {
    fs::create_directories(path_);
  }
  ~TemporaryFolder() { fs::remove_all(path_); }
  [[nodiscard]] fs::path path() const { return path_; }

private:
  fs::path path_;
};

// Documents 0 1 2 …, of lengths 1 to 9.
caf::error write_dataset(const fs::path& folder, int64_t num_tokens, int64_t shard_tokens) {
  auto writer = ShardWriter::create(folder, shard_tokens);
  if (!writer)
    return writer.error();
  for (int64_t at = 0, n = 1; at < num_tokens; at += n, n = n % 9 + 1) {
    std::vector<int32_t> document(static_cast<size_t>(std::min(n, num_tokens - at)));
    std::iota(document.begin(), document.end(), static_cast<int32_t>(at));
    if (auto error = writer->append(document))
      return error;
  }
  return writer->finish({{"vocab_size", num_tokens}});
}

void write_rows(const fs::path& path, std::vector<int64_t> shape, const std::vector<int32_t>& ids) {
  auto writer = SafetensorsWriter::create(path, {{"tokens", DType::i32, std::move(shape)}});
  REQUIRE(writer);
  REQUIRE(!(*writer)->append(std::as_bytes(std::span{ids})));
  REQUIRE(!(*writer)->finish());
}

} // namespace

TEST_CASE("rows run through documents and shards and begin again at the end") {
  const TemporaryFolder folder;
  for (const int64_t shard_tokens : {1, 10, 37, 1000}) {
    CAPTURE(shard_tokens);
    const auto path = folder.path() / std::to_string(shard_tokens);
    REQUIRE(!write_dataset(path, 103, shard_tokens));
    const auto rows = TokenRows::open(path, 10, 103);
    REQUIRE(rows);
    CHECK(rows->num_tokens() == 103);
    REQUIRE(rows->num_rows() == 10);
    for (int64_t i = 0; i < 25; ++i) {
      std::vector<int32_t> row(11);
      REQUIRE(!rows->read(i, row));
      for (int32_t j = 0; j < 11; ++j)
        CHECK(row[static_cast<size_t>(j)] == (i % 10) * 10 + j);
    }
  }
}

TEST_CASE("a file of rows gives its rows as they are") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "rows.safetensors";
  write_rows(path, {3, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  const auto rows = TokenRows::open(path, std::nullopt, 12);
  REQUIRE(rows);
  CHECK(rows->row_tokens() == 3);
  CHECK(rows->num_rows() == 3);
  std::vector<int32_t> row(4);
  REQUIRE(!rows->read(4, row));
  CHECK(row == std::vector<int32_t>{4, 5, 6, 7});
  CHECK(TokenRows::open(path, 3, 12));
  CHECK(text_of(TokenRows::open(path, 7, 12).error()).find("not of 7") != std::string::npos);
}

TEST_CASE("data that is no data is refused by name") {
  const TemporaryFolder folder;
  const auto error = [&](const fs::path& path, std::optional<int64_t> row_tokens = 4) {
    return text_of(TokenRows::open(path, row_tokens, 100).error());
  };
  const auto says = [](const std::string& text, const char* what) {
    CAPTURE(text);
    CHECK(text.find(what) != std::string::npos);
  };
  says(error(folder.path()), "no shard-*.safetensors");
  says(error(folder.path() / "absent"), "absent");

  const auto path = folder.path() / "data";
  REQUIRE(!write_dataset(path, 50, 20));
  says(error(path, std::nullopt), "was not said");
  says(error(path, 50), "do not fill a row");
  says(text_of(ShardWriter::create(path, 20).error()), "holds a dataset already");
  fs::remove(path / "dataset.json");
  says(error(path), "has not finished it");

  const auto rows = folder.path() / "rows.safetensors";
  write_rows(rows, {1, 2, 3}, {1, 2, 3, 4, 5, 6});
  says(error(rows), "expected I32 [n] or [rows, T + 1]");
  write_rows(rows, {2, 3}, {1, 2, 3, 4, 100, 6});
  const auto bad = TokenRows::open(rows, std::nullopt, 100);
  REQUIRE(bad);
  std::vector<int32_t> row(3);
  CHECK(!bad->read(0, row));
  says(text_of(bad->read(1, row)), "tokens[4]: 100 is not in the vocabulary of 100 ids");
}

TEST_CASE("fill-in-the-middle cuts the asked share of documents between characters") {
  const std::string text = "naïve „quotes“ — 漢字";
  int cut = 0;
  for (uint64_t document = 0; document < 4000; ++document) {
    const auto places = fim_cut(text, 0.25, 7, document);
    if (!places)
      continue;
    ++cut;
    CHECK(places->prefix_end <= places->middle_end);
    CHECK(places->middle_end <= text.size());
    for (const size_t at : {places->prefix_end, places->middle_end})
      CHECK((at == text.size() || (static_cast<uint8_t>(text[at]) & 0xC0u) != 0x80u));
  }
  CHECK(cut > 900);
  CHECK(cut < 1100);
  CHECK(!fim_cut(text, 0, 7, 1));
  CHECK(!fim_cut("ab", 1, 7, 1));
}
