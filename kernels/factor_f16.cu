// Kronecker factors of f16 rows.
#include "factor.cuh"

template <bool BY_ROWS> using Sums32 = TensorSums<Half<__half>, BY_ROWS, 32, 64, 1, 1, 4>;
template <bool BY_ROWS> using Sums64 = TensorSums<Half<__half>, BY_ROWS, 64, 64, 2, 2, 1>;
template <bool BY_ROWS> using Sums128 = TensorSums<Half<__half>, BY_ROWS, 128, 32, 2, 2, 1>;

FACTOR_KERNELS(f16, 32, 128, Sums32)
FACTOR_KERNELS(f16, 64, 128, Sums64)
FACTOR_KERNELS(f16, 128, 128, Sums128)
KERNEL(factor_f16_merge_32, 256, FactorArgs, (merge<float, 32>))
KERNEL(factor_f16_merge_64, 256, FactorArgs, (merge<float, 64>))
KERNEL(factor_f16_merge_128, 256, FactorArgs, (merge<float, 128>))
