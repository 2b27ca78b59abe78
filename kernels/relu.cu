// max(x, 0) and its gradient (src/ops/relu.rs).
#include "rows.cuh"

struct ReluArgs {
    const void *x;
    const void *gy; // null: y = max(x, 0), else gy where x > 0
    void *y;
    u64 len;
};

// A NaN is not below zero, so that it passes.
template <class T> DEVICE void relu(const ReluArgs &p) {
    const T *x = static_cast<const T *>(p.x), *gy = static_cast<const T *>(p.gy);
    T *y = static_cast<T *>(p.y);
    const u64 first = ((u64)blockIdx.x * ROW_THREADS + threadIdx.x) * PACK<T>;
    if (first >= p.len) return;
    Acc<T> v[PACK<T>], g[PACK<T>];
    read_pack(x, first, p.len, is_aligned(x), (Acc<T>)0, v);
    if (gy != nullptr) read_pack(gy, first, p.len, is_aligned(gy), (Acc<T>)0, g);
#pragma unroll
    for (u32 e = 0; e < PACK<T>; ++e) v[e] = v[e] <= 0 ? (Acc<T>)0 : gy == nullptr ? v[e] : g[e];
    write_pack(y, first, p.len, is_aligned(y), v);
}

KERNEL(relu_f32, ROW_THREADS, ReluArgs, relu<float>)
KERNEL(relu_f64, ROW_THREADS, ReluArgs, relu<double>)
KERNEL(relu_f16, ROW_THREADS, ReluArgs, relu<__half>)
KERNEL(relu_bf16, ROW_THREADS, ReluArgs, relu<__nv_bfloat16>)
