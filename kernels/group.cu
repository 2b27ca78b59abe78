// Norms of groups of weights, blocks of a matrix, and the gradients and proximal steps made of them (formulas in
// src/ops/group.rs). Sums are kept in f64, in which no square of a weight of f32 overflows or vanishes. A group's sums have parts,
// added up in order by a second kernel: the result depends on the sizes alone.
#include "divide.cuh"
#include "staged.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
// Of double.
constexpr double EPSILON = 2.220446049250313e-16;

// Blocks of `rows` x `columns` elements of an `m` x `n` matrix, `across` side by side; `run` adjacent elements are of one block.
struct Tiles {
    u64 m;
    u64 n;
    u64 rows;
    u64 columns;
    u64 across;
    u64 run;
};

struct SumArgs {
    const void *w;
    double *partial; // [partials, 2]
    Tiles tiles;
    u64 groups;
    u64 parts; // of a group, or of the columns of one
    u64 part;  // elements of one, or rows
    double threshold;
    u64 block; // a part for each block, not each warp
};

struct FinishArgs {
    const double *partial;
    double *sums; // [groups, 2]
    Tiles tiles;
    u64 groups;
    u64 parts;
    u64 by_column;
};

struct ValueArgs {
    const double *sums;
    void *out; // one element
    Tiles tiles;
    u64 extra; // weights that a group has beyond the tile
    double l1;
    double l2;
    double group;
    u64 sized;
};

struct FactorArgs {
    const double *sums;
    double *factors; // [groups]
    Tiles tiles;
    u64 extra;
    double group;
    double step;
    u64 sized;
    u64 prox;
};

struct MapArgs {
    const void *w;
    void *out;
    const double *factors; // or null
    const void *scale;     // of the gradient: one element of the accumulator's type, or null for 1
    Tiles tiles;
    double threshold;
    double shrink;
    double l1;
    double l2;
    u64 prox;
};

struct ScaledArgs {
    const double *w;
    const double *diagonal;
    double *out;
    Tiles tiles;
    double step;
    double threshold;
    double bend; // added to the diagonal
    double group;
    u64 sized;
};

struct DualArgs {
    const double *omegas; // [groups]
    const double *state;  // [6, groups]: alpha, integral, average, penalty, least violation, steps without a fall of it
    double *next;         // the same
    u64 groups;
    double bound;
    double kappa_p;
    double kappa_i;
    double nu;
    double cap; // of alpha; this, restart and limit may be infinite
    double restart;
    double penalty; // at first
    double growth;
    double tolerance;
    double limit;
    u64 equality;
    u64 by_penalty;
    u64 first;
};

// A division of 64 bits only where it takes one.
DEVICE u64 quotient(u64 a, u64 by) { return (a | by) <= 0xffffffffu ? (u64)((u32)a / (u32)by) : a / by; }

struct Extent {
    u64 row, column, height, width;
};

DEVICE Extent extent(const Tiles &t, u64 group) {
    const u64 down = quotient(group, t.across), row = down * t.rows, column = (group - down * t.across) * t.columns;
    const u64 height = t.m - row, width = t.n - column;
    return {row, column, height < t.rows ? height : t.rows, width < t.columns ? width : t.columns};
}

// NaN stays NaN.
template <class T> DEVICE double beyond(T w, double threshold) {
    const double size = fabs((double)widen(w)) - threshold;
    return size < 0 ? 0 : size;
}

