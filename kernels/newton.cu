// What Newton's iteration for inverses does beside matrix products, and its decisions, a group at a time and on the device.
#include "common.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / WARP;

// A group's report: the residual |1 - m x| / sqrt(dim) before the last update, the updates done, and how it stands. Unusable is
// a matrix of zeros, or with numbers that are not finite.
struct Report {
    double residual;
    double updates;
    double state;
};
constexpr double RUNNING = 0, DONE = 1, FAILED = 2, UNUSABLE = 3;

struct ResidualArgs {
    void *product;   // [groups, dim, dim]: m x before, 1 - m x after
    double *partial; // [groups, parts]: sums of its squares
    u32 groups;
    u32 dim;
    u32 parts;
    u32 subtract; // 0 leaves the product as it is
};

template <class T> DEVICE void residual(const ResidualArgs &p) {
    SHARED(double, slots, WARPS);
    const u64 size = (u64)p.dim * p.dim, tasks = (u64)p.groups * p.parts;
    for (u64 task = blockIdx.x; task < tasks; task += gridDim.x) {
        T *m = static_cast<T *>(p.product) + task / p.parts * size;
        double sum = 0;
        for (u64 i = task % p.parts * THREADS + threadIdx.x; i < size; i += (u64)p.parts * THREADS) {
            T x = m[i];
            if (p.subtract) {
                x = (i % (p.dim + 1ull) == 0 ? T(1) : T(0)) - x;
                m[i] = x;
            }
            sum += (double)x * (double)x;
        }
        sum = block_sum(sum, slots);
        if (threadIdx.x == 0) p.partial[task] = sum;
    }
}

KERNEL(residual_f32, 256, ResidualArgs, residual<float>)
KERNEL(residual_f64, 256, ResidualArgs, residual<double>)

// |r| of a group; NaN stays NaN. Every thread finds the same.
DEVICE double norm_of(const double *partial, u64 group, u32 parts) {
    double sum = 0;
    for (u32 i = 0; i < parts; ++i) sum += partial[group * parts + i];
    return sqrt(sum);
}

struct RowSumArgs {
    const void *m;   // [groups, dim, dim]
    double *partial; // [groups, rows]: the largest row sums of 8 rows each, infinite where a number is not finite
    u32 groups;
    u32 dim;
};

template <class T> DEVICE void row_sums(const RowSumArgs &p) {
    SHARED(double, slots, WARPS);
    const u64 d = p.dim, rows = (d + WARPS - 1) / WARPS, tasks = p.groups * rows;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u64 task = blockIdx.x; task < tasks; task += gridDim.x) {
        const u64 row = task % rows * WARPS + warp;
        const T *m = static_cast<const T *>(p.m) + (task / rows * d + row) * d;
        double sum = 0;
        if (row < d)
            for (u64 i = lane; i < d; i += WARP) sum += fabs((double)m[i]);
        sum = warp_sum(sum);
        if (lane == 0) slots[warp] = isfinite(sum) ? sum : (double)INFINITY;
        __syncthreads();
        if (threadIdx.x == 0) {
            double most = 0;
            for (u32 i = 0; i < WARPS; ++i) most = slots[i] > most ? slots[i] : most;
            p.partial[task] = most;
        }
        __syncthreads();
    }
}

KERNEL(row_sums_f32, 256, RowSumArgs, row_sums<float>)
KERNEL(row_sums_f64, 256, RowSumArgs, row_sums<double>)

struct StartArgs {
    const double *largest; // [groups, rows], from row_sums
    const void *start;     // [groups, dim, dim], or null
    const double *first;   // [groups, parts]: of r = 1 - m start, or null
    const double *second;  // [groups, parts]: of r r
    void *x;
    Report *report; // [groups]
    u32 groups;
    u32 dim;
    u32 rows;
    u32 parts;
};

