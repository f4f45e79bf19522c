#include "kernels/weights.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <sys/mman.h>
#include <unistd.h>

namespace troupe {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostBytes = std::numeric_limits<size_t>::max() / 2;

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Maps `bytes` at an address that huge pages can back: one huge page more is reserved and what
// lies before and behind the aligned part is given back.
std::byte* map_aligned(size_t bytes) {
  const size_t reserved = bytes + kHugePage;
  void* p = ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    return nullptr;
  auto* const begin = static_cast<std::byte*>(p);
  const size_t head =
      round_up(reinterpret_cast<uintptr_t>(begin), kHugePage) - reinterpret_cast<uintptr_t>(begin);
  if (head > 0)
    ::munmap(begin, head);
  if (reserved - head > bytes)
    ::munmap(begin + head + bytes, reserved - head - bytes);
  // Only whole huge pages inside the mapping become huge, so it never holds more memory than its
  // own pages. A kernel without huge pages refuses, which costs speed alone.
  (void)::madvise(begin + head, bytes, MADV_HUGEPAGE);
  return begin + head;
}

// Whole pages, zero-filled; nullptr and errno where there is no room.
std::byte* map(size_t bytes) {
  if (bytes >= kHugePage)
    return map_aligned(bytes);
  void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<std::byte*>(p);
}

} // namespace

void MemoryBlock::Unmap::operator()(std::byte* p) const {
  if (p != nullptr)
    ::munmap(p, size);
}

caf::expected<MemoryBlock> MemoryBlock::allocate(size_t bytes) {
  auto blocks = allocate_together({&bytes, 1});
  if (!blocks)
    return std::move(blocks.error());
  return std::move(blocks->front());
}

caf::expected<std::vector<MemoryBlock>>
MemoryBlock::allocate_together(std::span<const size_t> bytes) {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  size_t mapped = 0;
  for (const size_t n : bytes) {
    const size_t pages = n > kMostBytes ? n : round_up(n, page);
    mapped = pages > kMostBytes - std::min(mapped, kMostBytes) ? kMostBytes + 1 : mapped + pages;
  }
  std::vector<MemoryBlock> blocks(bytes.size());
  if (mapped == 0)
    return blocks;
  auto* next = mapped > kMostBytes ? nullptr : map(mapped);
  if (next == nullptr)
    return make_error(Errc::out_of_memory,
                      mapped > kMostBytes
                          ? std::string{"no room for more bytes than can be addressed"}
                          : fmt::format("no room for {} bytes: {}", mapped, std::strerror(errno)));
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] == 0)
      continue;
    const size_t pages = round_up(bytes[i], page);
    blocks[i].data_ = std::unique_ptr<std::byte, Unmap>(next, Unmap{pages});
    blocks[i].size_ = bytes[i];
    next += pages;
  }
  return blocks;
}

} // namespace troupe
