// out = weight sum_rows x x^T + decay bar + keep last for each group of features, symmetric, in f32 (f64 for f64): Kronecker factors
// and their exponential averages. With `one`, x is followed by a constant 1: the last row and column are the sums of the features
// and the count.
//
// One launch computes many of them. A block computes one tile of the lower triangle over a share of the rows, and writes it to both
// triangles. Where the tiles of the launch are too few to occupy the GPU, the rows are divided too; then the blocks write their sums to
// `partial`, and a second kernel adds them up in order.
#pragma once
#include "sums.cuh"

struct FactorJob {
    Rows rows;
    const void *bar;  // or null
    const void *last; // or null
    void *out;
    void *partial; // [splits][groups][pairs][TILE (+ 1)][TILE]
    double decay, keep, weight;
    u64 split_rows; // a multiple of BK
    u32 splits;
    u32 groups;
    u32 tiles; // of one side
    u32 one;
    // The first of the job's blocks, here and where sums are merged: none there, if its rows are not divided.
    u32 first;
    u32 first_merge;
};

constexpr u32 JOBS = 96;

struct FactorArgs {
    FactorJob jobs[JOBS];
    u32 count;
    u32 unused;
};

// The job that a block works for, by its first blocks, which ascend.
template <u32 FactorJob::*FIRST> DEVICE const FactorJob &job_of(const FactorArgs &args, u32 block) {
    u32 low = 0, high = args.count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (args.jobs[middle].*FIRST <= block) low = middle;
        else high = middle;
    }
    return args.jobs[low];
}

// Writes one sum, and its mirror image, to the factor of a group.
template <class A> DEVICE void finish(const FactorJob &p, u32 group, u32 i, u32 j, A sum) {
    u64 size = p.rows.dim + p.one, at = group * size * size + i * size + j, mirror = group * size * size + j * size + i;
    A *out = static_cast<A *>(p.out);
    A value = (A)p.weight * sum, other = value;
    if (const A *bar = static_cast<const A *>(p.bar)) value += (A)p.decay * bar[at], other += (A)p.decay * bar[mirror];
    if (const A *last = static_cast<const A *>(p.last)) value += (A)p.keep * last[at], other += (A)p.keep * last[mirror];
    out[at] = value;
    if (i != j) out[mirror] = other;
}

// Row and column of the `pair`-th tile of the lower triangle.
DEVICE void tiles_of(u32 pair, u32 &i, u32 &j) {
    i = (u32)((sqrtf(8.f * pair + 1.f) - 1.f) / 2.f);
    while ((u64)i * (i + 1) / 2 > pair) --i;
    while ((u64)(i + 1) * (i + 2) / 2 <= pair) ++i;
    j = pair - i * (i + 1) / 2;
}

