#include "config/checkpoint_digest.hpp"

#include <fmt/format.h>

#include <xxhash.h>

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <string>

namespace troupe {

namespace {

namespace fs = std::filesystem;

bool belongs_to_an_expert(std::string_view name) {
  return name.find(".mlp.experts.") != std::string_view::npos;
}

// Bytes [begin, end) of the line of tensors, cut where one tensor ends. `tensor` is the one that
// holds `begin` or one before it, `start` where it begins; both move along.
void add_range(std::span<const TensorExtent> tensors, int64_t begin, int64_t end, size_t& tensor,
               int64_t& start, std::vector<DataSample>& samples) {
  while (begin < end) {
    while (begin >= start + tensors[tensor].num_bytes)
      start += tensors[tensor++].num_bytes;
    const int64_t size = std::min(end, start + tensors[tensor].num_bytes) - begin;
    samples.push_back({tensor, begin - start, size});
    begin += size;
  }
}

// The samples of one file, and where their hashes go.
struct Read {
  int64_t offset = 0, size = 0;
  uint64_t* hash = nullptr;
};

class File {
public:
  explicit File(const fs::path& path)
      : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (fd_ >= 0)
      ::close(fd_);
  }

  caf::error hash(std::span<const Read> reads) {
    if (fd_ < 0)
      return failed("can't be opened");
    // Hints: no read-ahead around the samples, and all of them on their way before the first wait.
    (void)::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
    for (const auto& read : reads)
      (void)::posix_fadvise(fd_, read.offset, read.size, POSIX_FADV_WILLNEED);
    for (const auto& read : reads) {
      std::array<std::byte, kSampleBytes> bytes;
      if (auto error = fill({bytes.data(), static_cast<size_t>(read.size)}, read.offset))
        return error;
      *read.hash = XXH3_64bits(bytes.data(), static_cast<size_t>(read.size));
    }
    return {};
  }

private:
  caf::error fill(std::span<std::byte> bytes, int64_t offset) {
    while (!bytes.empty()) {
      const auto n = ::pread(fd_, bytes.data(), bytes.size(), offset);
      if (n < 0 && errno == EINTR)
        continue;
      if (n < 0)
        return failed("can't be read");
      if (n == 0)
        return make_error(Errc::io_error, path_.string() + ": the file ends early");
      bytes = bytes.subspan(static_cast<size_t>(n));
      offset += n;
    }
    return {};
  }
  [[nodiscard]] caf::error failed(std::string_view what) const {
    return make_error(Errc::io_error,
                      fmt::format("{}: {}: {}", path_.string(), what, std::strerror(errno)));
  }

  const fs::path& path_;
  int fd_;
};

} // namespace

std::vector<DataSample> plan_samples(std::span<const TensorExtent> tensors) {
  const int64_t total =
      std::accumulate(tensors.begin(), tensors.end(), int64_t{0},
                      [](int64_t sum, const TensorExtent& t) { return sum + t.num_bytes; });
  std::vector<DataSample> samples;
  size_t tensor = 0;
  int64_t start = 0;
  const int64_t blocks = (total + kSampleBytes - 1) / kSampleBytes;
  const int64_t even = std::min(blocks, kEvenSamples);
  for (int64_t i = 0; i < even; ++i) {
    const int64_t block = even == blocks ? i : i * (blocks - 1) / (even - 1);
    add_range(tensors, block * kSampleBytes, std::min(total, (block + 1) * kSampleBytes), tensor,
              start, samples);
  }
  if (even == blocks)
    return samples;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (const auto& [name, bytes] = tensors[i]; bytes > 0 && !belongs_to_an_expert(name)) {
      const int64_t size = std::min(bytes, kSampleBytes);
      samples.push_back({i, (bytes - size) / 2, size});
    }
  return samples;
}

caf::expected<uint64_t> digest_checkpoint(std::string_view config,
                                          std::vector<const TensorView*> tensors,
                                          std::span<const fs::path> files) {
  std::ranges::sort(tensors, {}, [](const TensorView* view) { return view->name; });
  std::string text{config};
  std::vector<TensorExtent> extents;
  for (const auto* view : tensors) {
    text +=
        fmt::format("\n{} {} [{}]", view->name, name_of(view->dtype), fmt::join(view->shape, ", "));
    extents.push_back({view->name, static_cast<int64_t>(view->bytes.size())});
  }
  const auto samples = plan_samples(extents);
  std::vector<uint64_t> hashes(samples.size());
  std::vector<std::vector<Read>> reads(files.size());
  for (size_t i = 0; i < samples.size(); ++i) {
    const auto& view = *tensors[samples[i].tensor];
    reads[static_cast<size_t>(view.file)].push_back(
        {view.file_offset + samples[i].offset, samples[i].size, &hashes[i]});
  }
  for (size_t f = 0; f < files.size(); ++f) {
    std::ranges::sort(reads[f], {}, &Read::offset);
    if (!reads[f].empty())
      if (auto error = File{files[f]}.hash(reads[f]))
        return error;
  }
  return XXH3_64bits_withSeed(hashes.data(), hashes.size() * sizeof(uint64_t),
                              XXH3_64bits(text.data(), text.size()));
}

} // namespace troupe
