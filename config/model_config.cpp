#include "config/model_config.hpp"

#include "config/json.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace troupe {

namespace json = boost::json;

namespace {

// Far above every published model and low enough that no product of the sizes below overflows
// int64 on its way to `kMaxParameters`.
constexpr int64_t kMaxVocab = int64_t{1} << 22;
constexpr int64_t kMaxHidden = int64_t{1} << 17;
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxMtpLayers = 64;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 4096;
constexpr int64_t kMaxExperts = int64_t{1} << 14;
constexpr int64_t kMaxPositions = int64_t{1} << 26;
constexpr int64_t kMaxExpertsOfAllLayers = int64_t{1} << 20;
constexpr double kMaxParameters = 1e15;

constexpr std::array<std::string_view, 3> kModelTypes{"deepseek_v2", "deepseek_v3", "kimi_k2"};

void read_identity(JsonFields& fields, ModelConfig& config) {
  config.model_type = fields.string("model_type");
  if (fields.ok() && std::ranges::find(kModelTypes, config.model_type) == kModelTypes.end())
    fields.fail(Errc::unsupported, "model_type",
                fmt::format("\"{}\" is not supported; expected deepseek_v2, deepseek_v3 or kimi_k2",
                            config.model_type));
  config.architectures = fields.strings_or_empty("architectures");
  for (const auto& name : config.architectures)
    if (!name.ends_with("ForCausalLM"))
      fields.fail(Errc::unsupported, "architectures",
                  fmt::format("\"{}\" is not supported; expected a causal language model", name));
  config.torch_dtype = fields.string_or("torch_dtype", fields.string_or("dtype", ""));
}

void read_dimensions(JsonFields& fields, ModelConfig& config) {
  config.vocab_size = fields.integer("vocab_size", 1, kMaxVocab);
  config.hidden_size = fields.integer("hidden_size", 1, kMaxHidden);
  config.intermediate_size = fields.integer("intermediate_size", 1, kMaxWidth);
  config.num_hidden_layers = fields.integer("num_hidden_layers", 1, kMaxLayers);
  config.num_attention_heads = fields.integer("num_attention_heads", 1, kMaxHeads);
  // Null is a value here (no query latent), absence is not: the classes' defaults differ.
  if (!fields.has("q_lora_rank"))
    fields.fail(Errc::malformed, "q_lora_rank", "expected an integer or null, but it is absent");
  config.q_lora_rank = fields.integer_or("q_lora_rank", 0, kMaxHidden, 0);
  config.kv_lora_rank = fields.integer("kv_lora_rank", 1, kMaxHidden);
  config.qk_nope_head_dim = fields.integer("qk_nope_head_dim", 1, kMaxHeadDim);
  config.qk_rope_head_dim = fields.integer("qk_rope_head_dim", 2, kMaxHeadDim);
  config.v_head_dim = fields.integer("v_head_dim", 1, kMaxHeadDim);
  config.max_position_embeddings = fields.integer("max_position_embeddings", 1, kMaxPositions);
  config.rms_norm_eps = fields.number("rms_norm_eps", 1e-30, 1);
  if (config.qk_rope_head_dim % 2 != 0)
    fields.fail(Errc::malformed, "qk_rope_head_dim",
                fmt::format("expected an even number, got {}", config.qk_rope_head_dim));
}

ScoringFunc read_scoring_func(JsonFields& fields, bool v2) {
  const auto name = fields.string_or("scoring_func", v2 ? "softmax" : "sigmoid");
  if (name != "sigmoid" && name != "softmax")
    fields.fail(Errc::unsupported, "scoring_func",
                fmt::format("\"{}\" is not supported; expected sigmoid or softmax", name));
  return name == "softmax" ? ScoringFunc::softmax : ScoringFunc::sigmoid;
}

TopkMethod read_topk_method(JsonFields& fields, bool v2) {
  const auto name = fields.string_or("topk_method", v2 ? "greedy" : "noaux_tc");
  if (name == "greedy")
    return TopkMethod::greedy;
  if (name == "group_limited_greedy")
    return TopkMethod::group_limited_greedy;
  if (name != "noaux_tc")
    fields.fail(
        Errc::unsupported, "topk_method",
        fmt::format("\"{}\" is not supported; expected noaux_tc, group_limited_greedy or greedy",
                    name));
  return TopkMethod::noaux_tc;
}

// How many experts the gate can choose from once it has dropped groups.
int64_t selectable_experts(const ModelConfig& config) {
  return config.topk_method == TopkMethod::greedy ? config.n_routed_experts
                                                  : config.topk_group * config.experts_per_group();
}

void check_groups(JsonFields& fields, const ModelConfig& config) {
  if (!fields.ok() || !config.has_moe())
    return;
  if (config.n_routed_experts % config.n_group != 0)
    fields.fail(Errc::malformed, "n_group",
                fmt::format("{} groups do not divide {} routed experts", config.n_group,
                            config.n_routed_experts));
  else if (config.topk_group > config.n_group)
    fields.fail(
        Errc::malformed, "topk_group",
        fmt::format("expected at most n_group = {}, got {}", config.n_group, config.topk_group));
  else if (config.topk_method == TopkMethod::noaux_tc && config.n_group > 1 &&
           config.experts_per_group() < 2)
    fields.fail(Errc::malformed, "n_group",
                "noaux_tc scores a group by its two best experts, but a group has only one");
  else if (config.num_experts_per_tok > selectable_experts(config))
    fields.fail(Errc::malformed, "num_experts_per_tok",
                fmt::format("expected at most the {} experts of the chosen groups, got {}",
                            selectable_experts(config), config.num_experts_per_tok));
}

bool any_moe_layer(const ModelConfig& config) {
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer)
    if (config.is_moe(layer))
      return true;
  return config.num_nextn_predict_layers > 0;
}

