// y = x mask, the mask of src/ops/dropout.rs bit for bit; the same again is the gradient.
#include "philox.cuh"

struct DropoutArgs {
    const void *x;
    void *y;
    u64 len;
    u64 seed;
    u64 stream;
    u64 threshold; // random words below it drop an element
    double kept;   // what the others are multiplied by
    u64 first;     // the number of x[0] in the stream
};

// A place of the random stream has the words of four elements.
template <class T> struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

template <class T> DEVICE void dropout(const DropoutArgs &p) {
    const T *x = static_cast<const T *>(p.x);
    T *y = static_cast<T *>(p.y);
    const bool aligned = (reinterpret_cast<u64>(x) | reinterpret_cast<u64>(y)) % sizeof(Four<T>) == 0;
    const Acc<T> kept = widen(narrow<T>((Acc<T>)p.kept));
    const u64 place = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    // The first place may have elements before x[0].
    const u32 before = p.first % 4;
    if (4 * place >= before + p.len) return;
    const u64 first = 4 * place - before;
    const Words words = random_bits(p.seed, p.stream, p.first / 4 + place);
    const u32 bits[4] = {words.a, words.b, words.c, words.d};
    Four<T> four;
    const bool whole = aligned && before == 0 && first + 4 <= p.len;
    if (whole) {
        four = *reinterpret_cast<const Four<T> *>(x + first);
    } else {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) // an element before x[0] has a number that wrapped around, above any length
            four.at[e] = first + e < p.len ? x[first + e] : narrow<T>((Acc<T>)0);
    }
#pragma unroll
    for (u32 e = 0; e < 4; ++e)
        four.at[e] = narrow<T>(widen(four.at[e]) * (bits[e] < p.threshold ? (Acc<T>)0 : kept));
    if (whole) {
        *reinterpret_cast<Four<T> *>(y + first) = four;
    } else {
#pragma unroll
        for (u32 e = 0; e < 4; ++e)
            if (first + e < p.len) y[first + e] = four.at[e];
    }
}

KERNEL(dropout_f32, 256, DropoutArgs, dropout<float>)
KERNEL(dropout_f64, 256, DropoutArgs, dropout<double>)
KERNEL(dropout_f16, 256, DropoutArgs, dropout<__half>)
KERNEL(dropout_bf16, 256, DropoutArgs, dropout<__nv_bfloat16>)
