// Size classes: four per octave from 256 bytes, so that a buffer wastes at most a quarter. A pool
// keeps what comes back and lends it out again last in, first out: on the machines this runs on,
// touching fresh memory costs ten times as much as reading warm memory.
#include "transport/buffer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace troupe {

namespace {

constexpr size_t kSmallest = 256;
constexpr int kStepsPerOctave = 4;
// 256 B · 2^40: more than any limit.
constexpr int kNumClasses = 40 * kStepsPerOctave + 1;
// A free buffer up to this many classes larger is taken before fresh memory is touched: at most
// twice the size asked.
constexpr int kClassesToLookUp = kStepsPerOctave;
// From here on memory is mapped on its own, so that freeing it returns it to the system.
constexpr size_t kMapFrom = size_t{1} << 20;

size_t class_capacity(int index) {
  const size_t octave = kSmallest << (index / kStepsPerOctave);
  return octave + octave / kStepsPerOctave * static_cast<size_t>(index % kStepsPerOctave);
}

int class_of(size_t size) {
  if (size <= kSmallest)
    return 0;
  const int octave = std::bit_width((size - 1) / kSmallest) - 1;
  int index = octave * kStepsPerOctave;
  while (class_capacity(index) < size)
    ++index;
  return index;
}

class HostMemory final : public MemorySource {
public:
  [[nodiscard]] MemoryKind kind() const override { return MemoryKind::host; }
  [[nodiscard]] void* allocate(size_t bytes) override {
    if (bytes < kMapFrom)
      return std::aligned_alloc(64, bytes);
    void* memory =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
  }
  void deallocate(void* memory, size_t bytes) noexcept override {
    if (bytes < kMapFrom)
      std::free(memory);
    else
      ::munmap(memory, bytes);
  }
};

HostMemory& host_memory() {
  static HostMemory memory; // stateless
  return memory;
}

} // namespace

void Buffer::resize(size_t n) {
  if (n > capacity_) {
    std::fputs("troupe: a buffer was resized beyond its capacity\n", stderr);
    std::abort();
  }
  size_ = n;
}

void BufferRef::release() noexcept {
  if (!ptr_ || ptr_->references_.fetch_sub(1, std::memory_order_acq_rel) != 1)
    return;
  // The pool must outlive the call that takes the buffer back, also when this was its last holder.
  const auto pool = std::move(ptr_->pool_);
  pool->give_back(ptr_);
}

struct BufferPool::Impl {
  size_t limit = 0;
  MemorySource* source = nullptr;
  mutable std::mutex mutex;
  Stats stats;
  std::array<std::vector<Buffer*>, kNumClasses> free;

  Buffer* take_free(int wanted) {
    for (int c = wanted; c <= std::min(wanted + kClassesToLookUp, kNumClasses - 1); ++c) {
      auto& list = free[static_cast<size_t>(c)];
      if (list.empty())
        continue;
      auto* buffer = list.back();
      list.pop_back();
      return buffer;
    }
    return nullptr;
  }
  // Takes free buffers out, largest first, until `bytes` fit below the limit; the caller frees
  // them. Empty when even that would not make room.
  bool make_room(size_t bytes, std::vector<Buffer*>& evicted) {
    if (bytes > limit || stats.bytes_lent > limit - bytes)
      return false;
    for (auto list = free.rbegin(); list != free.rend(); ++list) {
      while (stats.bytes_lent + stats.bytes_pooled > limit - bytes && !list->empty()) {
        stats.bytes_pooled -= list->back()->capacity();
        evicted.push_back(list->back());
        list->pop_back();
      }
    }
    return true;
  }
  void lend(size_t capacity) {
    stats.bytes_lent += capacity;
    stats.high_water = std::max(stats.high_water, stats.bytes_lent);
  }
};

BufferPool::BufferPool(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

BufferPool::~BufferPool() {
  for (const auto& list : impl_->free)
    for (auto* buffer : list)
      destroy(buffer);
}

void BufferPool::destroy(Buffer* buffer) noexcept {
  if (buffer->data_) {
    ASAN_UNPOISON_MEMORY_REGION(buffer->data_, buffer->capacity_);
    impl_->source->deallocate(buffer->data_, buffer->capacity_);
  }
  delete buffer;
}

std::shared_ptr<BufferPool> BufferPool::make(size_t limit_bytes, MemorySource* source) {
  auto impl = std::make_unique<Impl>();
  impl->limit = limit_bytes;
  impl->source = source ? source : &host_memory();
  return std::shared_ptr<BufferPool>{new BufferPool(std::move(impl))};
}

size_t BufferPool::capacity_for(size_t size) {
  if (size > class_capacity(kNumClasses - 1))
    return std::numeric_limits<size_t>::max();
  return class_capacity(class_of(size));
}

size_t BufferPool::limit() const { return impl_->limit; }

caf::expected<BufferRef> BufferPool::acquire(size_t size) {
  const size_t capacity = capacity_for(size);
  Buffer* buffer = nullptr;
  std::vector<Buffer*> evicted;
  {
    const std::lock_guard lock{impl_->mutex};
    auto& stats = impl_->stats;
    if (capacity <= impl_->limit)
      buffer = impl_->take_free(class_of(size));
    if (buffer) {
      stats.bytes_pooled -= buffer->capacity_;
      impl_->lend(buffer->capacity_);
    } else if (impl_->make_room(capacity, evicted)) {
      impl_->lend(capacity);
    } else {
      ++stats.refused;
      return make_error(Errc::out_of_memory,
                        fmt::format("buffer pool: no room for {} bytes ({} of {} bytes are lent)",
                                    size, stats.bytes_lent, impl_->limit));
    }
  }
  for (auto* old : evicted)
    destroy(old);
  if (!buffer)
    buffer = create(size, capacity);
  if (!buffer) {
    const std::lock_guard lock{impl_->mutex};
    impl_->stats.bytes_lent -= capacity;
    ++impl_->stats.refused;
    return make_error(Errc::out_of_memory,
                      fmt::format("buffer pool: the machine has no {} bytes of memory", capacity));
  }
  ASAN_UNPOISON_MEMORY_REGION(buffer->data_, buffer->capacity_);
  buffer->size_ = size;
  buffer->pool_ = shared_from_this();
  return BufferRef{buffer};
}

Buffer* BufferPool::create(size_t size, size_t capacity) {
  void* memory = impl_->source->allocate(capacity);
  if (!memory)
    return nullptr;
  auto* buffer = new Buffer;
  buffer->data_ = static_cast<std::byte*>(memory);
  buffer->capacity_ = capacity;
  buffer->kind_ = impl_->source->kind();
  buffer->size_class_ = class_of(size);
  return buffer;
}

void BufferPool::give_back(Buffer* buffer) noexcept {
  // Under ASan a use after the last release is an error, although the memory stays ours.
  if (buffer->kind_ == MemoryKind::host)
    ASAN_POISON_MEMORY_REGION(buffer->data_, buffer->capacity_);
  const std::lock_guard lock{impl_->mutex};
  impl_->stats.bytes_lent -= buffer->capacity_;
  impl_->stats.bytes_pooled += buffer->capacity_;
  impl_->free[static_cast<size_t>(buffer->size_class_)].push_back(buffer);
}

BufferPool::Stats BufferPool::stats() const {
  const std::lock_guard lock{impl_->mutex};
  return impl_->stats;
}

} // namespace troupe
