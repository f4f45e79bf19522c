// Both forms of MLA, one (head, row) at a time.
#include "kernels/reference_access.hpp"

namespace troupe::reference {

namespace {

// A sequence's rows in the cache.
class Latents {
public:
  Latents(const LatentCacheLayer& cache, const SequenceRows& sequence)
      : rows_{cache.base, cache.dtype, cache.row_elements}, pages_(sequence.pages) {}
  [[nodiscard]] float at(int64_t position, int64_t i) const {
    const int64_t page = pages_[position / kPageTokens];
    return get(rows_, page * kPageTokens + position % kPageTokens, i);
  }

private:
  Rows rows_;
  const int32_t* pages_;
};

// One head's query of one row: [nope ; rope].
struct Query {
  const Rows& q;
  int64_t row, first;
  [[nodiscard]] float at(int64_t i) const { return get(q, row, first + i); }
};

void naive_head(const MlaNaiveArgs& a, const PackedReader& kv_b, const SequenceRows& sequence,
                int64_t head) {
  const MlaShape& s = a.shape;
  const int64_t width = s.qk_nope_head_dim + s.v_head_dim;
  const int64_t qk = s.qk_nope_head_dim + s.qk_rope_head_dim;
  const int64_t num_keys = sequence.first_position + sequence.num_rows;
  const Latents latents(a.cache, sequence);
  // [k_nope ; v] of every key, rounded to A.
  std::vector<float> up(static_cast<size_t>(num_keys * width));
  for (int64_t j = 0; j < num_keys; ++j)
    for (int64_t i = 0; i < width; ++i)
      up[static_cast<size_t>(j * width + i)] = rounded(
          a.q.dtype, product(kv_b, head * width + i, [&](int64_t k) { return latents.at(j, k); }));
  const auto key = [&](int64_t j, int64_t i) {
    return i < s.qk_nope_head_dim ? up[static_cast<size_t>(j * width + i)]
                                  : latents.at(j, s.kv_lora_rank + i - s.qk_nope_head_dim);
  };
  std::vector<float> out(static_cast<size_t>(s.v_head_dim));
  for (int64_t r = 0; r < sequence.num_rows; ++r) {
    const Query query{a.q, sequence.row_begin + r, head * qk};
    attend<float>(
        sequence.first_position + r + 1, kPageTokens, s.tau,
        [&](int64_t j) {
          return chain<float>(
              0, qk, [&](int64_t i) { return query.at(i); }, [&](int64_t i) { return key(j, i); });
        },
        [&](int64_t j, int64_t i) {
          return up[static_cast<size_t>(j * width + s.qk_nope_head_dim + i)];
        },
        [&](float p) { return rounded(a.q.dtype, p); }, out);
    for (int64_t i = 0; i < s.v_head_dim; ++i)
      put(a.out, query.row, head * s.v_head_dim + i, out[static_cast<size_t>(i)]);
  }
}

void absorbed_head(const MlaAbsorbedArgs& a, const SequenceRows& sequence, int64_t head) {
  const MlaShape& s = a.shape;
  const int64_t qk = s.qk_nope_head_dim + s.qk_rope_head_dim;
  const int64_t dim = s.kv_lora_rank + s.qk_rope_head_dim;
  const PackedReader w_uk_t(a.w_uk_t[static_cast<size_t>(head)]);
  const PackedReader w_uv(a.w_uv[static_cast<size_t>(head)]);
  const Latents latents(a.cache, sequence);
  std::vector<float> absorbed(static_cast<size_t>(dim)); // [q_abs ; q_rope]
  std::vector<float> latent(static_cast<size_t>(s.kv_lora_rank));
  for (int64_t r = 0; r < sequence.num_rows; ++r) {
    const Query query{a.q, sequence.row_begin + r, head * qk};
    for (int64_t c = 0; c < s.kv_lora_rank; ++c)
      absorbed[static_cast<size_t>(c)] =
          rounded(a.q.dtype, product(w_uk_t, c, [&](int64_t i) { return query.at(i); }));
    for (int64_t i = 0; i < s.qk_rope_head_dim; ++i)
      absorbed[static_cast<size_t>(s.kv_lora_rank + i)] = query.at(s.qk_nope_head_dim + i);
    attend<float>(
        sequence.first_position + r + 1, kPageTokens, s.tau,
        [&](int64_t j) {
          return lanes<float>(
              dim, [&](int64_t i) { return absorbed[static_cast<size_t>(i)]; },
              [&](int64_t i) { return latents.at(j, i); });
        },
        [&](int64_t j, int64_t i) { return latents.at(j, i); },
        [&](float p) { return rounded(a.q.dtype, p); }, latent);
    for (float& c : latent)
      c = rounded(a.q.dtype, c);
    for (int64_t i = 0; i < s.v_head_dim; ++i)
      put(a.out, query.row, head * s.v_head_dim + i,
          product(w_uv, i, [&](int64_t k) { return latent[static_cast<size_t>(k)]; }));
  }
}

} // namespace

void mla_naive(const MlaNaiveArgs& a, Workers& workers) {
  const PackedReader kv_b(*a.kv_b);
  for (const SequenceRows& sequence : a.sequences)
    if (sequence.num_rows > 0)
      workers.parallel_for(a.shape.heads, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t head = begin; head < end; ++head)
          naive_head(a, kv_b, sequence, head);
      });
}

void mla_absorbed(const MlaAbsorbedArgs& a, Workers& workers) {
  for (const SequenceRows& sequence : a.sequences)
    if (sequence.num_rows > 0)
      workers.parallel_for(a.shape.heads, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t head = begin; head < end; ++head)
          absorbed_head(a, sequence, head);
      });
}

} // namespace troupe::reference
