// The emulator's state, and what shim.h's CUDA asks of it. A block's threads are fibers that give way at barriers and warp operations
// alone. The compiler reports every access of a kernel to memory (the hooks of its thread sanitizer), and checks.cpp follows them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// Functions of the emulator itself, whose accesses are not a kernel's.
#define UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("undefined")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr unsigned LANES = 32, MOST_THREADS = 1024;
// The lower half of a fiber's stack is out of bounds: a thread that needs it ends the process, not another thread.
constexpr size_t GUARD = 256, STACK = 128 << 10;
constexpr unsigned char POISON = 0xff; // a NaN in every floating-point type

// Where in the kernels' sources a call is.
struct Site {
    const char *file;
    unsigned line;
    bool operator==(const Site &other) const { return line == other.line && (file == other.file || !std::strcmp(file, other.file)); }
};
#define SITE const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()

enum class Wait : uint8_t { nothing, block, warp, done };

// A copy into shared memory that a thread has started; from nowhere: zeros.
struct Copy {
    void *to;
    const void *from;
    unsigned bytes;
};

struct Fiber {
    void *stack_pointer = nullptr;
    uintptr_t stack = 0; // its lowest address
    Wait wait = Wait::nothing;
    Site site{"", 0};
    int predicate = 0;
    // The warp operation that it waits at: what it puts down, and where it takes what all lanes have put down.
    unsigned mask = 0;
    const void *value = nullptr;
    void *all = nullptr;
    size_t size = 0;
    bool fenced = false;
    std::vector<Copy> copies;
};

// What is known of the accesses to one element: see checks.cpp.
struct Cell {
    uint32_t write_epoch = 0, write_time = 0, read_epoch = 0, read_time = 0, readers = 0;
    uint16_t writer = 0, read_warp = 0;
};

// Memory that kernels may access, an element a cell.
struct Region {
    uintptr_t start = 0;
    size_t bytes = 0;
    unsigned shift = 0; // 2^shift bytes an element
    const char *name = "";
    bool writable = true, shared = false;
    // An element has never been written where its first 8 bytes, seen through `mask`, are `mark`.
    uint64_t mask = 0, mark = 1;
    std::vector<Cell> cells;
};

struct State {
    std::vector<Fiber> fibers;
    unsigned current = 0, threads = 0;
    uintptr_t stack = 0; // of the current fiber
    void *scheduler = nullptr;
    void (*kernel)(const void *) = nullptr;
    const void *args = nullptr;
    std::string error;
    dim3 grid, block_index;
    int combined = 0; // of the predicates at the last barrier
    // How many lanes of each warp wait at warp operations.
    unsigned meeting[MOST_THREADS / LANES] = {};
    // Fibers that can go on; `order` says which does.
    std::vector<unsigned> ready;
    size_t ready_head = 0;
    unsigned order = 0, phase = 0;
    uint64_t random = 0;
};

extern State state;

// Ends the launch with a message.
[[noreturn]] void fail(const std::string &what);
[[noreturn]] void fail_at(const std::string &what, Site site);

int barrier(int predicate, Site site);

// Waits for the lanes of `mask`, and copies `size` bytes of each lane's `value` to `all`. With `memory`, what the lanes have written and read before is
// in order with what they do after.
void meet(unsigned mask, const void *value, void *all, size_t size, bool memory, Site site);

// Memory that the block's threads share, named by the declaration's tag.
void *shared(const void *tag, const char *name, size_t size, size_t unit);

void fence();
// An access that is in order with those of other threads, other atomic ones alone.
void atomic(const void *at, size_t size);
// Nothing arrives before the thread has waited, which shows a missing wait.
void copy_async(void *to, const void *from, unsigned bytes);
void wait_for_copies();

// checks.cpp
void begin_launch(const Region *regions, size_t count);
void begin_block();
void end_phase();
void meet_memory(unsigned warp, unsigned mask);
void add_shared(const char *name, void *at, size_t bytes, size_t unit);
void check(const void *at, size_t size, bool write, const void *code);

// Every lane of `mask` puts down `value` and sees what the others put down, 32 values in `all`.
template <class T> UNCHECKED void exchange(unsigned mask, const T &value, T (&all)[32], SITE) {
    meet(mask, &value, all, sizeof(T), false, {file, line});
}

// Constant as long as a thread's call lasts.
#define CONSTANT UNCHECKED __attribute__((const)) inline unsigned
CONSTANT lane() { return state.current % LANES; }
CONSTANT thread() { return state.current; }
CONSTANT threads() { return state.threads; }
CONSTANT block_x() { return state.block_index.x; }
CONSTANT block_y() { return state.block_index.y; }
CONSTANT block_z() { return state.block_index.z; }
CONSTANT grid_x() { return state.grid.x; }
CONSTANT grid_y() { return state.grid.y; }
CONSTANT grid_z() { return state.grid.z; }

// Lane `source` of what the lanes have put down.
template <class T> UNCHECKED T from_lane(unsigned mask, const T (&all)[32], unsigned source, Site site) {
    if (!(mask >> source & 1)) fail_at("a shuffle from lane " + std::to_string(source) + ", which its mask lacks", site);
    return all[source];
}

} // namespace emulator
