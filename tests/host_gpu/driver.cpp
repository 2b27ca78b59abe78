// The CUDA driver's functions that a program with candle calls. Kernels run as C++ on the emulator's fibers; which file has them is found
// by the names in a module's PTX.
#include "host_gpu.h"

#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dirent.h>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace host_gpu {

enum Result {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_BINARY = 209,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

std::recursive_mutex lock;

struct Work {
    std::function<void()> run;
    // What has to be done before: so much of another stream.
    Stream *after = nullptr;
    uint64_t until = 0;
};

struct Graph {
    std::vector<Work> work;
    // What it has allocated, and whether it is in use after the last launch.
    std::map<uint64_t, bool> memory;
};

struct Stream {
    std::deque<Work> queue;
    uint64_t queued = 0, done = 0;
    Graph *recording = nullptr;
    bool broken = false;
};

struct Event {
    Stream *stream = nullptr;
    uint64_t until = 0;
    Graph *recorded = nullptr;
};

static std::vector<Stream *> &streams() {
    static std::vector<Stream *> all;
    return all;
}

static Stream *new_stream() {
    streams().push_back(new Stream);
    return streams().back();
}

Stream *stream_of(void *handle) {
    static Stream *legacy = new_stream();
    static thread_local Stream *own = nullptr;
    switch (reinterpret_cast<uintptr_t>(handle)) {
    case 0:
    case 1:
        return legacy;
    case 2:
        if (!own) own = new_stream();
        return own;
    }
    return static_cast<Stream *>(handle);
}

static void advance(Stream *stream, uint64_t until) {
    while (stream->done < until) {
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (work.after) advance(work.after, work.until);
        if (work.run) work.run();
        ++stream->done;
    }
}

// When queued work is done, unless somebody waits for it: KRONWAKE_HOST_GPU_ORDER = late, early, or a number that any order follows from.
static void some_work() {
    static const char *order = std::getenv("KRONWAKE_HOST_GPU_ORDER");
    static const bool late = !order || !std::strcmp(order, "late"), early = !late && !std::strcmp(order, "early");
    static std::mt19937_64 random(late || early ? 0 : std::strtoull(order, nullptr, 10));
    if (late) return;
    if (early) {
        for (Stream *stream : streams()) advance(stream, stream->queued);
    } else if (random() % 4 == 0) {
        Stream *stream = streams()[random() % streams().size()];
        advance(stream, stream->done + random() % (stream->queued - stream->done + 1));
    }
}

static bool add(Stream *stream, Work work) {
    if (stream->recording) {
        stream->recording->work.push_back(std::move(work));
        return true;
    }
    stream->queue.push_back(std::move(work));
    ++stream->queued;
    some_work();
    return true;
}

bool queue(Stream *stream, std::function<void()> work, bool recordable) {
    if (stream->recording && !recordable) {
        stream->broken = true;
        return false;
    }
    return add(stream, {std::move(work)});
}

bool finish(Stream *stream) {
    if (stream->recording) {
        stream->broken = true;
        return false;
    }
    advance(stream, stream->queued);
    return true;
}

// What went wrong in a kernel; every later call says so.
static std::string failure;

static int state() { return failure.empty() ? OK : LAUNCH_FAILED; }

static void fail(const std::string &what) {
    if (failure.empty()) std::fprintf(stderr, "host GPU: %s\n", what.c_str());
    failure = what;
}

// Memory, with guards behind it that nobody may write.
constexpr size_t GUARD = 256;
constexpr unsigned char NOTHING = 0xff, FENCE = 0xa5;
struct Memory {
    size_t bytes;
    Graph *graph = nullptr; // that has allocated it
    bool freed = false;     // or will be, once the work queued before it is done
};
static std::map<uint64_t, Memory> memory;
// Freed memory is kept for a while, so that who still uses it finds nothing there.
static std::deque<std::pair<void *, size_t>> kept;
static size_t kept_bytes = 0;

static uint64_t allocate(size_t bytes, Graph *graph) {
    void *at = std::aligned_alloc(512, (bytes + GUARD + 511) / 512 * 512);
    if (!at) return 0;
    std::memset(at, NOTHING, bytes);
    std::memset(static_cast<char *>(at) + bytes, FENCE, GUARD);
    memory[reinterpret_cast<uint64_t>(at)] = {bytes, graph};
    return reinterpret_cast<uint64_t>(at);
}

static void blank(uint64_t at, size_t bytes) {
    auto *first = reinterpret_cast<unsigned char *>(at);
    for (size_t i = 0; i < GUARD; ++i)
        if (first[bytes + i] != FENCE) {
            fail("a write beyond an allocation of " + std::to_string(bytes) + " bytes");
            break;
        }
    std::memset(first, NOTHING, bytes);
}

static void release(uint64_t at, size_t bytes) {
    blank(at, bytes);
    memory.erase(at);
    kept.push_back({reinterpret_cast<void *>(at), bytes});
    kept_bytes += bytes;
    while (kept_bytes > size_t(1) << 28) {
        std::free(kept.front().first);
        kept_bytes -= kept.front().second;
        kept.pop_front();
    }
}

// The allocation that `bytes` from `at` on lie in, or a failure.
static bool inside(uint64_t at, size_t bytes, const char *what) {
    if (bytes == 0) return true;
    auto after = memory.upper_bound(at);
    if (after != memory.begin()) {
        auto &[start, block] = *std::prev(after);
        if (at + bytes <= start + block.bytes && !block.freed) return true;
    }
    fail(std::string(what) + " of memory that is not allocated");
    return false;
}

// A kernel: its function on the host, and the classes of its parameters ('i': up to 8 bytes in an integer register, 'f' and 'd': in a
// floating-point register, 's': a struct, which is ours).
struct Kernel {
    void *function = nullptr;
    std::string name, classes;
    std::vector<size_t> sizes;
    unsigned most_threads = 1024;
    bool meets = true;
};
struct Module {
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

// Kernels for the host, and whether their threads wait for one another.
struct File {
    void *library;
    bool meets;
};

static bool has_any(const std::string &text, std::initializer_list<const char *> words) {
    for (const char *word : words)
        if (text.find(word) != std::string::npos) return true;
    return false;
}

static std::vector<File> load_kernels() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void *>(load_kernels), &info)) return {};
    std::string folder(info.dli_fname);
    folder = folder.substr(0, folder.rfind('/')) + "/kernels";
    std::vector<File> all;
    if (DIR *dir = opendir(folder.c_str())) {
        while (dirent *entry = readdir(dir)) {
            if (!std::strstr(entry->d_name, ".so")) continue;
            std::string path = folder + "/" + entry->d_name;
            std::ifstream file(path, std::ios::binary);
            std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
            bool meets = has_any(content, {"host_gpu_barrier", "host_gpu_exchange", "emulator7barrier", "emulator4meet"});
            if (void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) all.push_back({library, meets});
            else std::fprintf(stderr, "host GPU: %s\n", dlerror());
        }
        closedir(dir);
    }
    return all;
}

