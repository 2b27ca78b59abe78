// CUDA for the host: what kernels and common.cuh use of it, on the emulator of emulator.h.
#pragma once
#include "emulator.h"

#include <cmath>

#define DEVICE inline
#define __restrict__ __restrict
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define KERNEL(name, threads, Args, body)                                                                              \
    extern "C" const size_t name##_size = sizeof(Args);                                                                \
    extern "C" const unsigned name##_threads = threads;                                                                \
    extern "C" void name(const void *args) { body(*static_cast<const Args *>(args)); }
#define WIDE_KERNEL KERNEL
#define PACKED_KERNEL(name, threads, blocks, Args, body) KERNEL(name, threads, Args, body)
// One array a declaration and block. The tag is a template's own for each of its instances.
#define SHARED(type, name, count)                                                                                      \
    static const char name##_tag = 0;                                                                                  \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(emulator::shared(&name##_tag, #name, sizeof(type) * (count), sizeof(type)))
#define SHARED_ALIGNED SHARED

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) double2 { double x, y; };

#define threadIdx (dim3{emulator::thread(), 0, 0})
#define blockDim (dim3{emulator::threads(), 1, 1})
#define blockIdx (dim3{emulator::block_x(), emulator::block_y(), emulator::block_z()})
#define gridDim (dim3{emulator::grid_x(), emulator::grid_y(), emulator::grid_z()})

inline void __syncthreads(SITE) { emulator::barrier(0, {file, line}); }
inline int __syncthreads_count(int predicate, SITE) { return emulator::barrier(predicate, {file, line}); }
inline int __syncthreads_or(int predicate, SITE) { return emulator::barrier(predicate, {file, line}) > 0; }
inline int __syncthreads_and(int predicate, SITE) { return emulator::barrier(predicate, {file, line}) == (int)blockDim.x; }
inline void __syncwarp(unsigned mask = 0xffffffffu, SITE) { emulator::meet(mask, nullptr, nullptr, 0, true, {file, line}); }

// The lane that a shuffle reads, by the PTX ISA's definition of shfl.sync; `width` is a power of 2 up to 32.
template <class T> UNCHECKED T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SITE) {
    T all[32];
    emulator::exchange(mask, value, all, file, line);
    unsigned own = emulator::lane();
    return emulator::from_lane(mask, all, (own & (32 - width)) | ((unsigned)lane & (width - 1)), {file, line});
}
template <class T> UNCHECKED T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SITE) {
    T all[32];
    emulator::exchange(mask, value, all, file, line);
    unsigned own = emulator::lane(), other = own ^ ((unsigned)bits & 31), last = own | (width - 1);
    return emulator::from_lane(mask, all, other <= last ? other : own, {file, line});
}
template <class T> UNCHECKED T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SITE) {
    T all[32];
    emulator::exchange(mask, value, all, file, line);
    unsigned own = emulator::lane(), other = own + (delta & 31), last = own | (width - 1);
    return emulator::from_lane(mask, all, other <= last ? other : own, {file, line});
}
template <class T> UNCHECKED T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SITE) {
    T all[32];
    emulator::exchange(mask, value, all, file, line);
    int own = emulator::lane(), other = own - (int)(delta & 31), first = own & (32 - width);
    return emulator::from_lane(mask, all, other >= first ? other : own, {file, line});
}
UNCHECKED inline unsigned __ballot_sync(unsigned mask, int predicate, SITE) {
    int all[32];
    emulator::exchange(mask, predicate, all, file, line);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= (mask >> i & 1 && all[i] ? 1u : 0u) << i;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, SITE) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, SITE) { return __ballot_sync(mask, predicate, file, line) == mask; }
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() {}

template <class T, class F> UNCHECKED T atomic_update(T *at, F next) {
    emulator::atomic(at, sizeof(T));
    T old = *at;
    *at = next(old);
    return old;
}
template <class T> T atomicAdd(T *at, T value) {
    return atomic_update(at, [=](T old) { return old + value; });
}
template <class T> T atomicMax(T *at, T value) {
    return atomic_update(at, [=](T old) { return value > old ? value : old; });
}
template <class T> T atomicMin(T *at, T value) {
    return atomic_update(at, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomicOr(T *at, T value) {
    return atomic_update(at, [=](T old) { return old | value; });
}
template <class T> T atomicExch(T *at, T value) {
    return atomic_update(at, [=](T) { return value; });
}
inline unsigned atomicInc(unsigned *at, unsigned limit) {
    return atomic_update(at, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// Half-precision types with the conversions that kernels use, rounding to nearest even.
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
    // The exponent's bias differs by 112; infinities and NaN keep the largest exponent.
    uint32_t bits = (uint32_t)(x.bits & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
    if (bits >= 0x47800000) bits |= 0x7f800000;
    bits |= (uint32_t)(x.bits & 0x8000) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline __half __float2half_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {0x7fff};
    if (bits >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)}; // from 65520 on
    if (bits < 0x38800000) {                                    // below 2^-14: a multiple of 2^-24
        float value;
        std::memcpy(&value, &bits, 4);
        return {(uint16_t)(sign | (uint16_t)std::nearbyint(value * 0x1p24f))};
    }
    bits += 0xfff + (bits >> 13 & 1);
    return {(uint16_t)(sign | (bits - 0x38000000) >> 13)};
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double cospi(double x) { return std::cos(3.14159265358979323846 * x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float fmaxf_(float a, float b) { return a > b ? a : b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
template <class T> T __ldg(const T *at) { return *at; }
using std::isfinite;
using std::isnan;
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