// The sums of parts of groups, each by a block or a warp.
template <class T> DEVICE void group_sums(const SumArgs &p) {
    SHARED(double, slots, WARPS);
    const u32 warp = threadIdx.x / WARP;
    const u64 unit = p.block ? blockIdx.x : (u64)blockIdx.x * WARPS + warp;
    const u32 rank = p.block ? threadIdx.x : threadIdx.x % WARP, size = p.block ? THREADS : WARP;
    if (unit >= p.groups * p.parts) return;
    const u64 group = quotient(unit, p.parts), part = unit - group * p.parts;
    const Extent e = extent(p.tiles, group);
    const T *first = static_cast<const T *>(p.w) + e.row * p.tiles.n + e.column;
    const u64 count = e.height * e.width, from = part * p.part;
    const u64 to = from + p.part < count ? from + p.part : count;
    const bool adjacent = e.width == p.tiles.n;
    double squares = 0, sum = 0;
    each_stage(from + rank, to, size, [&](const Stage &stage) {
        u64 at[STAGES];
        Acc<T> w[STAGES];
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j)
            at[j] = adjacent ? stage.at[j] : stage.at[j] + quotient(stage.at[j], e.width) * (p.tiles.n - e.width);
        fetch(first, at, stage.in, w);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            const double x = beyond(w[j], p.threshold);
            squares += x * x;
            sum += x;
        }
    });
    squares = p.block ? block_sum(squares, slots) : warp_sum(squares);
    sum = p.block ? block_sum(sum, slots) : warp_sum(sum);
    if (rank == 0) {
        p.partial[2 * unit] = squares;
        p.partial[2 * unit + 1] = sum;
    }
}

// The sums of 32 columns over a part of the rows of one row of blocks.
template <class T> DEVICE void group_column_sums(const SumArgs &p) {
    SHARED(double, squares, THREADS);
    SHARED(double, sums, THREADS);
    const Tiles &t = p.tiles;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 strips = (t.n + WARP - 1) / WARP;
    const u64 line = quotient(blockIdx.x, strips), column = (blockIdx.x - line * strips) * WARP + lane;
    const u64 down = quotient(line, p.parts), part = line - down * p.parts;
    const u64 above = down * t.rows, end = above + t.rows < t.m ? above + t.rows : t.m;
    const u64 from = above + part * p.part, to = from + p.part < end ? from + p.part : end;
    double square = 0, sum = 0;
    if (column < t.n)
        each_stage(from + warp, to, WARPS, [&](const Stage &stage) {
            u64 at[STAGES];
            Acc<T> w[STAGES];
#pragma unroll
            for (u32 j = 0; j < STAGES; ++j) at[j] = stage.at[j] * t.n + column;
            fetch(static_cast<const T *>(p.w), at, stage.in, w);
#pragma unroll
            for (u32 j = 0; j < STAGES; ++j) {
                if (!stage.in[j]) continue;
                const double x = beyond(w[j], p.threshold);
                square += x * x;
                sum += x;
            }
        });
    squares[threadIdx.x] = square;
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || line >= p.parts * quotient(t.m + t.rows - 1, t.rows) || column >= t.n) return;
    for (u32 other = 1; other < WARPS; ++other) {
        square += squares[other * WARP + lane];
        sum += sums[other * WARP + lane];
    }
    p.partial[2 * (line * t.n + column)] = square;
    p.partial[2 * (line * t.n + column) + 1] = sum;
}

// A warp adds up the parts of a group.
DEVICE void finish(const FinishArgs &p) {
    const u32 lane = threadIdx.x % WARP;
    const u64 group = (u64)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (group >= p.groups) return;
    const Extent e = extent(p.tiles, group);
    const u64 width = p.by_column ? e.width : 1, stride = p.by_column ? p.tiles.n : 1;
    const u64 first = p.by_column ? quotient(group, p.tiles.across) * p.parts * stride + e.column : group * p.parts;
    double squares = 0, sum = 0;
    for (u64 i = lane; i < p.parts * width; i += WARP) {
        const u64 part = quotient(i, width), at = first + part * stride + (i - part * width);
        squares += p.partial[2 * at];
        sum += p.partial[2 * at + 1];
    }
    squares = warp_sum(squares);
    sum = warp_sum(sum);
    if (lane == 0) {
        p.sums[2 * group] = squares;
        p.sums[2 * group + 1] = sum;
    }
}

DEVICE double factor_of(const Tiles &t, u64 group, u64 extra, double factor, u64 sized) {
    if (!sized) return factor;
    const Extent e = extent(t, group);
    return factor * sqrt((double)(e.height * e.width + extra));
}

// By one block.
template <class A> DEVICE void value(const ValueArgs &p) {
    SHARED(double, slots, WARPS);
    const u64 groups = p.tiles.n == 0 ? 0 : quotient(p.tiles.m + p.tiles.rows - 1, p.tiles.rows) * p.tiles.across;
    double total = 0;
    for (u64 group = threadIdx.x; group < groups; group += THREADS) {
        const double squares = p.sums[2 * group], sum = p.sums[2 * group + 1];
        total += p.l1 * sum + p.l2 * squares;
        if (p.group > 0) total += factor_of(p.tiles, group, p.extra, p.group, p.sized) * sqrt(squares);
    }
    total = block_sum(total, slots);
    if (threadIdx.x == 0) *static_cast<A *>(p.out) = (A)total;
}

