// Kronecker factors of f32 rows, to about the precision of f32.
#include "factor.cuh"

template <bool BY_ROWS> using Sums32 = TensorSums<Single<true>, BY_ROWS, 32, 64, 1, 1, 4>;
template <bool BY_ROWS> using Sums64 = TensorSums<Single<true>, BY_ROWS, 64, 32, 2, 2, 1>;
template <bool BY_ROWS> using Sums128 = TensorSums<Single<true>, BY_ROWS, 128, 16, 4, 4, 1>;

FACTOR_KERNELS(f32, 32, 128, Sums32)
FACTOR_KERNELS(f32, 64, 128, Sums64)
// As many warps as two blocks of half the threads would have on a multiprocessor, whose registers are all taken.
FACTOR_KERNELS(f32, 128, 512, Sums128)
KERNEL(factor_f32_merge_32, 256, FactorArgs, (merge<float, 32>))
KERNEL(factor_f32_merge_64, 256, FactorArgs, (merge<float, 64>))
KERNEL(factor_f32_merge_128, 256, FactorArgs, (merge<float, 128>))
