// Queues of work, and when it is done.
#include "host_gpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <unistd.h>

namespace host_gpu {

std::recursive_mutex lock;

static std::string failure;

int state() { return failure.empty() ? OK : LAUNCH_FAILED; }

void fail(const std::string &what) {
    if (failure.empty()) std::fprintf(stderr, "host GPU: %s\n", what.c_str());
    failure = what;
}

std::vector<Stream *> &streams() {
    static std::vector<Stream *> all;
    return all;
}

Stream *new_stream() {
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

bool advance(Stream *stream, uint64_t until, bool wait) {
    while (stream->done < until) {
        Work &next = stream->queue.front();
        if (next.after && !advance(next.after, next.until, wait)) return false;
        while (next.ready && !next.ready()) {
            if (!wait) return false;
            usleep(50);
        }
        Work work = std::move(next);
        stream->queue.pop_front();
        if (work.run) work.run();
        ++stream->done;
    }
    return true;
}

// When queued work is done, unless somebody waits for it: KRONWAKE_HOST_GPU_ORDER = late, early, or a number that any order follows from.
static void some_work() {
    static const char *order = std::getenv("KRONWAKE_HOST_GPU_ORDER");
    static const bool late = !order || !std::strcmp(order, "late"), early = !late && !std::strcmp(order, "early");
    static std::mt19937_64 random(late || early ? 0 : std::strtoull(order, nullptr, 10));
    if (late) return;
    if (early) {
        for (Stream *stream : streams()) advance(stream, stream->queued, false);
    } else if (random() % 4 == 0) {
        Stream *stream = streams()[random() % streams().size()];
        advance(stream, stream->done + random() % (stream->queued - stream->done + 1), false);
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
    return add(stream, {std::move(work), nullptr, 0, nullptr});
}

void queue_when(Stream *stream, std::function<bool()> ready, std::function<void()> work) {
    add(stream, {std::move(work), nullptr, 0, std::move(ready)});
}

bool finish(Stream *stream) {
    if (stream->recording) {
        stream->broken = true;
        return false;
    }
    advance(stream, stream->queued);
    trim();
    return true;
}

void queue_wait(Stream *stream, Stream *after, uint64_t until) { add(stream, {nullptr, after, until, nullptr}); }

} // namespace host_gpu