// What a weight is times, for the norm of its group.
DEVICE void factors(const FactorArgs &p) {
    const u64 groups = p.tiles.n == 0 ? 0 : quotient(p.tiles.m + p.tiles.rows - 1, p.tiles.rows) * p.tiles.across;
    const u64 group = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (group >= groups) return;
    const double norm = sqrt(p.sums[2 * group]), c = factor_of(p.tiles, group, p.extra, p.group, p.sized);
    // A norm that is NaN makes all of its group NaN.
    double factor;
    if (p.prox)
        factor = norm <= p.step * c ? 0 : 1 - p.step * c / norm;
    else
        factor = norm == 0 ? 0 : c / norm;
    p.factors[group] = factor;
}

template <class T> DEVICE void map(const MapArgs &p) {
    using A = Acc<T>;
    const T *w = static_cast<const T *>(p.w);
    T *out = static_cast<T *>(p.out);
    const Tiles &t = p.tiles;
    const double scale = p.scale == nullptr ? 1. : (double)*static_cast<const A *>(p.scale);
    const u64 count = t.m * t.n, stride = (u64)gridDim.x * THREADS;
    each_stage((u64)blockIdx.x * THREADS + threadIdx.x, count, stride, [&](const Stage &stage) {
        A x[STAGES];
        double factor[STAGES];
        fetch(w, stage, x);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            factor[j] = p.prox ? 1 : 0;
            if (p.factors == nullptr || !stage.in[j]) continue;
            const u64 i = stage.at[j];
            u64 group = quotient(i, t.run);
            if (t.columns != t.n) {
                const u64 row = quotient(i, t.n);
                group = quotient(row, t.rows) * t.across + quotient(i - row * t.n, t.columns);
            }
            factor[j] = p.factors[group];
        }
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            const double one = (double)x[j];
            double y;
            if (p.prox) {
                y = copysign(beyond(x[j], p.threshold), one) * (factor[j] * p.shrink);
            } else {
                const double sign = one > 0 ? 1 : one < 0 ? -1 : one;
                y = scale * (p.l1 * sign + (p.l2 + factor[j]) * one);
            }
            out[stage.at[j]] = narrow<T>((A)y);
        }
    });
}

// The proximal step in the metric of a diagonal (formulas in src/penalty/scaled.rs), of a group by a block.
DEVICE void scaled_prox(const ScaledArgs &p) {
    SHARED(double, slots, WARPS);
    const Tiles &t = p.tiles;
    const Extent e = extent(t, blockIdx.x);
    const u64 count = e.height * e.width;
    const double c = p.step * factor_of(t, blockIdx.x, 0, p.group, p.sized);
    const auto place = [&](u64 i) {
        const u64 row = quotient(i, e.width);
        return (e.row + row) * t.n + e.column + (i - row * e.width);
    };
    const auto a = [&](u64 at) {
        const double x = p.diagonal[at] * p.w[at];
        return copysign(beyond(x, p.threshold), x);
    };
    double largest = 0, steepest = 0, flattest = -INFINITY, broken = 0;
    for (u64 i = threadIdx.x; i < count; i += THREADS) {
        const u64 at = place(i);
        const double size = fabs(a(at)), b = p.diagonal[at] + p.bend;
        if (!(p.diagonal[at] > 0 && isfinite(b) && isfinite(p.w[at]))) broken = 1;
        largest = size > largest ? size : largest;
        steepest = b > steepest ? b : steepest;
        flattest = -b > flattest ? -b : flattest;
    }
    const bool ok = block_max(broken, slots) == 0;
    // c / r of the radius r, where the norm of the group counts.
    double pull = 0;
    bool zero = false;
    if (p.group > 0 && ok) {
        const double unit = block_max(largest, slots);
        const double most = block_max(steepest, slots), least = -block_max(flattest, slots);
        double norm = 0;
        if (unit > 0)
            for (u64 i = threadIdx.x; i < count; i += THREADS) {
                const double part = a(place(i)) / unit;
                norm += part * part;
            }
        norm = sqrt(block_sum(norm, slots)) * unit;
        zero = unit == 0 || norm <= c;
        double low = (norm - c) / most, high = (norm - c) / least, r = low;
        for (u32 step = 0; step < 200 && !zero; ++step) {
            double sum = 0, slope = 0;
            for (u64 i = threadIdx.x; i < count; i += THREADS) {
                const u64 at = place(i);
                const double b = p.diagonal[at] + p.bend, reach = b * r + c, part = a(at) / reach;
                sum += part * part;
                slope += part * part * b / reach;
            }
            sum = block_sum(sum, slots);
            slope = block_sum(slope, slots);
            if (sum > 1)
                low = r > low ? r : low;
            else
                high = r < high ? r : high;
            double next = r + (sqrt(sum) - 1) * sum / slope;
            if (!(next >= low && next <= high)) next = 0.5 * (low + high);
            const bool done = fabs(next - r) <= 2 * EPSILON * next;
            r = next;
            if (done) break;
        }
        pull = c / r;
    }
    for (u64 i = threadIdx.x; i < count; i += THREADS) {
        const u64 at = place(i);
        const double x = a(at) / (p.diagonal[at] + p.bend + pull);
        p.out[at] = !ok ? (double)NAN : zero ? 0 : x;
    }
}

