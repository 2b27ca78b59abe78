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

struct Span {
    u32 from, to;
};

// The windows of `size`, `stride` apart, that position `i` lies in, of `count`.
DEVICE Span windows(u32 i, u32 size, u32 stride, u32 count) {
    const u32 last = i / stride + 1;
    return {i < size ? 0 : (i - size) / stride + 1, last < count ? last : count};
}