// The kernels of a PTX text, as the file of the same kernels for the host has them.
static Module *load(const char *ptx) {
    static const std::vector<File> files = load_kernels();
    static const std::regex entry("\\.entry\\s+(\\w+)\\s*\\(([^)]*)\\)"), array("\\[(\\d+)\\]\\s*$"), type("\\.param\\s+(?:\\.align\\s+\\d+\\s+)?\\.([a-z]+)(\\d+)");
    auto module = std::make_unique<Module>();
    std::string text(ptx);
    for (std::sregex_iterator at(text.begin(), text.end(), entry), end; at != end; ++at) {
        auto kernel = std::make_unique<Kernel>();
        kernel->name = (*at)[1];
        std::istringstream params((*at)[2]);
        for (std::string param; std::getline(params, param, ',');) {
            std::smatch kind, count;
            if (!std::regex_search(param, kind, type)) continue;
            size_t size = std::stoul(kind[2]) / 8;
            bool many = std::regex_search(param, count, array);
            if (many) size *= std::stoul(count[1]);
            kernel->sizes.push_back(size);
            kernel->classes += kind[1] == "f" ? (size == 4 ? 'f' : 'd') : size > 8 ? 's' : 'i';
        }
        module->kernels[kernel->name] = std::move(kernel);
    }
    for (auto [library, meets] : files) {
        bool all = true;
        for (auto &[name, kernel] : module->kernels) {
            kernel->function = dlsym(library, name.c_str());
            all = all && kernel->function;
        }
        if (!all) continue;
        for (auto &[name, kernel] : module->kernels) {
            // Ours say what they take.
            auto *size = static_cast<size_t *>(dlsym(library, (name + "_size").c_str()));
            auto *threads = static_cast<unsigned *>(dlsym(library, (name + "_threads").c_str()));
            if (threads) kernel->most_threads = *threads;
            kernel->meets = meets;
            if (size && kernel->sizes != std::vector<size_t>{*size}) {
                std::fprintf(stderr, "host GPU: kernel %s takes %zu bytes on the host\n", name.c_str(), *size);
                return nullptr;
            }
        }
        return module.release();
    }
    std::fprintf(stderr, "host GPU: no file has the %zu kernels of a module\n", module->kernels.size());
    return nullptr;
}

