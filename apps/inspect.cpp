// troupe inspect: a model on paper — shapes, parameters, bytes per rank, KV cache.
#include "config/inspect.hpp"
#include "apps/commands.hpp"
#include "apps/console.hpp"
#include "config/presets.hpp"

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <string>

namespace troupe {

namespace {

struct InspectOptions {
  std::string what, layout, dtype;
  int32_t ranks = 0, tp = 0, nodes = 1;
  bool json = false;
};

caf::expected<ModelConfig> config_of(const std::string& what) {
  if (std::filesystem::exists(what))
    return load_model_config(what);
  if (auto known = preset(what))
    return *known;
  return load_model_config(what); // says what is wrong with the path
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const auto n : shape)
    text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

std::string ranks_text(const std::vector<RankId>& ranks) {
  const auto first = ranks.front().value, last = ranks.back().value;
  if (static_cast<size_t>(last - first) + 1 == ranks.size())
    return first == last ? std::to_string(first) : fmt::format("{}-{}", first, last);
  return fmt::format("{} of {}-{}", ranks.size(), first, last);
}

void print_text(const ModelConfig& config, const Inspection& i) {
  fmt::print("{} ({} layers, hidden {}, {} heads", config.model_type, config.num_hidden_layers,
             config.hidden_size, config.num_attention_heads);
  if (config.has_moe())
    fmt::print(", {} experts, {} per token", config.n_routed_experts, config.num_experts_per_tok);
  fmt::print(")\n\n{:<64} {:<18} {:>8}\n", "tensor", "shape", "count");
  for (const auto& row : i.shapes)
    fmt::print("{:<64} {:<18} {:>8}\n", row.name, shape_text(row.shape), row.count);
  const auto& p = i.parameters;
  fmt::print("\nparameters\n");
  fmt::print("  {:<40} {:>20}\n", "total (without MTP modules)", with_commas(p.total));
  fmt::print("  {:<40} {:>20}\n", "active per token, with embedding and head",
             with_commas(p.active));
  fmt::print("  {:<40} {:>20}\n", "active, without embedding",
             with_commas(p.active_without_embedding));
  fmt::print("  {:<40} {:>20}\n", "active, without embedding and head",
             with_commas(p.active_without_embedding_and_head));
  if (p.mtp_unique > 0)
    fmt::print("  {:<40} {:>20}\n", "MTP modules (their own; shared copies apart)",
               with_commas(p.mtp_unique));
  fmt::print("  active: all but the routed experts that a token did not choose\n");
  fmt::print("\nstored: F32 {}, BF16 {}, FP8 {}\n", bytes_text(i.bytes_f32),
             bytes_text(i.bytes_bf16), bytes_text(i.bytes_fp8));
  fmt::print("KV cache per token, BF16: {} B ({} B with MTP)\n", with_commas(i.kv_bytes_per_token),
             with_commas(i.kv_bytes_per_token_with_mtp));
  if (!i.layout)
    return;
  fmt::print("\nlayout {}: {} ranks, tp {}, weights in {}\n", i.layout->name, i.layout->num_ranks,
             i.layout->tp, name_of(i.format));
  fmt::print("{:<16} {:>7} {:>7} {:>11} {:>11} {:>11} {:>11} {:>11}\n", "ranks", "experts",
             "shared", "attention", "experts", "shared", "embed+head", "total");
  for (const auto& r : i.ranks)
    fmt::print("{:<16} {:>7} {:>7} {:>11} {:>11} {:>11} {:>11} {:>11}\n", ranks_text(r.ranks),
               r.slots.routed, r.slots.shared, bytes_text(r.bytes.attention),
               bytes_text(r.bytes.routed_experts), bytes_text(r.bytes.shared_experts),
               bytes_text(r.bytes.embedding + r.bytes.head), bytes_text(r.bytes.total()));
}

void print_json(const ModelConfig& config, const Inspection& i) {
  boost::json::object json;
  json["model_type"] = config.model_type;
  const auto& p = i.parameters;
  json["parameters"] = {{"total", p.total},
                        {"active", p.active},
                        {"active_without_embedding", p.active_without_embedding},
                        {"active_without_embedding_and_head", p.active_without_embedding_and_head},
                        {"mtp_unique", p.mtp_unique},
                        {"mtp_stored", p.mtp_stored}};
  json["kv_bytes_per_token"] = i.kv_bytes_per_token;
  json["kv_bytes_per_token_with_mtp"] = i.kv_bytes_per_token_with_mtp;
  json["stored_bytes"] = {{"f32", i.bytes_f32}, {"bf16", i.bytes_bf16}, {"fp8", i.bytes_fp8}};
  boost::json::array tensors;
  for (const auto& row : i.shapes)
    tensors.push_back(
        boost::json::object{{"name", row.name},
                            {"shape", boost::json::array(row.shape.begin(), row.shape.end())},
                            {"count", row.count}});
  json["tensors"] = std::move(tensors);
  if (i.layout) {
    boost::json::array ranks;
    for (const auto& r : i.ranks)
      for (const auto rank : r.ranks)
        ranks.push_back(boost::json::object{{"rank", rank.value},
                                            {"routed_slots", r.slots.routed},
                                            {"shared_slots", r.slots.shared},
                                            {"attention", r.bytes.attention},
                                            {"dense_ffn", r.bytes.dense_ffn},
                                            {"router", r.bytes.router},
                                            {"shared_experts", r.bytes.shared_experts},
                                            {"routed_experts", r.bytes.routed_experts},
                                            {"embedding", r.bytes.embedding},
                                            {"head", r.bytes.head},
                                            {"mtp", r.bytes.mtp},
                                            {"bytes", r.bytes.total()}});
    json["layout"] = i.layout->name;
    json["dtype"] = std::string{name_of(i.format)};
    json["ranks"] = std::move(ranks);
  }
  fmt::print("{}\n", boost::json::serialize(json));
}

int inspect(const InspectOptions& o) {
  auto config = config_of(o.what);
  if (!config)
    return complain(config.error());
  std::optional<ClusterLayout> layout;
  if (!o.layout.empty() || o.ranks > 0) {
    auto parsed = parse_layout(o.layout.empty() ? "joint" : o.layout, o.ranks, o.tp, o.nodes);
    if (!parsed)
      return complain(parsed.error());
    layout = std::move(*parsed);
  }
  const auto format = o.dtype.empty() ? format_of(*config) : *weight_format_from_name(o.dtype);
  auto inspection = inspect_model(*config, layout, format);
  if (!inspection)
    return complain(inspection.error());
  if (o.json)
    print_json(*config, *inspection);
  else
    print_text(*config, *inspection);
  return 0;
}

} // namespace

void add_inspect(CLI::App& app, int& code) {
  auto o = std::make_shared<InspectOptions>();
  auto* command = app.add_subcommand("inspect", "Shapes, parameters, bytes per rank, KV cache");
  command->add_option("MODEL_OR_CONFIG", o->what, "A checkpoint folder, a config.json, or a preset")
      ->required();
  command->add_option("--layout", o->layout, "joint, A+E (as 2+4), ep32, ep144 or ep320");
  command->add_option("--ranks", o->ranks, "Ranks of a joint layout")->check(CLI::Range(1, 65536));
  command->add_option("--tp", o->tp, "Tensor-parallel ranks per attention group")
      ->check(CLI::Range(1, 65536));
  command->add_option("--nodes", o->nodes, "Nodes")->check(CLI::Range(1, 65536));
  command->add_option("--dtype", o->dtype, "Count bytes as f32, bf16 or fp8 (default: as stored)")
      ->check(CLI::IsMember({"f32", "bf16", "fp8"}));
  command->add_flag("--json", o->json, "Print one JSON object");
  command->callback([o, &code] { code = inspect(*o); });
}

} // namespace troupe
