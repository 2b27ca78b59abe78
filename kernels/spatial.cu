// The spatial entropy of weights `m` x `n` x `k` and its gradient (formulas in src/ops/spatial.rs). Sums are kept in f64; those of rows
// and columns have parts, added up in order: the result depends on the sizes alone.
#include "divide.cuh"
#include "staged.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
// Columns that a block reads at once, and those of a thread.
constexpr u32 EACH = 4;
constexpr u32 CHUNK = EACH * WARP;

struct SumArgs {
    const void *w;
    double *rows;    // [strips, m]
    double *columns; // [bands, n k]
    double *totals;  // [bands strips, 2]: sum a ln a, sum w^2
    u64 m;
    u64 width; // n k
    u64 band;  // rows of a block
    u64 strip; // columns of one, a multiple of CHUNK
    u64 strips;
};

struct MarginalArgs {
    const double *rows;
    const double *columns;
    double *marginals; // [m + n]
    u64 m;
    u64 n;
    u64 k;
    u64 bands;
    u64 strips;
};

struct ValueArgs {
    const double *totals;
    double *marginals; // in: sums; out: logarithms of their shares
    double *numbers;   // [4]: ln S, 2 / S, H (0 below its floor), sum w^2
    void *value;
    u64 m;
    u64 n;
    u64 k;
    u64 parts;
    double kappa;
    double gamma;
    double empty; // the value where all weights are zero
    double factor;
};

struct GradientArgs {
    const void *w;
    const double *marginals;
    const double *numbers;
    const void *scale; // one element of the accumulator's type, or null for 1
    void *out;
    u64 m;
    u64 n;
    u64 k;
    double kappa;
    double gamma;
    double factor;
    u64 exact;
};

constexpr double FLOOR = 1e-9;

DEVICE u64 quotient(u64 a, u64 by) { return (a | by) <= 0xffffffffu ? (u64)((u32)a / (u32)by) : a / by; }

DEVICE double log_share(double share) { return log(share < FLOOR ? FLOOR : share); }

// A block reads `band` rows of `strip` columns; each of its warps every eighth row.
template <class T> DEVICE void spatial_sums(const SumArgs &p) {
    SHARED(double, sums, WARPS *CHUNK);
    SHARED(double, slots, WARPS);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 band = quotient(blockIdx.x, p.strips), strip = blockIdx.x - band * p.strips;
    const u64 top = band * p.band, bottom = top + p.band < p.m ? top + p.band : p.m;
    const u64 left = strip * p.strip, right = left + p.strip < p.width ? left + p.strip : p.width;
    double logs = 0, squares = 0;
    for (u64 chunk = left; chunk < right; chunk += CHUNK) {
        double column[EACH] = {};
        for (u64 row = top + warp; row < bottom; row += WARPS) {
            double sum = 0;
#pragma unroll
            for (u32 e = 0; e < EACH; ++e) {
                const u64 at = chunk + e * WARP + lane;
                if (at >= right) continue;
                const Acc<T> w = widen(static_cast<const T *>(p.w)[row * p.width + at]), a = fabs(w);
                column[e] += a;
                sum += a;
                squares += (double)w * w;
                // NaN is not 0.
                if (a != 0) logs += (double)a * (double)log(a);
            }
            sum = warp_sum(sum);
            // The same lane adds the row's other chunks.
            double *to = p.rows + strip * p.m + row;
            if (lane == 0) *to = chunk == left ? sum : *to + sum;
        }
#pragma unroll
        for (u32 e = 0; e < EACH; ++e) sums[warp * CHUNK + e * WARP + lane] = column[e];
        __syncthreads();
        for (u64 at = threadIdx.x; at < CHUNK && chunk + at < right; at += THREADS) {
            double sum = 0;
            for (u32 other = 0; other < WARPS; ++other) sum += sums[other * CHUNK + at];
            p.columns[band * p.width + chunk + at] = sum;
        }
        __syncthreads();
    }
    logs = block_sum(logs, slots);
    squares = block_sum(squares, slots);
    if (threadIdx.x == 0) {
        p.totals[2 * (u64)blockIdx.x] = logs;
        p.totals[2 * (u64)blockIdx.x + 1] = squares;
    }
}