// A launch as its fibers see it.
struct Launch {
    const Kernel *kernel;
    std::vector<std::vector<char>> values;
    uint64_t integers[26] = {};
    double floats[8] = {};
};

// Calls a function with integers and floating-point numbers each in their registers, and integers beyond on the stack.
#if defined(__aarch64__)
#define MORE uint64_t, uint64_t,
#define GIVE_MORE i[6], i[7],
constexpr unsigned REGISTERS = 8;
#else
#define MORE
#define GIVE_MORE
constexpr unsigned REGISTERS = 6;
#endif
static void call(const void *args) {
    const Launch &launch = *static_cast<const Launch *>(args);
    if (launch.kernel->classes == "s") {
        reinterpret_cast<void (*)(const void *)>(launch.kernel->function)(launch.values[0].data());
        return;
    }
    using U = uint64_t;
    using D = double;
    const U *i = launch.integers, *s = launch.integers + REGISTERS;
    const D *f = launch.floats;
    using Function = void (*)(U, U, U, U, U, U, MORE D, D, D, D, D, D, D, D, U, U, U, U, U, U, U, U, U, U, U, U);
    reinterpret_cast<Function>(launch.kernel->function)(i[0], i[1], i[2], i[3], i[4], i[5], GIVE_MORE f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7],
                                                        s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]);
}

// Threads that never wait take turns without fibers.
static void run_plain(const Launch &launch, dim3 grid, unsigned threads) {
    auto &state = emulator::state;
    state.grid = grid;
    state.threads = threads;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                state.block_index = {x, y, z};
                for (state.current = 0; state.current < threads; ++state.current) call(&launch);
            }
}

} // namespace host_gpu

// emulator.cpp
struct Operand;
extern "C" const char *emulate(void (*kernel)(const void *), const void *args, size_t args_size, const unsigned *grid, unsigned threads,
                               const Operand *operands, size_t count, unsigned order);

// What checks.cpp does for the tests of single kernels is not done here.
namespace emulator {
void begin_launch(const Region *, size_t) {}
void begin_block() {}
void end_phase() {}
void meet_memory(unsigned, unsigned) {}
void add_shared(const char *, void *, size_t, size_t) {}
void check(const void *, size_t, bool, const void *) {}
void fence() {}
void atomic(const void *, size_t) {}
} // namespace emulator

using namespace host_gpu;

// For candle.h.
SHOWN unsigned host_gpu_thread() { return emulator::thread(); }
SHOWN dim3 host_gpu_block() { return emulator::state.block_index; }
SHOWN dim3 host_gpu_threads() { return {emulator::threads(), 1, 1}; }
SHOWN dim3 host_gpu_blocks() { return emulator::state.grid; }
SHOWN void host_gpu_barrier() { emulator::barrier(0, {"candle", 0}); }
SHOWN void host_gpu_exchange(unsigned mask, const void *value, void *all, size_t size) { emulator::meet(mask, value, all, size, true, {"candle", 0}); }
SHOWN unsigned host_gpu_lane() { return emulator::lane(); }

SHOWN int cuInit(unsigned) { return OK; }
SHOWN int cuGetErrorString(int error, const char **text) {
    *text = error == LAUNCH_FAILED              ? "a kernel on the host GPU failed"
            : error == CAPTURE_UNSUPPORTED      ? "the stream is recorded, which this call does not go with"
            : error == CAPTURE_INVALIDATED      ? "the recording was broken by an earlier call"
            : error == NO_BINARY                ? "no kernels for the host GPU"
                                                : "refused by the host GPU";
    return OK;
}
SHOWN int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? OK : 101;
}
SHOWN int cuDeviceGetAttribute(int *value, int attribute, int) {
    const std::map<int, int> known = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 0x7fffffff}, {6, 65535}, {7, 65535}, {8, 49152},
                                      {10, 32},  {16, 4},   {41, 1},   {75, 9}, {76, 0},         {115, 1}};
    auto found = known.find(attribute);
    *value = found == known.end() ? 0 : found->second;
    return OK;
}
static int context;
static thread_local void *current = nullptr;
SHOWN int cuDevicePrimaryCtxRetain(void **made, int) { return *made = &context, OK; }
SHOWN int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
SHOWN int cuCtxSetCurrent(void *wanted) { return current = wanted, OK; }
SHOWN int cuCtxGetCurrent(void **found) { return *found = current, OK; }
SHOWN int cuCtxDestroy_v2(void *) { return OK; }
SHOWN int cuCtxSynchronize() {
    LOCKED;
    for (Stream *stream : streams())
        if (!stream->recording) advance(stream, stream->queued);
    return state();
}