void read_experts(JsonFields& fields, ModelConfig& config) {
  const bool v2 = config.model_type == "deepseek_v2";
  config.first_k_dense_replace = fields.integer("first_k_dense_replace", 0, kMaxWidth);
  config.moe_layer_freq = fields.integer_or("moe_layer_freq", 1, kMaxLayers, 1);
  config.num_nextn_predict_layers =
      fields.integer_or("num_nextn_predict_layers", 0, kMaxMtpLayers, 0);
  if (!fields.has("n_routed_experts"))
    fields.fail(Errc::malformed, "n_routed_experts",
                fmt::format("expected an integer from 1 to {}, but it is absent", kMaxExperts));
  config.n_routed_experts = fields.integer_or("n_routed_experts", 0, kMaxExperts, 0);
  if (!fields.has("n_shared_experts"))
    fields.fail(Errc::malformed, "n_shared_experts",
                "expected an integer or null, but it is absent");
  config.n_shared_experts = fields.integer_or("n_shared_experts", 0, kMaxLayers, 0);
  if (!config.has_moe()) {
    if (fields.ok() && any_moe_layer(config))
      fields.fail(Errc::malformed, "n_routed_experts",
                  "expected at least 1, because some layers are MoE layers");
    config.n_shared_experts = 0;
    return;
  }
  config.moe_intermediate_size = fields.integer("moe_intermediate_size", 1, kMaxWidth);
  config.num_experts_per_tok = fields.integer("num_experts_per_tok", 1, kMaxExperts);
  config.scoring_func = read_scoring_func(fields, v2);
  config.topk_method = read_topk_method(fields, v2);
  // transformers writes null for a model without groups.
  for (const char* name : {"n_group", "topk_group"})
    if (!fields.has(name))
      fields.fail(Errc::malformed, name, "expected an integer or null, but it is absent");
  config.n_group = fields.integer_or("n_group", 1, kMaxExperts, 1);
  config.topk_group = fields.integer_or("topk_group", 1, kMaxExperts, 1);
  config.norm_topk_prob = fields.boolean("norm_topk_prob");
  config.routed_scaling_factor = fields.number("routed_scaling_factor", 1e-6, 1e6);
  check_groups(fields, config);
}

RopeScaling read_yarn(JsonFields& fields) {
  RopeScaling yarn;
  yarn.factor = fields.number("factor", 1, 1e6);
  yarn.original_max_position_embeddings =
      fields.integer("original_max_position_embeddings", 1, kMaxPositions);
  yarn.beta_fast = fields.number_or("beta_fast", 1e-3, 1e6, 32);
  yarn.beta_slow = fields.number_or("beta_slow", 1e-3, 1e6, 1);
  yarn.mscale = fields.number_or("mscale", 0, 100, 1);
  yarn.mscale_all_dim = fields.number_or("mscale_all_dim", 0, 100, 0);
  if (yarn.beta_fast < yarn.beta_slow)
    fields.fail(Errc::malformed, "beta_fast", "expected at least beta_slow");
  // transformers knows these; they would change the rotation or the softmax scale.
  if (fields.find("attention_factor"))
    fields.fail(Errc::unsupported, "attention_factor", "is not supported; expected null");
  if (!fields.boolean_or("truncate", true))
    fields.fail(Errc::unsupported, "truncate", "false is not supported");
  return yarn;
}

