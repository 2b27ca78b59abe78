// Layer normalization and its variant by the root mean square over rows of `d`, and their gradients (formulas in
// src/ops/norm.rs). The sums over the rows, the weight's and the bias's gradients, have a part for each block, added up in order by
// a second kernel: the result depends on the sizes alone.
#include "rows.cuh"

struct NormArgs {
    const void *x;
    const void *weight;
    const void *bias; // or null
    void *y;
    u64 rows;
    u64 d;
    double eps;
    u32 center;
    u32 block;
};

struct NormGradientArgs {
    const void *x;
    const void *weight;
    const void *gy;
    void *gx;
    void *sums; // [blocks, 2, d], of the accumulator's type
    u64 rows;
    u64 d;
    double eps;
    u32 center;
    u32 block;
};

struct NormColumnArgs {
    const void *sums;
    void *gw;
    void *gb;
    u64 parts;
    u64 d;
};

// Packs that a thread keeps of each of the two rows, and of each of the two sums, that a gradient goes through: with twice those of other kernels,
// rows of up to 1024 elements (256 of f64) are a warp's, and eight of them are on their way on a multiprocessor where two blocks' were.
template <class T> constexpr u32 KEPT = 2 * HELD<T>;
template <class T> constexpr u32 WARP_ROW = KEPT<T> * PACK<T> * WARP;

template <class A> struct Moments {
    A mean, r;
};

template <class T, u32 KEPT, class A>
DEVICE Moments<A> moments(const Team &team, const Row<T, KEPT> &x, u32 center, double eps, A *slots) {
    const A size = (A)x.d;
    A mean = 0, squares = 0;
    if (center) {
        A total = 0;
        each_pack<T, KEPT>(team, x.d, [&](u32 slot, u64 first) {
            A v[PACK<T>];
            x.get(slot, first, v);
#pragma unroll
            for (u32 e = 0; e < PACK<T>; ++e) total += v[e];
        });
        mean = team_sum(team, total, slots) / size;
    }
    each_pack<T, KEPT>(team, x.d, [&](u32 slot, u64 first) {
        A v[PACK<T>];
        x.get(slot, first, v);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e)
            if (first + e < x.d) squares += (v[e] - mean) * (v[e] - mean);
    });
    const A variance = team_sum(team, squares, slots) / size;
    return {mean, (A)1 / (A)sqrt(variance + (A)eps)};
}

template <class T> DEVICE void norm(const NormArgs &p) {
    using A = Acc<T>;
    SHARED(A, slots, ROW_WARPS);
    const Team team = team_of(p.block);
    if (team.index >= p.rows) return;
    const T *weight = static_cast<const T *>(p.weight), *bias = static_cast<const T *>(p.bias);
    T *y = static_cast<T *>(p.y) + team.index * p.d;
    Row<T> x;
    x.open(team, static_cast<const T *>(p.x) + team.index * p.d, p.d, 0);
    const Moments<A> m = moments(team, x, p.center, p.eps, slots);
    const bool y_aligned = is_aligned(y), w_aligned = is_aligned(weight), b_aligned = is_aligned(bias);
    each_pack<T>(team, p.d, [&](u32 slot, u64 first) {
        A v[PACK<T>], w[PACK<T>];
        x.get(slot, first, v);
        read_pack(weight, first, p.d, w_aligned, (A)0, w);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) v[e] = (v[e] - m.mean) * m.r * w[e];
        if (bias != nullptr) {
            read_pack(bias, first, p.d, b_aligned, (A)0, w);
#pragma unroll
            for (u32 e = 0; e < PACK<T>; ++e) v[e] += w[e];
        }
        write_pack(y, first, p.d, y_aligned, v);
    });
}

