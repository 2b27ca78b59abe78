// CUDA as candle's kernels write it, for the host: NVIDIA's own headers for the types, the emulator for threads.
#pragma once
#include <cstdint>
#include <cstddef>
#include <cstring>
#include <cmath>
#include <cfloat>
#include <vector_types.h>
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

struct HostGpuIndex { unsigned x, y, z; };
extern "C" {
unsigned host_gpu_thread();
HostGpuIndex host_gpu_block(), host_gpu_threads(), host_gpu_blocks();
void host_gpu_barrier();
void host_gpu_exchange(unsigned mask, const void *value, void *all, size_t size);
unsigned host_gpu_lane();
}

// Blocks are lines of threads.
#define threadIdx (HostGpuIndex{host_gpu_thread(), 0, 0})
#define blockIdx (host_gpu_block())
#define blockDim (host_gpu_threads())
#define gridDim (host_gpu_blocks())
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH__ 900
inline void __syncthreads() { host_gpu_barrier(); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
    alignas(16) unsigned char all[32 * sizeof(T)];
    host_gpu_exchange(mask, &value, all, sizeof(T));
    T other;
    std::memcpy(&other, all + (host_gpu_lane() ^ (unsigned)bits) * sizeof(T), sizeof(T));
    return other;
}
using std::signbit;
using std::isnan;
using std::isinf;
using std::isfinite;
template <class To, class From> To host_gpu_bits(From x) { To y; static_assert(sizeof x == sizeof y); std::memcpy(&y, &x, sizeof y); return y; }
inline unsigned __float_as_uint(float x) { return host_gpu_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return host_gpu_bits<float>(x); }
inline int __float_as_int(float x) { return host_gpu_bits<int>(x); }
inline float __int_as_float(int x) { return host_gpu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return host_gpu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return host_gpu_bits<double>(x); }
template <class T> T atomicCAS(T *at, T compare, T value) { T old = *at; if (old == compare) *at = value; return old; }
template <class T, class U> T atomicMin(T *at, U next) { T value = (T)next; T old = *at; *at = value < old ? value : old; return old; }
template <class T, class U> T atomicMax(T *at, U next) { T value = (T)next; T old = *at; *at = old < value ? value : old; return old; }
#define HALF_MATH(name, expression)                                                                                    \
    inline __half h##name(__half h) { float x = __half2float(h); return __float2half_rn(expression); }                 \
    inline __nv_bfloat16 h##name(__nv_bfloat16 h) { float x = __bfloat162float(h); return __float2bfloat16_rn(expression); }
HALF_MATH(sqrt, std::sqrt(x))
HALF_MATH(cos, std::cos(x))
HALF_MATH(sin, std::sin(x))
HALF_MATH(log, std::log(x))
HALF_MATH(exp, std::exp(x))
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678118654752f); }
inline double normcdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }
template <class T> T atomicAdd(T *at, T value) { T old = *at; *at = old + value; return old; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
