// The scheduler: runs the fibers of a block from barrier to barrier.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <sys/mman.h>

namespace emulator {

State state;

extern "C" void emulator_switch(void **from, void *to);

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

// The next fiber that goes on: first come, first served; or last come; or any.
static bool take_ready(unsigned &next) {
    auto &ready = state.ready;
    if (state.ready_head == ready.size()) {
        ready.clear();
        state.ready_head = 0;
        return false;
    }
    if (state.order == 0) {
        next = ready[state.ready_head++];
        return true;
    }
    if (state.order > 1) {
        state.random = state.random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(ready[(state.random >> 33) % ready.size()], ready.back());
    }
    next = ready.back();
    ready.pop_back();
    return true;
}

static void go_on(unsigned next, void **from) {
    Fiber &fiber = state.fibers[next];
    state.current = next;
    state.stack = fiber.stack;
    emulator_switch(from, fiber.stack_pointer);
}

static void give_way() {
    void **from = &state.fibers[state.current].stack_pointer;
    unsigned next;
    if (take_ready(next)) {
        if (next != state.current) go_on(next, from);
    } else {
        emulator_switch(from, state.scheduler);
    }
}

void fail(const std::string &what) {
    char block[64];
    std::snprintf(block, sizeof block, ", block (%u, %u, %u)", state.block_index.x, state.block_index.y, state.block_index.z);
    state.error = what + block;
    void *abandoned;
    emulator_switch(&abandoned, state.scheduler);
    std::abort();
}

static std::string text(Site site) {
    const char *name = std::strrchr(site.file, '/');
    return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

void fail_at(const std::string &what, Site site) { fail(what + " at " + text(site)); }

static void begin() {
    state.kernel(state.args);
    Fiber &self = state.fibers[state.current];
    if (!self.copies.empty()) fail("an asynchronous copy that its thread never waits for");
    self.wait = Wait::done;
    give_way();
    std::abort();
}

// Stacks stay from launch to launch.
static void provide(unsigned threads) {
    state.fibers.reserve(MOST_THREADS);
    while (state.fibers.size() < threads) {
        Fiber fiber;
        void *at = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED || mprotect(at, STACK / 2, PROT_NONE)) std::abort();
        fiber.stack = reinterpret_cast<uintptr_t>(at);
        state.fibers.push_back(std::move(fiber));
    }
}

static void prepare(unsigned index) {
    Fiber &fiber = state.fibers[index];
    fiber.wait = Wait::nothing;
    fiber.fenced = false;
    fiber.copies.clear();
    // Stacks begin at different places of a page, or they would all share a few lines of the cache.
    uintptr_t top = fiber.stack + STACK - index % 32 * 128;
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

int barrier(int predicate, Site site) {
    Fiber &self = state.fibers[state.current];
    self.wait = Wait::block;
    self.site = site;
    self.predicate = predicate;
    give_way();
    return state.combined;
}

void meet(unsigned mask, const void *value, void *all, size_t size, bool memory, Site site) {
    unsigned first = state.current / LANES * LANES, warp = state.current / LANES;
    if (!(mask >> lane() & 1)) fail_at("a warp operation whose mask lacks the calling lane", site);
    Fiber &self = state.fibers[state.current];
    self.wait = Wait::warp;
    self.site = site;
    self.mask = mask;
    self.value = value;
    self.all = all;
    self.size = size;
    if (++state.meeting[warp] < (unsigned)__builtin_popcount(mask)) {
        give_way();
        return;
    }
    for (unsigned i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        Fiber &other = state.fibers[first + i];
        if (first + i >= state.threads || other.wait != Wait::warp || other.mask != mask || other.size != size || !(other.site == site)) {
            give_way();
            return;
        }
    }
    // The last lane to come serves all of them.
    static std::vector<char> values;
    values.assign(LANES * size, static_cast<char>(POISON));
    for (unsigned i = 0; i < LANES; ++i)
        if (mask >> i & 1 && size) std::memcpy(&values[i * size], state.fibers[first + i].value, size);
    for (unsigned i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        Fiber &other = state.fibers[first + i];
        if (size) std::memcpy(other.all, values.data(), values.size());
        other.wait = Wait::nothing;
        state.ready.push_back(first + i);
    }
    state.meeting[warp] -= __builtin_popcount(mask);
    if (memory) meet_memory(warp, mask);
    give_way();
}

// Why no fiber can go on.
static std::string stuck() {
    auto fibers = state.fibers.begin();
    unsigned at_barrier = 0;
    const Fiber *waiting = nullptr;
    for (unsigned i = 0; i < state.threads; ++i) {
        at_barrier += fibers[i].wait == Wait::block;
        if (fibers[i].wait == Wait::block) waiting = &fibers[i];
    }
    for (unsigned i = 0; i < state.threads; ++i) {
        if (fibers[i].wait != Wait::warp) continue;
        unsigned missing = 0;
        for (unsigned j = 0; j < LANES; ++j) {
            unsigned other = i / LANES * LANES + j;
            if (!(fibers[i].mask >> j & 1)) continue;
            if (other < state.threads && fibers[other].wait == Wait::warp && !(fibers[other].site == fibers[i].site))
                return "lanes of a warp at different operations, " + text(fibers[i].site) + " and " + text(fibers[other].site);
            missing += other >= state.threads || fibers[other].wait != Wait::warp || fibers[other].mask != fibers[i].mask;
        }
        return "a warp operation that lacks " + std::to_string(missing) + " of the lanes in its mask at " + text(fibers[i].site);
    }
    return "a barrier that only " + std::to_string(at_barrier) + " of " + std::to_string(state.threads) + " threads reach at " + text(waiting->site);
}

// The threads of the block in the order in which they begin, or go on after a barrier.
static void ready_all() {
    state.ready.clear();
    state.ready_head = 0;
    // Last come first: which thread that is alternates.
    bool backwards = state.order == 1 && state.phase % 2 == 1;
    for (unsigned i = 0; i < state.threads; ++i) state.ready.push_back(backwards ? state.threads - 1 - i : i);
    ++state.phase;
}

static bool release_barrier() {
    const Site site = state.fibers[0].site;
    int any = 0;
    for (unsigned i = 0; i < state.threads; ++i) {
        Fiber &fiber = state.fibers[i];
        if (!(fiber.site == site)) {
            state.error = "threads of a block at different barriers, " + text(site) + " and " + text(fiber.site);
            return false;
        }
        any += fiber.predicate != 0;
        fiber.wait = Wait::nothing;
    }
    state.combined = any;
    end_phase();
    ready_all();
    return true;
}

// An array in shared memory, made when a block first comes to its declaration, and kept: checks.cpp knows what the present block has written.
struct Array {
    const void *tag;
    size_t size;
    unsigned char *bytes;
};
static std::vector<Array> arrays;

static void run_block() {
    for (unsigned i = 0; i < state.threads; ++i) prepare(i);
    std::fill(std::begin(state.meeting), std::end(state.meeting), 0);
    begin_block();
    ready_all();
    for (;;) {
        unsigned next;
        if (take_ready(next)) {
            go_on(next, &state.scheduler);
            if (!state.error.empty()) return;
            continue;
        }
        unsigned at_barrier = 0, done = 0;
        for (unsigned i = 0; i < state.threads; ++i) {
            at_barrier += state.fibers[i].wait == Wait::block;
            done += state.fibers[i].wait == Wait::done;
        }
        if (done == state.threads) break;
        if (at_barrier < state.threads) {
            state.error = stuck();
            return;
        }
        if (!release_barrier()) return;
    }
    for (auto &array : arrays)
        for (size_t i = 0; i < GUARD; ++i)
            if (array.bytes[i] != POISON || array.bytes[GUARD + array.size + i] != POISON) {
                state.error = "a write beyond an array in shared memory";
                return;
            }
}

void *shared(const void *tag, const char *name, size_t size, size_t unit) {
    for (auto &array : arrays)
        if (array.tag == tag) return array.bytes + GUARD;
    auto bytes = static_cast<unsigned char *>(std::aligned_alloc(GUARD, (size + 3 * GUARD - 1) / GUARD * GUARD));
    std::memset(bytes, POISON, size + 2 * GUARD);
    arrays.push_back({tag, size, bytes});
    add_shared(name, bytes + GUARD, size, unit);
    return bytes + GUARD;
}

void copy_async(void *to, const void *from, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
        fail("an asynchronous copy to or from an address that is no multiple of its bytes");
    // The copy may read and write at any time from here to the end of the wait.
    if (from) check(from, bytes, false, nullptr);
    check(to, bytes, true, nullptr);
    state.fibers[state.current].copies.push_back({to, from, bytes});
}

void wait_for_copies() {
    auto &copies = state.fibers[state.current].copies;
    for (auto &copy : copies) {
        check(copy.to, copy.bytes, true, nullptr);
        if (copy.from) {
            check(copy.from, copy.bytes, false, nullptr);
            std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
            std::memset(copy.to, 0, copy.bytes);
        }
    }
    copies.clear();
}

} // namespace emulator

// An operand of a launch; `mask` and `mark` as in Region.
struct Operand {
    uint64_t start, bytes, unit;
    const char *name;
    uint64_t mask, mark;
};

// Runs a kernel over a grid of blocks; `order` chooses the order of blocks and of threads. Null, or what went wrong.
extern "C" const char *emulate(void (*kernel)(const void *), const void *args, size_t args_size, const unsigned *grid, unsigned threads,
                               const Operand *operands, size_t count, unsigned order) {
    using namespace emulator;
    state.error.clear();
    state.kernel = kernel;
    state.args = args;
    state.threads = threads;
    state.grid = {grid[0], grid[1], grid[2]};
    state.order = order;
    state.phase = 0;
    state.random = order * 0x9e3779b97f4a7c15ull;
    provide(threads);
    std::vector<Region> regions(count + 1);
    for (size_t i = 0; i < count; ++i) {
        regions[i].start = operands[i].start;
        regions[i].bytes = operands[i].bytes;
        regions[i].shift = __builtin_ctzll(operands[i].unit);
        regions[i].name = operands[i].name;
        regions[i].mask = operands[i].mask;
        regions[i].mark = operands[i].mark;
    }
    regions[count].start = reinterpret_cast<uintptr_t>(args);
    regions[count].bytes = args_size;
    regions[count].name = "the argument";
    regions[count].writable = false;
    begin_launch(regions.data(), regions.size());
    size_t blocks = (size_t)grid[0] * grid[1] * grid[2];
    std::vector<size_t> list(blocks);
    for (size_t i = 0; i < blocks; ++i) list[i] = order == 1 ? blocks - 1 - i : i;
    uint64_t seed = state.random;
    for (size_t i = order > 1 ? blocks : 0; i > 1; --i) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(list[i - 1], list[(seed >> 33) % i]);
    }
    for (size_t i : list) {
        state.block_index = {(unsigned)(i % grid[0]), (unsigned)(i / grid[0] % grid[1]), (unsigned)(i / grid[0] / grid[1])};
        run_block();
        if (!state.error.empty()) return state.error.c_str();
    }
    return nullptr;
}
