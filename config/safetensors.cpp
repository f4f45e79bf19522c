#include "config/safetensors.hpp"

#include "config/json.hpp"

#include <fmt/format.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

namespace troupe {

namespace json = boost::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is used as it lies");

namespace {

constexpr size_t kMaxRank = 8;
constexpr int64_t kPrefixBytes = 8; // the header's length, a little-endian u64
constexpr JsonLimits kHeaderLimits{static_cast<size_t>(kMaxSafetensorsHeader), 8, 16'000'000};

caf::error malformed(std::string_view source, const std::string& text) {
  return make_error(Errc::malformed, fmt::format("{}: {}", source, text));
}

caf::error os_error(const std::filesystem::path& path, std::string_view doing) {
  const int code = errno;
  return make_error(code == ENOENT ? Errc::not_found : Errc::io_error,
                    fmt::format("{}: {}: {}", path.string(), doing, std::strerror(code)));
}

// Product of shape and element size, or -1 where it does not fit.
int64_t checked_bytes(const std::vector<int64_t>& shape, DType dtype) {
  int64_t bytes = size_of(dtype);
  for (const int64_t n : shape)
    if (n < 0 || __builtin_mul_overflow(bytes, n, &bytes))
      return -1;
  return bytes;
}

// The integers of an array field; an error unless all are at least 0.
caf::expected<std::vector<int64_t>> integers(const json::object& tensor, std::string_view field,
                                             size_t at_most) {
  const auto* value = tensor.if_contains({field.data(), field.size()});
  const auto* array = value ? value->if_array() : nullptr;
  std::vector<int64_t> result;
  if (array && array->size() <= at_most)
    for (const auto& item : *array)
      if (item.is_int64() && item.get_int64() >= 0)
        result.push_back(item.get_int64());
  if (!array || result.size() != array->size())
    return make_error(Errc::malformed,
                      fmt::format("{}: expected up to {} integers of at least 0, got {}", field,
                                  at_most, value ? shown(*value) : "nothing"));
  return result;
}

caf::expected<DType> read_dtype(const json::object& tensor) {
  const auto* value = tensor.if_contains("dtype");
  if (!value || !value->is_string())
    return make_error(Errc::malformed, fmt::format("dtype: expected a string, got {}",
                                                   value ? shown(*value) : "nothing"));
  const auto& name = value->get_string();
  const auto dtype = dtype_from_name({name.data(), name.size()});
  if (!dtype)
    return make_error(Errc::unsupported, fmt::format("dtype: \"{}\" is unknown",
                                                     std::string_view{name}.substr(0, 40)));
  return *dtype;
}

// `data_bytes`: how many there are behind the header. Offsets become the file's only later.
caf::expected<SafetensorsEntry> read_entry(std::string_view name, const json::value& value,
                                           int64_t data_bytes) {
  const auto* tensor = value.if_object();
  if (!tensor)
    return make_error(Errc::malformed, fmt::format("expected an object, got {}", shown(value)));
  auto dtype = read_dtype(*tensor);
  if (!dtype)
    return dtype.error();
  auto shape = integers(*tensor, "shape", kMaxRank);
  if (!shape)
    return shape.error();
  auto offsets = integers(*tensor, "data_offsets", 2);
  if (!offsets)
    return offsets.error();
  if (offsets->size() != 2)
    return make_error(Errc::malformed, "data_offsets: expected two integers");
  const int64_t begin = (*offsets)[0];
  const int64_t end = (*offsets)[1];
  if (begin > end || end > data_bytes)
    return make_error(Errc::malformed,
                      fmt::format("data_offsets [{}, {}) lie outside the {} bytes of data", begin,
                                  end, data_bytes));
  const int64_t bytes = checked_bytes(*shape, *dtype);
  if (bytes != end - begin)
    return make_error(Errc::malformed,
                      fmt::format("{} [{}] does not take the {} bytes of its data_offsets",
                                  name_of(*dtype), fmt::join(*shape, ", "), end - begin));
  return SafetensorsEntry{std::string{name}, *dtype, std::move(*shape), begin, bytes};
}

caf::error read_metadata(const json::value& value, std::string_view source,
                         SafetensorsHeader& header) {
  const auto* object = value.if_object();
  if (!object)
    return malformed(source, "__metadata__: expected an object of strings");
  for (const auto& [key, text] : *object) {
    if (!text.is_string())
      return malformed(source, fmt::format("__metadata__: {}: expected a string, got {}",
                                           std::string_view{key}, shown(text)));
    header.metadata.emplace(key, text.get_string());
  }
  return {};
}

// Sorts entries and checks that they tile [0, data_bytes).
caf::error check_tiling(std::vector<SafetensorsEntry>& entries, int64_t data_bytes,
                        std::string_view source) {
  std::ranges::sort(entries, [](const auto& a, const auto& b) {
    return std::pair{a.offset, a.num_bytes} < std::pair{b.offset, b.num_bytes};
  });
  int64_t end = 0;
  for (const auto& entry : entries) {
    if (entry.offset != end)
      return malformed(source,
                       fmt::format("tensor {} starts at byte {} of the data, but {} at byte {}",
                                   entry.name, entry.offset,
                                   entry.offset < end ? "overlaps the one that ends"
                                                      : "leaves a gap behind the one that ends",
                                   end));
    end += entry.num_bytes;
  }
  if (end != data_bytes)
    return malformed(source,
                     fmt::format("{} bytes of data, but the tensors take {}", data_bytes, end));
  return {};
}

caf::error write_fully(int fd, std::span<const std::byte> bytes, int64_t offset,
                       const std::filesystem::path& path) {
  while (!bytes.empty()) {
    const auto n = ::pwrite(fd, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return os_error(path, "can't write");
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += n;
  }
  return {};
}

std::string_view kind_of(mode_t mode) {
  switch (mode & S_IFMT) {
  case S_IFDIR:
    return "a directory";
  case S_IFLNK:
    return "a symbolic link";
  case S_IFIFO:
    return "a FIFO";
  case S_IFSOCK:
    return "a socket";
  case S_IFCHR:
  case S_IFBLK:
    return "a device";
  default:
    return "no regular file";
  }
}

// A rename replaces whatever stands under the name, also /dev/null or a link to it. So a name is
// written to only where a regular file or nothing stands.
caf::error check_target(const std::filesystem::path& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) // whatever else is wrong, creating a file will say
    return {};
  if (S_ISREG(status.st_mode))
    return {};
  return make_error(Errc::invalid_argument,
                    fmt::format("{}: is {}; expected a regular file or nothing under this name",
                                path.string(), kind_of(status.st_mode)));
}

// Gives the finished temporary file its name, or removes it.
caf::error publish(const std::filesystem::path& temporary, const std::filesystem::path& path) {
  auto error = check_target(path); // again: writing may have taken hours
  if (!error && ::rename(temporary.c_str(), path.c_str()) != 0)
    error = os_error(path, "can't be written");
  if (error)
    ::unlink(temporary.c_str());
  return error;
}

// Creates a file beside `path` under a name nobody else uses, and says which; -1 and errno if not.
int create_temporary(const std::filesystem::path& path, std::filesystem::path& temporary) {
  constexpr int kAttempts = 100; // names that a crashed process with the same id left behind
  for (int i = 0; i < kAttempts; ++i) {
    temporary = path.string() + fmt::format(".{}-{}.tmp", ::getpid(), i);
    const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd >= 0 || errno != EEXIST)
      return fd;
  }
  return -1;
}

// The header as JSON, padded so that data starts at a multiple of 64.
std::string header_text(const std::vector<TensorDeclaration>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  json::object root;
  root["__metadata__"] = json::value_from(metadata);
  int64_t begin = 0;
  for (const auto& tensor : tensors) {
    const int64_t end = begin + tensor.num_bytes();
    const auto dtype = name_of(tensor.dtype);
    root[tensor.name] = json::object{{"dtype", json::string_view{dtype.data(), dtype.size()}},
                                     {"shape", json::value_from(tensor.shape)},
                                     {"data_offsets", {begin, end}}};
    begin = end;
  }
  auto text = json::serialize(root);
  text.resize((text.size() + kPrefixBytes + 63) / 64 * 64 - kPrefixBytes, ' ');
  return text;
}

caf::error check_declarations(const std::filesystem::path& path,
                              const std::vector<TensorDeclaration>& tensors) {
  std::vector<std::string_view> names;
  int64_t total = 0;
  for (const auto& tensor : tensors) {
    names.push_back(tensor.name);
    const int64_t bytes = checked_bytes(tensor.shape, tensor.dtype);
    if (bytes < 0 || __builtin_add_overflow(total, bytes, &total))
      return make_error(Errc::invalid_argument,
                        fmt::format("{}: tensor {} is too large", path.string(), tensor.name));
  }
  std::ranges::sort(names);
  const auto twice = std::ranges::adjacent_find(names);
  if (twice != names.end())
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: two tensors named {}", path.string(), *twice));
  return {};
}

} // namespace

