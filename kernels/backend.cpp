// Which backends there are, and the fingerprint by which ranks compare their arithmetic.
#include "kernels/backend.hpp"

#include "config/random.hpp"
#include "kernels/sampling.hpp"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

namespace troupe {

const Backend& best_backend() {
  for (const auto* b : {avx512_bf16_backend(), avx512_backend(), avx2_backend()})
    if (b)
      return *b;
  return reference_backend();
}

const Backend* find_backend(std::string_view name) {
  if (name == "simd")
    return &best_backend();
  for (const auto* b :
       {&reference_backend(), avx2_backend(), avx512_backend(), avx512_bf16_backend()})
    if (b && name == b->name)
      return b;
  return nullptr;
}

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const auto* b :
       {avx512_bf16_backend(), avx512_backend(), avx2_backend(), &reference_backend()})
    if (b)
      names.emplace_back(b->name);
  return names;
}

namespace {

// A small model's worth of inputs, the same everywhere, through every kernel.
class Fingerprint {
public:
  Fingerprint(const Backend& backend, DType a) : backend_(backend), a_(a) {}

  uint64_t compute() {
    linear(DType::f32);
    linear(DType::bf16);
    linear(DType::f8_e4m3);
    if (a_ == DType::bf16)
      quantized_linear();
    partials();
    norm_and_rope();
    gate();
    attention();
    quantize();
    noise();
    return hash_;
  }

private:
  static constexpr int64_t kRows = 5, kHidden = 200, kHeads = 2, kNope = 24, kRope = 8, kValue = 40,
                           kLatent = 72, kPositions = 70, kWidth = 150,
                           kTiles = (kHidden + 127) / 128;

  void mix(const void* data, size_t bytes) { hash_ = XXH3_64bits_withSeed(data, bytes, hash_); }

  // n values in (-2, 2), in A.
  std::vector<std::byte> values(int64_t n, DType dtype) {
    std::vector<std::byte> out(static_cast<size_t>(n * size_of(dtype)));
    for (int64_t i = 0; i < n; ++i) {
      const float v = (uniform_open(static_cast<uint32_t>(random_.next())) - 0.5f) * 4.0f;
      if (dtype == DType::f32) {
        std::memcpy(out.data() + i * 4, &v, 4);
      } else if (dtype == DType::bf16) {
        const BF16 b = to_bf16(v);
        std::memcpy(out.data() + i * 2, &b, 2);
      } else {
        out[static_cast<size_t>(i)] = static_cast<std::byte>(float_to_e4m3(v));
      }
    }
    return out;
  }
  Rows rows(const std::vector<std::byte>& memory, int64_t width) const {
    return {memory.data(), a_, width};
  }

  // A random [n, k] matrix; its memory is kept.
  PackedMatrix matrix(int64_t n, int64_t k, DType dtype, const KSegments& segments) {
    const auto source_bytes = values(n * k, dtype);
    std::vector<float> scales(static_cast<size_t>(((n + 127) / 128) * ((k + 127) / 128)));
    for (float& scale : scales)
      scale = uniform_open(static_cast<uint32_t>(random_.next()));
    PackedMatrix m;
    m.n = n;
    m.k = k;
    m.dtype = dtype;
    m.segments = segments;
    const auto bytes = static_cast<size_t>(packed_bytes(m));
    memory_.emplace_back(bytes + 64);
    auto address = reinterpret_cast<uintptr_t>(memory_.back().data());
    auto* aligned = memory_.back().data() + ((64 - address % 64) % 64);
    WeightSource source;
    source.data = source_bytes.data();
    source.dtype = dtype;
    source.total_rows = source.rows = n;
    source.total_cols = source.cols = k;
    source.scales = reinterpret_cast<const std::byte*>(scales.data());
    if (pack(m, std::span{&source, 1}, aligned, 0, m.panels()))
      std::abort(); // a bug here: its scales are good
    return m;
  }

  void linear(DType weights) {
    if (a_ == DType::bf16 && weights == DType::f32)
      return; // not part of that arithmetic
    const auto w = matrix(70, kHidden, weights, width_segments(kHidden));
    const auto x = values(kRows * kHidden, a_);
    std::vector<float> out(kRows * 70);
    LinearArgs args;
    args.num_rows = kRows;
    args.x = rows(x, kHidden);
    args.w = &w;
    args.out = {out.data(), DType::f32, 70};
    backend_.linear(args, workers_);
    mix(out.data(), out.size() * sizeof(float));
    expert(weights, rows(x, kHidden), {});
  }

