#include "actors/train_plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <map>
#include <tuple>

namespace troupe {

namespace {

caf::error wrong(std::string text) { return make_error(Errc::invalid_argument, std::move(text)); }

// x[0] becomes the binary tree over adjacent pairs of x[0], x[stride], …
void add_tree(std::span<float* const> x, int64_t n) {
  for (size_t half = 1; half < x.size(); half *= 2)
    for (size_t i = 0; i + half < x.size(); i += 2 * half)
      for (int64_t e = 0; e < n; ++e)
        x[i][e] += x[i + half][e];
}

} // namespace

GridCell cell_of(int64_t micro_batch, int32_t lanes) {
  return {static_cast<int32_t>(micro_batch % lanes), static_cast<int32_t>(micro_batch / lanes % 2),
          micro_batch / (2 * int64_t{lanes})};
}

StageShare TrainPlan::share(RankId r, int32_t phase) const {
  const auto k = kind();
  auto s =
      stage_share(config, num_mtp_layers, stage_of(k, pp_rank(r), pp, phase), num_stages(k, pp));
  const int64_t each = config.n_routed_experts / ep;
  s.first_expert = ep_index(column(r)) * each;
  s.last_expert = s.first_expert + each;
  return s;
}

std::vector<int32_t> TrainPlan::directions(RankId r, int32_t phase) const {
  if (kind() == ScheduleKind::dualpipe)
    return {direction_of(kind(), pp_rank(r), pp, phase)};
  return {0, 1};
}

std::vector<int64_t> TrainPlan::micro_batches(RankId r, int32_t phase,
                                              int64_t num_micro_batches) const {
  const auto wanted = directions(r, phase);
  const int32_t first = first_lane(column(r));
  std::vector<int64_t> list;
  for (int64_t j = 0; j < num_micro_batches; ++j) {
    const auto cell = cell_of(j, lanes);
    if (cell.lane >= first && cell.lane < first + lanes_per_column() &&
        std::find(wanted.begin(), wanted.end(), cell.direction) != wanted.end())
      list.push_back(j);
  }
  return list;
}

std::pair<RankId, int32_t> TrainPlan::neighbour(RankId r, int32_t phase, int32_t by) const {
  const auto k = kind();
  const auto [to, to_phase] = place_of(k, stage_of(k, pp_rank(r), pp, phase) + by,
                                       direction_of(k, pp_rank(r), pp, phase), pp);
  return {rank(to, column(r)), to_phase};
}

std::vector<RankId> TrainPlan::expert_peers(RankId r) const {
  std::vector<RankId> peers;
  const int32_t first = dp_index(column(r)) * ep;
  for (int32_t e = 0; e < ep; ++e)
    peers.push_back(rank(pp_rank(r), first + e));
  return peers;
}

RankId TrainPlan::expert_rank(RankId source, int32_t expert) const {
  const auto each = static_cast<int32_t>(config.n_routed_experts / ep);
  return rank(pp_rank(source), dp_index(column(source)) * ep + expert / each);
}

caf::error check(const TrainPlan& plan, int64_t batch, int64_t micro_batch) {
  const auto power = [](int32_t n) {
    return n > 0 && std::has_single_bit(static_cast<uint32_t>(n));
  };
  if (!power(plan.lanes))
    return wrong(fmt::format("grad_lanes: {} given, expected a power of two", plan.lanes));
  if (!power(plan.groups) || plan.lanes % plan.groups != 0)
    return wrong(fmt::format("grad_groups: {} given, expected a power of two that divides "
                             "grad_lanes ({})",
                             plan.groups, plan.lanes));
  if (plan.groups % plan.dp != 0)
    return wrong(fmt::format("dp: {} does not divide grad_groups ({})", plan.dp, plan.groups));
  if (plan.lanes % plan.columns() != 0)
    return wrong(
        fmt::format("ep · dp: {} does not divide grad_lanes ({})", plan.columns(), plan.lanes));
  if (plan.config.n_routed_experts % plan.ep != 0)
    return wrong(fmt::format("ep: {} does not divide the model's {} experts", plan.ep,
                             plan.config.n_routed_experts));
  const auto kind = plan.kind();
  if (num_stages(kind, plan.pp) > plan.config.num_hidden_layers)
    return wrong(fmt::format("pp: {} ranks make {} stages, but the model has {} layers", plan.pp,
                             num_stages(kind, plan.pp), plan.config.num_hidden_layers));
  if (batch % micro_batch != 0)
    return wrong(
        fmt::format("batch: {} is not a multiple of micro_batch ({})", batch, micro_batch));
  const int64_t total = batch / micro_batch;
  // A batch that ends within a round of lanes gives the first columns more than the last.
  if (plan.columns() > 1 && total % plan.lanes != 0)
    return wrong(
        fmt::format("batch: {} micro-batches can't be dealt to ep · dp = {} columns alike; "
                    "with {} lanes expected a multiple of {}",
                    total, plan.columns(), plan.lanes, plan.lanes));
  if (kind == ScheduleKind::dualpipe && total % (2 * int64_t{plan.lanes}) != 0)
    return wrong(fmt::format("batch: {} micro-batches given; dualpipe with {} lanes expects a "
                             "multiple of {}, as many in each direction",
                             total, plan.lanes, 2 * plan.lanes));
  return check_schedule(kind, plan.pp, static_cast<int32_t>(total / plan.columns()));
}

std::vector<PlannedTensor> plan_tensors(const TrainPlan& plan) {
  // Who holds what, from every rank's own layout.
  std::map<std::string, PlannedTensor> by_name;
  const auto kind = plan.kind();
  for (int32_t r = 0; r < plan.num_ranks(); ++r)
    for (int32_t phase = 0; phase < num_phases(kind); ++phase) {
      const RankId rank{r};
      const StageLayout layout{plan.config, plan.share(rank, phase)};
      for (const auto& tensor : layout.tensors()) {
        auto& planned = by_name[tensor.spec.name];
        planned.spec = tensor.spec;
        planned.holders.emplace_back(rank, phase);
      }
      const int32_t column = plan.column(rank);
      for (const auto& gradient : layout.gradients()) {
        const auto& spec = layout.tensors()[gradient.tensor].spec;
        auto& planned = by_name[spec.name];
        const bool shared = spec.role == TensorRole::embedding || spec.role == TensorRole::head;
        planned.num_uses = shared ? 1 + static_cast<int32_t>(plan.num_mtp_layers) : 1;
        for (const int32_t direction : plan.directions(rank, phase)) {
          GradientPart part{rank, phase, direction, gradient.use, 0, 1};
          if (gradient.expert) {
            part.count = plan.groups_per_copy();
            part.first = plan.dp_index(column) * part.count;
            planned.parts.push_back(part);
          } else if (planned.num_uses == 1) {
            part.first = plan.first_lane(column);
            part.count = plan.lanes_per_column();
            planned.parts.push_back(part);
          } else {
            // Uses add up before lanes do, so lanes travel one by one.
            for (int32_t l = 0; l < plan.lanes_per_column(); ++l) {
              part.first = plan.first_lane(column) + l;
              planned.parts.push_back(part);
            }
          }
        }
      }
    }
  std::vector<PlannedTensor> tensors;
  std::vector<int64_t> owned(static_cast<size_t>(plan.num_ranks()));
  for_each_tensor(plan.config, plan.num_mtp_layers, [&](const TensorSpec& spec) {
    if (spec.mtp_copy)
      return;
    auto& planned = by_name.at(spec.name);
    std::sort(planned.parts.begin(), planned.parts.end(), [](const auto& a, const auto& b) {
      return std::tie(a.direction, a.first, a.use) < std::tie(b.direction, b.first, b.use);
    });
    for (const auto& [rank, phase] : planned.holders) {
      const auto load = [&](RankId r) { return owned[static_cast<size_t>(r.value)]; };
      if (!planned.owner.valid() || load(rank) < load(planned.owner))
        planned.owner = rank;
    }
    owned[static_cast<size_t>(planned.owner.value)] += spec.num_elements();
    tensors.push_back(std::move(planned));
  });
  return tensors;
}

void add_parts(const PlannedTensor& tensor, std::span<float* const> parts, int64_t n) {
  std::vector<float*> lanes; // of both directions in turn
  const auto uses = static_cast<size_t>(tensor.num_uses);
  for (size_t i = 0; i < parts.size(); i += uses) {
    for (size_t use = 1; use < uses; ++use)
      for (int64_t e = 0; e < n; ++e)
        parts[i][e] += parts[i + use][e];
    lanes.push_back(parts[i]);
  }
  const size_t half = lanes.size() / 2;
  add_tree(std::span{lanes}.first(half), n);
  add_tree(std::span{lanes}.subspan(half), n);
  for (int64_t e = 0; e < n; ++e)
    lanes[0][e] += lanes[half][e];
}

} // namespace troupe
