// Symmetric matrices [groups, dim, dim] around cuSOLVER, which reads and writes one triangle and checks nothing: the largest
// number, the copy with two triangles, products with a vector, the verdict on a decomposition, and the inverses of small ones.
#include "common.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / WARP;

// Position i of the vector of signs that decompositions are tried on (`probe` in src/linalg/host.rs).
DEVICE double probe(u64 i) { return (i + 1) * 0x9e3779b97f4a7c15ull >> 63 ? -1. : 1.; }

struct LargestArgs {
    const void *m;
    double *partial; // [groups, parts], infinite where a number is not finite
    u64 size;        // dim * dim
    u32 groups;
    u32 parts;
};

template <class T> DEVICE void largest(const LargestArgs &p) {
    SHARED(double, slots, WARPS);
    const u64 total = (u64)p.groups * p.parts;
    for (u64 task = blockIdx.x; task < total; task += gridDim.x) {
        const T *m = static_cast<const T *>(p.m) + task / p.parts * p.size;
        double most = 0;
        for (u64 i = task % p.parts * THREADS + threadIdx.x; i < p.size; i += (u64)p.parts * THREADS) {
            const double size = fabs((double)m[i]);
            // Written so that NaN counts as infinite.
            if (!(size <= most)) most = isfinite(size) ? size : (double)INFINITY;
        }
        most = block_max(most, slots);
        if (threadIdx.x == 0) p.partial[task] = most;
    }
}

KERNEL(largest_f32, 256, LargestArgs, largest<float>)
KERNEL(largest_f64, 256, LargestArgs, largest<double>)

struct ScaleArgs {
    const double *partial; // [groups, parts]
    double *scale;         // [groups]: the largest number; 1 for a zero matrix
    u32 groups;
    u32 parts;
};

DEVICE void scales(const ScaleArgs &p) {
    for (u64 group = (u64)blockIdx.x * THREADS + threadIdx.x; group < p.groups; group += (u64)gridDim.x * THREADS) {
        double most = 0;
        for (u32 i = 0; i < p.parts; ++i) {
            const double part = p.partial[group * p.parts + i];
            most = part > most ? part : most;
        }
        p.scale[group] = most > 0 ? most : 1;
    }
}

KERNEL(spd_scale, 256, ScaleArgs, scales)

struct MirrorArgs {
    const void *m;
    void *out;
    const double *scale; // [groups]: what to divide by, and where it is infinite the identity is written; or null
    u32 groups;
    u32 dim;
    u32 zero; // zeros above the diagonal in place of the lower triangle's mirror image
    u32 pad;
};

// The matrix of a lower triangle, tile by tile.
template <class T> DEVICE void mirror(const MirrorArgs &p) {
    SHARED(T, tile, WARP *(WARP + 1));
    const u64 d = p.dim, tiles = (d + WARP - 1) / WARP, total = p.groups * tiles * tiles;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u64 task = blockIdx.x; task < total; task += gridDim.x) {
        const u64 group = task / (tiles * tiles), row = task / tiles % tiles * WARP, column = task % tiles * WARP;
        // Where the tile's numbers come from, below the diagonal.
        const bool above = column > row;
        const u64 from_row = above ? column : row, from_column = above ? row : column;
        const T *m = static_cast<const T *>(p.m) + group * d * d;
        for (u32 i = warp; i < WARP; i += WARPS)
            if (from_row + i < d && from_column + lane < d) tile[i * (WARP + 1) + lane] = m[(from_row + i) * d + from_column + lane];
        __syncthreads();
        const double scale = p.scale ? p.scale[group] : 1;
        T *out = static_cast<T *>(p.out) + group * d * d;
        for (u32 i = warp; i < WARP; i += WARPS) {
            const u64 r = row + i, c = column + lane;
            if (r >= d || c >= d) continue;
            T value = r >= c || p.zero ? T(0) : tile[lane * (WARP + 1) + i];
            if (r >= c) value = tile[i * (WARP + 1) + lane];
            if (p.scale) value = isfinite(scale) ? value / (T)scale : T(r == c);
            out[r * d + c] = value;
        }
        __syncthreads();
    }
}

KERNEL(mirror_f32, 256, MirrorArgs, mirror<float>)
KERNEL(mirror_f64, 256, MirrorArgs, mirror<double>)

struct TimesArgs {
    const void *m;
    const double *x;      // [groups, dim]; null for the probe
    const void *weights;  // [groups, dim] of the matrix's type: x is multiplied by them; or null
    double *y;            // [groups, dim]
    u32 groups;
    u32 dim;
};

template <class T> DEVICE double entry(const TimesArgs &p, u64 group, u64 i) {
    const double x = p.x ? p.x[group * p.dim + i] : probe(i);
    return p.weights ? x * (double)static_cast<const T *>(p.weights)[group * p.dim + i] : x;
}

// y = m (weights x), a warp a row.
template <class T> DEVICE void times(const TimesArgs &p) {
    const u64 d = p.dim, rows = p.groups * d;
    const u32 lane = threadIdx.x % WARP;
    for (u64 row = (u64)blockIdx.x * WARPS + threadIdx.x / WARP; row < rows; row += (u64)gridDim.x * WARPS) {
        const T *m = static_cast<const T *>(p.m) + row * d;
        double sum = 0;
        for (u64 j = lane; j < d; j += WARP) sum += (double)m[j] * entry<T>(p, row / d, j);
        sum = warp_sum(sum);
        if (lane == 0) p.y[row] = sum;
    }
}

KERNEL(times_f32, 256, TimesArgs, times<float>)
KERNEL(times_f64, 256, TimesArgs, times<double>)