  // W8A8: quantized rows, their scales and the weights' in one product.
  void quantized_linear() {
    const auto x = values(kRows * kHidden, a_);
    std::vector<uint8_t> codes(kRows * kHidden);
    std::vector<float> scales(kRows * kTiles);
    const QuantizedRows xq{codes.data(), scales.data(), kHidden, kTiles};
    backend_.quantize({.num_rows = kRows,
                       .k = kHidden,
                       .x = rows(x, kHidden),
                       .power_of_two = true,
                       .codes = codes.data(),
                       .scales = scales.data(),
                       .code_stride = kHidden,
                       .scale_stride = kTiles},
                      workers_);
    mix(codes.data(), codes.size());
    const auto w = matrix(70, kHidden, DType::f8_e4m3, width_segments(kHidden));
    std::vector<float> out(kRows * 70);
    backend_.linear({.num_rows = kRows,
                     .x = {},
                     .xq = xq,
                     .w = &w,
                     .out = {out.data(), DType::f32, 70},
                     .residual = {}},
                    workers_);
    mix(out.data(), out.size() * sizeof(float));
    for (const bool power_of_two : {false, true})
      expert(DType::f8_e4m3, {}, xq, power_of_two);
  }

  // Three of the rows through an expert's FFN.
  void expert(DType weights, const Rows& x, const QuantizedRows& xq, bool power_of_two = false) {
    const FfnWeights ffn{matrix(kWidth, kHidden, weights, whole_k(kHidden)),
                         matrix(kWidth, kHidden, weights, whole_k(kHidden)),
                         matrix(kHidden, kWidth, weights, whole_k(kWidth))};
    const std::array<int32_t, 3> chosen{0, 2, 4};
    const ExpertGroup group{&ffn, chosen, 0};
    std::vector<std::byte> y(3 * kHidden * static_cast<size_t>(size_of(a_)));
    std::vector<std::byte> scratch(
        static_cast<size_t>(ffn_scratch_bytes(kWidth, kHidden, 3, workers_.num_threads())));
    backend_.grouped_ffn({.groups = {&group, 1},
                          .x = x,
                          .xq = xq,
                          .out = {y.data(), a_, kHidden},
                          .residual = {},
                          .scratch = scratch,
                          .hidden = kHidden,
                          .power_of_two = power_of_two},
                         workers_);
    mix(y.data(), y.size());
  }

  void partials() {
    const auto parts = values(4 * kRows * kHidden, DType::f32);
    const auto* first = reinterpret_cast<const float*>(parts.data());
    std::array<const float*, 4> ranks{};
    for (size_t rank = 0; rank < ranks.size(); ++rank)
      ranks[rank] = first + rank * kRows * kHidden;
    const auto residual = values(kRows * kHidden, a_);
    std::vector<std::byte> out(residual.size());
    backend_.add_partials({.num_rows = kRows,
                           .n = kHidden,
                           .partials = ranks,
                           .residual = rows(residual, kHidden),
                           .out = {out.data(), a_, kHidden}},
                          workers_);
    mix(out.data(), out.size());
  }

  void norm_and_rope() {
    const auto x = values(kRows * kHidden, a_);
    const auto weight = values(kHidden, DType::f32);
    std::vector<std::byte> y(x.size());
    backend_.rms_norm({kRows,
                       kHidden,
                       rows(x, kHidden),
                       reinterpret_cast<const float*>(weight.data()),
                       1e-6f,
                       {y.data(), a_, kHidden}},
                      workers_);
    const auto table = values(kPositions * kRope, DType::f32);
    const auto* cos_sin = reinterpret_cast<const float*>(table.data());
    const RopeTable rope{kRope, kPositions, cos_sin, cos_sin + kPositions * kRope / 2, true};
    const std::array<int32_t, kRows> positions{0, 1, 5, 33, 69};
    backend_.rope({kRows, 3, {y.data(), a_, kHidden}, 20, positions.data(), &rope}, workers_);
    mix(y.data(), y.size());
  }

