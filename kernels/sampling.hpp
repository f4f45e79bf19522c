// From logits to a token (contract, Sampling). A pure function of its inputs and the noise key.
//
// Order: repetition, presence and frequency penalties; logit bias; temperature; top-k; top-p;
// min-p; Gumbel noise; argmax. Ties go to the lower id at every step. Temperature 0 is greedy: the
// argmax after penalties and bias, cuts and noise left out. Ids >= num_ids have no token and are
// never chosen; nor is a NaN. +inf counts as the largest finite number. Where every id is ruled
// out (by a bias of -inf, say) the answer is id 0.
//
//   repetition  once for each token of prompt or answer: x > 0 ? x / r : x · r
//   presence, frequency  x -= p + f · count, for each token of the answer
//   temperature  x = (x - max) / T, so that a tiny T can't overflow
//   top-k   the k largest
//   top-p   the smallest set of likeliest ids whose probability reaches p, the one that crosses
//           it included; probabilities are those left by top-k, renormalized
//   min-p   ids at least p times as likely as the likeliest
//   noise   x += -log(-log u), u = uniform_open(noise_bits(seed, choice, position, id))
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace troupe {

struct SamplingParams {
  float temperature = 0;
  int32_t top_k = 0; // 0: off
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::map<int32_t, float> logit_bias;
  uint64_t seed = 0;
  uint32_t choice = 0;
};

// How often each token occurs: repetition penalty looks at prompt and answer, presence and
// frequency at the answer only (as vLLM does).
struct TokenCounts {
  std::map<int32_t, int32_t> prompt;
  std::map<int32_t, int32_t> answer;
};

struct Sampled {
  int32_t token = -1;
  float logprob = 0; // of the token under the raw logits
};

// `logits` [vocab] raw; `position` is the index in the sequence of the token being chosen.
// `scratch` is resized as needed and can be reused.
[[nodiscard]] Sampled sample(std::span<const float> logits, const SamplingParams& params,
                             const TokenCounts& counts, uint32_t position, int32_t num_ids,
                             std::vector<float>& scratch);

// Log-probability of `token` under raw logits: x_t - max - log(sum exp(x - max)), the sum in F64
// over ascending ids. -inf for an id outside the vocabulary.
[[nodiscard]] double log_probability(std::span<const float> logits, int32_t token);

} // namespace troupe