SHOWN int cuStreamCreate(void **made, unsigned) {
    LOCKED;
    return *made = new_stream(), OK;
}
// Streams stay: events may still name them.
SHOWN int cuStreamDestroy_v2(void *) { return OK; }
SHOWN int cuStreamSynchronize(void *handle) {
    LOCKED;
    return finish(stream_of(handle)) ? state() : CAPTURE_UNSUPPORTED;
}
SHOWN int cuStreamWaitEvent(void *handle, void *event, unsigned) {
    LOCKED;
    auto *on = static_cast<Event *>(event);
    Stream *stream = stream_of(handle);
    if (stream->recording || on->recorded) {
        // Within one recording the order is that of the calls.
        if (stream->recording == on->recorded) return OK;
        if (stream->recording) stream->broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    if (on->stream && on->stream != stream) add(stream, {nullptr, on->stream, on->until});
    return OK;
}
SHOWN int cuStreamIsCapturing(void *handle, int *status) {
    LOCKED;
    Stream *stream = stream_of(handle);
    *status = !stream->recording ? 0 : stream->broken ? 2 : 1;
    return OK;
}
SHOWN int cuStreamBeginCapture_v2(void *handle, int) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (stream->recording) return INVALID_VALUE;
    stream->recording = new Graph;
    stream->broken = false;
    return OK;
}
SHOWN int cuStreamEndCapture(void *handle, void **graph) {
    LOCKED;
    Stream *stream = stream_of(handle);
    *graph = stream->broken ? nullptr : stream->recording;
    stream->recording = nullptr;
    return stream->broken ? CAPTURE_INVALIDATED : OK;
}
SHOWN int cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long flags) {
    // Only with memory that a launch frees by itself can a graph be launched again and again.
    return *made = graph, flags == 1 ? OK : INVALID_VALUE;
}
SHOWN int cuGraphDestroy(void *) { return OK; }
SHOWN int cuGraphExecDestroy(void *) { return OK; }
SHOWN int cuGraphLaunch(void *exec, void *handle) {
    LOCKED;
    auto *graph = static_cast<Graph *>(exec);
    for (auto &[at, used] : graph->memory) memory[at].freed = false;
    bool queued = queue(stream_of(handle), [graph] {
        for (auto &[at, used] : graph->memory) blank(at, memory[at].bytes);
        for (Work &work : graph->work)
            if (work.run) work.run();
    }, false);
    return queued ? state() : CAPTURE_UNSUPPORTED;
}

SHOWN int cuEventCreate(void **made, unsigned) { return *made = new Event, OK; }
SHOWN int cuEventDestroy_v2(void *event) {
    LOCKED;
    delete static_cast<Event *>(event);
    return OK;
}
SHOWN int cuEventRecord(void *event, void *handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    *static_cast<Event *>(event) = {stream, stream->queued, stream->recording};
    return OK;
}

