// From logits to a token (contract, Sampling). A pure function of its inputs and the noise key.
//
// Order: repetition, presence and frequency penalties; logit bias; temperature; top-k; top-p;
// min-p; Gumbel noise; argmax, ties to the lower id. Temperature 0 is greedy: the argmax after
// penalties and bias. Ids >= num_ids have no token and are never chosen.
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
// over ascending ids.
[[nodiscard]] double log_probability(std::span<const float> logits, int32_t token);

} // namespace troupe
