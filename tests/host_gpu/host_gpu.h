// A GPU on the host: what the stand-ins for NVIDIA's libraries share. Work is queued on streams and done as late as the rules of CUDA allow
// (or as early, or in between), so that what is right by luck on one order fails on another.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// What is seen from outside.
#define SHOWN extern "C" __attribute__((visibility("default")))

namespace host_gpu {

enum Result {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_BINARY = 209,
    NEW_PTX = 222,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

// One lock for everything: calls from several threads take turns, as does the work.
extern std::recursive_mutex lock;
#define LOCKED std::lock_guard<std::recursive_mutex> locked(host_gpu::lock)

// What went wrong in work that was queued: every later call says so. `state` is LAUNCH_FAILED then.
void fail(const std::string &what);
int state();

struct Stream;

struct Work {
    std::function<void()> run;
    // What has to be done before: so much of another stream.
    Stream *after = nullptr;
    uint64_t until = 0;
    // What has to be so before, where other processes are waited for.
    std::function<bool()> ready = nullptr;
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

// streams.cpp

std::vector<Stream *> &streams();
Stream *new_stream();
// The stream of a handle, which may be that of the calling thread.
Stream *stream_of(void *handle);
// Queues work, or adds it to the graph that the stream is recorded into; there `recordable` says whether that may be.
bool queue(Stream *stream, std::function<void()> work, bool recordable = true);
// Queues work that is done once `ready` says so. It is asked again and again.
void queue_when(Stream *stream, std::function<bool()> ready, std::function<void()> work);
// Lets what a stream queues from now on wait for so much of another.
void queue_wait(Stream *stream, Stream *after, uint64_t until);
// Does the first `until` of the work that was ever queued on a stream, and what it waits for. Without `wait` it stops where another process
// is waited for, and says false.
bool advance(Stream *stream, uint64_t until, bool wait = true);
// Does all of it. False while the stream is recorded.
bool finish(Stream *stream);

// memory.cpp

struct Memory {
    size_t bytes;
    Graph *graph = nullptr; // that has allocated it
    bool freed = false;     // or will be, once the work queued before it is done
};
extern std::map<uint64_t, Memory> memory;
// Bytes that are in use, and of which there are no more: KRONWAKE_HOST_GPU_MEMORY, 64 GiB unless it is set.
extern size_t used;
size_t all_memory();
// What the pool of memory has from the device, and how much of it stays there when a stream is waited for.
extern size_t reserved, threshold;
void trim();
// 0 where there is none left.
uint64_t allocate(size_t bytes, Graph *graph);
// Makes memory empty, and looks whether somebody wrote beyond it.
void blank(uint64_t at, size_t bytes);
void release(uint64_t at, size_t bytes);
// Whether `bytes` from `at` on lie in an allocation; else a failure.
bool inside(uint64_t at, size_t bytes, const char *what);

// images.cpp

// Ten times the compute capability that the GPU says it has: 90, unless KRONWAKE_HOST_GPU_CAPABILITY is set.
int capability();
// The PTX of what a program has compiled, which says what is in it: PTX as a text, or a file of code for several GPUs with PTX. Or why a
// driver refuses it. Counts what is loaded.
int readable(const void *image, int capability, const char **ptx);

// kernels.cpp

struct Kernel;
struct Module {
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
    ~Module();
};
// The kernels of a PTX text, as the file of the same kernels for the host has them; null if there is none.
Module *load(const char *ptx);
// Queues a launch of `blocks` with `threads` each.
int launch(Kernel *kernel, const unsigned (&blocks)[3], unsigned threads, void **params, Stream *stream);

} // namespace host_gpu
