// Kronecker factors of f64 rows.
#include "factor.cuh"

template <bool BY_ROWS> using Sums64 = PlainSums<double, BY_ROWS, 64, 16>;

FACTOR_KERNELS(f64, 64, 256, Sums64)
KERNEL(factor_f64_merge_64, 256, FactorArgs, (merge<double, 64>))
