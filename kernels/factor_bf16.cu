// Kronecker factors of bf16 rows.
#include "factor.cuh"

template <bool BY_ROWS> using Sums32 = TensorSums<Half<__nv_bfloat16>, BY_ROWS, 32, 64, 1, 1, 4>;
template <bool BY_ROWS> using Sums64 = TensorSums<Half<__nv_bfloat16>, BY_ROWS, 64, 64, 2, 2, 1>;
template <bool BY_ROWS> using Sums128 = TensorSums<Half<__nv_bfloat16>, BY_ROWS, 128, 32, 2, 2, 1>;

FACTOR_KERNELS(bf16, 32, 128, Sums32)
FACTOR_KERNELS(bf16, 64, 128, Sums64)
FACTOR_KERNELS(bf16, 128, 128, Sums128)
KERNEL(factor_bf16_merge_32, 256, FactorArgs, (merge<float, 32>))
KERNEL(factor_bf16_merge_64, 256, FactorArgs, (merge<float, 64>))
KERNEL(factor_bf16_merge_128, 256, FactorArgs, (merge<float, 128>))
