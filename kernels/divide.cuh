// From the number of an element to its place in an image.
#pragma once
#include "common.cuh"

struct Split {
    u64 quotient;
    u32 rest;
};

// A division of 64 bits costs several times one of 32, which nearly always is enough.
DEVICE Split divide(u64 i, u32 by) {
    if (i <= 0xffffffffu) {
        const u32 quotient = (u32)i / by;
        return {quotient, (u32)i - quotient * by};
    }
    const u64 quotient = i / by;
    return {quotient, (u32)(i - quotient * by)};
}

// A number below 2^30, and what divides others below 2^31 by it (Granlund & Montgomery 1994, figure 4.1).
struct Divisor {
    u32 value, factor, shift;
};

DEVICE void divide(u32 a, const Divisor &b, u32 &quotient, u32 &rest) {
    quotient = (__umulhi(a, b.factor) + a) >> b.shift;
    rest = a - quotient * b.value;
}

struct Span {
    u32 from, to;
};

// The windows of `size`, `stride` apart, that position `i` lies in, of `count`.
DEVICE Span windows(u32 i, u32 size, u32 stride, u32 count) {
    const u32 last = i / stride + 1;
    return {i < size ? 0 : (i - size) / stride + 1, last < count ? last : count};
}
