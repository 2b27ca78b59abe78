// Rotary position embeddings: a pair of elements of a row is turned by the angle of the row's position (src/ops/rope.rs).
#include "common.cuh"

struct RopeArgs {
    const void *x;
    const void *cos;
    const void *sin;
    void *y;
    u64 pairs;       // of all rows
    u64 batch_rows;  // rows of one example
    u64 batch_angle; // elements from the angles of one example to those of the next, 0 where all share them
    u32 half;        // pairs of a row
    u32 seq;         // positions
    u32 inner;       // rows of one position that lie together
    u32 interleaved; // whether a pair lies together, or half a row apart
    u32 back;        // turns the other way
};

template <class T> DEVICE void rope(const RopeArgs &p) {
    const u64 pair = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= p.pairs) return;
    const u64 row = pair / p.half, start = row * p.half * 2;
    const u32 at = pair % p.half;
    const u64 angle = row / p.batch_rows * p.batch_angle + row / p.inner % p.seq * p.half + at;
    const u64 first = start + (p.interleaved ? 2 * at : at), second = p.interleaved ? first + 1 : first + p.half;
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    const Acc<T> c = widen(static_cast<const T *>(p.cos)[angle]), s = widen(static_cast<const T *>(p.sin)[angle]);
    const Acc<T> turned = p.back ? -s : s, a = widen(x[first]), b = widen(x[second]);
    y[first] = narrow<T>(a * c - b * turned);
    y[second] = narrow<T>(a * turned + b * c);
}

KERNEL(rope_f32, 256, RopeArgs, rope<float>)
KERNEL(rope_f64, 256, RopeArgs, rope<double>)
KERNEL(rope_f16, 256, RopeArgs, rope<__half>)
KERNEL(rope_bf16, 256, RopeArgs, rope<__nv_bfloat16>)