// What one of the two keys says: its type, and YaRN's numbers where it is YaRN.
struct RopeReading {
  std::optional<RopeScaling> scaling;
  std::optional<double> theta;
};

RopeReading read_rope(JsonFields& fields) {
  RopeReading result;
  const auto type = fields.string_or("type", "");
  const auto rope_type = fields.string_or("rope_type", "");
  if (!type.empty() && !rope_type.empty() && type != rope_type)
    fields.fail(Errc::malformed, "type",
                fmt::format("says \"{}\", but rope_type says \"{}\"", type, rope_type));
  const auto& name = type.empty() ? rope_type : type;
  if (fields.find("rope_theta"))
    result.theta = fields.number("rope_theta", 1.0001, 1e12);
  if (fields.number_or("partial_rotary_factor", 0, 1e6, 1) != 1)
    fields.fail(Errc::unsupported, "partial_rotary_factor", "is not supported; expected 1");
  if (name == "yarn")
    result.scaling = read_yarn(fields);
  else if (name.empty())
    fields.fail(Errc::malformed, "type", "expected \"yarn\" or \"default\", but it is absent");
  else if (name != "default")
    fields.fail(Errc::unsupported, type.empty() ? "rope_type" : "type",
                fmt::format("\"{}\" is not supported; expected yarn, default or null", name));
  return result;
}

bool same(const RopeScaling& a, const RopeScaling& b) {
  return a.factor == b.factor &&
         a.original_max_position_embeddings == b.original_max_position_embeddings &&
         a.beta_fast == b.beta_fast && a.beta_slow == b.beta_slow && a.mscale == b.mscale &&
         a.mscale_all_dim == b.mscale_all_dim;
}

void read_positions(JsonFields& fields, ModelConfig& config) {
  std::optional<double> theta;
  std::optional<RopeReading> seen;
  if (fields.find("rope_theta"))
    theta = fields.number("rope_theta", 1.0001, 1e12);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const auto* object = fields.object_or_null(key);
    if (!object)
      continue;
    JsonFields inner{*object, fields.source(), std::string{key} + "."};
    // An empty object and one with nothing but a theta say no more than null.
    const bool plain = !inner.find("type") && !inner.find("rope_type") && !inner.find("factor");
    auto reading = plain ? RopeReading{} : read_rope(inner);
    if (plain && inner.find("rope_theta"))
      reading.theta = inner.number("rope_theta", 1.0001, 1e12);
    fields.adopt(inner);
    if (theta && reading.theta && *theta != *reading.theta)
      fields.fail(Errc::malformed, std::string{key} + ".rope_theta",
                  fmt::format("says {}, but rope_theta says {}", *reading.theta, *theta));
    if (reading.theta)
      theta = reading.theta;
    const bool agree =
        !seen || (seen->scaling && reading.scaling ? same(*seen->scaling, *reading.scaling)
                                                   : !seen->scaling && !reading.scaling);
    if (!agree)
      fields.fail(Errc::malformed, key, "differs from rope_scaling");
    seen = reading;
  }
  if (!theta)
    theta = fields.number("rope_theta", 1.0001, 1e12); // says that it is absent
  config.rope_theta = *theta;
  config.rope_scaling = seen ? seen->scaling : std::nullopt;
  config.rope_interleave = fields.boolean_or("rope_interleave", true);
}

QuantizationConfig read_quantization(JsonFields& fields) {
  QuantizationConfig result;
  const auto method = fields.string("quant_method");
  if (fields.ok() && method != "fp8")
    fields.fail(Errc::unsupported, "quant_method",
                fmt::format("\"{}\" is not supported; expected fp8", method));
  const auto fmt_name = fields.string_or("fmt", "e4m3");
  if (fmt_name != "e4m3")
    fields.fail(Errc::unsupported, "fmt",
                fmt::format("\"{}\" is not supported; expected e4m3", fmt_name));
  const auto scheme = fields.string_or("activation_scheme", "dynamic");
  if (scheme != "dynamic")
    fields.fail(Errc::unsupported, "activation_scheme",
                fmt::format("\"{}\" is not supported; expected dynamic", scheme));
  result.scale_fmt = fields.string_or("scale_fmt", "");
  if (!result.scale_fmt.empty() && result.scale_fmt != "ue8m0")
    fields.fail(Errc::unsupported, "scale_fmt",
                fmt::format("\"{}\" is not supported; expected ue8m0 or none", result.scale_fmt));
  if (fields.has("weight_block_size") && !fields.find("weight_block_size"))
    fields.fail(Errc::unsupported, "weight_block_size",
                "null (one scale for a whole tensor) is not supported; expected two integers");
  if (const auto* value = fields.find("weight_block_size")) {
    const auto* sizes = value->if_array();
    const auto is_size = [](const json::value& x) {
      return x.is_int64() && x.get_int64() >= 1 && x.get_int64() <= kMaxWidth;
    };
    if (!sizes || sizes->size() != 2 || !is_size((*sizes)[0]) || !is_size((*sizes)[1])) {
      fields.fail(Errc::malformed, "weight_block_size",
                  fmt::format("expected two integers from 1 to {}, got {}", kMaxWidth,
                              json::serialize(*value).substr(0, 60)));
      return result;
    }
    result.block_rows = (*sizes)[0].get_int64();
    result.block_cols = (*sizes)[1].get_int64();
  }
  return result;
}

