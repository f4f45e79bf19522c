// How much memory the kernels ask their caller for, and how they cut it up.
#include "kernels/simd_common.hpp"

#include <cstdio>
#include <cstdlib>

namespace troupe {

namespace {

int64_t panel_width(int64_t n) { return ceil_div(n, kPanelRows) * kPanelRows; }
// A packed block of 64 keys with `n` elements each, n padded to whole pairs.
int64_t block_bytes(int64_t n, DType a) { return (n + n % 2) * kPageTokens * size_of(a); }
constexpr int64_t kFloat = sizeof(float);

float* take_floats(ScratchCursor& cursor, int64_t n) {
  return reinterpret_cast<float*>(cursor.take(n * kFloat));
}

} // namespace

void ScratchCursor::stop() {
  std::fputs("troupe: scratch memory of a kernel is smaller than *_scratch_bytes says\n", stderr);
  std::abort();
}

NaiveScratch::NaiveScratch(ScratchCursor& cursor, const MlaShape& shape, DType a, int64_t rows)
    : keys(cursor.take(block_bytes(shape.qk_nope_head_dim + shape.qk_rope_head_dim, a))),
      values(cursor.take(block_bytes(panel_width(shape.v_head_dim), a))),
      out(take_floats(cursor, rows * panel_width(shape.v_head_dim))),
      max(take_floats(cursor, rows)), sum(take_floats(cursor, rows)) {}

int64_t NaiveScratch::bytes(const MlaShape& shape, DType a, int64_t rows) {
  return aligned(block_bytes(shape.qk_nope_head_dim + shape.qk_rope_head_dim, a)) +
         aligned(block_bytes(panel_width(shape.v_head_dim), a)) +
         aligned(rows * panel_width(shape.v_head_dim) * kFloat) + 2 * aligned(rows * kFloat);
}

AbsorbedScratch::AbsorbedScratch(ScratchCursor& cursor, const MlaShape& shape, DType a)
    : query(cursor.take(kAbsorbedRows * shape.heads * absorbed_dim(shape) * size_of(a))),
      latent(cursor.take(kAbsorbedRows * shape.heads * shape.kv_lora_rank * size_of(a))) {}

int64_t AbsorbedScratch::bytes(const MlaShape& shape, DType a) {
  return aligned(kAbsorbedRows * shape.heads * absorbed_dim(shape) * size_of(a)) +
         aligned(kAbsorbedRows * shape.heads * shape.kv_lora_rank * size_of(a));
}

AbsorbedThread::AbsorbedThread(ScratchCursor& cursor, const MlaShape& shape, DType a)
    : keys(cursor.take(kPageTokens * absorbed_dim(shape) * size_of(a))),
      values(cursor.take(block_bytes(panel_width(shape.kv_lora_rank), a))),
      out(take_floats(cursor, kAbsorbedHeads * panel_width(shape.kv_lora_rank))) {}

int64_t AbsorbedThread::bytes(const MlaShape& shape, DType a) {
  return aligned(kPageTokens * absorbed_dim(shape) * size_of(a)) +
         aligned(block_bytes(panel_width(shape.kv_lora_rank), a)) +
         aligned(kAbsorbedHeads * panel_width(shape.kv_lora_rank) * kFloat);
}

FfnScratch::FfnScratch(ScratchCursor& cursor, int64_t width, int64_t rows, DType a, bool quantized)
    : product(cursor.take(rows * width * size_of(a))) {
  if (quantized) {
    codes = reinterpret_cast<uint8_t*>(cursor.take(rows * width));
    scales = take_floats(cursor, rows * ceil_div(width, kQuantTile));
  }
}

int64_t mla_scratch_bytes(const MlaShape& shape, DType a, int64_t max_rows, int64_t,
                          int num_threads) {
  const int64_t naive = 64 + num_threads * NaiveScratch::bytes(shape, a, max_rows);
  const int64_t absorbed =
      64 + AbsorbedScratch::bytes(shape, a) + num_threads * AbsorbedThread::bytes(shape, a);
  return std::max(naive, absorbed);
}

int64_t ffn_scratch_bytes(int64_t width, int64_t, int64_t max_rows, int) {
  return aligned(max_rows * width * kFloat) + aligned(max_rows * width) +
         aligned(max_rows * ceil_div(width, kQuantTile) * kFloat);
}

} // namespace troupe
