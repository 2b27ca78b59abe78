// Follows every access of a kernel to memory: that it lies in an operand or a shared array, that what is read has been written, and that no
// two threads access an element, one of them writing, without something that puts them in order.
//
// Time in a launch is counted in epochs: one from each barrier of a block to its next. Within an epoch, the threads of a warp are put in order by
// __syncwarp alone; shuffles and votes order no memory. Blocks are in order where one has passed a fence and an atomic operation before
// the other comes to an atomic operation.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <dlfcn.h>
#include <link.h>

namespace emulator {

constexpr uint16_t ATOMIC = 0x8000, MANY_WARPS = 0xffff;
constexpr unsigned WARPS = MOST_THREADS / LANES;

// Sorted by start: those of the launch, and the shared arrays, which stay.
static std::vector<Region> regions;
static Region *recent = nullptr;
// Epochs only grow, so what cells say of earlier launches is seen to be old.
static uint32_t epoch = 1, launch_epoch, block_epoch;
// Completed __syncwarps of each warp, and what each lane has in order of the others: their accesses before these times.
static uint32_t warp_time[WARPS], ordered[MOST_THREADS][LANES];
// The blocks that have begun by their first epoch, which of them others may read, and whether the current block may read them.
static std::vector<std::pair<uint32_t, bool>> blocks;
static bool acquired;
// The kernel file's own memory: its constants.
static uintptr_t image_start, image_end;

static int find_image(dl_phdr_info *info, size_t, void *own) {
    uintptr_t start = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        start = std::min(start, (uintptr_t)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr));
        end = std::max(end, (uintptr_t)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz));
    }
    if (reinterpret_cast<uintptr_t>(own) < start || reinterpret_cast<uintptr_t>(own) >= end) return 0;
    image_start = start;
    image_end = end;
    return 1;
}

static void insert(Region region) {
    auto at = std::upper_bound(regions.begin(), regions.end(), region, [](const Region &a, const Region &b) { return a.start < b.start; });
    regions.insert(at, std::move(region));
    recent = &regions[0];
}

void begin_launch(const Region *operands, size_t count) {
    if (!image_end) dl_iterate_phdr(find_image, reinterpret_cast<void *>(begin_launch));
    // The cells of the last launch serve again.
    std::vector<std::vector<Cell>> cells;
    std::vector<Region> kept;
    for (auto &region : regions) {
        if (region.shared) kept.push_back(std::move(region));
        else if (!region.cells.empty()) cells.push_back(std::move(region.cells));
    }
    regions = std::move(kept);
    for (size_t i = 0; i < count; ++i) {
        if (operands[i].bytes == 0) continue;
        Region region = operands[i];
        if (region.writable) {
            if (!cells.empty()) {
                region.cells = std::move(cells.back());
                cells.pop_back();
            }
            region.cells.resize(region.bytes >> region.shift);
        }
        insert(std::move(region));
    }
    launch_epoch = ++epoch;
    blocks.clear();
}

void begin_block() {
    block_epoch = ++epoch;
    blocks.push_back({epoch, false});
    acquired = false;
}

void end_phase() { ++epoch; }

void meet_memory(unsigned warp, unsigned mask) {
    uint32_t joined[LANES] = {}, now = ++warp_time[warp];
    for (unsigned lane = 0; lane < LANES; ++lane)
        if (mask >> lane & 1)
            for (unsigned i = 0; i < LANES; ++i) joined[i] = std::max(joined[i], ordered[warp * LANES + lane][i]);
    for (unsigned lane = 0; lane < LANES; ++lane)
        if (mask >> lane & 1) joined[lane] = now;
    for (unsigned lane = 0; lane < LANES; ++lane)
        if (mask >> lane & 1) std::copy(joined, joined + LANES, ordered[warp * LANES + lane]);
}

void add_shared(const char *name, void *at, size_t bytes, size_t unit) {
    Region region;
    region.start = reinterpret_cast<uintptr_t>(at);
    region.bytes = bytes;
    // Pairs of halves, and bytes that hold other types, are accessed in parts.
    region.shift = unit % 2 ? 0 : 1;
    region.name = name;
    region.shared = true;
    region.cells.resize(bytes >> region.shift);
    insert(std::move(region));
}

