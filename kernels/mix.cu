// out = alpha a + beta b, element by element: exponential averages and weighted sums of tensors.
#include "staged.cuh"

struct MixArgs {
    const void *a;
    const void *b;
    void *out;
    u64 len;
    double alpha;
    double beta;
};

template <class T> DEVICE void mix(const MixArgs &p) {
    const T *a = static_cast<const T *>(p.a);
    const T *b = static_cast<const T *>(p.b);
    T *out = static_cast<T *>(p.out);
    const Acc<T> alpha = p.alpha, beta = p.beta;
    const u64 stride = (u64)gridDim.x * blockDim.x;
    each_stage((u64)blockIdx.x * blockDim.x + threadIdx.x, p.len, stride, [&](const Stage &stage) {
        Acc<T> x[STAGES], y[STAGES];
        fetch(a, stage, x);
        fetch(b, stage, y);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j)
            if (stage.in[j]) out[stage.at[j]] = narrow<T>(alpha * x[j] + beta * y[j]);
    });
}

KERNEL(mix_f32, 256, MixArgs, mix<float>)
KERNEL(mix_f64, 256, MixArgs, mix<double>)
KERNEL(mix_f16, 256, MixArgs, mix<__half>)
KERNEL(mix_bf16, 256, MixArgs, mix<__nv_bfloat16>)