// A thread adds up a row, or a column with its `k` elements.
DEVICE void marginals(const MarginalArgs &p) {
    const u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= p.m + p.n) return;
    double sum = 0;
    if (i < p.m)
        for (u64 strip = 0; strip < p.strips; ++strip) sum += p.rows[strip * p.m + i];
    else
        for (u64 band = 0; band < p.bands; ++band)
            for (u64 e = 0; e < p.k; ++e) sum += p.columns[(band * p.n + i - p.m) * p.k + e];
    p.marginals[i] = sum;
}

// By one block.
template <class A> DEVICE void value(const ValueArgs &p) {
    SHARED(double, slots, WARPS);
    double logs = 0, squares = 0, sum = 0;
    for (u64 i = threadIdx.x; i < p.parts; i += THREADS) {
        logs += p.totals[2 * i];
        squares += p.totals[2 * i + 1];
    }
    for (u64 i = threadIdx.x; i < p.m; i += THREADS) sum += p.marginals[i];
    logs = block_sum(logs, slots);
    squares = block_sum(squares, slots);
    sum = block_sum(sum, slots);
    double marginal = 0;
    for (u64 i = threadIdx.x; i < p.m + p.n; i += THREADS) {
        const double share = sum == 0 ? 0 : p.marginals[i] / sum, l = log_share(share);
        marginal -= share * l;
        p.marginals[i] = l;
    }
    marginal = block_sum(marginal, slots);
    if (threadIdx.x > 0) return;
    const double cells = (double)p.m * p.n;
    const double most = p.kappa * log(cells) + (1 - p.kappa) * log(cells * p.k);
    const double entropy = p.kappa * marginal + (1 - p.kappa) * (log(sum) - logs / sum);
    const double share = most > 0 ? entropy / most : 1;
    const bool empty = sum == 0;
    p.numbers[0] = log(sum);
    p.numbers[1] = empty ? 0 : 2 / sum;
    p.numbers[2] = most > 0 && share > FLOOR ? entropy : 0;
    p.numbers[3] = squares;
    const double value = 2 * log(sum) + 2 * p.gamma * log_share(share) - log(squares);
    *static_cast<A *>(p.value) = (A)(p.factor * (empty ? p.empty : value));
}

template <class T> DEVICE void gradient(const GradientArgs &p) {
    using A = Acc<T>;
    const T *w = static_cast<const T *>(p.w);
    const double scale = p.factor * (p.scale == nullptr ? 1. : (double)*static_cast<const A *>(p.scale));
    const double log_sum = p.numbers[0], two_over_sum = p.numbers[1], entropy = p.numbers[2], squares = p.numbers[3];
    const u64 width = p.n * p.k, count = p.m * width, stride = (u64)gridDim.x * THREADS;
    const double log_floor = log(FLOOR), shrink = p.exact && two_over_sum > 0 ? 2 / squares : 0;
    const double slope = entropy > 0 ? p.gamma / entropy : 0;
    each_stage((u64)blockIdx.x * THREADS + threadIdx.x, count, stride, [&](const Stage &stage) {
        A x[STAGES];
        double marginal[STAGES];
        fetch(w, stage, x);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            const u64 i = stage.in[j] ? stage.at[j] : 0, row = quotient(i, width), column = quotient(i - row * width, p.k);
            marginal[j] = p.marginals[row] + p.marginals[p.m + column];
        }
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            double y = x[j];
            if (x[j] != 0) {
                const double own = (double)log(fabs(x[j])) - log_sum;
                const double t = -p.kappa * marginal[j] - (1 - p.kappa) * (own < log_floor ? log_floor : own);
                const double size = two_over_sum * (1 + slope * (t - entropy));
                y = scale * ((x[j] > 0 ? size : -size) - shrink * x[j]);
            }
            static_cast<T *>(p.out)[stage.at[j]] = narrow<T>((A)y);
        }
    });
}

#define SPATIAL_KERNELS(suffix, T)                                                                                     \
    KERNEL(spatial_sums_##suffix, THREADS, SumArgs, spatial_sums<T>)                                                   \
    KERNEL(spatial_gradient_##suffix, THREADS, GradientArgs, gradient<T>)

SPATIAL_KERNELS(f32, float)
SPATIAL_KERNELS(f64, double)
SPATIAL_KERNELS(f16, __half)
SPATIAL_KERNELS(bf16, __nv_bfloat16)
KERNEL(spatial_marginals, THREADS, MarginalArgs, marginals)
KERNEL(spatial_value_f32, THREADS, ValueArgs, value<float>)
KERNEL(spatial_value_f64, THREADS, ValueArgs, value<double>)
