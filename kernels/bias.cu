// The bias of a linear layer, and its gradient (src/ops/bias.rs).
#include "divide.cuh"
#include "rows.cuh"

struct AddArgs {
    void *y; // [rows, d]
    const void *bias;
    u64 len;
    u64 d;
};

struct SumArgs {
    const void *gy; // [rows, d]
    void *sums;     // [parts, d], of the accumulator's type; null for one part
    void *gb;       // [d]
    u64 rows;
    u64 d;
    u32 tiles; // of 32 columns
    u32 parts;
};

template <class T> DEVICE void bias_add(const AddArgs &p) {
    T *y = static_cast<T *>(p.y);
    const T *bias = static_cast<const T *>(p.bias);
    const u64 first = ((u64)blockIdx.x * ROW_THREADS + threadIdx.x) * PACK<T>;
    if (first >= p.len) return;
    Acc<T> v[PACK<T>];
    read_pack(y, first, p.len, is_aligned(y), (Acc<T>)0, v);
    u32 column = divide(first, (u32)p.d).rest;
#pragma unroll
    for (u32 e = 0; e < PACK<T>; ++e) {
        v[e] += widen(bias[column]);
        column = column + 1 == p.d ? 0 : column + 1;
    }
    write_pack(y, first, p.len, is_aligned(y), v);
}

// Each warp of a block adds up 32 columns of every eighth row of the block's part.
template <class T> DEVICE void bias_sum(const SumArgs &p) {
    using A = Acc<T>;
    SHARED(A, partial, ROW_THREADS);
    const u32 part = blockIdx.x / p.tiles, tile = blockIdx.x - part * p.tiles;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 column = (u64)tile * WARP + lane;
    A sum = 0;
    if (column < p.d)
        for (u64 row = (u64)part * ROW_WARPS + warp; row < p.rows; row += (u64)p.parts * ROW_WARPS)
            sum += widen(static_cast<const T *>(p.gy)[row * p.d + column]);
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || column >= p.d) return;
    for (u32 other = 1; other < ROW_WARPS; ++other) sum += partial[other * WARP + lane];
    if (p.parts == 1)
        static_cast<T *>(p.gb)[column] = narrow<T>(sum);
    else
        static_cast<A *>(p.sums)[part * p.d + column] = sum;
}

template <class T> DEVICE void bias_total(const SumArgs &p) {
    const u64 column = (u64)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (column >= p.d) return;
    Acc<T> sum = 0;
    for (u32 part = 0; part < p.parts; ++part) sum += static_cast<const Acc<T> *>(p.sums)[part * p.d + column];
    static_cast<T *>(p.gb)[column] = narrow<T>(sum);
}

#define BIAS_KERNELS(suffix, T)                                                                                        \
    KERNEL(bias_add_##suffix, ROW_THREADS, AddArgs, bias_add<T>)                                                       \
    KERNEL(bias_sum_##suffix, ROW_THREADS, SumArgs, bias_sum<T>)                                                       \
    KERNEL(bias_total_##suffix, ROW_THREADS, SumArgs, bias_total<T>)

BIAS_KERNELS(f32, float)
BIAS_KERNELS(f64, double)
BIAS_KERNELS(f16, __half)
BIAS_KERNELS(bf16, __nv_bfloat16)
