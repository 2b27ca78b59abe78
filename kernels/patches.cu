// The patches under a convolution's kernel: out[n, (channel, ky, kx), (oy, ox)] = x[n, channel, iy, ix], zero outside of x, with
// iy = oy stride - padding + ky dilation, and ix likewise.
#include "divide.cuh"

struct PatchArgs {
    const void *x;
    void *out;
    u64 samples;
    u32 planes; // elements of an image
    u32 patches; // elements of an image's patches
    u32 height, width;
    u32 stride_y, stride_x;
    u32 padding_y, padding_x;
    u32 dilation_y, dilation_x;
    Divisor positions, out_width, kernel, kernel_width;
};

template <class T> DEVICE void patches(const PatchArgs &p) {
    constexpr u32 EACH = 4;
    for (u64 sample = blockIdx.y; sample < p.samples; sample += gridDim.y) {
        const T *x = static_cast<const T *>(p.x) + sample * p.planes;
        T *out = static_cast<T *>(p.out) + sample * p.patches;
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) {
            u32 at = (blockIdx.x * EACH + i) * blockDim.x + threadIdx.x, feature, position, channel, tap, ky, kx, oy, ox;
            if (at >= p.patches) break;
            divide(at, p.positions, feature, position);
            divide(feature, p.kernel, channel, tap);
            divide(tap, p.kernel_width, ky, kx);
            divide(position, p.out_width, oy, ox);
            // Beyond the image on either side, these are beyond its height or width as unsigned numbers.
            u32 iy = oy * p.stride_y + ky * p.dilation_y - p.padding_y, ix = ox * p.stride_x + kx * p.dilation_x - p.padding_x;
            bool inside = iy < p.height && ix < p.width;
            out[at] = inside ? x[(channel * p.height + iy) * p.width + ix] : narrow<T>(0);
        }
    }
}

KERNEL(patches_f32, 256, PatchArgs, patches<float>)
KERNEL(patches_f64, 256, PatchArgs, patches<double>)
KERNEL(patches_f16, 256, PatchArgs, patches<__half>)
KERNEL(patches_bf16, 256, PatchArgs, patches<__nv_bfloat16>)
