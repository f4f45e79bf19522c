#include "config/json.hpp"
#include "config/model_config.hpp"
#include "config/presets.hpp"
#include "tests/config/scratch_folder.hpp"

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

using namespace troupe;

namespace json = boost::json;

namespace {

json::object v3_object() { return *parse_json_object(to_json(*preset("v3")), "v3"); }

caf::expected<ModelConfig> parse(const json::object& object) {
  return parse_model_config(json::serialize(object), "config.json");
}

// The message for V3's config with `field` set to `value`; empty where it is accepted.
std::string complaint(std::string_view field, json::value value) {
  auto object = v3_object();
  object[json::string_view{field.data(), field.size()}] = std::move(value);
  const auto config = parse(object);
  return config ? std::string{} : text_of(config.error());
}

std::string rope_complaint(json::object rope) { return complaint("rope_scaling", std::move(rope)); }

json::object yarn() {
  return {{"type", "yarn"}, {"factor", 40}, {"original_max_position_embeddings", 4096}};
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("every preset survives the way to config.json and back") {
  for (const auto name : preset_names()) {
    CAPTURE(name);
    const auto text = to_json(*preset(name));
    const auto config = parse_model_config(text, "config.json");
    REQUIRE_MESSAGE(config, text_of(config ? caf::error{} : config.error()));
    CHECK(to_json(*config) == text);
  }
}

TEST_CASE("V3's published config is read as it is meant") {
  const auto config = parse_model_config(R"({
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
    "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
    "v_head_dim": 128, "vocab_size": 129280})",
                                         "config.json");
  REQUIRE(config);
  CHECK(to_json(*config) == to_json(*preset("v3")));
  CHECK(config->latent_dim() == 576);
  CHECK(!config->is_moe(2));
  CHECK(config->is_moe(3));
  CHECK(config->is_moe(61));
}

TEST_CASE("a required field that is absent is named, whichever it is") {
  for (const char* name : {"model_type",
                           "vocab_size",
                           "hidden_size",
                           "intermediate_size",
                           "moe_intermediate_size",
                           "num_hidden_layers",
                           "num_attention_heads",
                           "q_lora_rank",
                           "kv_lora_rank",
                           "qk_nope_head_dim",
                           "qk_rope_head_dim",
                           "v_head_dim",
                           "first_k_dense_replace",
                           "n_routed_experts",
                           "n_shared_experts",
                           "num_experts_per_tok",
                           "n_group",
                           "topk_group",
                           "norm_topk_prob",
                           "routed_scaling_factor",
                           "rms_norm_eps",
                           "rope_theta",
                           "max_position_embeddings"}) {
    auto object = v3_object();
    object.erase(name);
    const auto config = parse(object);
    CAPTURE(name);
    REQUIRE(!config);
    CHECK(contains(text_of(config.error()), std::string{"config.json: "} + name + ": expected"));
  }
}

TEST_CASE("optional fields have the specification's defaults") {
  auto object = v3_object();
  for (const char* name :
       {"attention_bias", "tie_word_embeddings", "moe_layer_freq", "num_nextn_predict_layers",
        "rope_interleave", "hidden_act", "rope_scaling", "quantization_config", "torch_dtype",
        "num_key_value_heads", "architectures", "bos_token_id", "eos_token_id", "scoring_func",
        "topk_method"})
    object.erase(name);
  const auto config = parse(object);
  REQUIRE(config);
  CHECK(config->moe_layer_freq == 1);
  CHECK(config->num_nextn_predict_layers == 0);
  CHECK(config->rope_interleave);
  CHECK(!config->rope_scaling);
  CHECK(!config->quantization);
  CHECK(config->bos_token_id == -1);
  CHECK(config->eos_token_ids.empty());
  CHECK(config->topk_method == TopkMethod::noaux_tc);

  object["rope_scaling"] = yarn();
  const auto scaled = parse(object);
  REQUIRE(scaled);
  CHECK(scaled->rope_scaling->beta_fast == 32);
  CHECK(scaled->rope_scaling->beta_slow == 1);
  CHECK(scaled->rope_scaling->mscale == 1);
  CHECK(scaled->rope_scaling->mscale_all_dim == 0);
}

