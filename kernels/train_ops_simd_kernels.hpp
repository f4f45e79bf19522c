// All training kernels of one target, in the order they build on each other. Included once per
// target, after its vector headers.
#include "kernels/train_ops_simd_tile.hpp"

#include "kernels/train_ops_simd_linear.hpp"

#include "kernels/train_ops_simd_rows.hpp"

#include "kernels/train_ops_simd_attention.hpp"

namespace troupe::TROUPE_SIMD {

inline constexpr TrainOps kTrainOps{"simd",
                                    weight_bytes,
                                    prepare_weight,
                                    fprop,
                                    dgrad,
                                    wgrad,
                                    rms_norm,
                                    rms_norm_backward,
                                    swiglu,
                                    swiglu_backward,
                                    expert_weight_backward,
                                    rope,
                                    attention,
                                    attention_backward,
                                    cross_entropy,
                                    adamw};

} // namespace troupe::TROUPE_SIMD
