// What `troupe train` is to do, from a file in text format and flags that override it
// (config/train.proto names the fields; defaults are those of struct TrainConfig).
#pragma once

#include "config/errors.hpp"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace troupe {

enum class ComputePrecision : uint8_t { f32, bf16, fp8 };
enum class LrSchedule : uint8_t { constant, wsd, cosine };
enum class PipelineSchedule : uint8_t { dualpipe, dualpipev, one_f_one_b, zb1p };

// A setting that changes at given optimizer steps (the first step is 1).
struct Stepwise {
  double first = 0;
  std::vector<std::pair<int64_t, double>> changes; // (step, value), ascending steps

  [[nodiscard]] double at(int64_t step) const;
};

struct TrainConfig {
  std::filesystem::path model; // exactly one of model and init
  std::string init;
  uint64_t seed = 0;
  double init_std = 0.006;
  std::filesystem::path data, tokens, chat; // exactly one
  std::optional<int64_t> sequence_length;   // absent: the file's, with `tokens` only
  std::filesystem::path held_out;           // empty: none
  int64_t eval_every = 0;

  int64_t micro_batch = 1; // sequences
  Stepwise batch{8, {}};   // sequences; whole numbers, multiples of micro_batch
  int64_t steps = 1;
  ComputePrecision compute = ComputePrecision::bf16;
  bool recompute = false;

  double lr = 2.2e-4, min_lr = 0;
  LrSchedule lr_schedule = LrSchedule::constant;
  int64_t warmup_steps = 0;
  int64_t decay_steps = 0; // wsd; set whenever lr_schedule is wsd
  double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double clip = 1.0; // 0: none
  double ema = 0;    // 0: none

  Stepwise mtp_lambda{0.3, {}}, bias_gamma{0.001, {}};
  double balance_alpha = 1e-4;

  int32_t pp = 1, ep = 1, dp = 1;
  int32_t grad_lanes = 0; // 0 in the file: ep · dp, or its next power of two; never 0 here
  int32_t grad_groups = 1;
  PipelineSchedule schedule = PipelineSchedule::dualpipe;
  std::string fabric = "ucx", backend = "simd";
  int32_t threads = 0; // 0: cores divided by ranks

  std::optional<int64_t> yarn_original_length;
  double yarn_factor = 1;

  std::filesystem::path out; // empty: nothing is kept
  int64_t save_every = 0;
  int32_t keep = 2; // 0: all
  bool resume = false;
  std::filesystem::path log;            // empty: OUT/log.jsonl, or none without `out`
  std::filesystem::path dump_gradients; // empty: none
  std::filesystem::path trace;

  [[nodiscard]] int32_t num_ranks() const { return pp * ep * dp; }
};

// A field that can be set by a flag.
struct TrainFlag {
  std::string field;      // "weight_decay"; flag_name gives "--weight-decay"
  std::string help, type; // "INT", "FLOAT", "TEXT"
  bool is_bool = false;
};
[[nodiscard]] std::vector<TrainFlag> train_flags();
[[nodiscard]] std::string flag_name(std::string_view field);

// (field, text) of a flag that was given. A bool's text is "true" or "false".
using TrainOverrides = std::vector<std::pair<std::string, std::string>>;

// Relative paths of the file are relative to `folder`, those of flags to the working directory.
// Errors name FILE:LINE:COLUMN and field, or the flag.
[[nodiscard]] caf::expected<TrainConfig> parse_train_config(std::string_view text,
                                                            std::string_view source,
                                                            const std::filesystem::path& folder,
                                                            const TrainOverrides& flags);
// Without a file: flags alone.
[[nodiscard]] caf::expected<TrainConfig>
load_train_config(const std::optional<std::filesystem::path>& file, const TrainOverrides& flags);

[[nodiscard]] std::string_view name_of(ComputePrecision compute);
[[nodiscard]] std::string_view name_of(LrSchedule schedule);
[[nodiscard]] std::string_view name_of(PipelineSchedule schedule);

} // namespace troupe
