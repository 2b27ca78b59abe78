// Runs CUDA kernels on the host. A block's threads are fibers that give way at barriers and warp operations alone, so that
// every order in which they could pass from barrier to barrier can be tried; `emulate` runs one, and says what went wrong:
// a barrier that only some threads reach, a warp operation that lacks lanes, a write beyond shared memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

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
// One array a declaration and block. The tag is a template's own for each of its instances.
#define SHARED(type, name, count)                                                                                      \
    static const char name##_tag = 0;                                                                                  \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(emulator::shared(&name##_tag, sizeof(type) * (count)))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) double2 { double x, y; };

namespace emulator {

enum class Wait { nothing, block, warp, done };

struct Fiber {
    void *stack_pointer = nullptr;
    std::vector<char> stack;
    Wait wait = Wait::nothing;
    unsigned mask = 0;
};

struct Shared {
    std::vector<char> bytes;
    size_t size;
};

struct State {
    std::vector<Fiber> fibers;
    unsigned current = 0;
    void *scheduler = nullptr;
    void (*kernel)(const void *) = nullptr;
    const void *args = nullptr;
    std::string error;
    std::unordered_map<const void *, Shared> shared;
    // What the lanes of each warp have put down for a warp operation.
    std::vector<std::vector<char>> slots;
};

constexpr size_t STACK = 256 << 10, GUARD = 256, SLOT = 256;
constexpr unsigned char POISON = 0xff; // a NaN in every floating-point type

extern State state;

inline void fail(const std::string &what) {
    if (state.error.empty()) state.error = what;
}

extern "C" void emulator_switch(void **from, void *to);

inline void give_way() {
    Fiber &self = state.fibers[state.current];
    emulator_switch(&self.stack_pointer, state.scheduler);
}

inline void *shared(const void *tag, size_t size) {
    auto found = state.shared.find(tag);
    if (found == state.shared.end()) {
        Shared area{std::vector<char>(size + 2 * GUARD, static_cast<char>(POISON)), size};
        found = state.shared.emplace(tag, std::move(area)).first;
    }
    return found->second.bytes.data() + GUARD;
}

// Every lane of `mask` puts down `value` and sees what the others put down, 32 values in `all`.
template <class T> void exchange(unsigned mask, const T &value, T (&all)[32]) {
    static_assert(sizeof(T) <= SLOT, "a lane's slot");
    unsigned warp = state.current / 32, lane = state.current % 32;
    if (!(mask >> lane & 1)) fail("a warp operation whose mask lacks the calling lane");
    Fiber &self = state.fibers[state.current];
    std::memcpy(&state.slots[warp][lane * SLOT], &value, sizeof(T));
    self.wait = Wait::warp;
    self.mask = mask;
    give_way();
    for (unsigned i = 0; i < 32; ++i) std::memcpy(&all[i], &state.slots[warp][i * SLOT], sizeof(T));
    self.wait = Wait::warp;
    give_way();
}

} // namespace emulator

extern dim3 gridDim, blockDim, blockIdx, threadIdx;

inline void __syncthreads() {
    emulator::state.fibers[emulator::state.current].wait = emulator::Wait::block;
    emulator::give_way();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    int all[32];
    emulator::exchange(mask, 0, all);
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    T all[32];
    emulator::exchange(mask, value, all);
    unsigned own = threadIdx.x % 32;
    return all[own / width * width + lane % width];
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    T all[32];
    emulator::exchange(mask, value, all);
    unsigned own = threadIdx.x % 32, other = own ^ bits;
    return all[other / width == own / width ? other : own];
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    T all[32];
    emulator::exchange(mask, value, all);
    unsigned own = threadIdx.x % 32;
    return all[own % width + delta < (unsigned)width ? own + delta : own];
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    T all[32];
    emulator::exchange(mask, value, all);
    unsigned own = threadIdx.x % 32;
    return all[own % width >= delta ? own - delta : own];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    int all[32];
    emulator::exchange(mask, predicate, all);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= (mask >> i & 1 && all[i] ? 1u : 0u) << i;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __syncthreads_or(int predicate) {
    // Two barriers with a shared cell between them, as the hardware's one.
    static const char tag = 0;
    int *cell = static_cast<int *>(emulator::shared(&tag, sizeof(int)));
    if (threadIdx.x == 0) *cell = 0;
    __syncthreads();
    if (predicate) *cell = 1;
    __syncthreads();
    int result = *cell;
    __syncthreads();
    return result;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T atomicAdd(T *at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <class T> T atomicMax(T *at, T value) {
    T old = *at;
    if (value > old) *at = value;
    return old;
}
template <class T> T atomicMin(T *at, T value) {
    T old = *at;
    if (value < old) *at = value;
    return old;
}
template <class T> T atomicOr(T *at, T value) {
    T old = *at;
    *at = old | value;
    return old;
}
template <class T> T atomicExch(T *at, T value) {
    T old = *at;
    *at = value;
    return old;
}
inline unsigned atomicInc(unsigned *at, unsigned limit) {
    unsigned old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
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
    unsigned sign = x.bits >> 15, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float value = exponent == 0    ? std::ldexp((float)fraction, -24)
                  : exponent == 31 ? (fraction ? NAN : INFINITY)
                                   : std::ldexp((float)(fraction | 1024), (int)exponent - 25);
    return sign ? -value : value;
}
inline __half __float2half_rn(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (x >= 65520.f) return {(uint16_t)(sign | 0x7c00)};
    if (x < 6.103515625e-5f) return {(uint16_t)(sign | (unsigned)std::nearbyint(std::ldexp(x, 24)))};
    int exponent;
    std::frexp(x, &exponent);
    unsigned fraction = (unsigned)std::nearbyint(std::ldexp(x, 11 - exponent)); // 1024 to 2048
    return {(uint16_t)(sign + ((exponent + 14) << 10) + (fraction - 1024))};
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
