// Kernels with one mistake each, and their right counterparts (`fine_..`): what the emulator must find, and what it must let pass.
#include "common.cuh"

struct BrokenArgs {
    const float *a; // 64 elements
    float *out;     // 64 elements that nothing has written
    u32 *words;     // 64 zeros
    u64 len;        // 64
};

constexpr u32 THREADS = 64;
// The same declared as a kernel.
#define BROKEN(name) KERNEL(name, THREADS, BrokenArgs, name##_body)
#define HERE const u32 t = threadIdx.x, lane = t % WARP, i = blockIdx.x * blockDim.x + t; (void)lane, (void)i

// ---- barriers
template <bool BARRIER> DEVICE void neighbours(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    s[t] = p.a[t];
    if (BARRIER) __syncthreads();
    p.out[t] = s[(t + 1) % THREADS];
}
KERNEL(no_barrier, THREADS, BrokenArgs, neighbours<false>)
KERNEL(fine_barrier, THREADS, BrokenArgs, neighbours<true>)

// The array is written again while others may still read it.
template <bool BARRIER> DEVICE void reused(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    float sum = 0;
    for (u32 round = 0; round < 2; ++round) {
        s[t] = p.a[t] + round;
        __syncthreads();
        sum += s[(t + 1) % THREADS];
        if (BARRIER) __syncthreads();
    }
    p.out[t] = sum;
}
KERNEL(reuse_without_barrier, THREADS, BrokenArgs, reused<false>)
KERNEL(fine_reuse, THREADS, BrokenArgs, reused<true>)

DEVICE void half_barrier_body(const BrokenArgs &p) {
    HERE;
    if (t < THREADS / 2) __syncthreads();
    p.out[t] = p.a[t];
}
BROKEN(half_barrier)

DEVICE void barrier_after_return_body(const BrokenArgs &p) {
    HERE;
    if (t >= p.len - 1) return;
    __syncthreads();
    p.out[t] = p.a[t];
}
BROKEN(barrier_after_return)

DEVICE void two_barriers_body(const BrokenArgs &p) {
    HERE;
    if (t < WARP)
        __syncthreads();
    else
        __syncthreads();
    p.out[t] = p.a[t];
}
BROKEN(two_barriers)

// ---- bounds
DEVICE void write_past_end_body(const BrokenArgs &p) {
    HERE;
    p.out[t + 1] = p.a[t];
}
BROKEN(write_past_end)

DEVICE void read_past_end_body(const BrokenArgs &p) {
    HERE;
    float next = p.a[t + 1]; // used where it is inside alone
    p.out[t] = t + 1 < p.len ? next : 0.f;
}
BROKEN(read_past_end)

DEVICE void read_before_start_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = p.a[(int)t - 1] > 1e30f ? 1.f : 0.f;
}
BROKEN(read_before_start)

DEVICE void read_null_body(const BrokenArgs &p) {
    HERE;
    const float *missing = p.len == 64 ? nullptr : p.a;
    p.out[t] = missing[t];
}
BROKEN(read_null)

DEVICE void shared_index_body(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    s[t + 1] = p.a[t];
    __syncthreads();
    p.out[t] = s[t];
}
BROKEN(shared_index)

DEVICE void shared_pointer_body(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    float *at = s;
    at[t + 1] = p.a[t];
    __syncthreads();
    p.out[t] = at[t];
}
BROKEN(shared_pointer)

DEVICE void local_index_body(const BrokenArgs &p) {
    HERE;
    float local[4] = {p.a[t], 1, 2, 3};
    p.out[t] = local[t];
}
BROKEN(local_index)

DEVICE void misaligned_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = t < 8 ? reinterpret_cast<const float4 *>(p.a + 1)[t].x : 0.f;
}
BROKEN(misaligned)

DEVICE void wide_shift_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = p.a[t] + (float)(1u << t);
}
BROKEN(wide_shift)

// ---- what nothing has written
DEVICE void unwritten_shared_body(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    if (t < THREADS - 1) s[t] = p.a[t];
    __syncthreads();
    p.out[t] = 0.f * s[t] > 0.f ? 1.f : 0.f;
}
BROKEN(unwritten_shared)

DEVICE void unwritten_global_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = p.out[t] > 0.f ? 1.f : 0.f;
}
BROKEN(unwritten_global)

DEVICE void unwritten_element_body(const BrokenArgs &p) {
    HERE;
    if (t != 5) p.out[t] = p.a[t];
}
BROKEN(unwritten_element)

// ---- warps
DEVICE void missing_lanes_body(const BrokenArgs &p) {
    HERE;
    float x = p.a[t];
    if (lane < 20) x = __shfl_xor_sync(ALL_LANES, x, 1);
    p.out[t] = x;
}
BROKEN(missing_lanes)

DEVICE void mask_without_caller_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = __shfl_xor_sync(0x7fffffffu, p.a[t], 1);
}
BROKEN(mask_without_caller)

