#include "transport/rows.hpp"

#include <fmt/format.h>

#include <cmath>
#include <cstring>

namespace troupe {

namespace {

constexpr size_t padded(size_t bytes) {
  return (bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

} // namespace

caf::expected<RowLayout> row_layout(DType dtype, int64_t width) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f8_e4m3)
    return make_error(Errc::unsupported,
                      fmt::format("wire rows: dtype {} can't be sent, expected F32, BF16 or E4M3",
                                  static_cast<int>(dtype)));
  if (width < 1 || width > kMaxRowWidth)
    return make_error(Errc::malformed,
                      fmt::format("wire rows: width is {}, expected 1 to {}", width, kMaxRowWidth));
  RowLayout layout;
  layout.dtype = dtype;
  layout.width = width;
  layout.value_bytes = static_cast<size_t>(width * size_of(dtype));
  layout.row_bytes = padded(layout.value_bytes);
  if (dtype == DType::f8_e4m3) {
    layout.num_scales = (width + kScaleTile - 1) / kScaleTile;
    layout.scales_offset = layout.row_bytes;
    layout.row_bytes += padded(static_cast<size_t>(layout.num_scales) * sizeof(float));
  }
  return layout;
}

float RowsView::scale(int64_t i, int64_t tile) const {
  float value;
  std::memcpy(&value,
              row(i).data() + layout.scales_offset + static_cast<size_t>(tile) * sizeof value,
              sizeof value);
  return value;
}

caf::expected<RowsView> read_rows(const RowLayout& layout, int64_t num_rows,
                                  std::span<const std::byte> bytes) {
  // Divided rather than multiplied: num_rows comes from a peer and the product may wrap.
  const bool fits = num_rows >= 0 && layout.row_bytes != 0 &&
                    bytes.size() % layout.row_bytes == 0 &&
                    bytes.size() / layout.row_bytes == static_cast<size_t>(num_rows);
  if (!fits)
    return make_error(Errc::malformed,
                      fmt::format("wire rows: {} bytes, expected {} rows of {} bytes", bytes.size(),
                                  num_rows, layout.row_bytes));
  const RowsView view{layout, num_rows, bytes};
  for (int64_t i = 0; i < num_rows; ++i)
    for (int64_t tile = 0; tile < layout.num_scales; ++tile)
      if (const float s = view.scale(i, tile); !std::isfinite(s) || s <= 0)
        return make_error(Errc::malformed,
                          fmt::format("wire rows: scale {} of row {} is {}, expected a positive "
                                      "number",
                                      tile, i, s));
  return view;
}

} // namespace troupe
