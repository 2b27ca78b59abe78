// What a convolution on a GPU does besides its matrix products (src/ops/conv_device.rs).
#include "conv.cuh"

struct PatchArgs {
    const void *x; // [n, c, h, w]
    void *patches; // [c kh kw, n, oh ow]
    u64 columns;   // n oh ow
    u64 each;      // features of a block
    ConvSizes sizes;
};

struct FoldArgs {
    const void *patches; // [c kh kw, n, oh ow]
    void *x;             // [n, c, h, w]
    u64 len;
    u64 columns;
    ConvSizes sizes;
};

struct SwapArgs {
    const void *from; // [a, b, t]
    const void *bias; // [a], or null
    void *to;         // [b, a, t]
    u64 len;
    u64 b;
    u32 a;
    u32 t;
};

struct BiasArgs {
    const void *gy;          // [n, o, t]
    const unsigned char *at; // of each element, what is CUT adds nothing; or null
    void *sums;              // [parts, o], of the accumulator's type
    void *gb;                // [o]
    u64 n;
    u32 o;
    u32 t;
    u32 parts;
    u32 pad;
};

constexpr unsigned char CUT = 255;

// A thread goes down a column, an output position of a sample.
template <class T> DEVICE void conv_patches(const PatchArgs &p) {
    const ConvSizes &s = p.sizes;
    const u64 column = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    const Split position = divide(column, s.oh * s.ow);
    const u32 oy = position.rest / s.ow, ox = position.rest - oy * s.ow;
    const T *x = static_cast<const T *>(p.x) + position.quotient * s.channels * s.h * s.w;
    const u32 each = (u32)p.each, first = blockIdx.y * each, last = s.features - first < each ? s.features : first + each;
    u32 channel = first / (s.kh * s.kw), ky = first % (s.kh * s.kw) / s.kw, kx = first % s.kw;
    T *out = static_cast<T *>(p.patches) + first * p.columns + column;
    for (u32 feature = first; feature < last; ++feature, out += p.columns) {
        // Before the image's first row or column, these are beyond its last as unsigned numbers.
        const u32 iy = oy * s.sy + ky * s.dy - s.py, ix = ox * s.sx + kx * s.dx - s.px;
        *out = iy < s.h && ix < s.w ? x[(channel * s.h + iy) * s.w + ix] : narrow<T>((Acc<T>)0);
        if (++kx < s.kw) continue;
        kx = 0;
        if (++ky < s.kh) continue;
        ky = 0;
        ++channel;
    }
}

// The output position at which kernel element `k` lies on `i`; beyond `count` if there is none.
DEVICE u32 output_at(u32 i, u32 padding, u32 k, u32 dilation, u32 stride, u32 count) {
    const u32 shifted = i + padding - k * dilation;
    if (shifted > i + padding) return count;
    if (stride == 1) return shifted;
    const u32 at = shifted / stride;
    return at * stride == shifted ? at : count;
}

// The adjoint of conv_patches: each input adds up where it was read to.
template <class T> DEVICE void conv_fold(const FoldArgs &p) {
    const ConvSizes &s = p.sizes;
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.len) return;
    const Split column = divide(i, s.w), row = divide(column.quotient, s.h), channel = divide(row.quotient, s.channels);
    const T *patches = static_cast<const T *>(p.patches) + (u64)channel.rest * s.kh * s.kw * p.columns +
                       channel.quotient * s.oh * s.ow;
    Acc<T> sum = 0;
    for (u32 ky = 0; ky < s.kh; ++ky) {
        const u32 oy = output_at(row.rest, s.py, ky, s.dy, s.sy, s.oh);
        if (oy >= s.oh) continue;
        for (u32 kx = 0; kx < s.kw; ++kx) {
            const u32 ox = output_at(column.rest, s.px, kx, s.dx, s.sx, s.ow);
            if (ox < s.ow) sum += widen(patches[(u64)(ky * s.kw + kx) * p.columns + oy * s.ow + ox]);
        }
    }
    static_cast<T *>(p.x)[i] = narrow<T>(sum);
}

template <class T> DEVICE void conv_swap(const SwapArgs &p) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.len) return;
    const Split position = divide(i, p.t), a = divide(position.quotient, p.a);
    Acc<T> v = widen(static_cast<const T *>(p.from)[((u64)a.rest * p.b + a.quotient) * p.t + position.rest]);
    if (p.bias != nullptr) v += widen(static_cast<const T *>(p.bias)[a.rest]);
    static_cast<T *>(p.to)[i] = narrow<T>(v);
}

// Block `o + part O` adds up output channel `o` of a part of the samples.
template <class T> DEVICE void conv_bias(const BiasArgs &p) {
    SHARED(Acc<T>, slots, 256 / WARP);
    const u32 part = blockIdx.x / p.o, o = blockIdx.x - part * p.o;
    const u64 each = (p.n + p.parts - 1) / p.parts, first = part * each;
    const u64 samples = first >= p.n ? 0 : first + each < p.n ? each : p.n - first;
    Acc<T> sum = 0;
    for (u64 i = threadIdx.x; i < samples * p.t; i += blockDim.x) {
        const Split position = divide(i, p.t);
        const u64 at = ((first + position.quotient) * p.o + o) * p.t + position.rest;
        if (p.at == nullptr || p.at[at] != CUT) sum += widen(static_cast<const T *>(p.gy)[at]);
    }
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) static_cast<Acc<T> *>(p.sums)[blockIdx.x] = sum;
}

template <class T> DEVICE void conv_bias_total(const BiasArgs &p) {
    const u64 o = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= p.o) return;
    Acc<T> sum = 0;
    for (u32 part = 0; part < p.parts; ++part) sum += static_cast<const Acc<T> *>(p.sums)[(u64)part * p.o + o];
    static_cast<T *>(p.gb)[o] = narrow<T>(sum);
}

#define CONV_KERNELS(suffix, T)                                                                                        \
    KERNEL(conv_patches_##suffix, 256, PatchArgs, conv_patches<T>)                                                     \
    KERNEL(conv_fold_##suffix, 256, FoldArgs, conv_fold<T>)                                                            \
    KERNEL(conv_swap_##suffix, 256, SwapArgs, conv_swap<T>)                                                            \
    KERNEL(conv_bias_##suffix, 256, BiasArgs, conv_bias<T>)                                                            \
    KERNEL(conv_bias_total_##suffix, 256, BiasArgs, conv_bias_total<T>)

CONV_KERNELS(f32, float)
CONV_KERNELS(f64, double)
CONV_KERNELS(f16, __half)
CONV_KERNELS(bf16, __nv_bfloat16)
