// How one row of activations lies on the wire.
//
//   F32, BF16   hidden elements, little-endian
//   E4M3        hidden codes, padding to 16 bytes, then one F32 scale per 128 columns (the last
//               tile may be short); value = code · scale
//
// Rows are padded to 16 bytes, so every row of an aligned array is aligned for SIMD loads. Padding
// is zero, so that equal rows have equal checksums.
#pragma once

#include "config/dtype.hpp"
#include "config/errors.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace troupe {

inline constexpr size_t kRowAlignment = 16;
inline constexpr int64_t kScaleTile = 128;       // columns per scale of an E4M3 row
inline constexpr int64_t kMaxRowWidth = 1 << 20; // columns; far beyond any published model

struct RowLayout {
  DType dtype = DType::f32; // f32, bf16 or f8_e4m3
  int64_t width = 0;        // columns
  size_t value_bytes = 0;   // of the elements, without padding
  size_t scales_offset = 0; // from the row's start; 0 where there are none
  int64_t num_scales = 0;
  size_t row_bytes = 0; // distance between rows
};

// Errc::unsupported for another dtype, Errc::malformed for a width outside [1, kMaxRowWidth].
[[nodiscard]] caf::expected<RowLayout> row_layout(DType dtype, int64_t width);

// The rows of an untrusted message: exactly num_rows · row_bytes bytes, or Errc::malformed.
// E4M3 rows are checked for scales that are not finite and positive.
struct RowsView {
  RowLayout layout;
  int64_t num_rows = 0;
  std::span<const std::byte> bytes;

  [[nodiscard]] std::span<const std::byte> row(int64_t i) const {
    return bytes.subspan(static_cast<size_t>(i) * layout.row_bytes, layout.row_bytes);
  }
  // Scale number `tile` of row `i`, read without alignment demands.
  [[nodiscard]] float scale(int64_t i, int64_t tile) const;
};
[[nodiscard]] caf::expected<RowsView> read_rows(const RowLayout& layout, int64_t num_rows,
                                                std::span<const std::byte> bytes);

} // namespace troupe
