// Softmax over rows of `d` and its logarithm, with their gradients (src/ops/softmax.rs). A row with a NaN or +inf gives NaN; one of -inf
// alone gives 0, its logarithm -inf, and its gradient is 0.
#include "exponentials.cuh"

struct SoftmaxArgs {
    const void *x;
    void *y;
    u64 rows;
    u64 d;
    u32 log;
    u32 block;
};

struct SoftmaxGradientArgs {
    const void *y;
    const void *gy;
    void *gx;
    u64 rows;
    u64 d;
    u32 log;
    u32 block;
};

template <class T> DEVICE void softmax(const SoftmaxArgs &p) {
    using A = Acc<T>;
    SHARED(A, slots, ROW_WARPS);
    const Team team = team_of(p.block);
    if (team.index >= p.rows) return;
    T *y = static_cast<T *>(p.y) + team.index * p.d;
    const bool aligned = is_aligned(y);
    Row<T> x;
    x.open(team, static_cast<const T *>(p.x) + team.index * p.d, p.d, minus_infinity<A>());
    const Exponentials<A> all = exponentials(team, x, slots);
    const A log_sum = all.log_sum(), scale = all.scale();
    each_pack<T>(team, p.d, [&](u32 slot, u64 first) {
        A v[PACK<T>];
        x.get(slot, first, v);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) v[e] = p.log ? v[e] - all.max - log_sum : (A)exp(v[e] - all.max) * scale;
        write_pack(y, first, p.d, aligned, v);
    });
}

template <class T> DEVICE void softmax_gradient(const SoftmaxGradientArgs &p) {
    using A = Acc<T>;
    SHARED(A, slots, ROW_WARPS);
    const Team team = team_of(p.block);
    if (team.index >= p.rows) return;
    T *gx = static_cast<T *>(p.gx) + team.index * p.d;
    const bool aligned = is_aligned(gx);
    Row<T> y, gy;
    y.open(team, static_cast<const T *>(p.y) + team.index * p.d, p.d, 0);
    gy.open(team, static_cast<const T *>(p.gy) + team.index * p.d, p.d, 0);
    A total = 0, finite = 0;
    each_pack<T>(team, p.d, [&](u32 slot, u64 first) {
        A v[PACK<T>], g[PACK<T>];
        y.get(slot, first, v);
        gy.get(slot, first, g);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) {
            total += p.log ? g[e] : v[e] * g[e];
            // Beyond the row's end is a 0.
            if (first + e < p.d && !(v[e] == minus_infinity<A>())) finite = 1;
        }
    });
    total = team_sum(team, total, slots);
    // Logarithms of a row of -inf alone are constants.
    const bool masked = p.log && team_max(team, finite, slots) == (A)0;
    each_pack<T>(team, p.d, [&](u32 slot, u64 first) {
        A v[PACK<T>], g[PACK<T>];
        y.get(slot, first, v);
        gy.get(slot, first, g);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) g[e] = masked ? (A)0 : p.log ? g[e] - (A)exp(v[e]) * total : v[e] * (g[e] - total);
        write_pack(gx, first, p.d, aligned, g);
    });
}

#define SOFTMAX_KERNELS(suffix, T)                                                                                     \
    KERNEL(softmax_##suffix, ROW_THREADS, SoftmaxArgs, softmax<T>)                                                     \
    KERNEL(softmax_gradient_##suffix, ROW_THREADS, SoftmaxGradientArgs, softmax_gradient<T>)

SOFTMAX_KERNELS(f32, float)
SOFTMAX_KERNELS(f64, double)
SOFTMAX_KERNELS(f16, __half)
SOFTMAX_KERNELS(bf16, __nv_bfloat16)
