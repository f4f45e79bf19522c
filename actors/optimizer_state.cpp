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
                                                                    const ValueSource& source,
                                                                    const LoadProgress& progress) {
  const TrainLayout held{c.plan.config, c.plan.num_mtp_layers, [&](const TensorSpec& spec) {
                           return std::ranges::any_of(c.phases, [&](const auto& phase) {
                             return phase.weights->layout().find(spec.name) != nullptr;
                           });
                         }};
  auto state = allocate(c);
  if (!state)
    return state.error();
  int64_t done = 0, all = 0;
  for (const auto& tensor : held.tensors())
    all += tensor.size;
  for (const auto& phase : c.phases)
    all += phase.weights->layout().num_values(); // to be prepared
  const auto advance = [&](int64_t elements) {
    done += elements;
    if (progress)
      progress(done * int64_t{sizeof(float)}, all * int64_t{sizeof(float)});
  };
  std::vector<float> values;
  for (const auto& tensor : held.tensors()) {
    values.resize(static_cast<size_t>(tensor.size));
    if (auto error = source.master(tensor.spec, values))
      return error;
    copy_to_phases(c, tensor.spec, values, 0);
    // An owner holds what it owns.
    if (const auto* owned = (*state)->layout->find(tensor.spec.name)) {
      std::ranges::copy(values, (*state)->master.of(*owned).begin());
      if ((*state)->ema)
        std::ranges::copy(values, (*state)->ema->of(*owned).begin());
      if (source.moments)
        if (auto error = source.moments(*owned, **state))
          return error;
    }
    advance(tensor.size);
  }
  InlineWorkers workers;
  for (const auto& phase : c.phases) {
    phase.weights->prepare(workers);
    advance(phase.weights->layout().num_values());
  }
  return state;
}

} // namespace troupe
