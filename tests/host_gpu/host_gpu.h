// A GPU on the host: what the stand-ins for NVIDIA's libraries share. Work is queued on streams and done as late as the rules of CUDA allow
// (or as early, or in between), so that what is right by luck on one order fails on another.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>

namespace host_gpu {

struct Stream;

// One lock for everything: calls from several threads take turns, as does the work.
extern std::recursive_mutex lock;
#define LOCKED std::lock_guard<std::recursive_mutex> locked(host_gpu::lock)

// The stream of a handle, which may be that of the calling thread.
Stream *stream_of(void *handle);

// Queues work. Where the stream is recorded into a graph, `recordable` says whether that may be.
bool queue(Stream *stream, std::function<void()> work, bool recordable = true);

// Does all that is queued on a stream, and what it waits for. False while the stream is recorded.
bool finish(Stream *stream);

} // namespace host_gpu

// What is seen from outside.
#define SHOWN extern "C" __attribute__((visibility("default")))
