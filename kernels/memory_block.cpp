#include "kernels/weights.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <sys/mman.h>
#include <unistd.h>

namespace troupe {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

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
  // Only whole huge pages inside the block become huge, so a block never holds more memory than
  // its own pages. A kernel without huge pages refuses, which costs speed alone.
  (void)::madvise(begin + head, bytes, MADV_HUGEPAGE);
  return begin + head;
}

} // namespace

void MemoryBlock::Unmap::operator()(std::byte* p) const {
  if (p != nullptr)
    ::munmap(p, size);
}

caf::expected<MemoryBlock> MemoryBlock::allocate(size_t bytes) {
  MemoryBlock block;
  if (bytes == 0)
    return block;
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  if (bytes > std::numeric_limits<size_t>::max() / 2)
    return make_error(Errc::out_of_memory, fmt::format("no room for {} bytes", bytes));
  const size_t mapped = round_up(bytes, page);
  std::byte* data = nullptr;
  if (mapped >= kHugePage) {
    data = map_aligned(mapped);
  } else {
    void* p = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data = p == MAP_FAILED ? nullptr : static_cast<std::byte*>(p);
  }
  if (data == nullptr)
    return make_error(Errc::out_of_memory,
                      fmt::format("no room for {} bytes: {}", bytes, std::strerror(errno)));
  block.data_ = std::unique_ptr<std::byte, Unmap>(data, Unmap{mapped});
  block.size_ = bytes;
  return block;
}

} // namespace troupe