caf::expected<SafetensorsHeader> parse_safetensors_header(std::span<const std::byte> prefix,
                                                          int64_t file_size,
                                                          std::string_view source) {
  if (file_size < kPrefixBytes || prefix.size() < kPrefixBytes)
    return malformed(source, fmt::format("truncated: {} bytes are no safetensors file", file_size));
  uint64_t length = 0;
  std::memcpy(&length, prefix.data(), sizeof length);
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeader))
    return malformed(source, fmt::format("the header claims {} bytes, at most {} are read", length,
                                         kMaxSafetensorsHeader));
  const auto available = std::min(prefix.size(), static_cast<size_t>(file_size)) - kPrefixBytes;
  if (length > available)
    return malformed(source, fmt::format("truncated: the header claims {} bytes, the file has {}",
                                         length, available));
  const std::string_view text{reinterpret_cast<const char*>(prefix.data()) + kPrefixBytes,
                              static_cast<size_t>(length)};
  auto root = parse_json_object(text, fmt::format("{}: header", source), kHeaderLimits);
  if (!root)
    return root.error();
  SafetensorsHeader header;
  header.data_offset = kPrefixBytes + static_cast<int64_t>(length);
  const int64_t data_bytes = file_size - header.data_offset;
  for (const auto& [key, value] : *root) {
    const std::string_view name{key.data(), key.size()};
    if (name == "__metadata__") {
      if (auto error = read_metadata(value, source, header))
        return error;
      continue;
    }
    auto entry = read_entry(name, value, data_bytes);
    if (!entry)
      return with_context(fmt::format("{}: tensor {}", source, name.substr(0, 200)), entry.error());
    header.entries.push_back(std::move(*entry));
  }
  if (auto error = check_tiling(header.entries, data_bytes, source))
    return error;
  for (auto& entry : header.entries)
    entry.offset += header.data_offset;
  return header;
}