// Where the access is, for the side that knows the kernel file's lines.
static std::string text(const void *code) {
    if (!code) return "";
    char text[40];
    std::snprintf(text, sizeof text, " {code %lx}", (unsigned long)(reinterpret_cast<uintptr_t>(code) - 1 - image_start));
    return text;
}

static std::string element(const Region &region, uintptr_t at) {
    return std::string(region.name) + "[" + std::to_string((at - region.start) >> region.shift) + "]" +
           (region.shift == 1 && region.shared ? " (in units of 2 bytes)" : "");
}

[[noreturn]] static void outside(uintptr_t at, size_t size, bool write, const void *code) {
    std::string what = write ? "a write" : "a read";
    const Region *nearest = nullptr;
    auto distance = [&](const Region &region) { return at < region.start ? region.start - at : at - region.start - region.bytes + 1; };
    for (auto &region : regions)
        if (!nearest || distance(region) < distance(*nearest)) nearest = &region;
    if (at < 4096) what += " through an address that is null";
    else if (!nearest || distance(*nearest) > 4096) what += " beyond all operands and shared arrays";
    else if (at + size > nearest->start && at < nearest->start + nearest->bytes) what += " across an end of " + std::string(nearest->name);
    else
        what += " beyond " + std::string(nearest->name) + ": " +
                (at < nearest->start ? std::to_string(nearest->start - at) + " bytes before its start" : std::to_string(at - nearest->start - nearest->bytes) + " bytes after its end");
    fail(what + " by thread " + std::to_string(state.current) + text(code));
}

[[noreturn]] static void race(const Region &region, uintptr_t at, const char *what, unsigned other, const void *code) {
    fail("a race: thread " + std::to_string(state.current) + " " + what + " " + element(region, at) + ", thread " + std::to_string(other) + ", and nothing puts them in order" +
         text(code));
}

static bool in_order_with(unsigned thread, uint32_t time) {
    return thread == state.current || (thread / LANES == state.current / LANES && ordered[state.current][thread % LANES] > time);
}

// Whether what an earlier block did at `then` is done for the current block.
static bool block_in_order(uint32_t then) {
    if (then >= block_epoch || then < launch_epoch) return true;
    auto at = std::upper_bound(blocks.begin(), blocks.end(), then, [](uint32_t then, const auto &block) { return then < block.first; });
    return acquired && (at - 1)->second;
}

static inline void check_cell(const Region &region, Cell &cell, uintptr_t at, bool write, bool is_atomic, const void *code) {
    const uint32_t time = warp_time[state.current / LANES];
    const uint16_t warp = state.current / LANES, lane = state.current % LANES;
    bool both_atomic = is_atomic && cell.writer & ATOMIC;
    if (cell.write_epoch == epoch) {
        unsigned writer = cell.writer & ~ATOMIC;
        if (!both_atomic && !in_order_with(writer, cell.write_time)) race(region, at, write ? "writes what another thread writes, " : "reads what another thread writes, ", writer, code);
    } else if (!region.shared && !both_atomic && !block_in_order(cell.write_epoch)) {
        fail("a race: two blocks, one of them writing, at " + element(region, at) + text(code));
    }
    if (!write || is_atomic) {
        const char *unwritten = nullptr;
        if (region.shared && cell.write_epoch < block_epoch) unwritten = ", which the block has not written, by thread ";
        uint64_t content; // the guards allow for 8 bytes of any element
        std::memcpy(&content, reinterpret_cast<const void *>(at), sizeof content);
        if ((content & region.mask) == region.mark) unwritten = ", which nothing has written, by thread ";
        if (unwritten) fail("a read of " + element(region, at) + unwritten + std::to_string(state.current) + text(code));
    }
    if (!write) {
        if (cell.read_epoch != epoch) {
            cell.read_epoch = epoch;
            cell.read_warp = warp;
            cell.readers = 1u << lane;
        } else if (cell.read_warp != warp) {
            cell.read_warp = MANY_WARPS;
        } else {
            bool all_seen = true;
            for (uint32_t others = cell.readers & ~(1u << lane); others && all_seen; others &= others - 1)
                all_seen = ordered[state.current][__builtin_ctz(others)] > cell.read_time;
            cell.readers = (all_seen ? 0 : cell.readers) | 1u << lane;
        }
        cell.read_time = time;
        return;
    }
    if (cell.read_epoch == epoch) {
        const char *what = "writes what another thread reads, ";
        if (cell.read_warp == MANY_WARPS) race(region, at, what, (state.current + LANES) % state.threads, code);
        for (uint32_t readers = cell.readers; readers; readers &= readers - 1) {
            unsigned reader = cell.read_warp * LANES + __builtin_ctz(readers);
            if (!in_order_with(reader, cell.read_time)) race(region, at, what, reader, code);
        }
    } else if (!region.shared && !is_atomic && !block_in_order(cell.read_epoch)) {
        fail("a race: a block writes what another block reads, " + element(region, at) + text(code));
    }
    cell.write_epoch = epoch;
    cell.write_time = time;
    cell.writer = state.current | (is_atomic ? ATOMIC : 0);
}

