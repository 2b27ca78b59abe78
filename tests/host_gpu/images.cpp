// Modules as programs bring them. A file of code for several GPUs, as nvcc -fatbin makes it, begins with 16 bytes that say how long it is; its
// parts have headers of their own: the kind and the length of what follows, and the GPU that it is for.
#include "host_gpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace host_gpu {

int capability() {
    static const char *set = std::getenv("KRONWAKE_HOST_GPU_CAPABILITY");
    static const int tenfold = set ? std::atoi(set) : 90;
    return tenfold;
}

template <class T> static T field(const char *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// Files that were loaded for their code, and for their PTX.
static int as_code = 0, as_ptx = 0;

// What a driver of its time can read: KRONWAKE_HOST_GPU_PTX, 8.0 say.
static int compile(const char *ptx) {
    static const char *newest = std::getenv("KRONWAKE_HOST_GPU_PTX");
    const char *version = std::strstr(ptx, ".version ");
    return newest && version && std::atof(version + 9) > std::atof(newest) ? NEW_PTX : OK;
}

int readable(const void *image, int capability, const char **ptx) {
    auto *at = static_cast<const char *>(image);
    if (field<uint32_t>(at) != 0xba55ed50) return compile(*ptx = at);
    constexpr uint16_t PTX = 1, CODE = 2;
    const char *end = at + field<uint16_t>(at + 6) + field<uint64_t>(at + 8);
    bool code = false;
    int target = 0;
    for (at += field<uint16_t>(at + 6); at < end; at += field<uint32_t>(at + 4) + field<uint64_t>(at + 8)) {
        const auto kind = field<uint16_t>(at);
        const auto arch = static_cast<int>(field<uint32_t>(at + 28));
        // Code runs on what has the same first digit and is no older; PTX, on all that is no older.
        if (kind == CODE && arch / 10 == capability / 10 && arch <= capability) code = true;
        if (kind == PTX) *ptx = at + field<uint32_t>(at + 4), target = arch;
        if (field<uint32_t>(at + 16)) *ptx = nullptr;
    }
    if (!*ptx) {
        std::fprintf(stderr, "host GPU: a module has no PTX, or it is compressed\n");
        return NO_BINARY;
    }
    if (code) return ++as_code, OK;
    if (target > capability) return NO_BINARY;
    const int refused = compile(*ptx);
    return refused ? refused : (++as_ptx, OK);
}

} // namespace host_gpu

// For tests.
SHOWN void host_gpu_loaded(int *code, int *ptx) {
    LOCKED;
    *code = host_gpu::as_code, *ptx = host_gpu::as_ptx;
}