caf::expected<std::shared_ptr<const SafetensorsFile>>
SafetensorsFile::open(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a FIFO by this name must not hang.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0)
    return os_error(path, "can't be opened");
  struct stat status {};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size < kPrefixBytes) {
    ::close(fd);
    if (S_ISREG(status.st_mode))
      return malformed(path.string(),
                       fmt::format("truncated: {} bytes are no safetensors file", status.st_size));
    return make_error(Errc::io_error, path.string() + ": not a regular file");
  }
  const auto size = static_cast<size_t>(status.st_size);
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  ::close(fd);
  if (address == MAP_FAILED)
    return os_error(path, "can't be mapped");
  std::shared_ptr<SafetensorsFile> file{
      new SafetensorsFile{path, {static_cast<const std::byte*>(address), size}}};
  auto header = parse_safetensors_header(file->mapping_, status.st_size, path.string());
  if (!header)
    return header.error();
  file->header_ = std::move(*header);
  return std::shared_ptr<const SafetensorsFile>{std::move(file)};
}

SafetensorsFile::~SafetensorsFile() {
  ::munmap(const_cast<std::byte*>(mapping_.data()), mapping_.size());
}

std::span<const std::byte> SafetensorsFile::bytes(const SafetensorsEntry& entry) const {
  return mapping_.subspan(static_cast<size_t>(entry.offset), static_cast<size_t>(entry.num_bytes));
}

