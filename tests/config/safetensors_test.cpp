#include "config/safetensors.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <cstring>
#include <numeric>
#include <string>

using namespace troupe;

namespace fs = std::filesystem;

namespace {

// A file with this header and so many bytes of data.
std::string container(std::string_view header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file.append(header).append(data_bytes, 'x');
}

std::string complaint(std::string_view header, size_t data_bytes) {
  const auto file = container(header, data_bytes);
  const auto parsed = parse_safetensors_header(std::as_bytes(std::span{file}),
                                               static_cast<int64_t>(file.size()), "f");
  return parsed ? std::string{} : text_of(parsed.error());
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

#define ONE R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})"

} // namespace

TEST_CASE("a written file reads back, whether written in order, in pieces or at places") {
  const ScratchFolder folder;
  const auto path = folder / "t.safetensors";
  std::vector<float> a(1000);
  std::iota(a.begin(), a.end(), 0.5f);
  const std::vector<uint16_t> b{1, 2, 3};
  for (const bool in_order : {true, false}) {
    auto writer = SafetensorsWriter::create(
        path,
        {{"a", DType::f32, {10, 100}}, {"empty", DType::f32, {0, 7}}, {"b", DType::bf16, {3}}});
    REQUIRE(writer);
    const auto bytes = std::as_bytes(std::span{a});
    if (in_order) {
      for (size_t i = 0; i < bytes.size(); i += 37)
        CHECK(!(*writer)->append(bytes.subspan(i, std::min<size_t>(37, bytes.size() - i))));
      CHECK(!(*writer)->append(std::as_bytes(std::span{b})));
    } else {
      CHECK(!(*writer)->write_at((*writer)->position_of(2), std::as_bytes(std::span{b})));
      CHECK(!(*writer)->write_at(2000, bytes.subspan(2000)));
      CHECK(!(*writer)->write_at(0, bytes.first(2000)));
    }
    CHECK(!(*writer)->finish());
    const auto file = SafetensorsFile::open(path);
    REQUIRE(file);
    const auto& header = (*file)->header();
    REQUIRE(header.entries.size() == 3);
    CHECK(header.metadata.at("format") == "pt");
    CHECK(header.entries[0].name == "a");
    CHECK(header.entries[0].shape == std::vector<int64_t>{10, 100});
    CHECK(header.data_offset % 64 == 0);
    CHECK(std::memcmp((*file)->bytes(header.entries[0]).data(), a.data(), 4000) == 0);
    CHECK(header.entries[2].dtype == DType::bf16);
    CHECK(std::memcmp((*file)->bytes(header.entries[2]).data(), b.data(), 6) == 0);
  }
}

TEST_CASE("an unfinished file leaves nothing behind, and too much or too little is refused") {
  const ScratchFolder folder;
  const std::vector<std::byte> data(25);
  {
    auto writer = SafetensorsWriter::create(folder / "t", {{"a", DType::f32, {2, 3}}});
    REQUIRE(writer);
    CHECK((*writer)->append(data));
    CHECK(!(*writer)->append(std::span{data}.first(20)));
    CHECK((*writer)->write_at(-1, std::span{data}.first(1)));
    const auto error = (*writer)->finish();
    CHECK(contains(text_of(error), "20 bytes written of 24"));
  }
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK(!SafetensorsWriter::create(folder / "t", {{"a", DType::f32, {1}}, {"a", DType::f32, {1}}}));
  CHECK(!SafetensorsWriter::create(folder / "t", {{"a", DType::f32, {1ll << 40, 1ll << 40}}}));
  CHECK(!SafetensorsWriter::create(folder / "no" / "t", {{"a", DType::f32, {1}}}));
}

TEST_CASE("a header that lies is refused with the tensor's name") {
  CHECK(complaint(ONE, 24).empty());
  CHECK(contains(complaint(ONE, 23), "tensor a: data_offsets [0, 24) lie outside"));
  CHECK(contains(complaint(ONE, 25), "25 bytes of data, but the tensors take 24"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,20]}})", 20),
                 "tensor a: F32 [2, 3] does not take the 20 bytes"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4),
                 "lie outside"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
    "b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
                           6),
                 "tensor b starts at byte 2"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
    "b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                           4),
                 "overlaps"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
    "b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
                           12),
                 "leaves a gap"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
    "a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                           8),
                 "appears twice"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],
    "data_offsets":[0,0]}})",
                           0),
                 "tensor a"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4),
                 "tensor a: shape"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4),
                 "shape"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],
    "data_offsets":[0,4]}})",
                           4),
                 "shape"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],
    "data_offsets":[0,18446744073709551615]}})",
                           4),
                 "data_offsets"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4),
                 "data_offsets"));
  CHECK(contains(complaint(R"({"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}})", 1),
                 "\"F8_E5M2\" is unknown"));
  CHECK(contains(complaint(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4), "dtype"));
  CHECK(contains(complaint(R"({"a":7})", 0), "tensor a: expected an object"));
  CHECK(contains(complaint(R"({"__metadata__":{"x":1}})", 0), "__metadata__"));
  CHECK(contains(complaint(R"([])", 0), "expected a JSON object"));
  CHECK(contains(complaint(R"({"a":)", 0), "not JSON"));
  CHECK(complaint("{}   ", 0).empty());
}

