// Samples from the distribution that a model's outputs describe, by the random numbers of the CPU's version (src/ops/sample.rs). All
// is computed in f64: a sample differs from the CPU's only where the last bits of a sum decide.
#include "philox.cuh"
#include "rows.cuh"

struct LabelArgs {
    const void *x;
    u32 *labels;
    u64 rows;
    u64 d;
    u64 seed;
    u64 stream;
    u64 first; // place of the first row
    u64 block;
};

struct DrawArgs {
    const void *x; // not read for normal numbers
    void *y;
    u64 len;
    u64 seed;
    u64 stream;
    u64 first; // place of the first element
};

// What a row without a distribution gets.
constexpr u32 NO_LABEL = 0xffffffffu;

// One warp goes through `[from, to)`, whose exponentials add up to at least `target`, for the first element at which their running sum
// exceeds it; where rounding has it that none does, the last that adds to the sum.
template <class T> DEVICE u32 find_label(const T *x, u64 from, u64 to, double max, double target) {
    const u32 lane = threadIdx.x % WARP;
    double sum = 0;
    u32 last = NO_LABEL;
    for (u64 tile = from; tile < to; tile += WARP) {
        const double own = tile + lane < to ? exp((double)widen(x[tile + lane]) - max) : 0.0;
        double running = own;
        for (u32 offset = 1; offset < WARP; offset *= 2) {
            const double before = __shfl_up_sync(ALL_LANES, running, offset);
            if (lane >= offset) running += before;
        }
        // A class of probability 0 is none to choose, however its running sum was rounded.
        const u32 adds = __ballot_sync(ALL_LANES, own > 0), exceeds = __ballot_sync(ALL_LANES, own > 0 && sum + running > target);
        if (exceeds != 0) return (u32)tile + (u32)__ffs((int)exceeds) - 1;
        if (adds != 0) last = (u32)tile + WARP - 1 - (u32)__clz((int)adds);
        sum += __shfl_sync(ALL_LANES, running, WARP - 1);
    }
    return last;
}

template <class T> DEVICE void label(const LabelArgs &p) {
    SHARED(double, slots, ROW_WARPS);
    const Team team = team_of(p.block != 0);
    if (team.index >= p.rows) return;
    const T *x = static_cast<const T *>(p.x) + team.index * p.d;
    double max = -(double)__uint_as_float(0x7f800000);
    for (u64 i = team.rank; i < p.d; i += team.size) {
        const double v = (double)widen(x[i]);
        if (v > max) max = v;
    }
    max = team_max(team, max, slots);

    // Each warp adds up a run of the row.
    const u32 warps = team.size / WARP, warp = team.rank / WARP, lane = team.rank % WARP;
    const u64 run = (p.d + warps - 1) / warps;
    const u64 from = warp * run < p.d ? warp * run : p.d, to = from + run < p.d ? from + run : p.d;
    double sum = 0;
    for (u64 i = from + lane; i < to; i += WARP) sum += exp((double)widen(x[i]) - max);
    sum = warp_sum(sum);
    if (team.block) {
        if (lane == 0) slots[warp] = sum;
        __syncthreads();
    }

    double total = 0;
    for (u32 other = 0; other < warps; ++other) total += team.block ? slots[other] : sum;
    const Words bits = random_bits(p.seed, p.stream, p.first + team.index);
    const double target = unit(bits.a, bits.b) * total;
    // The warp in whose run the target lies, else the last that has anything.
    u32 chosen = 0;
    double before = 0, chosen_before = 0;
    for (u32 other = 0; other < warps; ++other) {
        const double part = team.block ? slots[other] : sum;
        if (part > 0) {
            chosen = other;
            chosen_before = before;
            if (before + part > target) break;
        }
        before += part;
    }
    if (warp != chosen) return;
    const u32 found = isfinite(total) ? find_label(x, from, to, max, target - chosen_before) : NO_LABEL;
    if (lane == 0) p.labels[team.index] = found;
}

// 0 or 1 with probability sigmoid(x), NaN for NaN.
template <class T> DEVICE void bernoulli(const DrawArgs &p) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.len; i += stride) {
        const double logit = (double)widen(static_cast<const T *>(p.x)[i]);
        const Words bits = random_bits(p.seed, p.stream, p.first + i);
        const double draw = unit(bits.a, bits.b) < 1. / (1. + exp(-logit)) ? 1 : 0;
        static_cast<T *>(p.y)[i] = narrow<T>((Acc<T>)(isnan(logit) ? logit : draw));
    }
}

// Standard normal numbers.
template <class T> DEVICE void normal(const DrawArgs &p) {
    const u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.len; i += stride) {
        const Words bits = random_bits(p.seed, p.stream, p.first + i);
        const double radius = sqrt(-2.0 * log(1.0 - unit(bits.a, bits.b)));
        static_cast<T *>(p.y)[i] = narrow<T>((Acc<T>)(radius * cospi(2. * unit(bits.c, bits.d))));
    }
}

#define SAMPLE_KERNELS(suffix, T)                                                                                      \
    KERNEL(label_##suffix, ROW_THREADS, LabelArgs, label<T>)                                                           \
    KERNEL(bernoulli_##suffix, ROW_THREADS, DrawArgs, bernoulli<T>)                                                    \
    KERNEL(normal_##suffix, ROW_THREADS, DrawArgs, normal<T>)

SAMPLE_KERNELS(f32, float)
SAMPLE_KERNELS(f64, double)
SAMPLE_KERNELS(f16, __half)
SAMPLE_KERNELS(bf16, __nv_bfloat16)
