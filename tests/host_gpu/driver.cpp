// The CUDA driver's functions that a program with candle calls.
#include "host_gpu.h"

#include <cstdlib>
#include <cstring>

using namespace host_gpu;

SHOWN int cuInit(unsigned) { return OK; }
SHOWN int cuGetErrorString(int error, const char **text) {
    *text = error == LAUNCH_FAILED              ? "a kernel on the host GPU failed"
            : error == CAPTURE_UNSUPPORTED      ? "the stream is recorded, which this call does not go with"
            : error == CAPTURE_INVALIDATED      ? "the recording was broken by an earlier call"
            : error == NO_BINARY                ? "no kernels for the host GPU"
            : error == NEW_PTX                  ? "the provided PTX was compiled with an unsupported toolchain."
            : error == OUT_OF_MEMORY            ? "out of memory"
                                                : "refused by the host GPU";
    return OK;
}
// How many GPUs there are: one, unless KRONWAKE_HOST_GPUS says more. A process uses one of them.
static int gpus() {
    static const char *set = std::getenv("KRONWAKE_HOST_GPUS");
    return set ? std::atoi(set) : 1;
}
SHOWN int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < gpus() ? OK : 101;
}
SHOWN int cuDeviceGetAttribute(int *value, int attribute, int) {
    const std::map<int, int> known = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 0x7fffffff}, {6, 65535}, {7, 65535}, {8, 49152},
                                      {10, 32},  {16, 4},   {41, 1},   {75, capability() / 10}, {76, capability() % 10}, {115, 1}};
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
    trim();
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
    if (on->stream && on->stream != stream) queue_wait(stream, on->stream, on->until);
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

SHOWN int cuEventQuery(void *handle) {
    LOCKED;
    auto *event = static_cast<Event *>(handle);
    bool done = !event->stream || advance(event->stream, event->until, false);
    return done ? state() : NOT_READY;
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
SHOWN int cuMemGetInfo_v2(size_t *free, size_t *total) {
    LOCKED;
    return *total = all_memory(), *free = *total - reserved, OK;
}
SHOWN int cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = &threshold, OK; }
// CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, _RESERVED_MEM_CURRENT, _USED_MEM_CURRENT
SHOWN int cuMemPoolSetAttribute(void *, int attribute, void *value) {
    LOCKED;
    return attribute == 4 ? (threshold = *static_cast<uint64_t *>(value), OK) : INVALID_VALUE;
}
SHOWN int cuMemPoolGetAttribute(void *, int attribute, void *value) {
    LOCKED;
    const std::map<int, size_t> known = {{4, threshold}, {5, reserved}, {7, used}};
    auto found = known.find(attribute);
    return found == known.end() ? INVALID_VALUE : (*static_cast<uint64_t *>(value) = found->second, OK);
}
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
static uint64_t bytes_to_host = 0;
// For tests that count them.
SHOWN uint64_t hostGpuBytesToHost() { return bytes_to_host; }
SHOWN int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *handle) {
    LOCKED;
    bytes_to_host += bytes;
    inside(from, bytes, "a copy");
    if (!finish(stream_of(handle))) return CAPTURE_UNSUPPORTED;
    std::memcpy(to, reinterpret_cast<void *>(from), bytes);
    return state();
}

SHOWN int cuModuleLoad(void **, const char *) { return NOT_FOUND; }
SHOWN int cuModuleLoadData(void **made, const void *image) {
    LOCKED;
    const char *ptx = nullptr;
    if (int refused = readable(image, capability(), &ptx)) return refused;
    return (*made = load(ptx)) ? OK : NO_BINARY;
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
    if (by != 1 || bz != 1 || shared) {
        fail("a launch with planes of threads or with dynamic shared memory, which are not done on the host");
        return INVALID_VALUE;
    }
    return launch(static_cast<Kernel *>(function), {gx, gy, gz}, bx, params, stream_of(handle));
}
