// Buffers: the memory that tensors travel in. Pooled, reference-counted, 64-byte aligned.
//
// A buffer is copied at most once between the wire and a kernel; messages carry BufferRefs. The
// pool has a hard bound: acquiring more is refused, so a sender's memory stays flat.
// All functions are callable from any thread. A buffer's contents belong to whoever the protocol
// says (normally the single holder that fills it, until it is sent; readers after that).
#pragma once

#include "config/errors.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

namespace troupe {

enum class MemoryKind : uint8_t { host, pinned, device };

class BufferPool;

// Where a pool's memory comes from. A backend supplies one for pinned or device memory.
// Callable from any thread; outlives the pool.
class MemorySource {
public:
  virtual ~MemorySource() = default;
  [[nodiscard]] virtual MemoryKind kind() const = 0;
  // At least 64-byte aligned; null when there is none.
  [[nodiscard]] virtual void* allocate(size_t bytes) = 0;
  virtual void deallocate(void* memory, size_t bytes) noexcept = 0;
};

class Buffer {
public:
  [[nodiscard]] std::byte* data() { return data_; }
  [[nodiscard]] const std::byte* data() const { return data_; }
  [[nodiscard]] size_t size() const { return size_; }         // bytes in use
  [[nodiscard]] size_t capacity() const { return capacity_; } // bytes owned
  [[nodiscard]] MemoryKind kind() const { return kind_; }
  // How many BufferRefs share it; for tests and statistics.
  [[nodiscard]] int64_t references() const { return references_.load(std::memory_order_relaxed); }
  // Shrinks or grows the part in use; n <= capacity().
  void resize(size_t n);
  [[nodiscard]] std::span<std::byte> bytes() { return {data_, size_}; }
  [[nodiscard]] std::span<const std::byte> bytes() const { return {data_, size_}; }

private:
  friend class BufferPool;
  friend class BufferRef;
  Buffer() = default;
  ~Buffer() = default;
  std::atomic<int64_t> references_{0};
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
  MemoryKind kind_ = MemoryKind::host;
  int size_class_ = 0;
  std::shared_ptr<BufferPool> pool_; // keeps the pool alive while lent
};

// Shared ownership of a Buffer; the last one gives it back to its pool.
class BufferRef {
public:
  BufferRef() = default;
  BufferRef(const BufferRef& other) noexcept : ptr_(other.ptr_) { retain(); }
  BufferRef(BufferRef&& other) noexcept : ptr_(std::exchange(other.ptr_, nullptr)) {}
  BufferRef& operator=(BufferRef other) noexcept {
    std::swap(ptr_, other.ptr_);
    return *this;
  }
  ~BufferRef() { release(); }
  explicit operator bool() const { return ptr_ != nullptr; }
  Buffer* operator->() const { return ptr_; }
  Buffer& operator*() const { return *ptr_; }
  [[nodiscard]] Buffer* get() const { return ptr_; }
  friend bool operator==(const BufferRef& a, const BufferRef& b) { return a.ptr_ == b.ptr_; }

private:
  friend class BufferPool;
  explicit BufferRef(Buffer* ptr) noexcept : ptr_(ptr) { retain(); }
  void retain() noexcept {
    if (ptr_)
      ptr_->references_.fetch_add(1, std::memory_order_relaxed);
  }
  void release() noexcept;
  Buffer* ptr_ = nullptr;
};

class BufferPool : public std::enable_shared_from_this<BufferPool> {
public:
  struct Stats {
    size_t bytes_lent = 0;   // capacity of the buffers now in use
    size_t bytes_pooled = 0; // capacity kept for reuse
    size_t high_water = 0;   // largest bytes_lent so far
    uint64_t refused = 0;
  };
  // At most `limit_bytes` are owned (lent + pooled) at any time.
  // Memory that was given back is kept warm for the next, and freed only to make room for another
  // size. `source` null: host memory.
  static std::shared_ptr<BufferPool> make(size_t limit_bytes, MemorySource* source = nullptr);
  ~BufferPool();
  // A buffer of `size` bytes, contents undefined. Errc::out_of_memory past the limit.
  [[nodiscard]] caf::expected<BufferRef> acquire(size_t size);
  [[nodiscard]] Stats stats() const;
  [[nodiscard]] size_t limit() const;
  // Bytes that a buffer of `size` bytes takes of the limit: at most a quarter more, at least 256.
  [[nodiscard]] static size_t capacity_for(size_t size);

private:
  friend class BufferRef;
  struct Impl;
  explicit BufferPool(std::unique_ptr<Impl> impl);
  [[nodiscard]] Buffer* create(size_t size, size_t capacity);
  void destroy(Buffer* buffer) noexcept;
  void give_back(Buffer* buffer) noexcept;
  std::unique_ptr<Impl> impl_;
};

} // namespace troupe