int64_t TensorDeclaration::num_bytes() const {
  return std::max<int64_t>(0, checked_bytes(shape, dtype));
}

caf::expected<std::unique_ptr<SafetensorsWriter>>
SafetensorsWriter::create(const std::filesystem::path& path,
                          const std::vector<TensorDeclaration>& tensors,
                          std::map<std::string, std::string> metadata) {
  if (auto error = check_declarations(path, tensors))
    return error;
  if (auto error = check_target(path))
    return error;
  metadata.try_emplace("format", "pt");
  const auto text = header_text(tensors, metadata);
  std::unique_ptr<SafetensorsWriter> writer{new SafetensorsWriter};
  writer->path_ = path;
  writer->fd_ = create_temporary(path, writer->temporary_);
  if (writer->fd_ < 0)
    return os_error(path, "can't be created");
  writer->data_offset_ = kPrefixBytes + static_cast<int64_t>(text.size());
  for (const auto& tensor : tensors) {
    writer->positions_.push_back(writer->data_bytes_);
    writer->data_bytes_ += tensor.num_bytes();
  }
  const uint64_t length = text.size();
  if (auto error = write_fully(writer->fd_, std::as_bytes(std::span{&length, 1}), 0, path))
    return error;
  if (auto error = write_fully(writer->fd_, std::as_bytes(std::span{text}), kPrefixBytes, path))
    return error;
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ < 0)
    return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

caf::error SafetensorsWriter::append(std::span<const std::byte> bytes) {
  if (auto error = write_at(appended_, bytes))
    return error;
  appended_ += static_cast<int64_t>(bytes.size());
  return {};
}

caf::error SafetensorsWriter::write_at(int64_t position, std::span<const std::byte> bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  if (position < 0 || position > data_bytes_ || size > data_bytes_ - position)
    return make_error(
        Errc::invalid_argument,
        fmt::format("{}: more data than the {} bytes declared", path_.string(), data_bytes_));
  if (auto error = write_fully(fd_, bytes, data_offset_ + position, path_))
    return error;
  written_.fetch_add(size);
  return {};
}

caf::error SafetensorsWriter::finish() {
  if (written_.load() != data_bytes_)
    return make_error(Errc::invalid_argument,
                      fmt::format("{}: {} bytes written of {} declared", path_.string(),
                                  written_.load(), data_bytes_));
  const int closed = ::close(fd_);
  fd_ = -1;
  if (closed != 0) {
    auto error = os_error(path_, "can't be written");
    ::unlink(temporary_.c_str());
    return error;
  }
  return publish(temporary_, path_);
}

caf::error write_text_file(const std::filesystem::path& path, std::string_view text) {
  if (auto error = check_target(path))
    return error;
  std::filesystem::path temporary;
  const int fd = create_temporary(path, temporary);
  if (fd < 0)
    return os_error(path, "can't be created");
  auto error = write_fully(fd, std::as_bytes(std::span{text}), 0, path);
  if (::close(fd) != 0 && !error)
    error = os_error(path, "can't be written");
  if (!error)
    return publish(temporary, path);
  ::unlink(temporary.c_str());
  return error;
}

} // namespace troupe