TEST_CASE("what transformers writes for V2 without gate fields is V2's gate") {
  auto object = *parse_json_object(to_json(*preset("v2-lite")), "v2-lite");
  object.erase("scoring_func");
  object.erase("topk_method");
  object["n_group"] = nullptr;
  object["topk_group"] = nullptr;
  object["n_shared_experts"] = nullptr;
  const auto config = parse(object);
  REQUIRE(config);
  CHECK(config->scoring_func == ScoringFunc::softmax);
  CHECK(config->topk_method == TopkMethod::greedy);
  CHECK(config->n_group == 1);
  CHECK(config->n_shared_experts == 0);
  CHECK(config->q_lora_rank == 0);
}

TEST_CASE("settings that Troupe does not compute are refused by name") {
  const std::vector<std::pair<const char*, json::value>> settings{
      {"model_type", "llama"},
      {"model_type", "deepseek_v32"},
      {"architectures", json::array{"DeepseekV3ForSequenceClassification"}},
      {"attention_bias", true},
      {"tie_word_embeddings", true},
      {"hidden_act", "gelu"},
      {"scoring_func", "softplus"},
      {"topk_method", "random"},
  };
  for (const auto& [field, value] : settings) {
    auto object = v3_object();
    object[field] = value;
    const auto config = parse(object);
    CAPTURE(field);
    REQUIRE(!config);
    CHECK(code_of(config.error()) == Errc::unsupported);
    CHECK(contains(text_of(config.error()), std::string{field} + ": "));
    CHECK(contains(text_of(config.error()), "not supported"));
  }
  for (const auto& [field, value] :
       std::vector<std::pair<const char*, json::value>>{{"quant_method", "awq"},
                                                        {"fmt", "e5m2"},
                                                        {"activation_scheme", "static"},
                                                        {"scale_fmt", "float"}}) {
    json::object quantization{{"quant_method", "fp8"}};
    quantization[field] = value;
    CHECK(contains(complaint("quantization_config", quantization),
                   std::string{"quantization_config."} + field + ": "));
  }
}

TEST_CASE("absurd and mistyped values are refused with the field's name") {
  const std::vector<std::pair<const char*, json::value>> settings{
      {"hidden_size", 0},
      {"hidden_size", -7168},
      {"hidden_size", "7168"},
      {"hidden_size", 7168.5},
      {"hidden_size", true},
      {"hidden_size", 18446744073709551615u},
      {"hidden_size", json::array{}},
      {"vocab_size", int64_t{1} << 40},
      {"num_hidden_layers", 1000000},
      {"qk_rope_head_dim", 63},
      {"n_routed_experts", nullptr},
      {"n_group", 7},
      {"topk_group", 9},
      {"num_experts_per_tok", 129},
      {"num_experts_per_tok", 0},
      {"norm_topk_prob", 1},
      {"rms_norm_eps", 0},
      {"rms_norm_eps", "1e-6"},
      {"rope_theta", 1},
      {"rope_scaling", "yarn"},
      {"eos_token_id", "x"},
      {"eos_token_id", json::array{1, "x"}},
      {"torch_dtype", 16},
      {"architectures", "DeepseekV3ForCausalLM"},
      {"quantization_config", json::array{1}},
  };
  for (const auto& [field, value] : settings) {
    CAPTURE(field);
    CAPTURE(json::serialize(value));
    CHECK(contains(complaint(field, value), std::string{"config.json: "} + field + ": "));
  }
  CHECK(contains(complaint("n_routed_experts", 255), "n_group: 8 groups do not divide 255"));
  CHECK(contains(complaint("n_group", 256), "n_group: "));
  CHECK(contains(complaint("quantization_config",
                           json::object{{"quant_method", "fp8"}, {"weight_block_size", {128, 0}}}),
                 "weight_block_size"));
  CHECK(contains(complaint("quantization_config",
                           json::object{{"quant_method", "fp8"}, {"weight_block_size", nullptr}}),
                 "quantization_config.weight_block_size: null (one scale for a whole tensor)"));
}

TEST_CASE("sizes that are each plausible but not together are refused") {
  auto object = v3_object();
  object["hidden_size"] = 131072;
  object["intermediate_size"] = 1048576;
  object["num_hidden_layers"] = 1024;
  object["moe_intermediate_size"] = 1048576;
  const auto config = parse(object);
  REQUIRE(!config);
  CHECK(contains(text_of(config.error()), "parameters"));
  auto many = v3_object();
  many["n_routed_experts"] = 16384;
  many["num_hidden_layers"] = 1024;
  CHECK(!parse(many));
}

