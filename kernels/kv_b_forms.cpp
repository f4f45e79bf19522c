#include "kernels/kv_b_forms.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace troupe {

namespace {

int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }
int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// out[c][r - begin] = in[r][c], rows [begin, end), in tiles that stay in the cache.
template <size_t Element>
void transpose(const std::byte* in, int64_t begin, int64_t end, int64_t cols, std::byte* out) {
  constexpr int64_t kTile = 32;
  const int64_t rows = end - begin;
  for (int64_t r0 = begin; r0 < end; r0 += kTile)
    for (int64_t c0 = 0; c0 < cols; c0 += kTile)
      for (int64_t c = c0; c < std::min(c0 + kTile, cols); ++c)
        for (int64_t r = r0; r < std::min(r0 + kTile, end); ++r)
          std::memcpy(out + static_cast<size_t>(c * rows + (r - begin)) * Element,
                      in + static_cast<size_t>(r * cols + c) * Element, Element);
}

void transpose(int64_t element, const std::byte* in, int64_t begin, int64_t end, int64_t cols,
               std::byte* out) {
  switch (element) {
  case 1:
    return transpose<1>(in, begin, end, cols, out);
  case 2:
    return transpose<2>(in, begin, end, cols, out);
  default:
    return transpose<4>(in, begin, end, cols, out);
  }
}

// The rows of a source, transposed, with their block scales. They are rounded outward to whole
// scale blocks, so that the blocks stay those of the whole matrix: row0 becomes the first column
// `source().col0`, which is row0 modulo the block.
class Transposed {
public:
  explicit Transposed(const WeightSource& from) : source_(from) {
    const int64_t begin = round_down(from.row0, from.block_rows);
    const int64_t end = std::min(round_up(from.row0 + from.rows, from.block_rows), from.total_rows);
    const int64_t element = size_of(from.dtype);
    source_.total_rows = source_.rows = from.total_cols;
    source_.total_cols = end - begin;
    source_.row0 = 0;
    source_.col0 = from.row0 - begin;
    source_.cols = from.rows;
    std::swap(source_.block_rows, source_.block_cols);
    data_.resize(static_cast<size_t>(from.total_cols * (end - begin) * element));
    transpose(element, from.data, begin, end, from.total_cols, data_.data());
    source_.data = data_.data();
    if (from.scales == nullptr)
      return;
    const int64_t scale_cols = round_up(from.total_cols, from.block_cols) / from.block_cols;
    const int64_t scale_begin = begin / from.block_rows;
    const int64_t scale_end = round_up(end, from.block_rows) / from.block_rows;
    scales_.resize(static_cast<size_t>(scale_cols * (scale_end - scale_begin) * 4));
    transpose<4>(from.scales, scale_begin, scale_end, scale_cols, scales_.data());
    source_.scales = scales_.data();
  }
  [[nodiscard]] const WeightSource& source() const { return source_; }

private:
  WeightSource source_;
  std::vector<std::byte> data_, scales_;
};

} // namespace

PackedMatrix panels_of(const PackedMatrix& whole, int64_t row0, int64_t rows) {
  const auto* const scales = reinterpret_cast<const std::byte*>(whole.scales);
  const int64_t data_bytes = scales == nullptr ? packed_bytes(whole) : scales - whole.data;
  const int64_t scale_bytes = packed_bytes(whole) - data_bytes;
  const int64_t panel = row0 / kPanelRows;
  auto view = whole;
  view.n = rows;
  view.data = whole.data + panel * (data_bytes / whole.panels());
  if (scales != nullptr)
    view.scales = reinterpret_cast<const float*>(scales + panel * (scale_bytes / whole.panels()));
  return view;
}

KvBForms::KvBForms(const WeightSources::Matrix& whole, int64_t num_heads, int64_t nope,
                   int64_t v_dim)
    : source_(whole.source), nope_(nope), v_dim_(v_dim), whole_(place(whole.packed)) {
  PackedMatrix key;
  key.n = whole.packed.k;
  key.k = nope;
  key.dtype = whole.packed.dtype;
  key.segments = whole_k(nope);
  key.block_k = source_.block_rows;
  auto value = whole.packed;
  value.n = v_dim;
  for (size_t h = 0; h < static_cast<size_t>(num_heads); ++h) {
    key.k0 = source_.row0 % source_.block_rows + key_row(h);
    keys_.push_back(place(key));
    if (!values_are_views())
      values_.push_back(place(value));
  }
}

KvBForms::Placed KvBForms::place(const PackedMatrix& matrix) {
  const int64_t offset = bytes_;
  bytes_ += round_up(packed_bytes(matrix), 64);
  return {matrix, offset};
}

int64_t KvBForms::key_row(size_t head) const {
  return static_cast<int64_t>(head) * (nope_ + v_dim_);
}

bool KvBForms::values_are_views() const {
  return nope_ % kPanelRows == 0 && v_dim_ % kPanelRows == 0;
}

void KvBForms::attach(std::byte* memory, AttentionWeights& out) const {
  const auto placed_at = [memory](Placed placed) {
    troupe::attach(placed.matrix, memory + placed.offset);
    return placed.matrix;
  };
  out.kv_b = placed_at(whole_);
  for (size_t h = 0; h < keys_.size(); ++h) {
    out.w_uk_t.push_back(placed_at(keys_[h]));
    out.w_uv.push_back(values_are_views() ? panels_of(out.kv_b, key_row(h) + nope_, v_dim_)
                                          : placed_at(values_[h]));
  }
}

caf::error KvBForms::pack(std::byte* memory) const {
  const auto fill = [memory](Placed to, const WeightSource& from) {
    return troupe::pack(to.matrix, {&from, 1}, memory + to.offset, 0, to.matrix.panels());
  };
  // The other forms need no scale that this one has not checked under its published place.
  if (auto error = fill(whole_, source_))
    return error;
  const Transposed transposed{source_};
  for (size_t h = 0; h < keys_.size(); ++h) {
    auto keys = transposed.source();
    keys.col0 += key_row(h);
    keys.cols = nope_;
    if (auto error = fill(keys_[h], keys))
      return error;
    if (values_are_views())
      continue;
    auto values = source_;
    values.row0 += key_row(h) + nope_;
    values.rows = v_dim_;
    if (auto error = fill(values_[h], values))
      return error;
  }
  return {};
}

} // namespace troupe
