// Maxima of windows and their gradients (src/ops/pool.rs). The first of equal maxima counts, and a NaN is larger
// than everything.
#include "divide.cuh"

struct PoolArgs {
    const void *x;
    void *y;
    u32 *at; // of each output the place of its maximum within its plane of the input
    u64 len; // outputs
    u32 h, w, oh, ow;
    u32 kh, kw, sh, sw;
};

struct PoolGradientArgs {
    const void *gy;
    const u32 *at;
    void *gx;
    u64 len; // inputs
    u32 h, w, oh, ow;
    u32 kh, kw, sh, sw;
};

template <class T> DEVICE void max_pool(const PoolArgs &p) {
    const u64 o = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= p.len) return;
    const Split column = divide(o, p.ow), row = divide(column.quotient, p.oh);
    const T *plane = static_cast<const T *>(p.x) + row.quotient * p.h * p.w;
    u32 first = row.rest * p.sh * p.w + column.rest * p.sw, place = first;
    Acc<T> max = widen(plane[first]);
    for (u32 a = 0; a < p.kh; ++a, first += p.w)
        for (u32 b = 0; b < p.kw; ++b) {
            const Acc<T> v = widen(plane[first + b]);
            if (v > max || v != v) {
                max = v;
                place = first + b;
            }
        }
    static_cast<T *>(p.y)[o] = narrow<T>(max);
    p.at[o] = place;
}

// Each input asks the windows that it lies in, in their order.
template <class T> DEVICE void max_pool_gradient(const PoolGradientArgs &p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.len) return;
    const Split column = divide(i, p.w), row = divide(column.quotient, p.h);
    const u64 plane = row.quotient * p.oh * p.ow;
    const u32 place = row.rest * p.w + column.rest;
    const Span rows = windows(row.rest, p.kh, p.sh, p.oh), columns = windows(column.rest, p.kw, p.sw, p.ow);
    Acc<T> sum = 0;
    for (u32 a = rows.from; a < rows.to; ++a)
        for (u32 b = columns.from; b < columns.to; ++b) {
            const u64 o = plane + (u64)a * p.ow + b;
            if (p.at[o] == place) sum += widen(static_cast<const T *>(p.gy)[o]);
        }
    static_cast<T *>(p.gx)[i] = narrow<T>(sum);
}

#define POOL_KERNELS(suffix, T)                                                                                        \
    KERNEL(max_pool_##suffix, 256, PoolArgs, max_pool<T>)                                                              \
    KERNEL(max_pool_gradient_##suffix, 256, PoolGradientArgs, max_pool_gradient<T>)

POOL_KERNELS(f32, float)
POOL_KERNELS(f64, double)
POOL_KERNELS(f16, __half)
POOL_KERNELS(bf16, __nv_bfloat16)
