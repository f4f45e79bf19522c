// Whether two machines compute training to the same bits: a hash of what the kernels make of fixed
// inputs, in every precision. Ranks compare it when they join.
#pragma once

#include "kernels/train_ops.hpp"

#include <cstdint>

namespace troupe {

[[nodiscard]] uint64_t train_fingerprint(const TrainOps& ops);

} // namespace troupe
