// What all kernels share. Every kernel takes one struct by value and is declared with KERNEL, shared memory is declared with
// SHARED, and what exists on a GPU alone (PTX) has a twin for the host emulator (tests/emulator/shim.h), which compiles
// these files as C++ to check them where there is no GPU.
#pragma once

#ifdef KRONWAKE_EMULATE
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__
// A kernel `name` that runs `body(args)`; `threads` is the largest block it may be launched with.
#define KERNEL(name, threads, Args, body)                                                                              \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args args) { body(args); }
// One that may take all the registers it needs: left to itself, the compiler spilled some to have more blocks at a time.
#define WIDE_KERNEL(name, threads, Args, body)                                                                         \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args) { body(args); }
// One of which `blocks` blocks fit on a multiprocessor.
#define PACKED_KERNEL(name, threads, blocks, Args, body)                                                               \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args) { body(args); }
#define SHARED(type, name, count) __shared__ type name[count]
// The same, from a multiple of 16 bytes on.
#define SHARED_ALIGNED(type, name, count) __shared__ __align__(16) type name[count]
#endif

using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// Elements are computed with in an accumulator type: f32 for f16, bf16 and f32, f64 for f64.
template <class T> struct Accumulator {
    using type = float;
};
template <> struct Accumulator<double> {
    using type = double;
};
template <class T> using Acc = typename Accumulator<T>::type;

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(__half x) { return __half2float(x); }
DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> DEVICE T narrow(Acc<T> x) { return x; }
template <> DEVICE __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> DEVICE T warp_sum(T x) {
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

template <class T> DEVICE T warp_max(T x) {
    for (u32 offset = WARP / 2; offset > 0; offset /= 2) {
        T other = __shfl_xor_sync(ALL_LANES, x, offset);
        x = other > x ? other : x;
    }
    return x;
}

// The sum over a block of `blockDim.x` threads, a multiple of WARP, known to all of them; the order of the additions depends on nothing
// else. `slots` has one element a warp, and may be used again after the next __syncthreads.
template <class T> DEVICE T block_sum(T x, T *slots) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = x;
    __syncthreads();
    T total = 0;
    for (u32 warp = 0; warp < blockDim.x / WARP; ++warp) total += slots[warp];
    __syncthreads();
    return total;
}

// The largest of numbers, as block_sum the sum.
DEVICE double block_max(double x, double *slots) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = x;
    __syncthreads();
    double most = slots[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) most = slots[warp] > most ? slots[warp] : most;
    __syncthreads();
    return most;
}
