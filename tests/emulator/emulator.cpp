// The scheduler of shim.h, compiled with every kernel file.
#include "shim.h"

#include <algorithm>

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

State state;

#if defined(__x86_64__)
// Saves what a call preserves, and goes on where `to` left off.
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    sub sp, sp, #176
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #176
    ret
)");
#else
#error "the emulator knows how to switch fibers on x86-64 and AArch64 alone"
#endif

static void begin() {
    state.kernel(state.args);
    state.fibers[state.current].wait = Wait::done;
    give_way();
    std::abort();
}

static void prepare(Fiber &fiber) {
    fiber.stack.resize(STACK);
    fiber.wait = Wait::nothing;
    uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.data()) + STACK) & ~uintptr_t(15);
    void **at = reinterpret_cast<void **>(top);
#if defined(__x86_64__)
    // As after a call: the return address at an odd multiple of 8.
    at -= 2;
    *at = reinterpret_cast<void *>(begin);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
#else
    at -= 22;
    std::memset(at, 0, 176);
    at[11] = reinterpret_cast<void *>(begin);
#endif
    fiber.stack_pointer = at;
}

// The order in which ready fibers go on: as they are, backwards, or shuffled by a seed.
static std::vector<unsigned> order_of(unsigned count, unsigned order) {
    std::vector<unsigned> list(count);
    for (unsigned i = 0; i < count; ++i) list[i] = order == 1 ? count - 1 - i : i;
    if (order > 1) {
        uint64_t seed = order * 0x9e3779b97f4a7c15ull;
        for (unsigned i = count; i > 1; --i) {
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(list[i - 1], list[(seed >> 33) % i]);
        }
    }
    return list;
}

static std::string at_block() {
    char text[64];
    std::snprintf(text, sizeof text, " in block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}

// Lets the fibers of a warp go on whose operation has all its lanes.
static bool release_warp(unsigned first, unsigned last) {
    bool any = false;
    for (unsigned i = first; i < last; ++i) {
        Fiber &fiber = state.fibers[i];
        if (fiber.wait != Wait::warp) continue;
        bool complete = true;
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (!(fiber.mask >> lane & 1)) continue;
            if (first + lane >= last || state.fibers[first + lane].wait != Wait::warp || state.fibers[first + lane].mask != fiber.mask)
                complete = false;
        }
        if (!complete) continue;
        unsigned mask = fiber.mask;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) state.fibers[first + lane].wait = Wait::nothing;
        any = true;
    }
    return any;
}

static void run_block(unsigned threads, const std::vector<unsigned> &order) {
    for (auto &fiber : state.fibers) prepare(fiber);
    state.shared.clear();
    state.slots.assign((threads + 31) / 32, std::vector<char>(32 * SLOT, static_cast<char>(POISON)));
    while (state.error.empty()) {
        for (unsigned i : order) {
            Fiber &fiber = state.fibers[i];
            if (fiber.wait != Wait::nothing) continue;
            state.current = i;
            threadIdx.x = i % blockDim.x;
            threadIdx.y = i / blockDim.x % blockDim.y;
            threadIdx.z = i / (blockDim.x * blockDim.y);
            emulator_switch(&state.scheduler, fiber.stack_pointer);
        }
        bool released = false;
        for (unsigned first = 0; first < threads; first += 32) released |= release_warp(first, std::min(first + 32, threads));
        if (released) continue;
        unsigned at_barrier = 0, done = 0, at_warp = 0;
        for (auto &fiber : state.fibers) {
            at_barrier += fiber.wait == Wait::block;
            at_warp += fiber.wait == Wait::warp;
            done += fiber.wait == Wait::done;
        }
        if (done == threads) break;
        if (at_warp > 0) fail("a warp operation that lacks some of its lanes" + at_block());
        else if (at_barrier < threads) fail("a barrier that only " + std::to_string(at_barrier) + " of " + std::to_string(threads) + " threads reach" + at_block());
        else
            for (auto &fiber : state.fibers) fiber.wait = Wait::nothing;
    }
    for (auto &entry : state.shared) {
        const auto &area = entry.second;
        for (size_t i = 0; i < GUARD; ++i)
            if ((unsigned char)area.bytes[i] != POISON || (unsigned char)area.bytes[GUARD + area.size + i] != POISON) {
                fail("a write beyond an array in shared memory" + at_block());
                return;
            }
    }
}

} // namespace emulator

// Runs a kernel over a grid of blocks; `order` chooses the order of blocks and of threads. Null, or what went wrong.
extern "C" const char *emulate(void (*kernel)(const void *), const void *args, const unsigned *grid, unsigned threads, unsigned order) {
    using namespace emulator;
    state.error.clear();
    state.kernel = kernel;
    state.args = args;
    state.fibers.resize(threads);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    std::vector<unsigned> thread_order = order_of(threads, order);
    for (unsigned i : order_of(grid[0] * grid[1] * grid[2], order)) {
        blockIdx = {i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
        run_block(threads, thread_order);
        if (!state.error.empty()) return state.error.c_str();
    }
    return nullptr;
}
