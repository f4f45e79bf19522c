#include "kernels/trunk.hpp"

#include <fmt/format.h>

#include <limits>

namespace troupe {

namespace {

// a·b, or nothing when that is no longer a size.
bool multiply(size_t& a, int64_t b) {
  return b >= 0 && !__builtin_mul_overflow(a, static_cast<size_t>(b), &a) &&
         a <= std::numeric_limits<size_t>::max() / 4;
}

} // namespace

caf::expected<std::unique_ptr<LatentCache>>
LatentCache::make(const ModelConfig& config, DType a, int64_t num_layers, int64_t num_pages) {
  size_t bytes = static_cast<size_t>(size_of(a));
  if (!multiply(bytes, num_layers) || !multiply(bytes, num_pages) ||
      !multiply(bytes, kPageTokens * config.latent_dim()))
    return make_error(Errc::out_of_memory,
                      fmt::format("latent cache of {} layers and {} pages of {} positions is "
                                  "larger than any memory",
                                  num_layers, num_pages, kPageTokens));
  auto memory = MemoryBlock::allocate(bytes);
  if (!memory)
    return with_context(fmt::format("latent cache of {} positions and {} layers ({:.1f} GiB)",
                                    num_pages * kPageTokens, num_layers,
                                    static_cast<double>(bytes) / (1 << 30)),
                        memory.error());
  auto cache = std::make_unique<LatentCache>();
  cache->memory_ = std::move(*memory);
  cache->dtype_ = a;
  cache->num_layers_ = num_layers;
  cache->num_pages_ = num_pages;
  cache->row_elements_ = config.latent_dim();
  return cache;
}

LatentCacheLayer LatentCache::layer(int64_t l) const {
  const int64_t layer_bytes = num_pages_ * kPageTokens * row_elements_ * size_of(dtype_);
  return {memory_.data() + l * layer_bytes, dtype_, row_elements_};
}

std::span<std::byte> LatentCache::page(int64_t layer, int64_t page) const {
  const int64_t page_bytes = kPageTokens * row_elements_ * size_of(dtype_);
  return {memory_.data() + (layer * num_pages_ + page) * page_bytes,
          static_cast<size_t>(page_bytes)};
}

} // namespace troupe