template <class C> DEVICE void factor(const FactorArgs &args) {
    using T = typename C::T;
    using A = typename C::A;
    constexpr u32 TILE = C::TILE, BK = C::BK, SIDES = C::SINGLE ? 1 : 2;
    constexpr u32 TILES = 2 * SIDES * C::SIZE, SCRATCH = C::SCRATCH / sizeof(T);
    SHARED_ALIGNED(T, tiles, TILES > SCRATCH ? TILES : SCRATCH);
    SHARED(Tap, taps, C::BY_ROWS ? 1 : SIDES * TILE);
    SHARED(Spot, spots, C::BY_ROWS ? 1 : 2 * BK);
    SHARED(A, feature_sums, C::THREADS);

    const FactorJob &p = job_of<&FactorJob::first>(args, blockIdx.x);
    const Rows &rows = p.rows;
    const u32 block = blockIdx.x - p.first, pairs = p.tiles * (p.tiles + 1) / 2, split = block / (p.groups * pairs);
    const u32 group = block / pairs - split * p.groups, pair = block % pairs;
    u32 tile_i, tile_j;
    tiles_of(pair, tile_i, tile_j);
    const bool diagonal = C::SINGLE || tile_i == tile_j;
    const u32 i0 = tile_i * TILE, j0 = tile_j * TILE;
    const u64 first = split * p.split_rows, end = min(first + p.split_rows, rows.count);
    const u32 count = first < end ? (u32)(end - first) : 0, chunks = (count + BK - 1) / BK;
    const T *from = static_cast<const T *>(rows.x) + (first * rows.step + (u64)group * rows.group_step);
    const u64 sample = C::BY_ROWS ? 0 : first / rows.positions.value;
    const u32 position = C::BY_ROWS ? 0 : (u32)(first % rows.positions.value);

    // The spots of a chunk are found while the chunk before it is loaded.
    auto find = [&](u32 chunk) {
        if constexpr (!C::BY_ROWS) find_spots<C>(spots + chunk % 2 * BK, rows, group, sample, position, chunk * BK, count);
    };
    auto load = [&](u32 chunk) {
        T *a = tiles + chunk % 2 * SIDES * C::SIZE;
        if constexpr (C::BY_ROWS) {
            const T *here = from + (u64)chunk * BK * rows.step;
            load_rows<C>(a, here + i0, rows, count - chunk * BK, rows.dim - i0);
            if (!diagonal) load_rows<C>(a + C::SIZE, here + j0, rows, count - chunk * BK, rows.dim - j0);
        } else {
            load_patches<C>(a, rows, spots + chunk % 2 * BK, taps);
            if (!diagonal) load_patches<C>(a + C::SIZE, rows, spots + chunk % 2 * BK, taps + TILE);
        }
    };
    if constexpr (!C::BY_ROWS) {
        find_taps<C>(taps, rows, i0);
        if (!diagonal) find_taps<C>(taps + TILE, rows, j0);
        find(0);
        find(1);
        __syncthreads();
    }

    C sums;
    sums.start(diagonal, rows.dim - i0, rows.dim - j0);
    A feature_sum = 0;
    if (chunks > 0) load(0);
    for (u32 chunk = 0; chunk < chunks; ++chunk) {
        wait_for_copies();
        __syncthreads();
        if (chunk + 1 < chunks) load(chunk + 1);
        if (chunk + 2 < chunks) find(chunk + 2);
        const T *a = tiles + chunk % 2 * SIDES * C::SIZE;
        sums.add(a, diagonal ? a : a + C::SIZE);
        if (p.one && diagonal) {
            const T *own = a + threadIdx.x % TILE * C::FEATURE;
            for (u32 k = threadIdx.x / TILE; k < BK; k += C::THREADS / TILE) feature_sum += widen(own[k * C::ROW]);
        }
    }

    const u32 slot = TILE * (TILE + p.one);
    A *partial = static_cast<A *>(p.partial) + (u64)block * slot;
    const bool whole = p.splits == 1;
    sums.each(tiles, [&](u32 i, u32 j, A sum) {
        if (i0 + i >= rows.dim || j0 + j > i0 + i) return;
        if (whole) finish(p, group, i0 + i, j0 + j, sum);
        else partial[i * TILE + j] = sum;
    });
    if (!p.one || !diagonal) return;
    feature_sums[threadIdx.x] = feature_sum;
    __syncthreads();
    if (threadIdx.x < TILE && j0 + threadIdx.x < rows.dim) {
        A sum = 0;
        for (u32 k = 0; k < C::THREADS / TILE; ++k) sum += feature_sums[k * TILE + threadIdx.x];
        if (whole) finish(p, group, rows.dim, j0 + threadIdx.x, sum);
        else partial[TILE * TILE + threadIdx.x] = sum;
    }
    if (whole && pair == 0 && threadIdx.x == 0) finish(p, group, rows.dim, rows.dim, (A)rows.count);
}

// Adds up what the blocks of `factor` have left: 32 elements a block, each by as many threads as there are warps.
template <class A, u32 TILE> DEVICE void merge(const FactorArgs &args) {
    constexpr u32 WARPS = 8;
    SHARED(A, shares, WARPS *WARP);
    const FactorJob &p = job_of<&FactorJob::first_merge>(args, blockIdx.x);
    const u32 block = blockIdx.x - p.first_merge;
    u32 pairs = p.tiles * (p.tiles + 1) / 2, slot = TILE * (TILE + p.one), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 total = (u64)p.groups * pairs * slot, at = (u64)block * WARP + lane;
    u32 group = (u32)(at / ((u64)pairs * slot)), pair = (u32)(at / slot % pairs), element = (u32)(at % slot), tile_i, tile_j;
    tiles_of(pair, tile_i, tile_j);
    bool one = element >= TILE * TILE;
    u32 i = one ? p.rows.dim : tile_i * TILE + element / TILE, j = tile_j * TILE + element % TILE;
    bool wanted = at < total && j < p.rows.dim && (one ? tile_i == tile_j : i < p.rows.dim && j <= i);
    A sum = 0;
    const A *partial = static_cast<const A *>(p.partial);
    if (wanted) {
#pragma unroll 4
        for (u32 split = warp; split < p.splits; split += WARPS) sum += partial[split * total + at];
    }
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0) return;
    if (wanted) {
        for (u32 other = 1; other < WARPS; ++other) sum += shares[other * WARP + lane];
        finish(p, group, i, j, sum);
    }
    if (p.one && block == 0)
        for (u32 g = lane; g < p.groups; g += WARP) finish(p, g, p.rows.dim, p.rows.dim, (A)p.rows.count);
}

// The kernels of one type and tile, for rows and for images.
#define FACTOR_KERNELS(name, side, threads, sums)                                                                      \
    KERNEL(factor_##name##_rows_##side, threads, FactorArgs, factor<sums<true>>)                                       \
    KERNEL(factor_##name##_images_##side, threads, FactorArgs, factor<sums<false>>)
