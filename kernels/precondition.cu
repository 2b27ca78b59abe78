// The scaling between two changes of basis, with the inner product that the clips and the step's length need, for all blocks.
#include "step.cuh"

struct ScaleItem {
    void *inside;      // Kg^T w Ka, becomes scale * that
    const void *scale;
    u64 len;
    u32 first, pad;
};

struct ScaleArgs {
    ScaleItem items[TABLE];
    double *products;  // a partial sum a block of threads of <V, w> = sum scale inside^2
    u32 count, pad;
};

template <class T> DEVICE void precondition(const ScaleArgs &p) {
    SHARED(double, sums, STEP_THREADS / WARP);
    const ScaleItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    T *inside = static_cast<T *>(item.inside);
    const T *scale = static_cast<const T *>(item.scale);
    T sum = 0;
    each_stage_of(item, [&](const Stage &stage) {
        T x[STAGES], scales[STAGES];
        fetch<T>(inside, stage, x);
        fetch(scale, stage, scales);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            const T scaled = x[j] * scales[j];
            inside[stage.at[j]] = scaled;
            sum += x[j] * scaled;
        }
    });
    const double total = block_sum<double>(sum, sums);
    if (threadIdx.x == 0) p.products[blockIdx.x] = total;
}

struct DotItem {
    const void *a;
    const void *b;
    u64 len;
    u32 first, pad;
};

struct DotArgs {
    DotItem items[TABLE];
    double *products;
    u32 count, pad;
};

template <class T> DEVICE void dots(const DotArgs &p) {
    SHARED(double, sums, STEP_THREADS / WARP);
    const DotItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    const T *a = static_cast<const T *>(item.a);
    const T *b = static_cast<const T *>(item.b);
    T sum = 0;
    each_stage_of(item, [&](const Stage &stage) {
        T x[STAGES], y[STAGES];
        fetch(a, stage, x);
        fetch(b, stage, y);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j)
            if (stage.in[j]) sum += x[j] * y[j];
    });
    const double total = block_sum<double>(sum, sums);
    if (threadIdx.x == 0) p.products[blockIdx.x] = total;
}

KERNEL(precondition_f32, STEP_THREADS, ScaleArgs, precondition<float>)
KERNEL(precondition_f64, STEP_THREADS, ScaleArgs, precondition<double>)
KERNEL(dots_f32, STEP_THREADS, DotArgs, dots<float>)
KERNEL(dots_f64, STEP_THREADS, DotArgs, dots<double>)

// Adds up each item's partial sums, one block of threads an item.
struct TotalItem {
    const double *parts;
    double *total;
    u64 len;
};

struct TotalArgs {
    TotalItem items[TABLE];
};

DEVICE void add_up(const TotalArgs &p) {
    SHARED(double, sums, STEP_THREADS / WARP);
    const TotalItem &item = p.items[blockIdx.x];
    double sum = 0;
    for (u64 i = threadIdx.x; i < item.len; i += STEP_THREADS) sum += item.parts[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) *item.total = sum;
}

KERNEL(totals, STEP_THREADS, TotalArgs, add_up)
