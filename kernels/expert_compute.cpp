#include "kernels/trunk.hpp"

#include <algorithm>
#include <new>

namespace troupe {

struct ExpertCompute::Impl {
  Impl(const ModelConfig& config, const Arithmetic& arithmetic, const Backend& b, int64_t rows,
       int num_threads)
      : backend(b), power_of_two(arithmetic.fp8_power_of_two), max_rows(std::max<int64_t>(rows, 1)),
        hidden(config.hidden_size) {
    const int64_t width = std::max(config.moe_intermediate_size, config.shared_intermediate_size());
    const auto bytes = ffn_scratch_bytes(width, hidden, max_rows, num_threads);
    auto memory = MemoryBlock::allocate(static_cast<size_t>(bytes));
    if (!memory)
      throw std::bad_alloc{};
    scratch = std::move(*memory);
  }

  void run(std::span<const ExpertGroup> groups, Rows x, QuantizedRows xq, MutableRows out,
           Workers& workers) {
    GroupedFfnArgs args;
    args.groups = groups;
    args.xq = xq;
    args.power_of_two = power_of_two;
    if (xq.codes == nullptr)
      args.x = x;
    args.out = out;
    args.scratch = {scratch.data(), scratch.size()};
    args.hidden = hidden;
    backend.grouped_ffn(args, workers);
  }

  const Backend& backend;
  const bool power_of_two;
  const int64_t max_rows, hidden;
  MemoryBlock scratch;
  std::vector<ExpertGroup> part; // of a call that is larger than the scratch
};

ExpertCompute::ExpertCompute(const ModelConfig& config, const Arithmetic& arithmetic,
                             const Backend& backend, int64_t max_rows, int num_threads)
    : impl_(std::make_unique<Impl>(config, arithmetic, backend, max_rows, num_threads)) {}
ExpertCompute::~ExpertCompute() = default;

void ExpertCompute::run(std::span<const ExpertGroup> groups, Rows x, QuantizedRows xq,
                        MutableRows out, Workers& workers) {
  auto& impl = *impl_;
  size_t total = 0;
  for (const auto& group : groups)
    total += group.row_of_x.size();
  const auto room = static_cast<size_t>(impl.max_rows);
  if (total <= room)
    return impl.run(groups, x, xq, out, workers);
  // Rows don't know of each other, so the call may be cut anywhere.
  impl.part.clear();
  size_t used = 0;
  for (auto group : groups) {
    while (!group.row_of_x.empty()) {
      const size_t n = std::min(group.row_of_x.size(), room - used);
      auto piece = group;
      piece.row_of_x = group.row_of_x.first(n);
      impl.part.push_back(piece);
      group.row_of_x = group.row_of_x.subspan(n);
      group.out_begin += static_cast<int64_t>(n);
      used += n;
      if (used == room) {
        impl.run(impl.part, x, xq, out, workers);
        impl.part.clear();
        used = 0;
      }
    }
  }
  impl.run(impl.part, x, xq, out, workers);
}

} // namespace troupe