void read_token_ids(JsonFields& fields, ModelConfig& config) {
  config.bos_token_id = fields.integer_or("bos_token_id", 0, kMaxVocab, -1);
  const auto* eos = fields.find("eos_token_id");
  if (!eos)
    return;
  if (!eos->is_array()) {
    config.eos_token_ids = {fields.integer("eos_token_id", 0, kMaxVocab)};
    return;
  }
  for (const auto& id : eos->get_array()) {
    if (!id.is_int64() || id.get_int64() < 0 || id.get_int64() > kMaxVocab)
      fields.fail(Errc::malformed, "eos_token_id",
                  fmt::format("expected token ids, got {}", shown(id)));
    else
      config.eos_token_ids.push_back(id.get_int64());
  }
}

void refuse_what_is_not_computed(JsonFields& fields) {
  for (const char* name : {"attention_bias", "mlp_bias", "tie_word_embeddings"})
    if (fields.boolean_or(name, false))
      fields.fail(Errc::unsupported, name, "true is not supported");
  const auto act = fields.string_or("hidden_act", "silu");
  if (act != "silu")
    fields.fail(Errc::unsupported, "hidden_act",
                fmt::format("\"{}\" is not supported; expected silu", act));
}

// In floating point, because what is being refused is what would overflow.
double roughly_all_parameters(const ModelConfig& c) {
  const auto d = static_cast<double>(c.hidden_size);
  const auto heads = static_cast<double>(c.num_attention_heads);
  const auto layers = static_cast<double>(c.num_hidden_layers + c.num_nextn_predict_layers);
  const double query = static_cast<double>(std::max(c.q_lora_rank, c.hidden_size));
  const double attention = heads * static_cast<double>(c.qk_head_dim()) * query +
                           heads * static_cast<double>(c.qk_nope_head_dim + c.v_head_dim) *
                               static_cast<double>(c.kv_lora_rank) +
                           heads * static_cast<double>(c.v_head_dim) * d;
  const double experts = static_cast<double>(c.n_routed_experts + c.n_shared_experts);
  const double ffn = std::max(static_cast<double>(c.intermediate_size),
                              experts * static_cast<double>(c.moe_intermediate_size));
  const double tables = 2 * static_cast<double>(1 + c.num_nextn_predict_layers) *
                        static_cast<double>(c.vocab_size) * d;
  return layers * (attention + 3 * ffn * d) + tables;
}

void check_whole(JsonFields& fields, const ModelConfig& config) {
  if (!fields.ok())
    return;
  const int64_t layers = config.num_hidden_layers + config.num_nextn_predict_layers;
  if (layers * config.n_routed_experts > kMaxExpertsOfAllLayers)
    fields.fail(Errc::malformed, "n_routed_experts",
                fmt::format("{} layers of {} experts are more than {} experts", layers,
                            config.n_routed_experts, kMaxExpertsOfAllLayers));
  if (roughly_all_parameters(config) > kMaxParameters)
    fields.fail(
        Errc::malformed, "hidden_size",
        fmt::format("with the other sizes it makes more than {:.0e} parameters", kMaxParameters));
}

json::value rope_json(const RopeScaling& yarn) {
  return json::object{{"type", "yarn"},
                      {"factor", yarn.factor},
                      {"original_max_position_embeddings", yarn.original_max_position_embeddings},
                      {"beta_fast", yarn.beta_fast},
                      {"beta_slow", yarn.beta_slow},
                      {"mscale", yarn.mscale},
                      {"mscale_all_dim", yarn.mscale_all_dim}};
}

json::value quantization_json(const QuantizationConfig& quantization) {
  json::object object{{"activation_scheme", "dynamic"},
                      {"fmt", "e4m3"},
                      {"quant_method", "fp8"},
                      {"weight_block_size", {quantization.block_rows, quantization.block_cols}}};
  if (!quantization.scale_fmt.empty())
    object["scale_fmt"] = quantization.scale_fmt;
  return object;
}