// y = m^T (weights x), a block for 32 columns.
template <class T> DEVICE void turned(const TimesArgs &p) {
    SHARED(double, sums, THREADS);
    const u64 d = p.dim, tiles = (d + WARP - 1) / WARP, total = p.groups * tiles;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u64 task = blockIdx.x; task < total; task += gridDim.x) {
        const u64 group = task / tiles, column = task % tiles * WARP + lane;
        const T *m = static_cast<const T *>(p.m) + group * d * d;
        double sum = 0;
        if (column < d)
            for (u64 i = warp; i < d; i += WARPS) sum += (double)m[i * d + column] * entry<T>(p, group, i);
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (warp == 0 && column < d) {
            for (u32 other = 1; other < WARPS; ++other) sum += sums[other * WARP + lane];
            p.y[group * d + column] = sum;
        }
        __syncthreads();
    }
}

KERNEL(turned_f32, 256, TimesArgs, turned<float>)
KERNEL(turned_f64, 256, TimesArgs, turned<double>)

struct JudgeArgs {
    double *verdict;       // [groups, 4]: scale, info, drift, residual
    const double *scale;   // [groups]
    const int *info;       // [groups], the first that is not 0 counts; or null
    const int *later_info; // likewise
    const double *p;       // [groups, dim], should be the probe z; or null
    const double *q;       // [groups, dim], should be r; or null
    const double *r;       // [groups, dim], divided by the scale if there are values; null for values z
    const void *values;    // [groups, dim] of type T, or null
    u32 groups;
    u32 dim;
};

// drift = |p - z| / sqrt(dim), residual = |q - r| / (sqrt(dim) max |values|): a block a group.
template <class T> DEVICE void judge(const JudgeArgs &a) {
    SHARED(double, slots, WARPS);
    const u64 d = a.dim;
    for (u64 group = blockIdx.x; group < a.groups; group += gridDim.x) {
        const u64 first = group * d;
        const T *values = static_cast<const T *>(a.values);
        double drift = 0, residual = 0, most = 0;
        for (u64 i = threadIdx.x; i < d; i += THREADS) {
            if (a.p) {
                const double off = a.p[first + i] - probe(i);
                drift += off * off;
            }
            const double value = values ? (double)values[first + i] : 1;
            most = fabs(value) > most ? fabs(value) : most;
            if (a.q) {
                double wanted = value * probe(i);
                if (a.r) wanted = values ? a.r[first + i] / a.scale[group] : a.r[first + i];
                residual += (a.q[first + i] - wanted) * (a.q[first + i] - wanted);
            }
        }
        drift = block_sum(drift, slots);
        residual = block_sum(residual, slots);
        most = block_max(most, slots);
        if (threadIdx.x == 0) {
            const int info = a.info ? a.info[group] : 0, later = a.later_info ? a.later_info[group] : 0;
            // Rounding alone leaves something of a zero matrix.
            const double size = most > 1e-300 ? most : 1e-300;
            a.verdict[4 * group] = a.scale[group];
            a.verdict[4 * group + 1] = info != 0 ? info : later;
            a.verdict[4 * group + 2] = sqrt(drift / (double)d);
            a.verdict[4 * group + 3] = residual == 0 ? 0 : sqrt(residual / (double)d) / size;
        }
    }
}

KERNEL(judge_f32, 256, JudgeArgs, judge<float>)
KERNEL(judge_f64, 256, JudgeArgs, judge<double>)

struct SmallArgs {
    const void *m;
    void *out;
    int *info; // [groups]: 0, or one more than the first pivot that is not positive
    u32 groups;
    u32 dim; // at most SMALL
};

constexpr u32 SMALL = 64;

// The inverse by sweeps: each makes one variable the dependent one, and all of them leave -m^-1. The pivots are those of
// Cholesky's method, squared. Only lower triangles are read and kept.
template <class T> DEVICE void small_inverse(const SmallArgs &p) {
    SHARED(T, a, SMALL *(SMALL + 1));
    SHARED(T, line, SMALL);
    const u32 d = p.dim;
    for (u64 group = blockIdx.x; group < p.groups; group += gridDim.x) {
        const T *m = static_cast<const T *>(p.m) + group * d * d;
        T *out = static_cast<T *>(p.out) + group * d * d;
        int info = 0;
        for (u32 i = threadIdx.x; i < d * d; i += THREADS) a[i / d * (SMALL + 1) + i % d] = m[i];
        __syncthreads();
        for (u32 k = 0; k < d; ++k) {
            for (u32 i = threadIdx.x; i < d; i += THREADS) line[i] = i < k ? a[k * (SMALL + 1) + i] : a[i * (SMALL + 1) + k];
            __syncthreads();
            T pivot = line[k];
            if (!(pivot > 0)) {
                if (info == 0) info = k + 1;
                pivot = 1;
            }
            for (u32 at = threadIdx.x; at < d * d; at += THREADS) {
                const u32 i = at / d, j = at % d;
                if (j > i) continue;
                T &x = a[i * (SMALL + 1) + j];
                if (i != k && j != k) x -= line[i] * (line[j] / pivot);
                else if (i != k) x = line[i] / pivot;
                else if (j != k) x = line[j] / pivot;
                else x = T(-1) / pivot;
            }
            __syncthreads();
        }
        for (u32 at = threadIdx.x; at < d * d; at += THREADS) {
            const u32 i = at / d, j = at % d;
            out[at] = -(i >= j ? a[i * (SMALL + 1) + j] : a[j * (SMALL + 1) + i]);
        }
        if (threadIdx.x == 0) p.info[group] = info;
        __syncthreads();
    }
}

KERNEL(small_inverse_f32, 256, SmallArgs, small_inverse<float>)
KERNEL(small_inverse_f64, 256, SmallArgs, small_inverse<double>)