// A step of multipliers (formulas in src/ops/dual.rs), a group by a thread.
DEVICE void dual(const DualArgs &p) {
    // As in dual.rs.
    constexpr double NONE = 1.7976931348623157e308, LEAST = 1e-3, FALL = 0.99;
    const u64 group = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (group >= p.groups) return;
    const double *old = p.state + group;
    double *next = p.next + group;
    const u64 n = p.groups;
    const double omega = p.omegas[group], e = omega - p.bound;
    double alpha = old[0], integral = old[n], average = old[2 * n], penalty = old[3 * n];
    double least = old[4 * n], stalled = old[5 * n];
    if (isfinite(e)) {
        const double violation = p.equality ? fabs(e) : fmax(e, 0.0);
        if (!(violation > LEAST * fmax(fabs(omega), fabs(p.bound)))) {
            least = NONE;
            stalled = 0;
        } else if (violation < FALL * least) {
            least = violation;
            stalled = 0;
        } else {
            stalled += 1;
        }
        if (e < -p.restart) {
            alpha = integral = 0;
            average = e;
            penalty = p.penalty;
        } else {
            const double low = p.equality ? -p.cap : 0;
            average = p.first ? e : p.nu * average + (1 - p.nu) * e;
            integral = fmax(fmin(integral + (p.by_penalty ? penalty : p.kappa_i) * e, p.cap), low);
            alpha = fmax(fmin(p.kappa_p * average + integral, p.cap), low);
            if (violation > p.tolerance) penalty = fmin(p.growth * penalty, p.limit);
        }
    }
    next[0] = alpha;
    next[n] = integral;
    next[2 * n] = average;
    next[3 * n] = penalty;
    next[4 * n] = least;
    next[5 * n] = stalled;
}

#define GROUP_KERNELS(suffix, T)                                                                                       \
    KERNEL(group_sums_##suffix, THREADS, SumArgs, group_sums<T>)                                                       \
    KERNEL(group_column_sums_##suffix, THREADS, SumArgs, group_column_sums<T>)                                         \
    KERNEL(group_map_##suffix, THREADS, MapArgs, map<T>)

GROUP_KERNELS(f32, float)
GROUP_KERNELS(f64, double)
GROUP_KERNELS(f16, __half)
GROUP_KERNELS(bf16, __nv_bfloat16)
KERNEL(group_finish, THREADS, FinishArgs, finish)
KERNEL(group_factors, THREADS, FactorArgs, factors)
KERNEL(group_scaled_prox, THREADS, ScaledArgs, scaled_prox)
KERNEL(group_dual, THREADS, DualArgs, dual)
KERNEL(group_value_f32, THREADS, ValueArgs, value<float>)
KERNEL(group_value_f64, THREADS, ValueArgs, value<double>)
