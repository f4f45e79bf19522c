#include "actors/train_setup.hpp"

#include "actors/train_checkpoint.hpp"
#include "actors/train_shard.hpp"
#include "config/json.hpp"
#include "config/presets.hpp"
#include "config/tokenizer.hpp"
#include "config/train_schedule.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

namespace troupe {

namespace fs = std::filesystem;
namespace json = boost::json;

namespace {

caf::expected<ModelConfig> base_model(const TrainConfig& config) {
  if (!config.init.empty()) {
    if (const auto known = preset(config.init))
      return *known;
    if (!fs::exists(config.init))
      return make_error(
          Errc::not_found,
          fmt::format("init: \"{}\" is neither a preset nor a config.json or a folder "
                      "with one; presets: {}",
                      config.init, fmt::join(preset_names(), ", ")));
    return load_model_config(config.init);
  }
  return load_model_config(config.model);
}

// The model as it is trained.
caf::error adapt(const TrainConfig& config, ModelConfig& model) {
  if (model.tie_word_embeddings)
    return make_error(Errc::unsupported, "tie_word_embeddings: training one matrix as embedding "
                                         "and head is not supported");
  model.quantization.reset();
  if (!config.yarn_original_length)
    return {};
  RopeScaling yarn; // the report's extension, specification §5.2
  yarn.factor = config.yarn_factor;
  yarn.original_max_position_embeddings = *config.yarn_original_length;
  yarn.mscale = 1;
  yarn.mscale_all_dim = 1;
  model.rope_scaling = yarn;
  const auto longest = static_cast<double>(*config.yarn_original_length) * config.yarn_factor;
  model.max_position_embeddings =
      std::max(model.max_position_embeddings, static_cast<int64_t>(longest));
  return {};
}

// Where the model's tokenizer is: its folder, or the data's.
fs::path tokenizer_folder(const TrainConfig& config) {
  std::vector<fs::path> folders{config.model, config.data};
  if (!config.init.empty())
    folders.push_back(fs::is_directory(config.init) ? fs::path{config.init}
                                                    : fs::path{config.init}.parent_path());
  for (const auto& folder : folders)
    for (const char* name : {"tokenizer.json", "tiktoken.model"})
      if (!folder.empty() && fs::is_regular_file(folder / name))
        return folder;
  return {};
}

// Where weights come from.
caf::error choose_source(TrainSetup& setup) {
  const auto& config = setup.config;
  if (!setup.resume_from.empty()) {
    auto shards = TrainShards::open(setup.resume_from / "training");
    if (!shards)
      return shards.error();
    setup.source = resume_source(std::make_shared<const TrainShards>(std::move(*shards)));
    return {};
  }
  if (!config.init.empty()) {
    setup.source.master = [seed = config.seed, std = static_cast<float>(config.init_std)](
                              const TensorSpec& spec, std::span<float> to) -> caf::error {
      init_master(seed, std, spec, to);
      return {};
    };
    return {};
  }
  auto checkpoint = Checkpoint::open(config.model);
  if (!checkpoint)
    return checkpoint.error();
  setup.model.num_nextn_predict_layers = (*checkpoint)->num_mtp_layers();
  setup.digest = (*checkpoint)->digest();
  setup.source.master = [opened = *checkpoint](const TensorSpec& spec, std::span<float> to) {
    return load_master(*opened, spec, to);
  };
  return {};
}

caf::error find_resume_point(TrainSetup& setup, const json::object& settings) {
  const auto& config = setup.config;
  if (!config.resume)
    return {};
  if (config.out.empty())
    return make_error(Errc::invalid_argument, "resume: expected out, the folder to resume from");
  auto found = newest_checkpoint(config.out);
  if (!found)
    return found.error();
  auto before = load_model_config(found->folder);
  if (!before)
    return before.error();
  auto now = setup.model;
  before->torch_dtype = now.torch_dtype = "";
  if (to_json(*before) != to_json(now))
    return make_error(Errc::mismatch, fmt::format("resume: {} is the checkpoint of another model",
                                                  found->folder.string()));
  if (found->state.data_digest != setup.data->digest())
    return make_error(Errc::mismatch,
                      fmt::format("resume: {} was trained on other data; start a new run from it "
                                  "with --model",
                                  found->folder.string()));
  for (auto& line : found->skipped)
    setup.warnings.push_back(std::move(line));
  for (const auto& line : changed_settings(found->state.settings, settings))
    setup.warnings.push_back(
        fmt::format("resume: {}; the run goes on, but not to the bit as it would have", line));
  if (found->state.step >= config.steps)
    setup.warnings.push_back(fmt::format("resume: step {} of {} is done, nothing is left to do",
                                         found->state.step, config.steps));
  setup.resume_from = found->folder;
  setup.first_step = found->state.step + 1;
  return {};
}

// What a run leaves that ended before its first checkpoint, and what this one writes beside it.
bool is_leftover(const TrainConfig& config, const fs::path& entry) {
  if (is_temporary_checkpoint(entry) || entry.filename() == kLockFile)
    return true;
  return std::ranges::any_of(
      std::array{config.log, config.trace, config.dump_gradients}, [&](const fs::path& path) {
        return !path.empty() && fs::weakly_canonical(path) == fs::weakly_canonical(entry);
      });
}

caf::error check_out(const TrainConfig& config) {
  if (config.out.empty() || config.resume || !fs::exists(config.out))
    return {};
  if (!fs::is_directory(config.out))
    return make_error(Errc::invalid_argument,
                      fmt::format("out: {} is no folder", config.out.string()));
  for (const auto& entry : fs::directory_iterator{config.out, fs::directory_options::none})
    if (!is_leftover(config, entry.path()))
      return make_error(
          Errc::invalid_argument,
          fmt::format(
              "out: {} is not empty, {} is there; --resume goes on with a run, a new one needs "
              "a folder of its own",
              config.out.string(), entry.path().filename().string()));
  return {};
}

} // namespace

json::object settings_json(const TrainConfig& c) {
  const auto stepwise = [](const Stepwise& s) {
    json::array list{s.first};
    for (const auto& [step, value] : s.changes)
      list.push_back({step, value});
    return list;
  };
  const auto name = [](std::string_view text) { return json::string{text.data(), text.size()}; };
  json::object settings{{"seed", c.seed},
                        {"compute", name(name_of(c.compute))},
                        {"backend", c.backend},
                        {"batch", stepwise(c.batch)},
                        {"micro_batch", c.micro_batch},
                        {"grad_lanes", c.grad_lanes},
                        {"grad_groups", c.grad_groups},
                        {"lr", c.lr},
                        {"min_lr", c.min_lr},
                        {"lr_schedule", name(name_of(c.lr_schedule))},
                        {"warmup_steps", c.warmup_steps},
                        {"decay_steps", c.decay_steps},
                        {"weight_decay", c.weight_decay},
                        {"beta1", c.beta1},
                        {"beta2", c.beta2},
                        {"eps", c.eps},
                        {"clip", c.clip},
                        {"ema", c.ema},
                        {"mtp_lambda", stepwise(c.mtp_lambda)},
                        {"bias_gamma", stepwise(c.bias_gamma)},
                        {"balance_alpha", c.balance_alpha}};
  if (c.lr_schedule != LrSchedule::constant)
    settings["steps"] = c.steps; // where the learning rate ends
  return settings;
}

static uint64_t digest_of(const json::array& values) {
  const auto text = json::serialize(values);
  return XXH3_64bits(text.data(), text.size());
}

// What ranks must agree on beside model and weights.
static json::array agreement(const TrainSetup& setup, const json::object& settings) {
  const auto& c = setup.config;
  return {settings,
          setup.data->digest(),
          setup.held_out ? setup.held_out->digest() : 0,
          setup.first_step,
          c.steps,
          c.init_std,
          c.pp,
          c.ep,
          c.dp,
          std::string{name_of(c.schedule)},
          c.eval_every,
          c.save_every,
          c.out.string(),
          c.dump_gradients.string()};
}

caf::expected<std::shared_ptr<const TrainSetup>> load_train_setup(const TrainConfig& config) try {
  auto setup = std::make_shared<TrainSetup>();
  setup->config = config;
  if (auto error = check_out(config))
    return error;
  // Found now rather than after a step.
  if (!config.dump_gradients.empty() && fs::exists(config.dump_gradients) &&
      !fs::is_directory(config.dump_gradients))
    return make_error(Errc::invalid_argument, fmt::format("dump_gradients: {} is no folder",
                                                          config.dump_gradients.string()));
  auto model = base_model(config);
  if (!model)
    return model.error();
  setup->model = std::move(*model);
  if (auto error = adapt(config, setup->model))
    return error;
  setup->tokenizer = tokenizer_folder(config);
  std::shared_ptr<const Tokenizer> tokenizer;
  if (!setup->tokenizer.empty()) {
    auto loaded = Tokenizer::load(setup->tokenizer);
    if (!loaded)
      return loaded.error();
    tokenizer = *loaded;
  }
  auto data = TrainData::open(config, setup->model.vocab_size, tokenizer.get());
  if (!data)
    return data.error();
  setup->data = *data;
  if (const auto length = setup->data->sequence_length();
      length > setup->model.max_position_embeddings)
    setup->warnings.push_back(
        fmt::format("sequence_length: {} tokens are more than the model's context of {} "
                    "(max_position_embeddings); --yarn-factor makes that longer",
                    length, setup->model.max_position_embeddings));
  if (const auto warning = setup->data->warning(); !warning.empty())
    setup->warnings.push_back(warning);
  if (!config.held_out.empty()) {
    auto held_out = TrainData::open_held_out(config.held_out, setup->data->sequence_length(),
                                             setup->model.vocab_size, tokenizer.get());
    if (!held_out)
      return held_out.error();
    setup->held_out = *held_out;
  }
  if (!config.model.empty()) { // modules that are not there can't be trained
    auto checkpoint = Checkpoint::open(config.model);
    if (!checkpoint)
      return checkpoint.error();
    setup->model.num_nextn_predict_layers = (*checkpoint)->num_mtp_layers();
  }
  const auto settings = settings_json(config);
  if (auto error = find_resume_point(*setup, settings))
    return error;
  if (auto error = choose_source(*setup))
    return error;
  setup->digest = digest_of({setup->digest, to_json(setup->model)});
  setup->settings_digest = digest_of(agreement(*setup, settings));
  return std::shared_ptr<const TrainSetup>{std::move(setup)};
} catch (const fs::filesystem_error& error) {
  return make_error(Errc::io_error, error.what());
}

// Elements that a micro-batch keeps for its way back: of each block input and middle, of the head
// the logits' gradient.
static int64_t micro_batch_elements(const TrainSetup& setup, const StageShare& share) {
  const auto blocks = share.last_layer - share.first_layer + share.num_mtp_layers;
  const auto row = static_cast<double>(2 * blocks * setup.model.hidden_size +
                                       (share.last ? setup.model.vocab_size : 0));
  return static_cast<int64_t>(std::min(static_cast<double>(setup.rows()) * row, 0x1p48));
}

std::vector<int64_t> train_memory_bytes(const TrainSetup& setup, const TrainPlan& plan) {
  const auto num_ranks = static_cast<size_t>(plan.num_ranks());
  std::vector<int64_t> elements(num_ranks, 0);
  for (size_t r = 0; r < num_ranks; ++r) {
    int64_t micro_batch = 0; // in one phase or the other
    for (int32_t p = 0; p < num_phases(plan.kind()); ++p) {
      const RankId rank{static_cast<int32_t>(r)};
      const StageLayout layout{plan.config, plan.share(rank, p)};
      const auto directions = static_cast<int64_t>(plan.directions(rank, p).size());
      elements[r] +=
          layout.num_values() + directions * (plan.lanes_per_column() * layout.num_dense() +
                                              plan.groups_per_copy() * layout.num_expert());
      micro_batch = std::max(micro_batch, micro_batch_elements(setup, plan.share(rank, p)));
    }
    elements[r] += micro_batch;
  }
  const int64_t arenas = setup.config.ema > 0 ? 4 : 3; // masters, two moments, the average
  for (const auto& tensor : plan_tensors(plan))
    elements[static_cast<size_t>(tensor.owner.value)] += arenas * tensor.spec.num_elements();
  for (auto& n : elements)
    n *= int64_t{sizeof(float)};
  return elements;
}

size_t train_credit_bytes(const TrainSetup& setup) {
  // A chunk's dispatch and answer, to and from a peer, for every chunk that may be alive, and the
  // rows between stages; of the optimizer a window. Half as much again, as credit returns late.
  const auto row = static_cast<size_t>(setup.model.hidden_size) * sizeof(float) + 64;
  const auto copies =
      static_cast<size_t>(2 * std::max<int64_t>(setup.model.num_experts_per_tok, 1) + 2);
  const auto alive = static_cast<size_t>(setup.config.pp) + 2;
  return (size_t{96} << 20) + static_cast<size_t>(setup.rows()) * row * copies * alive * 3 / 2;
}

size_t train_pool_bytes(const TrainSetup& setup) {
  // What peers may send and what this rank sends; taken only when used.
  return (size_t{256} << 20) +
         train_credit_bytes(setup) * static_cast<size_t>(setup.config.num_ranks() + 1) * 2;
}

} // namespace troupe