template <class T> DEVICE void norm_gradient(const NormGradientArgs &p) {
    using A = Acc<T>;
    SHARED(A, slots, ROW_WARPS);
    SHARED(A, columns, 2 * WARP_ROW<T>);
    const Team team = team_of(p.block);
    const T *weight = static_cast<const T *>(p.weight);
    A *sums = static_cast<A *>(p.sums) + blockIdx.x * 2 * p.d;
    const bool w_aligned = is_aligned(weight);
    const A size = (A)p.d;
    // Of the columns that a thread keeps; those of a longer row are in `sums`, where only this thread touches them.
    A gw[KEPT<T>][PACK<T>], gb[KEPT<T>][PACK<T>];
#pragma unroll
    for (u32 slot = 0; slot < KEPT<T>; ++slot)
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) gw[slot][e] = gb[slot][e] = 0;

    for (u64 row = team.index; row < p.rows; row += team.count) {
        Row<T, KEPT<T>> x, gy;
        x.open(team, static_cast<const T *>(p.x) + row * p.d, p.d, 0);
        gy.open(team, static_cast<const T *>(p.gy) + row * p.d, p.d, 0);
        T *gx = static_cast<T *>(p.gx) + row * p.d;
        const bool gx_aligned = is_aligned(gx);
        const Moments<A> m = moments(team, x, p.center, p.eps, slots);
        A shift = 0, slope = 0;
        each_pack<T, KEPT<T>>(team, p.d, [&](u32 slot, u64 first) {
            A v[PACK<T>], g[PACK<T>], w[PACK<T>];
            x.get(slot, first, v);
            gy.get(slot, first, g);
            read_pack(weight, first, p.d, w_aligned, (A)0, w);
#pragma unroll
            for (u32 e = 0; e < PACK<T>; ++e) {
                shift += g[e] * w[e];
                slope += g[e] * w[e] * ((v[e] - m.mean) * m.r);
            }
        });
        shift = p.center ? team_sum(team, shift, slots) / size : (A)0;
        slope = team_sum(team, slope, slots) / size;
        each_pack<T, KEPT<T>>(team, p.d, [&](u32 slot, u64 first) {
            A v[PACK<T>], g[PACK<T>], w[PACK<T>];
            x.get(slot, first, v);
            gy.get(slot, first, g);
            read_pack(weight, first, p.d, w_aligned, (A)0, w);
#pragma unroll
            for (u32 e = 0; e < PACK<T>; ++e) {
                const A xh = (v[e] - m.mean) * m.r;
                v[e] = m.r * (g[e] * w[e] - shift - xh * slope);
                if (slot < KEPT<T>) {
                    gw[slot][e] += g[e] * xh;
                    gb[slot][e] += g[e];
                } else if (first + e < p.d) {
                    const bool fresh = row == team.index;
                    sums[first + e] = (fresh ? (A)0 : sums[first + e]) + g[e] * xh;
                    sums[p.d + first + e] = (fresh ? (A)0 : sums[p.d + first + e]) + g[e];
                }
            }
            if (slot < KEPT<T>) {
                // In the place of x, and stored when all is computed: the next pack's weights would wait for the store.
#pragma unroll
                for (u32 e = 0; e < PACK<T>; ++e) x.held[slot][e] = v[e];
            } else {
                write_pack(gx, first, p.d, gx_aligned, v);
            }
        });
#pragma unroll
        for (u32 slot = 0; slot < KEPT<T>; ++slot) {
            const u64 first = ((u64)slot * team.size + team.rank) * PACK<T>;
            if (first < p.d) write_pack(gx, first, p.d, gx_aligned, x.held[slot]);
        }
    }

    // The warps of a block that are teams of their own add up in their order.
    const u32 own = team.block ? 0 : threadIdx.x / WARP;
    for (u32 turn = 0; turn < (team.block ? 1 : ROW_WARPS); ++turn) {
        if (own == turn) {
#pragma unroll
            for (u32 slot = 0; slot < KEPT<T>; ++slot)
#pragma unroll
                for (u32 e = 0; e < PACK<T>; ++e) {
                    const u64 column = ((u64)slot * team.size + team.rank) * PACK<T> + e;
                    if (column >= p.d) continue;
                    if (team.block) {
                        sums[column] = gw[slot][e];
                        sums[p.d + column] = gb[slot][e];
                    } else {
                        columns[column] = (turn == 0 ? (A)0 : columns[column]) + gw[slot][e];
                        columns[WARP_ROW<T> + column] = (turn == 0 ? (A)0 : columns[WARP_ROW<T> + column]) + gb[slot][e];
                    }
                }
        }
        if (!team.block) __syncthreads();
    }
    if (!team.block)
        for (u64 column = threadIdx.x; column < p.d; column += ROW_THREADS) {
            sums[column] = columns[column];
            sums[p.d + column] = columns[WARP_ROW<T> + column];
        }
}

// A block adds up 32 columns, each warp every eighth of the parts.
template <class T> DEVICE void norm_columns(const NormColumnArgs &p) {
    using A = Acc<T>;
    SHARED(A, partial, ROW_THREADS);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 column = (u64)blockIdx.x * WARP + lane;
    A total = 0;
    if (column < 2 * p.d)
        for (u64 part = warp; part < p.parts; part += ROW_WARPS)
            total += static_cast<const A *>(p.sums)[part * 2 * p.d + column];
    partial[threadIdx.x] = total;
    __syncthreads();
    if (warp > 0 || column >= 2 * p.d) return;
    for (u32 other = 1; other < ROW_WARPS; ++other) total += partial[other * WARP + lane];
    if (column < p.d)
        static_cast<T *>(p.gw)[column] = narrow<T>(total);
    else
        static_cast<T *>(p.gb)[column - p.d] = narrow<T>(total);
}

#define NORM_KERNELS(suffix, T)                                                                                        \
    KERNEL(norm_##suffix, ROW_THREADS, NormArgs, norm<T>)                                                              \
    KERNEL(norm_gradient_##suffix, ROW_THREADS, NormGradientArgs, norm_gradient<T>)                                    \
    KERNEL(norm_columns_##suffix, ROW_THREADS, NormColumnArgs, norm_columns<T>)

NORM_KERNELS(f32, float)
NORM_KERNELS(f64, double)
NORM_KERNELS(f16, __half)
NORM_KERNELS(bf16, __nv_bfloat16)
