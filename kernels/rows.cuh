// Rows that a team of threads, a warp or a whole block, goes through several times: what fits stays in registers between the passes,
// the rest of a long row is read again.
#pragma once
#include "common.cuh"

constexpr u32 ROW_THREADS = 256;
constexpr u32 ROW_WARPS = ROW_THREADS / WARP;

// Elements that are read or written at once, 16 bytes, where the row is aligned to them.
template <class T> constexpr u32 PACK = 16 / sizeof(T);
template <class T> struct alignas(16) Pack {
    T at[PACK<T>];
};
// Packs of a row that a thread keeps.
template <class T> constexpr u32 HELD = sizeof(T) == 4 ? 4 : 2;

constexpr u64 ROW_ALIGNMENT = 16;

struct Team {
    bool block;
    u32 rank, size;
    u64 index, count;
};

// `block`: whether the whole block is one team; otherwise each of its warps is.
DEVICE Team team_of(u32 block) {
    if (block) return {true, threadIdx.x, ROW_THREADS, blockIdx.x, gridDim.x};
    return {false, threadIdx.x % WARP, WARP, (u64)blockIdx.x * ROW_WARPS + threadIdx.x / WARP, (u64)gridDim.x * ROW_WARPS};
}

template <class A> DEVICE A team_sum(const Team &team, A x, A *slots) {
    return team.block ? block_sum(x, slots) : warp_sum(x);
}

// NaN only where all are.
template <class A> DEVICE A team_max(const Team &team, A x, A *slots) {
    x = warp_max(x);
    if (!team.block) return x;
    if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = x;
    __syncthreads();
    for (u32 warp = 0; warp < ROW_WARPS; ++warp) x = slots[warp] > x ? slots[warp] : x;
    __syncthreads();
    return x;
}

// The pack from `first` on of a row of `d`, with `fill` beyond its end.
template <class T>
DEVICE void read_pack(const T *row, u64 first, u64 d, bool aligned, Acc<T> fill, Acc<T> (&out)[PACK<T>]) {
    if (aligned && first + PACK<T> <= d) {
        const Pack<T> pack = *reinterpret_cast<const Pack<T> *>(row + first);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) out[e] = widen(pack.at[e]);
    } else {
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) out[e] = first + e < d ? widen(row[first + e]) : fill;
    }
}

template <class T> DEVICE void write_pack(T *row, u64 first, u64 d, bool aligned, const Acc<T> (&values)[PACK<T>]) {
    if (aligned && first + PACK<T> <= d) {
        Pack<T> pack;
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) pack.at[e] = narrow<T>(values[e]);
        *reinterpret_cast<Pack<T> *>(row + first) = pack;
    } else {
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e)
            if (first + e < d) row[first + e] = narrow<T>(values[e]);
    }
}

template <class T> DEVICE bool is_aligned(const T *at) { return reinterpret_cast<u64>(at) % ROW_ALIGNMENT == 0; }

// Calls `f(slot, first)` for each of a thread's packs of a row of `d`; `slot` is KEPT for those that are not kept.
template <class T, u32 KEPT = HELD<T>, class F> DEVICE void each_pack(const Team &team, u64 d, F f) {
#pragma unroll
    for (u32 slot = 0; slot < KEPT; ++slot) {
        const u64 first = ((u64)slot * team.size + team.rank) * PACK<T>;
        if (first < d) f(slot, first);
    }
    const u64 step = (u64)team.size * PACK<T>;
    for (u64 first = KEPT * step + team.rank * PACK<T>; first < d; first += step) f(KEPT, first);
}

// A row that is read, as a thread of its team sees it.
template <class T, u32 KEPT = HELD<T>> struct Row {
    using A = Acc<T>;
    const T *data;
    u64 d;
    A fill;
    bool aligned;
    A held[KEPT][PACK<T>];

    // Beyond the row's end its packs have `fill`.
    DEVICE void open(const Team &team, const T *row, u64 length, A beyond) {
        data = row;
        d = length;
        fill = beyond;
        aligned = is_aligned(row);
#pragma unroll
        for (u32 slot = 0; slot < KEPT; ++slot) {
            const u64 first = ((u64)slot * team.size + team.rank) * PACK<T>;
            if (first < d) read_pack(data, first, d, aligned, fill, held[slot]);
        }
    }

    DEVICE void get(u32 slot, u64 first, A (&out)[PACK<T>]) const {
        if (slot < KEPT) {
#pragma unroll
            for (u32 e = 0; e < PACK<T>; ++e) out[e] = held[slot][e];
        } else {
            read_pack(data, first, d, aligned, fill, out);
        }
    }
};
