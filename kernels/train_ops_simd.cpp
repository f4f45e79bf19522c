// The SIMD table. What it has no kernel of its own for, it takes from the reference.
#include "kernels/train_ops.hpp"

#include "kernels/training_gemm.hpp"

namespace troupe {

namespace {

const float* values(const LinearTask& t) { return reinterpret_cast<const float*>(t.weight); }

void fprop(TrainPrecision precision, std::span<const LinearTask> tasks, TrainScratch& scratch,
           Workers& workers) {
  if (precision != TrainPrecision::f32)
    return reference_train_ops().fprop(precision, tasks, scratch, workers);
  for (const auto& t : tasks)
    gemm_f32({t.rows, t.n, t.k, t.a, t.a_stride, 1, values(t), 1, t.k, t.out, t.out_stride, false},
             workers);
}

void dgrad(TrainPrecision precision, std::span<const LinearTask> tasks, TrainScratch& scratch,
           Workers& workers) {
  if (precision != TrainPrecision::f32)
    return reference_train_ops().dgrad(precision, tasks, scratch, workers);
  for (const auto& t : tasks)
    gemm_f32({t.rows, t.k, t.n, t.a, t.a_stride, 1, values(t), t.k, 1, t.out, t.out_stride,
              t.accumulate},
             workers);
}

void wgrad(TrainPrecision precision, std::span<const LinearTask> tasks, TrainScratch& scratch,
           Workers& workers) {
  if (precision != TrainPrecision::f32)
    return reference_train_ops().wgrad(precision, tasks, scratch, workers);
  for (const auto& t : tasks)
    gemm_f32({t.n, t.k, t.rows, t.a, 1, t.a_stride, t.b, t.b_stride, 1, t.out, t.out_stride, true},
             workers);
}

} // namespace

const TrainOps& simd_train_ops() {
  static const TrainOps ops = [] {
    TrainOps table = reference_train_ops();
    table.name = "simd";
    table.fprop = fprop;
    table.dgrad = dgrad;
    table.wgrad = wgrad;
    return table;
  }();
  return ops;
}

} // namespace troupe
