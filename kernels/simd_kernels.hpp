// All kernels of one SIMD target, in the order they build on each other. Included once per target,
// after its vector header, see simd_common.hpp.
#include "kernels/simd_math.hpp"

#include "kernels/simd_io.hpp"

#include "kernels/simd_rows.hpp"

#include "kernels/simd_gemm.hpp"

#include "kernels/simd_linear.hpp"

#include "kernels/simd_ffn.hpp"

#include "kernels/simd_attention.hpp"

#include "kernels/simd_absorbed.hpp"
