// Element by element work of which a thread has several elements on their way at once. A load must not pass a store before it that might be to the
// same place, so that in a plain loop each element waits for the one before; here all loads of STAGES elements come first, then all
// stores (scripts/check-kernels.sh looks).
#pragma once
#include "common.cuh"

constexpr u32 STAGES = 4;

// A thread's next elements.
struct Stage {
    u64 at[STAGES];
    bool in[STAGES]; // whether there is such an element
};

// Calls `f(stage)` until a thread's elements from `first` on, `stride` apart and below `end`, have all been in a stage.
template <class F> DEVICE void each_stage(u64 first, u64 end, u64 stride, F f) {
#pragma unroll 1
    for (u64 base = first; base < end; base += STAGES * stride) {
        Stage stage;
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            stage.at[j] = base + j * stride;
            stage.in[j] = stage.at[j] < end;
        }
        f(stage);
    }
}

// The elements of `from`, which may be null, at `at`; zeros where there are none.
template <class T> DEVICE void fetch(const T *from, const u64 (&at)[STAGES], const bool (&in)[STAGES], Acc<T> (&to)[STAGES]) {
#pragma unroll
    for (u32 j = 0; j < STAGES; ++j) to[j] = 0;
    if (from == nullptr) return;
#pragma unroll
    for (u32 j = 0; j < STAGES; ++j)
        if (in[j]) to[j] = widen(from[at[j]]);
}
template <class T> DEVICE void fetch(const T *from, const Stage &stage, Acc<T> (&to)[STAGES]) { fetch(from, stage.at, stage.in, to); }