SHOWN int cuMemAllocAsync(uint64_t *made, size_t bytes, void *handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    *made = allocate(bytes, stream->recording);
    if (!*made) return OUT_OF_MEMORY;
    if (stream->recording) stream->recording->memory[*made] = true;
    return state();
}
SHOWN int cuMemAlloc_v2(uint64_t *made, size_t bytes) {
    LOCKED;
    *made = allocate(bytes, nullptr);
    return *made ? state() : OUT_OF_MEMORY;
}
SHOWN int cuMemFreeAsync(uint64_t at, void *handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    auto found = memory.find(at);
    if (found == memory.end() || found->second.freed) {
        fail("memory is freed that is not allocated");
        return INVALID_VALUE;
    }
    Graph *graph = found->second.graph;
    size_t bytes = found->second.bytes;
    if (stream->recording && stream->recording != graph) {
        // A recording may free only what it has allocated.
        fail("memory from before a recording is freed in it");
        stream->broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    // Its graph's next launch makes it usable again.
    found->second.freed = !stream->recording;
    queue(stream, [=] { graph ? blank(at, bytes) : release(at, bytes); });
    return state();
}
SHOWN int cuMemFree_v2(uint64_t at) {
    LOCKED;
    cuCtxSynchronize();
    auto found = memory.find(at);
    if (found == memory.end()) return INVALID_VALUE;
    release(at, found->second.bytes);
    return state();
}
SHOWN int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = *total = size_t(64) << 30, OK; }
SHOWN int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void *handle) {
    LOCKED;
    inside(at, bytes, "a setting");
    queue(stream_of(handle), [=] { std::memset(reinterpret_cast<void *>(at), value, bytes); });
    return state();
}
static int copy(uint64_t to, uint64_t from, size_t bytes, void *handle) {
    LOCKED;
    inside(to, bytes, "a copy to a place");
    inside(from, bytes, "a copy");
    queue(stream_of(handle), [=] { std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
    return state();
}
SHOWN int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) { return copy(to, from, bytes, stream); }
SHOWN int cuMemcpyPeerAsync(uint64_t to, void *, uint64_t from, void *, size_t bytes, void *stream) { return copy(to, from, bytes, stream); }
SHOWN int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *handle) {
    LOCKED;
    inside(to, bytes, "a copy to a place");
    // The host's memory is read before this returns; a recording would read it again later, when it may be gone.
    auto *first = static_cast<const char *>(from);
    auto data = std::make_shared<std::vector<char>>(first, first + bytes);
    bool queued = queue(stream_of(handle), [=] { std::memcpy(reinterpret_cast<void *>(to), data->data(), bytes); }, false);
    if (!queued) fail("a copy from the host in a recording");
    return queued ? state() : CAPTURE_UNSUPPORTED;
}
SHOWN int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *handle) {
    LOCKED;
    inside(from, bytes, "a copy");
    if (!finish(stream_of(handle))) return CAPTURE_UNSUPPORTED;
    std::memcpy(to, reinterpret_cast<void *>(from), bytes);
    return state();
}

SHOWN int cuModuleLoad(void **, const char *) { return NOT_FOUND; }
SHOWN int cuModuleLoadData(void **made, const void *image) {
    LOCKED;
    return (*made = load(static_cast<const char *>(image))) ? OK : NO_BINARY;
}
SHOWN int cuModuleUnload(void *) { return OK; }
SHOWN int cuModuleGetFunction(void **made, void *module, const char *name) {
    LOCKED;
    auto &kernels = static_cast<Module *>(module)->kernels;
    auto found = kernels.find(name);
    return found == kernels.end() ? NOT_FOUND : (*made = found->second.get(), OK);
}
SHOWN int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *handle,
                         void **params, void **) {
    LOCKED;
    auto *kernel = static_cast<Kernel *>(function);
    if (by != 1 || bz != 1 || shared) {
        fail("kernel " + kernel->name + ": blocks with planes of threads or with dynamic shared memory are not done on the host");
        return INVALID_VALUE;
    }
    if (bx == 0 || bx > kernel->most_threads || !gx || !gy || !gz || gx > 0x7fffffffu || gy > 65535 || gz > 65535) {
        std::fprintf(stderr, "host GPU: kernel %s: a launch that a GPU refuses\n", kernel->name.c_str());
        return INVALID_VALUE;
    }
    auto launch = std::make_shared<Launch>();
    launch->kernel = kernel;
    size_t integers = 0, floats = 0;
    for (size_t p = 0; p < kernel->sizes.size(); ++p) {
        auto *value = static_cast<const char *>(params[p]);
        launch->values.emplace_back(value, value + kernel->sizes[p]);
        bool number = kernel->classes[p] == 'f' || kernel->classes[p] == 'd';
        if (kernel->classes[p] == 's') continue;
        if ((number && floats == 8) || (!number && integers == REGISTERS + 12)) {
            fail("kernel " + kernel->name + " takes more than the host GPU can pass");
            return INVALID_VALUE;
        }
        void *slot = number ? static_cast<void *>(&launch->floats[floats++]) : &launch->integers[integers++];
        std::memcpy(slot, value, kernel->sizes[p]);
    }
    queue(stream_of(handle), [=] {
        if (!failure.empty()) return;
        if (!kernel->meets) return run_plain(*launch, {gx, gy, gz}, bx);
        unsigned grid[3] = {gx, gy, gz};
        if (const char *error = emulate(call, launch.get(), sizeof(Launch), grid, bx, nullptr, 0, 0))
            fail("kernel " + kernel->name + ": " + error);
    });
    return state();
}