// x = the start where it is proven to contract, else I / |m|_inf: block (x, y) for a part of group y.
template <class T> DEVICE void start(const StartArgs &p) {
    const u64 size = (u64)p.dim * p.dim;
    for (u64 group = blockIdx.y; group < p.groups; group += gridDim.y) {
        double most = 0;
        for (u32 i = 0; i < p.rows; ++i) {
            const double part = p.largest[group * p.rows + i];
            most = part > most ? part : most;
        }
        // NaN does not contract.
        const bool warm = p.start && (norm_of(p.first, group, p.parts) < 1 || norm_of(p.second, group, p.parts) < 1);
        const bool usable = most > 0 && isfinite(most) && isfinite((T)(1 / most));
        const T *given = static_cast<const T *>(p.start) + (p.start ? group * size : 0);
        T *x = static_cast<T *>(p.x) + group * size;
        for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < size; i += (u64)gridDim.x * THREADS) {
            T value = i % (p.dim + 1ull) == 0 && usable ? (T)(1 / most) : T(0);
            if (warm && usable) value = given[i];
            x[i] = value;
        }
        if (blockIdx.x == 0 && threadIdx.x == 0) p.report[group] = Report{(double)NAN, 0, usable ? RUNNING : UNUSABLE};
    }
}

KERNEL(start_f32, 256, StartArgs, start<float>)
KERNEL(start_f64, 256, StartArgs, start<double>)

struct StepArgs {
    const void *x;
    const void *change;    // x r
    const double *partial; // [groups, parts]: of r
    const Report *report;  // [groups]
    void *next;
    Report *next_report;
    double tolerance;
    u32 groups;
    u32 dim;
    u32 parts;
    u32 pad;
};

// x + x r, where the group still runs. Its last update is the one at a residual within the tolerance; it fails where the
// residual grows, or stays at what rounding leaves.
template <class T> DEVICE void step(const StepArgs &p) {
    const u64 size = (u64)p.dim * p.dim;
    for (u64 group = blockIdx.y; group < p.groups; group += gridDim.y) {
        const Report report = p.report[group];
        const double found = norm_of(p.partial, group, p.parts) / sqrt((double)p.dim), last = report.residual;
        const double bound = p.tolerance > 0.5 * last ? p.tolerance : 0.5 * last;
        const bool stalled = last < 0.1 && found > bound;
        // Written so that NaN fails.
        const bool fails = stalled || !(found <= 1e3);
        const bool running = report.state == RUNNING, moves = running && !fails;
        const T *x = static_cast<const T *>(p.x) + group * size, *change = static_cast<const T *>(p.change) + group * size;
        T *next = static_cast<T *>(p.next) + group * size;
        for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < size; i += (u64)gridDim.x * THREADS)
            next[i] = moves ? x[i] + change[i] : x[i];
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            const double state = fails ? FAILED : found <= p.tolerance ? DONE : RUNNING;
            p.next_report[group] = running ? Report{found, report.updates + (moves ? 1 : 0), state} : report;
        }
    }
}

KERNEL(step_f32, 256, StepArgs, step<float>)
KERNEL(step_f64, 256, StepArgs, step<double>)

struct FinishArgs {
    const void *x;
    void *out;
    u32 groups;
    u32 dim;
};

// (x + x^T) / 2.
template <class T> DEVICE void finish(const FinishArgs &p) {
    SHARED(T, tile, WARP *(WARP + 1));
    const u64 d = p.dim, tiles = (d + WARP - 1) / WARP, tasks = p.groups * tiles * tiles;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u64 task = blockIdx.x; task < tasks; task += gridDim.x) {
        const u64 group = task / (tiles * tiles), row = task / tiles % tiles * WARP, column = task % tiles * WARP;
        const T *x = static_cast<const T *>(p.x) + group * d * d;
        for (u32 i = warp; i < WARP; i += WARPS)
            if (column + i < d && row + lane < d) tile[i * (WARP + 1) + lane] = x[(column + i) * d + row + lane];
        __syncthreads();
        for (u32 i = warp; i < WARP; i += WARPS) {
            const u64 r = row + i, c = column + lane;
            if (r >= d || c >= d) continue;
            const T sum = x[r * d + c] + tile[lane * (WARP + 1) + i];
            (static_cast<T *>(p.out) + group * d * d)[r * d + c] = sum * T(0.5);
        }
        __syncthreads();
    }
}

KERNEL(finish_f32, 256, FinishArgs, finish<float>)
KERNEL(finish_f64, 256, FinishArgs, finish<double>)