static void check_access(uintptr_t at, size_t size, bool write, bool is_atomic, const void *code) {
    if (at - state.stack < STACK) return;
    if (regions.empty()) outside(at, size, write, code);
    Region *region = recent;
    if (at - region->start >= region->bytes) {
        auto next = std::upper_bound(regions.begin(), regions.end(), at, [](uintptr_t at, const Region &other) { return at < other.start; });
        if (next == regions.begin() || at - (next - 1)->start >= (next - 1)->bytes) {
            if (!write && at >= image_start && at < image_end) return;
            outside(at, size, write, code);
        }
        recent = region = &*(next - 1);
    }
    size_t offset = at - region->start;
    if (size > region->bytes - offset || (write && !region->writable)) outside(at, size, write, code);
    if (!region->writable) return;
    size_t first = offset >> region->shift, last = (offset + size - 1) >> region->shift;
    for (size_t i = first; i <= last; ++i) check_cell(*region, region->cells[i], region->start + (i << region->shift), write, is_atomic, code);
}

void check(const void *at, size_t size, bool write, const void *code) { check_access(reinterpret_cast<uintptr_t>(at), size, write, false, code); }

void fence() { state.fibers[state.current].fenced = true; }

void atomic(const void *at, size_t size) {
    if (reinterpret_cast<uintptr_t>(at) % size) fail("an atomic operation on an address that is no multiple of its bytes");
    check_access(reinterpret_cast<uintptr_t>(at), size, true, true, __builtin_return_address(0));
    acquired = true;
    if (state.fibers[state.current].fenced) blocks.back().second = true;
}

} // namespace emulator

// The thread sanitizer's hooks.
#define HOOKS(size)                                                                                                                                     \
    extern "C" void __tsan_read##size(void *at) { emulator::check(at, size, false, __builtin_return_address(0)); }                                      \
    extern "C" void __tsan_write##size(void *at) { emulator::check(at, size, true, __builtin_return_address(0)); }                                      \
    extern "C" void __tsan_unaligned_read##size(void *at) { emulator::check(at, size, false, __builtin_return_address(0)); }                            \
    extern "C" void __tsan_unaligned_write##size(void *at) { emulator::check(at, size, true, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void *at, size_t size) { emulator::check(at, size, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void *at, size_t size) { emulator::check(at, size, true, __builtin_return_address(0)); }
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
// Clang's copies and fills.
extern "C" void *__tsan_memcpy(void *to, const void *from, size_t size) {
    if (size) emulator::check(from, size, false, __builtin_return_address(0)), emulator::check(to, size, true, __builtin_return_address(0));
    return std::memcpy(to, from, size);
}
extern "C" void *__tsan_memset(void *to, int value, size_t size) {
    if (size) emulator::check(to, size, true, __builtin_return_address(0));
    return std::memset(to, value, size);
}

// The undefined-behaviour sanitizer's handlers; what they are given begins with the place in the source.
namespace {
struct Location {
    const char *file;
    unsigned line, column;
};
} // namespace
#define HANDLER(name, what, ...)                                                                                                                        \
    extern "C" void __ubsan_handle_##name(const Location *location, ##__VA_ARGS__) { emulator::fail_at(what, {location->file, location->line}); }
HANDLER(type_mismatch_v1, "an access to an address that is no multiple of its type's alignment", void *)
HANDLER(out_of_bounds, "an index beyond an array's bounds", void *)
HANDLER(shift_out_of_bounds, "a shift by more than the type has bits", void *, void *)
HANDLER(divrem_overflow, "a division by zero or out of range", void *, void *)
HANDLER(float_cast_overflow, "a conversion to an integer that the value does not fit", void *)
