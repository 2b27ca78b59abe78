// The cross-entropy of labels and its gradient over rows of `d` logits (src/ops/cross_entropy.rs). A label that is none of `0..d` gives
// NaN, as does a row with a NaN or +inf. Of a row of -inf alone the loss is inf and the gradient 0.
#include "exponentials.cuh"

struct LossArgs {
    const void *x;
    const void *labels;
    void *losses; // [rows], of the accumulator's type
    u64 rows;
    u64 d;
    u32 wide_labels; // i64, not u32
    u32 block;
};

struct MeanArgs {
    const void *losses;
    void *mean;
    u64 rows;
};

struct LossGradientArgs {
    const void *x;
    const void *labels;
    const void *scale; // one element, or null for 1
    void *gx;
    u64 rows;
    u64 d;
    double divisor;
    u32 wide_labels;
    u32 block;
};

// A label, or `d` for what is none.
DEVICE u64 label_of(const void *labels, u32 wide, u64 row, u64 d) {
    const u64 label = wide ? (u64) static_cast<const int64_t *>(labels)[row] : static_cast<const u32 *>(labels)[row];
    return label < d ? label : d;
}

template <class T> DEVICE void cross_entropy(const LossArgs &p) {
    using A = Acc<T>;
    SHARED(A, slots, ROW_WARPS);
    const Team team = team_of(p.block);
    if (team.index >= p.rows) return;
    const T *data = static_cast<const T *>(p.x) + team.index * p.d;
    Row<T> x;
    x.open(team, data, p.d, minus_infinity<A>());
    const Exponentials<A> all = exponentials(team, x, slots);
    if (team.rank > 0) return;
    const u64 label = label_of(p.labels, p.wide_labels, team.index, p.d);
    const A nan = minus_infinity<A>() - minus_infinity<A>();
    const A loss = label < p.d ? all.log_sum() - (widen(data[label]) - all.max) : nan;
    static_cast<A *>(p.losses)[team.index] = loss;
}

// By one block.
template <class T> DEVICE void cross_entropy_mean(const MeanArgs &p) {
    SHARED(double, slots, ROW_WARPS);
    double total = 0;
    for (u64 row = threadIdx.x; row < p.rows; row += ROW_THREADS) total += static_cast<const Acc<T> *>(p.losses)[row];
    total = block_sum(total, slots);
    if (threadIdx.x == 0) *static_cast<T *>(p.mean) = narrow<T>((Acc<T>)(total / (double)p.rows));
}

// `(softmax - onehot) scale / divisor`.
template <class T> DEVICE void cross_entropy_gradient(const LossGradientArgs &p) {
    using A = Acc<T>;
    SHARED(A, slots, ROW_WARPS);
    const Team team = team_of(p.block);
    if (team.index >= p.rows) return;
    T *gx = static_cast<T *>(p.gx) + team.index * p.d;
    const bool aligned = is_aligned(gx);
    Row<T> x;
    x.open(team, static_cast<const T *>(p.x) + team.index * p.d, p.d, minus_infinity<A>());
    const Exponentials<A> all = exponentials(team, x, slots);
    const u64 label = label_of(p.labels, p.wide_labels, team.index, p.d);
    A scale = p.scale == nullptr ? (A)1 : widen(*static_cast<const T *>(p.scale));
    scale = (A)((double)scale / p.divisor);
    const A one_over_sum = all.scale();
    // A row without a probability has no gradient.
    if (one_over_sum == (A)0) scale = 0;
    if (label == p.d) scale = minus_infinity<A>() - minus_infinity<A>();
    each_pack<T>(team, p.d, [&](u32 slot, u64 first) {
        A v[PACK<T>];
        x.get(slot, first, v);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) {
            const A probability = (A)exp(v[e] - all.max) * one_over_sum;
            v[e] = (first + e == label ? probability - (A)1 : probability) * scale;
        }
        write_pack(gx, first, p.d, aligned, v);
    });
}

#define CROSS_ENTROPY_KERNELS(suffix, T)                                                                               \
    KERNEL(cross_entropy_##suffix, ROW_THREADS, LossArgs, cross_entropy<T>)                                            \
    KERNEL(cross_entropy_mean_##suffix, ROW_THREADS, MeanArgs, cross_entropy_mean<T>)                                  \
    WIDE_KERNEL(cross_entropy_gradient_##suffix, ROW_THREADS, LossGradientArgs, cross_entropy_gradient<T>)

CROSS_ENTROPY_KERNELS(f32, float)
CROSS_ENTROPY_KERNELS(f64, double)
CROSS_ENTROPY_KERNELS(f16, __half)
CROSS_ENTROPY_KERNELS(bf16, __nv_bfloat16)
