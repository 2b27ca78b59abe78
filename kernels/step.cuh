// What the kernels of an optimizer's step share. Nothing of a step is known to the host until it asks: its numbers pass from
// kernel to kernel in two small arrays on the device.
#pragma once
#include "staged.cuh"

// Tensors of one launch, and the threads of a block.
constexpr u32 TABLE = 96, STEP_THREADS = 256;

// The elements of a tensor of `len` that a block of threads works on: fewer of small ones, or a small model would leave most of a GPU
// idle. As `chunk` in src/gpu/table.rs.
DEVICE u32 chunk(u64 len) { return len <= 1 << 18 ? 1024 : 4096; }

// `flags`
constexpr u32 CULPRIT = 0;   // who makes this step non-finite: a parameter, or BLOCK + a block; NOBODY without one
constexpr u32 BLAMED = 1;    // the first culprit since the host asked
constexpr u32 FAILED_AT = 2; // and the number of its step
constexpr u32 SKIPPED = 3;   // steps that were left out
constexpr u32 GO = 4;        // whether this step is taken
constexpr u32 NOBODY = 0xffffffffu, BLOCK = 0x80000000u;

// `numbers`
constexpr u32 WAKE = 0;     // what the carry is multiplied by
constexpr u32 LR = 1;       // the learning rate
constexpr u32 GIVEN = 2;    // 1 / lambda where the options give it
constexpr u32 RATE = 3;     // 1 / lambda of this step
constexpr u32 PREVIOUS = 4; // and of the last one; below 0 without one
constexpr u32 CLIP = 5;
constexpr u32 DONE = 6;     // steps taken
constexpr u32 MIXING = 7;   // weight of the new parameters in their average
constexpr u32 AFTER = 8, BEFORE = 9, LAST = 10, LENGTH = 11; // slopes along the steps, and the length they led to
constexpr u32 STEP = 12;    // the step's number
constexpr u32 REST_LR = 13; // the learning rate of parameters without a block

// The item of a table whose elements a block of threads works on; `first` of the items is ascending.
template <class Item> DEVICE u32 item_of(const Item *items, u32 count, u32 block) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (items[middle].first <= block) low = middle;
        else high = middle;
    }
    return low;
}

// The elements of an item that a block of threads works on, a stage at a time.
template <class Item, class F> DEVICE void each_stage_of(const Item &item, F f) {
    const u32 size = chunk(item.len);
    const u64 begin = (u64)(blockIdx.x - item.first) * size;
    each_stage(begin + threadIdx.x, min(begin + size, item.len), STEP_THREADS, f);
}

// Element types by number, for tensors whose type only the table knows.
constexpr u32 F32 = 0, F64 = 1, F16 = 2, BF16 = 3;

template <class From, class T> DEVICE void fetch_cast(const From *from, const Stage &stage, T (&to)[STAGES]) {
    Acc<From> wide[STAGES];
    fetch(from, stage, wide);
#pragma unroll
    for (u32 j = 0; j < STAGES; ++j) to[j] = (T)wide[j];
}

// As `fetch`.
template <class T> DEVICE void fetch_as(const void *from, u32 type, const Stage &stage, T (&to)[STAGES]) {
    switch (type) {
    case F64: fetch_cast(static_cast<const double *>(from), stage, to); break;
    case F16: fetch_cast(static_cast<const __half *>(from), stage, to); break;
    case BF16: fetch_cast(static_cast<const __nv_bfloat16 *>(from), stage, to); break;
    default: fetch_cast(static_cast<const float *>(from), stage, to);
    }
}

template <class T> DEVICE void store_as(void *data, u64 at, u32 type, Acc<T> value) {
    switch (type) {
    case F64: static_cast<double *>(data)[at] = value; break;
    case F16: static_cast<__half *>(data)[at] = narrow<__half>((float)value); break;
    case BF16: static_cast<__nv_bfloat16 *>(data)[at] = narrow<__nv_bfloat16>((float)value); break;
    default: static_cast<float *>(data)[at] = value;
    }
}

// A parameter's place in its block's matrix of `columns` columns: it fills `width` of them, from `offset` on. It has fewer
// than 2^32 elements.
struct Place {
    u32 width, columns, offset, pad;
};

DEVICE u64 place_of(const Place &place, u64 element) {
    if (place.width == place.columns) return element;
    const u32 row = (u32)element / place.width;
    return (u64)row * place.columns + place.offset + ((u32)element - row * place.width);
}

DEVICE void places_of(const Place &place, const Stage &stage, u64 (&at)[STAGES]) {
#pragma unroll
    for (u32 j = 0; j < STAGES; ++j) at[j] = place_of(place, stage.in[j] ? stage.at[j] : 0);
}
