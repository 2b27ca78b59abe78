// What follows a convolution's product whose outputs are pooled, and perhaps rectified (src/ops/conv_pool_device.rs): bias, maxima
// and rectifier at once. Windows do not overlap. Of each output a byte is kept: which element of its window was the maximum, or CUT.
#include "divide.cuh"

struct PooledArgs {
    const void *product; // [o, n, oh ow]
    const void *bias;    // [o], or null
    void *y;             // [n, o, ph, pw]
    unsigned char *at;
    u64 len;
    u32 n, o, oh, ow, ph, pw;
    u32 kh, kw, sy, sx;
    u64 relu;
};

struct UnpoolArgs {
    const void *gy; // [n, o, ph, pw]
    const unsigned char *at;
    void *wide; // [o, n, oh ow]
    u64 len;
    u32 n, o, oh, ow, ph, pw;
    u32 kh, kw, sy, sx;
};

constexpr unsigned char CUT = 255;

// The first of equal maxima counts, and a NaN is larger than everything.
template <class T> DEVICE void conv_pooled(const PooledArgs &p) {
    using A = Acc<T>;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.len) return;
    const Split column = divide(i, p.pw), row = divide(column.quotient, p.ph), channel = divide(row.quotient, p.o);
    const T *plane = static_cast<const T *>(p.product) + ((u64)channel.rest * p.n + channel.quotient) * p.oh * p.ow;
    const T *window = plane + row.rest * p.sy * p.ow + column.rest * p.sx;
    const A bias = p.bias == nullptr ? (A)0 : widen(static_cast<const T *>(p.bias)[channel.rest]);
    A max = widen(*window) + bias;
    u32 at = 0;
    for (u32 a = 0, e = 0; a < p.kh; ++a, window += p.ow)
        for (u32 b = 0; b < p.kw; ++b, ++e) {
            const A v = widen(window[b]) + bias;
            if (v > max || v != v) {
                max = v;
                at = e;
            }
        }
    if (p.relu && max <= 0) {
        max = 0;
        at = CUT;
    }
    static_cast<T *>(p.y)[i] = narrow<T>(max);
    p.at[i] = (unsigned char)at;
}

// The gradient of the product: each of its elements asks the one window that it may lie in.
template <class T> DEVICE void conv_unpool(const UnpoolArgs &p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.len) return;
    const Split column = divide(i, p.ow), row = divide(column.quotient, p.oh);
    const Split sample = divide(row.quotient, p.n);
    const u64 o = sample.quotient, n = sample.rest;
    const u32 y = row.rest / p.sy, x = column.rest / p.sx;
    const u32 a = row.rest - y * p.sy, b = column.rest - x * p.sx;
    Acc<T> g = 0;
    if (y < p.ph && x < p.pw && a < p.kh && b < p.kw) {
        const u64 at = ((n * p.o + o) * p.ph + y) * p.pw + x;
        if (p.at[at] == a * p.kw + b) g = widen(static_cast<const T *>(p.gy)[at]);
    }
    static_cast<T *>(p.wide)[i] = narrow<T>(g);
}

#define CONV_POOL_KERNELS(suffix, T)                                                                                   \
    KERNEL(conv_pooled_##suffix, 256, PooledArgs, conv_pooled<T>)                                                      \
    KERNEL(conv_unpool_##suffix, 256, UnpoolArgs, conv_unpool<T>)

CONV_POOL_KERNELS(f32, float)
CONV_POOL_KERNELS(f64, double)
CONV_POOL_KERNELS(f16, __half)
CONV_POOL_KERNELS(bf16, __nv_bfloat16)