DEVICE void shuffle_from_outside_body(const BrokenArgs &p) {
    HERE;
    float x = p.a[t];
    if (lane < 16) x = __shfl_down_sync(0x0000ffffu, x, 1);
    p.out[t] = x;
}
BROKEN(shuffle_from_outside)

DEVICE void fine_half_warp_body(const BrokenArgs &p) {
    HERE;
    float x = p.a[t];
    if (lane < 16)
        x = __shfl_down_sync(0x0000ffffu, x, 1, 16);
    else
        x = __shfl_xor_sync(0xffff0000u, __shfl_xor_sync(0xffff0000u, x, 3), 1);
    p.out[t] = x;
}
BROKEN(fine_half_warp)

DEVICE void two_operations_body(const BrokenArgs &p) {
    HERE;
    u32 x = t;
    if (lane < 16)
        x = __shfl_xor_sync(ALL_LANES, x, 1);
    else
        x = __ballot_sync(ALL_LANES, x > 40);
    p.out[t] = x;
}
BROKEN(two_operations)

// Lanes that talk through shared memory: `ORDER` 0 nothing between, 1 a shuffle, 2 __syncwarp of half the lanes, 3 of all.
template <u32 ORDER, u32 DISTANCE> DEVICE void talk(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    s[t] = 0;
    __syncthreads();
    s[t] = p.a[t];
    float x = 0;
    if (ORDER == 1) x = __shfl_xor_sync(ALL_LANES, s[t], 1);
    if (ORDER == 2) __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
    if (ORDER == 3) __syncwarp();
    p.out[t] = x + s[t ^ DISTANCE];
    if (ORDER == 3) __syncwarp();
    s[t] = x;
}
#define TALK(order, distance) talk<order, distance>
KERNEL(lanes_unordered, THREADS, BrokenArgs, TALK(0, 1))
KERNEL(lanes_after_shuffle, THREADS, BrokenArgs, TALK(1, 1))
KERNEL(lanes_of_two_halves, THREADS, BrokenArgs, TALK(2, 16))
KERNEL(warps_after_syncwarp, THREADS, BrokenArgs, TALK(3, 32))
KERNEL(fine_lanes, THREADS, BrokenArgs, TALK(3, 16))

// ---- blocks and atomics
DEVICE void blocks_write_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = p.a[t];
}
BROKEN(blocks_write)

DEVICE void block_reads_body(const BrokenArgs &p) {
    HERE;
    if (t >= 32) return;
    p.words[blockIdx.x * 32 + t] = t;
    p.out[blockIdx.x * 32 + t] = p.words[t];
}
BROKEN(block_reads)

// The last block to finish sums what all have written.
template <bool FENCE> DEVICE void last_block(const BrokenArgs &p) {
    HERE;
    SHARED(u32, ticket, 1);
    if (t < 16) p.out[blockIdx.x * 16 + t] = p.a[blockIdx.x * 16 + t];
    if (FENCE) __threadfence();
    __syncthreads();
    if (t == 0) ticket[0] = atomicInc(p.words, gridDim.x - 1);
    __syncthreads();
    if (ticket[0] == gridDim.x - 1 && t == 0)
        for (u32 k = 1; k < p.len; ++k) p.out[0] += p.out[k];
}
KERNEL(last_block_without_fence, THREADS, BrokenArgs, last_block<false>)
KERNEL(fine_last_block, THREADS, BrokenArgs, last_block<true>)

DEVICE void order_of_threads_body(const BrokenArgs &p) {
    HERE;
    p.out[t] = atomicAdd(p.words, 1u);
}
BROKEN(order_of_threads)

DEVICE void atomic_and_plain_body(const BrokenArgs &p) {
    HERE;
    atomicAdd(p.words, 1u);
    p.out[t] = p.words[0] > 100 ? 1.f : 0.f;
}
BROKEN(atomic_and_plain)

DEVICE void fine_count_body(const BrokenArgs &p) {
    HERE;
    SHARED(u32, count, 1);
    if (t == 0) count[0] = 0;
    __syncthreads();
    atomicAdd(count, t);
    int odd = __syncthreads_count(t % 2), any = __syncthreads_or(t == 3), all = __syncthreads_and(t == 3);
    p.out[t] = p.a[t] + count[0] + odd + any + all;
}
BROKEN(fine_count)

// ---- asynchronous copies: `STAGE` 0 never waits, 1 waits without a barrier, 2 waits and all wait for each other
#ifdef KRONWAKE_EMULATE
template <u32 STAGE> DEVICE void copies(const BrokenArgs &p) {
    HERE;
    SHARED(float, s, THREADS);
    s[t] = 0;
    __syncthreads();
    emulator::copy_async(&s[t], &p.a[t], 4);
    if (STAGE > 0) emulator::wait_for_copies();
    if (STAGE > 1) __syncthreads();
    p.out[t] = STAGE > 0 ? s[t ^ 1] : 0.f;
}
KERNEL(copy_without_wait, THREADS, BrokenArgs, copies<0>)
KERNEL(copy_without_barrier, THREADS, BrokenArgs, copies<1>)
KERNEL(fine_copy, THREADS, BrokenArgs, copies<2>)
#endif
