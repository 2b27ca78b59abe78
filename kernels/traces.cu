// tr(F) and tr(F^2) of a Fisher matrix in Kronecker blocks.
#include "common.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / WARP, TABLE = 64;

struct Entry {
    const void *m;   // [groups, dim, dim]
    double *partial; // [groups, parts, 2]: traces, and sums of squares
    u32 groups;
    u32 dim;
};

struct TracesArgs {
    Entry entries[TABLE];
    u32 count;
    u32 parts;
};

// Block (x, y) takes part x of the groups of matrix y.
template <class T> DEVICE void traces(const TracesArgs &p) {
    SHARED(double, slots, WARPS);
    const Entry &e = p.entries[blockIdx.y];
    const u64 size = (u64)e.dim * e.dim, tasks = (u64)e.groups * p.parts;
    for (u64 task = blockIdx.x; task < tasks; task += gridDim.x) {
        const T *m = static_cast<const T *>(e.m) + task / p.parts * size;
        double trace = 0, squares = 0;
        for (u64 i = task % p.parts * THREADS + threadIdx.x; i < size; i += (u64)p.parts * THREADS) {
            const double x = m[i];
            squares += x * x;
            if (i % (e.dim + 1ull) == 0) trace += x;
        }
        trace = block_sum(trace, slots);
        squares = block_sum(squares, slots);
        if (threadIdx.x == 0) {
            e.partial[2 * task] = trace;
            e.partial[2 * task + 1] = squares;
        }
    }
}

KERNEL(traces_f32, 256, TracesArgs, traces<float>)
KERNEL(traces_f64, 256, TracesArgs, traces<double>)

struct JoinArgs {
    const double *a; // [groups, parts, 2], those of all blocks
    const double *g;
    double *out; // sum of tr a^2 tr g^2, sum of tr a tr g
    u32 groups;
    u32 parts;
};

DEVICE void join(const JoinArgs &p) {
    SHARED(double, slots, WARPS);
    double trace = 0, squares = 0;
    for (u32 group = threadIdx.x; group < p.groups; group += THREADS) {
        double sums[4] = {0, 0, 0, 0};
        for (u64 i = (u64)group * p.parts; i < (group + 1ull) * p.parts; ++i) {
            sums[0] += p.a[2 * i];
            sums[1] += p.a[2 * i + 1];
            sums[2] += p.g[2 * i];
            sums[3] += p.g[2 * i + 1];
        }
        trace += sums[0] * sums[2];
        squares += sums[1] * sums[3];
    }
    trace = block_sum(trace, slots);
    squares = block_sum(squares, slots);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        p.out[0] = squares;
        p.out[1] = trace;
    }
}

KERNEL(join_traces, 256, JoinArgs, join)
