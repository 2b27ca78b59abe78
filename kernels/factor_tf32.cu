// Kronecker factors of f32 rows rounded to TF32.
#include "factor.cuh"

template <bool BY_ROWS> using Sums32 = TensorSums<Single<false>, BY_ROWS, 32, 64, 1, 1, 4>;
template <bool BY_ROWS> using Sums64 = TensorSums<Single<false>, BY_ROWS, 64, 32, 2, 2, 1>;
template <bool BY_ROWS> using Sums128 = TensorSums<Single<false>, BY_ROWS, 128, 16, 2, 2, 1>;

FACTOR_KERNELS(tf32, 32, 128, Sums32)
FACTOR_KERNELS(tf32, 64, 128, Sums64)
FACTOR_KERNELS(tf32, 128, 128, Sums128)
KERNEL(factor_tf32_merge_32, 256, FactorArgs, (merge<float, 32>))
KERNEL(factor_tf32_merge_64, 256, FactorArgs, (merge<float, 64>))
KERNEL(factor_tf32_merge_128, 256, FactorArgs, (merge<float, 128>))
