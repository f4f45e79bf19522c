#include "actors/train_context.hpp"

#include "actors/dispatch_plan.hpp"
#include "kernels/reference_backward_fp8.hpp"

#include <fmt/format.h>

#include <cstring>

namespace troupe {

int32_t TrainContext::phase_of_layer(int64_t layer) const {
  for (size_t p = 0; p < phases.size(); ++p) {
    const auto& share = phases[p].weights->layout().share();
    const bool trunk = layer >= share.first_layer && layer < share.last_layer;
    if (trunk || (share.last && layer >= plan.config.num_hidden_layers &&
                  layer < plan.config.num_hidden_layers + share.num_mtp_layers))
      return static_cast<int32_t>(p);
  }
  return -1;
}

caf::expected<TrainPlan> plan_of(const TrainConfig& config, const ModelConfig& model) {
  TrainPlan plan;
  auto schedule = parse_schedule(name_of(config.schedule));
  if (!schedule)
    return schedule.error();
  plan.schedule = *schedule;
  plan.pp = config.pp;
  plan.ep = config.ep;
  plan.dp = config.dp;
  plan.lanes = config.grad_lanes;
  plan.groups = config.grad_groups;
  plan.config = model;
  plan.num_mtp_layers = model.num_nextn_predict_layers;
  const auto check_batch = [&](double batch) {
    return check(plan, static_cast<int64_t>(batch), config.micro_batch);
  };
  if (auto error = check_batch(config.batch.first))
    return error;
  for (const auto& [step, batch] : config.batch.changes)
    if (auto error = check_batch(batch))
      return with_context(fmt::format("from step {} on", step), error);
  return plan;
}

namespace {

caf::error add_arenas(const TrainPlan& plan, RankId self, int32_t p, TrainPhase& phase) {
  const auto& layout = phase.weights->layout();
  const auto add = [](auto& arenas, int32_t direction, int32_t index,
                      int64_t elements) -> caf::error {
    auto memory = MemoryBlock::allocate(static_cast<size_t>(elements) * sizeof(float));
    if (!memory)
      return memory.error();
    arenas.emplace(std::pair{direction, index}, std::move(*memory));
    return {};
  };
  const int32_t column = plan.column(self);
  for (const int32_t direction : plan.directions(self, p)) {
    for (int32_t l = 0; l < plan.lanes_per_column(); ++l)
      if (auto error = add(phase.dense, direction, plan.first_lane(column) + l, layout.num_dense()))
        return error;
    for (int32_t g = 0; g < plan.groups_per_copy(); ++g)
      if (auto error = add(phase.experts, direction,
                           plan.dp_index(column) * plan.groups_per_copy() + g, layout.num_expert()))
        return error;
  }
  return {};
}

// Where the experts of this rank's layers are: on the ep ranks of its copy.
View experts_view(const TrainContext& c) {
  View view;
  view.epoch = 1;
  for (int32_t r = 0; r < c.plan.num_ranks(); ++r) {
    Member member;
    member.rank = RankId{r};
    member.incarnation = 1;
    member.node = NodeId{0};
    member.hosts_experts = true;
    view.members.push_back(member);
  }
  const int64_t layers = c.plan.config.num_hidden_layers + c.plan.num_mtp_layers;
  view.placement_of_layer.assign(static_cast<size_t>(layers), -1);
  for (int64_t l = 0; l < layers; ++l) {
    if (!c.plan.config.is_moe(l) || c.phase_of_layer(l) < 0)
      continue;
    LayerPlacement placement;
    placement.layer = static_cast<int32_t>(l);
    for (int32_t e = 0; e < c.plan.config.n_routed_experts; ++e) {
      placement.slots.push_back({SlotId{e}, ExpertId{e}, c.plan.expert_rank(c.self(), e), 1});
      placement.slots_of.push_back({e});
    }
    view.placement_of_layer[static_cast<size_t>(l)] = static_cast<int32_t>(view.placement.size());
    view.placement.push_back(std::move(placement));
  }
  return view;
}

} // namespace

caf::expected<std::shared_ptr<TrainContext>>
make_train_context(const RankContext* rank, const TrainConfig& config, const ModelConfig& model,
                   std::shared_ptr<const TrainData> data,
                   std::shared_ptr<const TrainData> held_out) {
  auto context = std::make_shared<TrainContext>();
  auto& c = *context;
  c.rank = rank;
  c.config = config;
  auto plan = plan_of(config, model);
  if (!plan)
    return plan.error();
  c.plan = std::move(*plan);
  auto precision = parse_precision(name_of(config.compute));
  if (!precision)
    return precision.error();
  c.precision = *precision;
  c.data = std::move(data);
  c.held_out = std::move(held_out);
  c.tensors = plan_tensors(c.plan);
  const auto* ops = find_train_ops(config.backend);
  if (ops == nullptr)
    return make_error(Errc::invalid_argument,
                      fmt::format("backend: \"{}\" is not available here", config.backend));
  c.compute =
      std::make_shared<TrainCompute>(model, c.precision, config.recompute, *ops,
                                     c.data->sequence_length(), rank->stream->num_threads());
  for (int32_t p = 0; p < num_phases(c.plan.kind()); ++p) {
    auto weights = StageWeights::make(model, c.plan.share(rank->self, p), c.precision, *ops);
    if (!weights)
      return weights.error();
    TrainPhase phase;
    phase.weights = std::move(*weights);
    if (auto error = add_arenas(c.plan, rank->self, p, phase))
      return error;
    c.phases.push_back(std::move(phase));
  }
  c.experts_view = experts_view(c);
  return context;
}

void encode_row(RowFormat format, int64_t width, const float* from, std::byte* to) {
  const auto bytes = row_bytes(format, width);
  std::memset(to, 0, bytes); // padding too: equal rows have equal checksums
  switch (format) {
  case RowFormat::f32:
    std::memcpy(to, from, static_cast<size_t>(width) * sizeof(float));
    return;
  case RowFormat::bf16:
    for (int64_t i = 0; i < width; ++i) {
      const BF16 x = to_bf16(from[i]);
      std::memcpy(to + static_cast<size_t>(i) * sizeof x, &x, sizeof x);
    }
    return;
  case RowFormat::fp8: {
    const auto q = reference::quantize_activations(
        1, width, [&](int64_t, int64_t i) { return from[i]; }, reference::Fp8Scale::power_of_two);
    std::memcpy(to, q.codes.data(), q.codes.size());
    std::memcpy(to + fp8_scales_offset(width), q.scales.data(), q.scales.size() * sizeof(float));
    return;
  }
  }
}

void encode_rows(RowFormat format, int64_t n, int64_t width, const float* from, std::byte* to) {
  const auto stride = row_bytes(format, width);
  for (int64_t r = 0; r < n; ++r)
    encode_row(format, width, from + r * width, to + static_cast<size_t>(r) * stride);
}

void decode_row(RowFormat format, int64_t width, const std::byte* from, float* to) {
  switch (format) {
  case RowFormat::f32:
    std::memcpy(to, from, static_cast<size_t>(width) * sizeof(float));
    return;
  case RowFormat::bf16:
    for (int64_t i = 0; i < width; ++i) {
      BF16 x;
      std::memcpy(&x, from + static_cast<size_t>(i) * sizeof x, sizeof x);
      to[i] = to_float(x);
    }
    return;
  case RowFormat::fp8:
    for (int64_t i = 0; i < width; ++i) {
      float scale = 0;
      std::memcpy(&scale,
                  from + fp8_scales_offset(width) +
                      static_cast<size_t>(i / reference::kFp8Block) * sizeof scale,
                  sizeof scale);
      to[i] = e4m3_to_float(static_cast<uint8_t>(from[i])) * scale;
    }
    return;
  }
}

} // namespace troupe
