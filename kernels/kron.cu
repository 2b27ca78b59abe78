// The damping of Kronecker factors: its split, the factors with it on their diagonals, and the inverse spectrum of a product.
#include "common.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / WARP;

struct PiArgs {
    const void *a; // [groups, a_dim, a_dim]
    const void *g; // [groups, g_dim, g_dim]
    void *pi;      // [groups]
    u32 groups;
    u32 a_dim;
    u32 g_dim;
    u32 pad;
};

template <class T> DEVICE T mean_of_diagonal(const void *m, u64 group, u64 dim, T *slots) {
    const T *at = static_cast<const T *>(m) + group * dim * dim;
    T sum = 0;
    for (u64 i = threadIdx.x; i < dim; i += THREADS) sum += at[i * (dim + 1)];
    return block_sum(sum, slots) / (T)dim;
}

// sqrt(mean a) / sqrt(mean g), and 1 where a mean is not positive: a block a group.
template <class T> DEVICE void pi(const PiArgs &p) {
    SHARED(T, slots, WARPS);
    for (u64 group = blockIdx.x; group < p.groups; group += gridDim.x) {
        const T a = mean_of_diagonal(p.a, group, p.a_dim, slots), g = mean_of_diagonal(p.g, group, p.g_dim, slots);
        if (threadIdx.x == 0) static_cast<T *>(p.pi)[group] = a > 0 && g > 0 ? sqrt(a) / sqrt(g) : T(1);
    }
}

KERNEL(pi_f32, 256, PiArgs, pi<float>)
KERNEL(pi_f64, 256, PiArgs, pi<double>)

struct ShiftArgs {
    const void *m;      // [groups, dim, dim]
    const void *values; // [groups]
    void *out;
    double factor;
    u32 groups;
    u32 dim;
    u32 inverse; // the reciprocal values
    u32 pad;
};

// out = m + factor values I.
template <class T> DEVICE void shift(const ShiftArgs &p) {
    const T *m = static_cast<const T *>(p.m);
    T *out = static_cast<T *>(p.out);
    const u64 size = (u64)p.dim * p.dim, total = p.groups * size, stride = (u64)gridDim.x * THREADS;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < total; i += stride) {
        T x = m[i];
        if (i % size % (p.dim + 1ull) == 0) {
            const T value = static_cast<const T *>(p.values)[i / size];
            x += (T)p.factor * (p.inverse ? T(1) / value : value);
        }
        out[i] = x;
    }
}

KERNEL(shift_f32, 256, ShiftArgs, shift<float>)
KERNEL(shift_f64, 256, ShiftArgs, shift<double>)

struct SpectrumArgs {
    const void *a; // [groups, a_dim]
    const void *g; // [groups, g_dim]
    void *out;     // [groups, g_dim, a_dim]
    double floor;
    double factor;
    double offset;
    u64 total;
    u32 a_dim;
    u32 g_dim;
};

// out = 1 / (factor g a^T + offset), where values at or below the floor count as 0.
template <class T> DEVICE void spectrum(const SpectrumArgs &p) {
    const T *a = static_cast<const T *>(p.a), *g = static_cast<const T *>(p.g);
    const T floor = p.floor;
    const u64 stride = (u64)gridDim.x * THREADS;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < p.total; i += stride) {
        const u64 row = i / p.a_dim, group = row / p.g_dim;
        const T da = a[group * p.a_dim + i % p.a_dim], dg = g[row];
        const T product = (dg > floor ? dg : T(0)) * (da > floor ? da : T(0));
        static_cast<T *>(p.out)[i] = T(1) / (product * (T)p.factor + (T)p.offset);
    }
}

KERNEL(spectrum_f32, 256, SpectrumArgs, spectrum<float>)
KERNEL(spectrum_f64, 256, SpectrumArgs, spectrum<double>)