  void gate() {
    const auto logits = values(kRows * 16, DType::f32);
    const auto bias = values(16, DType::f32);
    std::array<int32_t, kRows * 3> idx{};
    std::array<float, kRows * 3> weight{};
    GateArgs args;
    args.num_rows = kRows;
    args.n_experts = 16;
    args.n_group = 4;
    args.topk_group = 2;
    args.top_k = 3;
    args.logits = reinterpret_cast<const float*>(logits.data());
    args.bias = reinterpret_cast<const float*>(bias.data());
    args.topk_idx = idx.data();
    args.topk_weight = weight.data();
    for (const auto scoring : {ScoringFunc::sigmoid, ScoringFunc::softmax}) {
      args.scoring = scoring;
      backend_.gate(args, workers_);
      mix(idx.data(), sizeof idx);
      mix(weight.data(), sizeof weight);
    }
  }

  void attention() {
    constexpr int64_t row = kLatent + kRope;
    auto cache_bytes = values(2 * kPageTokens * row, a_);
    const LatentCacheLayer cache{cache_bytes.data(), a_, row};
    const std::array<int32_t, 2> pages{1, 0};
    const SequenceRows sequence{0, kRows, kPositions - kRows, pages.data()};
    const MlaShape shape{kHeads, kNope, kRope, kValue, kLatent, 0.13f};
    const auto q = values(kRows * kHeads * (kNope + kRope), a_);
    std::vector<std::byte> out(kRows * kHeads * kValue * static_cast<size_t>(size_of(a_)));
    std::vector<std::byte> scratch(
        static_cast<size_t>(mla_scratch_bytes(shape, a_, kRows, 2 * kPageTokens, 1)) + 64);
    const auto kv_b = matrix(kHeads * (kNope + kValue), kLatent, a_, whole_k(kLatent));
    backend_.mla_naive({shape,
                        std::span{&sequence, 1},
                        rows(q, kHeads * (kNope + kRope)),
                        cache,
                        &kv_b,
                        {out.data(), a_, kHeads * kValue},
                        scratch},
                       workers_);
    mix(out.data(), out.size());
    std::vector<PackedMatrix> keys, values_of;
    for (int64_t h = 0; h < kHeads; ++h) {
      keys.push_back(matrix(kLatent, kNope, a_, whole_k(kNope)));
      values_of.push_back(matrix(kValue, kLatent, a_, whole_k(kLatent)));
    }
    backend_.mla_absorbed({shape,
                           std::span{&sequence, 1},
                           rows(q, kHeads * (kNope + kRope)),
                           cache,
                           keys,
                           values_of,
                           {out.data(), a_, kHeads * kValue},
                           scratch},
                          workers_);
    mix(out.data(), out.size());
  }

  // Not the backend's, but part of what a token depends on.
  void noise() {
    const auto bytes = values(500, DType::f32);
    const std::span logits{reinterpret_cast<const float*>(bytes.data()), 500};
    SamplingParams params;
    params.temperature = 1.3f;
    params.top_p = 0.9f;
    std::vector<float> scratch;
    for (uint32_t position = 0; position < 8; ++position) {
      const auto sampled = sample(logits, params, {}, position, 500, scratch);
      mix(&sampled.token, sizeof sampled.token);
      mix(&sampled.logprob, sizeof sampled.logprob);
    }
  }

  void quantize() {
    const auto x = values(kRows * kHidden, a_);
    std::vector<uint8_t> codes(kRows * kHidden);
    std::vector<float> scales(kRows * 2);
    backend_.quantize(
        {kRows, kHidden, rows(x, kHidden), false, codes.data(), scales.data(), kHidden, 2},
        workers_);
    mix(codes.data(), codes.size());
    mix(scales.data(), scales.size() * sizeof(float));
  }

  const Backend& backend_;
  DType a_;
  InlineWorkers workers_;
  KeyedStream random_{0x54524F55u};
  std::vector<std::vector<std::byte>> memory_;
  uint64_t hash_ = kArithmeticVersion;

  // Changes with every change of the arithmetic that the inputs above might not show.
  static constexpr uint64_t kArithmeticVersion = 3;
};

} // namespace

uint64_t arithmetic_fingerprint(const Backend& backend, DType activations) {
  return Fingerprint{backend, activations}.compute();
}

} // namespace troupe
