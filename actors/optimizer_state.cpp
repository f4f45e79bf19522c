#include "actors/optimizer_state.hpp"

#include <algorithm>
#include <set>
#include <string>

namespace troupe {

namespace {

caf::expected<std::shared_ptr<OptimizerState>> allocate(const TrainContext& c) {
  std::set<std::string, std::less<>> owned;
  for (const auto& tensor : c.tensors)
    if (tensor.owner == c.self())
      owned.insert(tensor.spec.name);
  auto layout = std::make_shared<const TrainLayout>(
      c.plan.config, c.plan.num_mtp_layers,
      [&](const TensorSpec& spec) { return owned.contains(spec.name); });
  auto master = TrainArena::make(layout);
  if (!master)
    return with_context("master weights", master.error());
  auto m = TrainArena::make(layout), v = TrainArena::make(layout);
  if (!m || !v)
    return with_context("optimizer moments", !m ? m.error() : v.error());
  auto state = std::make_shared<OptimizerState>(
      OptimizerState{layout, std::move(*master), std::move(*m), std::move(*v), {}});
  if (c.config.ema > 0) {
    auto ema = TrainArena::make(layout);
    if (!ema)
      return with_context("averaged weights", ema.error());
    state->ema = std::move(*ema);
  }
  return state;
}

} // namespace

void copy_to_phases(const TrainContext& context, const TensorSpec& spec,
                    std::span<const float> from, int64_t at) {
  for (const auto& phase : context.phases)
    if (const auto* held = phase.weights->layout().find(spec.name))
      std::ranges::copy(from, phase.weights->values(*held).begin() + at);
}

caf::expected<std::shared_ptr<OptimizerState>> make_optimizer_state(const TrainContext& c,
                                                                    const ValueSource& source) {
  const auto held = std::make_shared<const TrainLayout>(
      c.plan.config, c.plan.num_mtp_layers, [&](const TensorSpec& spec) {
        return std::ranges::any_of(c.phases, [&](const auto& phase) {
          return phase.weights->layout().find(spec.name) != nullptr;
        });
      });
  auto values = TrainArena::make(held);
  if (!values)
    return with_context("loading weights", values.error());
  if (auto error = source.masters(*values))
    return error;
  auto state = allocate(c);
  if (!state)
    return state.error();
  for (const auto& tensor : held->tensors()) {
    const auto from = values->of(tensor);
    copy_to_phases(c, tensor.spec, from, 0);
    // An owner holds what it owns.
    if (const auto* owned = (*state)->layout->find(tensor.spec.name))
      std::ranges::copy(from, (*state)->master.of(*owned).begin());
  }
  if ((*state)->ema)
    std::ranges::copy((*state)->master.all(), (*state)->ema->all().begin());
  if (source.moments)
    if (auto error = source.moments(**state))
      return error;
  InlineWorkers workers;
  for (const auto& phase : c.phases)
    phase.weights->prepare(workers);
  return state;
}

} // namespace troupe
