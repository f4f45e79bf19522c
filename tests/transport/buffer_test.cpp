#include "config/random.hpp"
#include "transport/buffer.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using namespace troupe;

namespace {

class CountingSource final : public MemorySource {
public:
  [[nodiscard]] MemoryKind kind() const override { return MemoryKind::pinned; }
  [[nodiscard]] void* allocate(size_t bytes) override {
    if (exhausted)
      return nullptr;
    owned += bytes;
    ++allocations;
    return std::aligned_alloc(64, bytes);
  }
  void deallocate(void* memory, size_t bytes) noexcept override {
    owned -= bytes;
    std::free(memory);
  }
  size_t owned = 0;
  int allocations = 0;
  bool exhausted = false;
};

} // namespace

TEST_CASE("buffers of every size are aligned, writable and as large as asked") {
  auto pool = BufferPool::make(size_t{1} << 30);
  for (const size_t size : {size_t{0}, size_t{1}, size_t{255}, size_t{256}, size_t{257},
                            size_t{4097}, size_t{1} << 20, (size_t{300} << 20) + 1}) {
    auto buffer = pool->acquire(size);
    REQUIRE(buffer);
    CHECK((*buffer)->size() == size);
    CHECK((*buffer)->capacity() >= size);
    CHECK((*buffer)->capacity() == BufferPool::capacity_for(size));
    CHECK(reinterpret_cast<uintptr_t>((*buffer)->data()) % 64 == 0);
    if (size > 0) {
      (*buffer)->data()[0] = std::byte{1};
      (*buffer)->data()[size - 1] = std::byte{2};
    }
  }
  CHECK(pool->stats().bytes_lent == 0);
}

TEST_CASE("a buffer wastes at most a quarter of what was asked") {
  KeyedStream draws{30};
  for (int i = 0; i < 10000; ++i) {
    const size_t size = 256 + draws.next() % (size_t{1} << (10 + i % 30));
    const size_t capacity = BufferPool::capacity_for(size);
    REQUIRE(capacity >= size);
    REQUIRE(capacity <= size + size / 4 + 1);
  }
}

TEST_CASE("a pool never owns more than its limit, and says so when it is asked for more") {
  CountingSource source;
  {
    auto pool = BufferPool::make(1 << 20, &source);
    std::vector<BufferRef> held;
    while (auto buffer = pool->acquire(100'000)) {
      held.push_back(*buffer);
      REQUIRE(source.owned <= size_t{1} << 20);
    }
    CHECK(held.size() == (size_t{1} << 20) / BufferPool::capacity_for(100'000));
    const auto refused = pool->acquire(100'000);
    REQUIRE_FALSE(refused);
    CHECK(code_of(refused.error()) == Errc::out_of_memory);
    CHECK(pool->stats().refused == 2);
    held.pop_back();
    CHECK(pool->acquire(100'000));
    CHECK_FALSE(pool->acquire(2 << 20));
    CHECK_FALSE(pool->acquire(~size_t{0}));
    CHECK(pool->stats().high_water <= size_t{1} << 20);
  }
  CHECK(source.owned == 0);
}

TEST_CASE("memory that came back is lent again, and freed for a size that needs the room") {
  CountingSource source;
  auto pool = BufferPool::make(1 << 20, &source);
  const std::byte* first = nullptr;
  for (int i = 0; i < 100; ++i) {
    auto buffer = pool->acquire(50'000 + static_cast<size_t>(i));
    REQUIRE(buffer);
    if (i == 0)
      first = (*buffer)->data();
    CHECK((*buffer)->data() == first);
    CHECK((*buffer)->kind() == MemoryKind::pinned);
  }
  CHECK(source.allocations == 1);
  CHECK(pool->stats().bytes_pooled == BufferPool::capacity_for(50'000));
  auto whole = pool->acquire(1 << 20);
  CHECK(whole);
  CHECK(pool->stats().bytes_pooled == 0);
}

TEST_CASE("a machine without memory is an error, and the room is not lost") {
  CountingSource source;
  auto pool = BufferPool::make(1 << 20, &source);
  source.exhausted = true;
  const auto none = pool->acquire(1 << 19);
  REQUIRE_FALSE(none);
  CHECK(code_of(none.error()) == Errc::out_of_memory);
  source.exhausted = false;
  CHECK(pool->acquire(1 << 20));
}

TEST_CASE("a buffer outlives its pool's owner") {
  BufferRef last;
  {
    auto pool = BufferPool::make(1 << 20);
    last = *pool->acquire(1000);
  }
  std::memset(last->data(), 7, last->size());
  BufferRef copy = last;
  last = {};
  CHECK(copy->data()[999] == std::byte{7});
}

TEST_CASE("many threads can share a pool and its buffers") {
  auto pool = BufferPool::make(8 << 20);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      KeyedStream draws{31, static_cast<uint64_t>(t)};
      std::vector<BufferRef> held;
      for (int i = 0; i < 5000; ++i) {
        if (auto buffer = pool->acquire(1 + draws.below(60'000))) {
          std::memset((*buffer)->data(), t, std::min<size_t>(64, (*buffer)->size()));
          held.push_back(std::move(*buffer));
        }
        if (held.size() > 20) {
          const auto victim = draws.below(held.size());
          if (held[victim]->data()[0] != static_cast<std::byte>(t))
            ++wrong;
          held.erase(held.begin() + static_cast<std::ptrdiff_t>(victim));
        }
      }
    });
  for (auto& thread : threads)
    thread.join();
  CHECK(wrong == 0);
  CHECK(pool->stats().bytes_lent == 0);
  CHECK(pool->stats().bytes_pooled <= size_t{8} << 20);
}