// Zero stands for null where the published files write null.
json::value or_null(int64_t x) { return x == 0 ? json::value(nullptr) : json::value(x); }

std::string_view name_of(TopkMethod method) {
  switch (method) {
  case TopkMethod::noaux_tc:
    return "noaux_tc";
  case TopkMethod::group_limited_greedy:
    return "group_limited_greedy";
  case TopkMethod::greedy:
    return "greedy";
  }
  return "";
}

json::value eos_json(const std::vector<int64_t>& ids) {
  if (ids.empty())
    return nullptr;
  return ids.size() == 1 ? json::value(ids.front()) : json::value_from(ids);
}

} // namespace

bool ModelConfig::is_moe(int64_t layer) const {
  if (layer >= num_hidden_layers)
    return true;
  return layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
}

caf::expected<ModelConfig> parse_model_config(std::string_view text, std::string_view source) {
  auto object = parse_json_object(text, source);
  if (!object)
    return object.error();
  ModelConfig config;
  JsonFields fields{*object, std::string{source}};
  read_identity(fields, config);
  read_dimensions(fields, config);
  read_experts(fields, config);
  read_positions(fields, config);
  if (const auto* quantization = fields.object_or_null("quantization_config")) {
    JsonFields inner{*quantization, fields.source(), "quantization_config."};
    config.quantization = read_quantization(inner);
    fields.adopt(inner);
  }
  read_token_ids(fields, config);
  refuse_what_is_not_computed(fields);
  check_whole(fields, config);
  if (!fields.ok())
    return fields.error();
  return config;
}

caf::expected<ModelConfig> load_model_config(const std::filesystem::path& path) {
  std::error_code ec;
  const auto file = std::filesystem::is_directory(path, ec) ? path / "config.json" : path;
  auto text = read_text_file(file, JsonLimits{}.max_bytes);
  if (!text)
    return text.error();
  return parse_model_config(*text, file.string());
}

std::string to_json(const ModelConfig& config) {
  json::object object{
      {"architectures", json::value_from(config.architectures)},
      {"model_type", config.model_type},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"intermediate_size", config.intermediate_size},
      {"moe_intermediate_size", config.moe_intermediate_size},
      {"num_hidden_layers", config.num_hidden_layers},
      {"num_attention_heads", config.num_attention_heads},
      {"num_key_value_heads", config.num_attention_heads},
      {"q_lora_rank", or_null(config.q_lora_rank)},
      {"kv_lora_rank", config.kv_lora_rank},
      {"qk_nope_head_dim", config.qk_nope_head_dim},
      {"qk_rope_head_dim", config.qk_rope_head_dim},
      {"v_head_dim", config.v_head_dim},
      {"first_k_dense_replace", config.first_k_dense_replace},
      {"moe_layer_freq", config.moe_layer_freq},
      {"n_routed_experts", or_null(config.n_routed_experts)},
      {"n_shared_experts", or_null(config.n_shared_experts)},
      {"num_experts_per_tok", config.num_experts_per_tok},
      {"n_group", config.n_group},
      {"topk_group", config.topk_group},
      {"scoring_func", config.scoring_func == ScoringFunc::sigmoid ? "sigmoid" : "softmax"},
      {"topk_method", json::string_view{name_of(config.topk_method).data()}},
      {"norm_topk_prob", config.norm_topk_prob},
      {"routed_scaling_factor", config.routed_scaling_factor},
      {"num_nextn_predict_layers", config.num_nextn_predict_layers},
      {"rms_norm_eps", config.rms_norm_eps},
      {"rope_theta", config.rope_theta},
      {"rope_interleave", config.rope_interleave},
      {"rope_scaling", config.rope_scaling ? rope_json(*config.rope_scaling) : nullptr},
      {"max_position_embeddings", config.max_position_embeddings},
      {"hidden_act", "silu"},
      {"attention_bias", false},
      {"attention_dropout", 0.0},
      {"tie_word_embeddings", config.tie_word_embeddings},
      {"initializer_range", 0.02},
      {"use_cache", true},
  };
  if (!config.torch_dtype.empty())
    object["torch_dtype"] = config.torch_dtype;
  if (config.quantization)
    object["quantization_config"] = quantization_json(*config.quantization);
  object["bos_token_id"] = config.bos_token_id < 0 ? json::value(nullptr) : config.bos_token_id;
  object["eos_token_id"] = eos_json(config.eos_token_ids);
  return pretty(object);
}

} // namespace troupe
