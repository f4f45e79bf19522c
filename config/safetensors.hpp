// The safetensors container (specification §1.7): a JSON header and raw little-endian data.
//
// The reader believes nothing: the header must be complete, within limits and truthful, and the
// tensors must tile the data exactly, without gap or overlap, as the format demands. The file must
// not shrink while it is mapped (the kernel would answer a read with SIGBUS).
#pragma once

#include "config/dtype.hpp"
#include "config/errors.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe {

// The largest header that is read; the format's own implementation has the same limit.
inline constexpr int64_t kMaxSafetensorsHeader = 100'000'000;

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  int64_t offset = 0;    // of the first byte in the file
  int64_t num_bytes = 0; // product of shape times size_of(dtype), checked
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries; // ascending by offset
  std::map<std::string, std::string> metadata;
  int64_t data_offset = 0;
};

// `prefix` is the file's beginning and holds at least the header; `file_size` that of all of it.
[[nodiscard]] caf::expected<SafetensorsHeader>
parse_safetensors_header(std::span<const std::byte> prefix, int64_t file_size,
                         std::string_view source);

// A file mapped read-only. Thread-safe.
class SafetensorsFile {
public:
  [[nodiscard]] static caf::expected<std::shared_ptr<const SafetensorsFile>>
  open(const std::filesystem::path& path);
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;
  ~SafetensorsFile();

  [[nodiscard]] const SafetensorsHeader& header() const { return header_; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  // Valid as long as the file object.
  [[nodiscard]] std::span<const std::byte> bytes(const SafetensorsEntry& entry) const;
  [[nodiscard]] std::span<const std::byte> mapping() const { return mapping_; }

private:
  SafetensorsFile(std::filesystem::path path, std::span<const std::byte> mapping)
      : path_(std::move(path)), mapping_(mapping) {}

  std::filesystem::path path_;
  std::span<const std::byte> mapping_;
  SafetensorsHeader header_;
};

struct TensorDeclaration {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;

  [[nodiscard]] int64_t num_bytes() const;
};

// Writes a file of tensors that are declared at the start; their data then comes in pieces of any
// size, either in order (`append`) or at places (`write_at`, from any thread). The file appears
// under its name when `finish` succeeds; without that nothing is left behind. A regular file under
// that name is replaced; anything else (a directory, device, FIFO or link) is refused.
class SafetensorsWriter {
public:
  // `metadata` gets {"format": "pt"} unless it has a "format", which transformers insists on.
  [[nodiscard]] static caf::expected<std::unique_ptr<SafetensorsWriter>>
  create(const std::filesystem::path& path, const std::vector<TensorDeclaration>& tensors,
         std::map<std::string, std::string> metadata = {});
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  ~SafetensorsWriter();

  // The next bytes of the data, tensor after tensor in the order of their declaration.
  [[nodiscard]] caf::error append(std::span<const std::byte> bytes);
  // `position` counts from the first byte of the first tensor. The caller writes each byte once.
  [[nodiscard]] caf::error write_at(int64_t position, std::span<const std::byte> bytes);
  // Where tensor i starts, as `write_at` counts.
  [[nodiscard]] int64_t position_of(size_t tensor) const { return positions_.at(tensor); }
  [[nodiscard]] int64_t num_data_bytes() const { return data_bytes_; }
  // Errc::invalid_argument unless all declared bytes were written.
  [[nodiscard]] caf::error finish();

private:
  SafetensorsWriter() = default;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
  int64_t data_offset_ = 0;
  int64_t data_bytes_ = 0;
  int64_t appended_ = 0;
  std::atomic<int64_t> written_{0};
  std::vector<int64_t> positions_;
};

// Writes `text` under a temporary name and renames it to `path`, where only a regular file or
// nothing may stand.
[[nodiscard]] caf::error write_text_file(const std::filesystem::path& path, std::string_view text);

} // namespace troupe