TEST_CASE("rope settings may come under either key and either name, but must agree") {
  auto renamed = yarn();
  renamed.erase("type");
  renamed["rope_type"] = "yarn";
  CHECK(rope_complaint(renamed).empty());
  renamed["type"] = "yarn";
  CHECK(rope_complaint(renamed).empty());
  renamed["type"] = "linear";
  CHECK(contains(rope_complaint(renamed), "rope_scaling.type: says \"linear\""));

  auto object = v3_object();
  object.erase("rope_theta");
  object.erase("rope_scaling");
  auto parameters = yarn();
  parameters["rope_theta"] = 50000.0;
  object["rope_parameters"] = parameters;
  const auto config = parse(object);
  REQUIRE(config);
  CHECK(config->rope_theta == 50000);
  CHECK(config->rope_scaling->factor == 40);

  object["rope_theta"] = 10000;
  CHECK(contains(text_of(parse(object).error()), "rope_parameters.rope_theta: says 50000"));
  object["rope_theta"] = 50000;
  object["rope_scaling"] = yarn();
  CHECK(parse(object));
  object["rope_scaling"].get_object()["factor"] = 32;
  CHECK(contains(text_of(parse(object).error()), "rope_parameters: differs from rope_scaling"));

  object.erase("rope_scaling");
  object["rope_parameters"] = json::object{{"rope_type", "default"}, {"rope_theta", 50000}};
  const auto plain = parse(object);
  REQUIRE(plain);
  CHECK(!plain->rope_scaling);
}

TEST_CASE("rope settings that would change the result are refused") {
  const auto with = [](const char* key, json::value value) {
    auto rope = yarn();
    rope[key] = std::move(value);
    return rope_complaint(rope);
  };
  CHECK(contains(with("type", "linear"), "\"linear\" is not supported"));
  CHECK(contains(with("type", "dynamic"), "\"dynamic\" is not supported"));
  CHECK(contains(with("attention_factor", 1.5), "attention_factor"));
  CHECK(contains(with("truncate", false), "truncate"));
  CHECK(contains(with("factor", 0), "rope_scaling.factor: expected a number"));
  CHECK(contains(with("factor", nullptr), "rope_scaling.factor"));
  CHECK(contains(with("beta_fast", 0.5), "rope_scaling.beta_fast"));
  CHECK(contains(with("original_max_position_embeddings", 0), "original_max_position_embeddings"));
  CHECK(contains(rope_complaint({{"factor", 4}}), "rope_scaling.type"));
}

TEST_CASE("broken JSON is refused with line and column") {
  const auto text = [](std::string_view source) {
    const auto config = parse_model_config(source, "config.json");
    return config ? std::string{} : text_of(config.error());
  };
  CHECK(contains(text("{\n  \"a\": tru\n}"), "config.json:2:"));
  CHECK(contains(text("{\n  \"a\": 1,\n  \"a\": 2}"), "the key \"a\" appears twice"));
  CHECK(contains(text("{\n  \"a\": 1,\n  \"a\": 2}"), "config.json:3:"));
  CHECK(contains(text("{} {}"), "text follows"));
  CHECK(contains(text(""), "not JSON"));
  CHECK(contains(text("[1]"), "expected a JSON object"));
  CHECK(contains(text("{\"a\": \"\xff\"}"), "not JSON"));
  CHECK(contains(text(std::string(100'000, '[')), "nested deeper"));
  CHECK(contains(text("{\"a\":" + std::string(1000, '[') + std::string(1000, ']') + "}"),
                 "nested deeper"));
  std::string many = "{\"a\":[0";
  for (int i = 0; i < 1'100'000; ++i)
    many += ",0";
  CHECK(contains(text(many + "]}"), "values"));
}

TEST_CASE("a config is loaded from a file or from the folder that holds it") {
  const ScratchFolder folder;
  write_file(folder / "config.json", to_json(*preset("tiny-v3")));
  CHECK(load_model_config(folder.path()));
  CHECK(load_model_config(folder / "config.json"));
  const auto absent = load_model_config(folder / "other");
  REQUIRE(!absent);
  CHECK(code_of(absent.error()) == Errc::not_found);
  CHECK(contains(text_of(absent.error()), "other"));
}