TEST_CASE("what is no regular file is never written over") {
  const ScratchFolder folder;
  const auto refused = [](const fs::path& path, std::string_view kind) {
    const auto want = fmt::format("{}: is {}; expected a regular file or nothing under this name",
                                  path.string(), kind);
    const auto writer = SafetensorsWriter::create(path, {{"a", DType::f32, {1}}});
    REQUIRE(!writer);
    CHECK(text_of(writer.error()) == want);
    CHECK(code_of(writer.error()) == Errc::invalid_argument);
    CHECK(text_of(write_text_file(path, "text")) == want);
  };
  fs::create_directory(folder / "directory");
  refused(folder / "directory", "a directory");
  REQUIRE(::mkfifo((folder / "fifo").c_str(), 0600) == 0);
  refused(folder / "fifo", "a FIFO");
  write_file(folder / "target", "kept");
  fs::create_symlink(folder / "target", folder / "link");
  refused(folder / "link", "a symbolic link");
  fs::create_symlink(folder / "nowhere", folder / "dangling");
  refused(folder / "dangling", "a symbolic link");
  fs::create_symlink("/dev/null", folder / "null"); // a device by another name
  refused(folder / "null", "a symbolic link");
  if (::mknod((folder / "device").c_str(), S_IFCHR | 0600, makedev(1, 3)) == 0) // needs privileges
    refused(folder / "device", "a device");

  // Also one that appears while the data is written.
  auto writer = SafetensorsWriter::create(folder / "late", {{"a", DType::u8, {1}}});
  REQUIRE(writer);
  fs::create_directory(folder / "late");
  CHECK(!(*writer)->append(std::vector<std::byte>(1)));
  CHECK(contains(text_of((*writer)->finish()), "late: is a directory"));

  // A regular file is replaced.
  CHECK(!write_text_file(folder / "target", "new"));
  CHECK(read_file(folder / "target") == "new");
  for (const auto& entry : fs::directory_iterator{folder.path()}) // nothing stays behind
    CHECK(entry.path().extension() != ".tmp");
}

TEST_CASE("a file shorter than it says, or with an enormous header, is refused") {
  const ScratchFolder folder;
  const auto whole = container(ONE, 24);
  const auto path = folder / "t.safetensors";
  for (size_t size = 0; size < whole.size(); ++size) {
    write_file(path, std::string_view{whole}.substr(0, size));
    const auto file = SafetensorsFile::open(path);
    CAPTURE(size);
    REQUIRE(!file);
    CHECK(contains(text_of(file.error()), "t.safetensors"));
  }
  write_file(path, whole);
  CHECK(SafetensorsFile::open(path));
  for (const uint64_t length : {uint64_t{100'000'001}, uint64_t{1} << 63, ~uint64_t{0}}) {
    auto file = whole;
    std::memcpy(file.data(), &length, sizeof length);
    write_file(path, file);
    CHECK(contains(text_of(SafetensorsFile::open(path).error()), "the header claims"));
  }
  CHECK(code_of(SafetensorsFile::open(folder / "absent").error()) == Errc::not_found);
  CHECK(code_of(SafetensorsFile::open(folder.path()).error()) == Errc::io_error);
}
