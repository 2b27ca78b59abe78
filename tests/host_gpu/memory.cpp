// Memory with guards behind it that nobody may write; fresh and freed memory is full of NaN.
#include "host_gpu.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace host_gpu {

constexpr size_t GUARD = 256;
constexpr unsigned char NOTHING = 0xff, FENCE = 0xa5;
std::map<uint64_t, Memory> memory;
// Freed memory is kept for a while, so that who still uses it finds nothing there.
static std::deque<std::pair<void *, size_t>> kept;
static size_t kept_bytes = 0;

size_t used = 0, reserved = 0, threshold = 0;

void trim() { reserved = std::max(used, std::min(reserved, threshold)); }

size_t all_memory() {
    static const char *set = std::getenv("KRONWAKE_HOST_GPU_MEMORY");
    static const size_t bytes = set ? std::strtoull(set, nullptr, 10) : size_t(64) << 30;
    return bytes;
}

uint64_t allocate(size_t bytes, Graph *graph) {
    if (bytes > all_memory() - used) return 0;
    void *at = std::aligned_alloc(512, (bytes + GUARD + 511) / 512 * 512);
    if (!at) return 0;
    std::memset(at, NOTHING, bytes);
    std::memset(static_cast<char *>(at) + bytes, FENCE, GUARD);
    memory[reinterpret_cast<uint64_t>(at)] = {bytes, graph};
    used += bytes;
    reserved = std::max(used, reserved);
    return reinterpret_cast<uint64_t>(at);
}

void blank(uint64_t at, size_t bytes) {
    auto *first = reinterpret_cast<unsigned char *>(at);
    for (size_t i = 0; i < GUARD; ++i)
        if (first[bytes + i] != FENCE) {
            fail("a write beyond an allocation of " + std::to_string(bytes) + " bytes");
            break;
        }
    std::memset(first, NOTHING, bytes);
}

void release(uint64_t at, size_t bytes) {
    blank(at, bytes);
    memory.erase(at);
    used -= bytes;
    kept.push_back({reinterpret_cast<void *>(at), bytes});
    kept_bytes += bytes;
    while (kept_bytes > size_t(1) << 28) {
        std::free(kept.front().first);
        kept_bytes -= kept.front().second;
        kept.pop_front();
    }
}

bool inside(uint64_t at, size_t bytes, const char *what) {
    if (bytes == 0) return true;
    auto after = memory.upper_bound(at);
    if (after != memory.begin()) {
        auto &[start, block] = *std::prev(after);
        if (at + bytes <= start + block.bytes && !block.freed) return true;
    }
    fail(std::string(what) + " of memory that is not allocated");
    return false;
}

} // namespace host_gpu
