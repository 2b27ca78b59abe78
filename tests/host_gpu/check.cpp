// That the host GPU shows what it is there to show: missing waits, memory that is used too late or beyond its end, and recordings that a GPU
// would refuse. Built and run by scripts/host-gpu.sh; the orders of work are those of KRONWAKE_HOST_GPU_ORDER=late.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

extern "C" {
int cuStreamCreate(void **, unsigned), cuStreamSynchronize(void *), cuStreamWaitEvent(void *, void *, unsigned);
int cuStreamBeginCapture_v2(void *, int), cuStreamEndCapture(void *, void **);
int cuEventCreate(void **, unsigned), cuEventRecord(void *, void *);
int cuMemAllocAsync(uint64_t *, size_t, void *), cuMemFreeAsync(uint64_t, void *), cuMemsetD8Async(uint64_t, unsigned char, size_t, void *);
int cuMemcpyDtoDAsync_v2(uint64_t, uint64_t, size_t, void *), cuMemcpyHtoDAsync_v2(uint64_t, const void *, size_t, void *);
int cuMemcpyDtoHAsync_v2(void *, uint64_t, size_t, void *), cuMemGetInfo_v2(size_t *, size_t *), cuMemPoolSetAttribute(void *, int, void *);
int cuGraphInstantiateWithFlags(void **, void *, unsigned long long), cuGraphLaunch(void *, void *);
}

static int wrong = 0;
static void check(bool right, const char *what) {
    if (!right) std::printf("wrong: %s\n", what), ++wrong;
}

int main() {
    void *first, *second, *event, *graph, *exec;
    cuStreamCreate(&first, 1), cuStreamCreate(&second, 1), cuEventCreate(&event, 0);
    auto alloc = [](void *stream) {
        uint64_t at;
        return cuMemAllocAsync(&at, 4, stream) ? 0 : at;
    };
    auto number = [](uint64_t at, void *stream) {
        float x;
        return cuMemcpyDtoHAsync_v2(&x, at, 4, stream) ? -1.f : x;
    };
    const float one = 1, two = 2;
    uint64_t a = alloc(first), b = alloc(second);
    check(std::isnan(number(a, first)), "fresh memory is empty");

    cuMemcpyHtoDAsync_v2(a, &one, 4, first);
    cuMemcpyDtoDAsync_v2(b, a, 4, second);
    check(std::isnan(number(b, second)), "a copy that does not wait for another stream finds nothing");
    cuEventRecord(event, first);
    cuStreamWaitEvent(second, event, 0);
    cuMemcpyDtoDAsync_v2(b, a, 4, second);
    check(number(b, second) == 1, "one that waits finds what is there");

    uint64_t c = alloc(first);
    cuMemcpyHtoDAsync_v2(c, &two, 4, first);
    cuStreamSynchronize(first);
    cuMemcpyDtoDAsync_v2(b, c, 4, second);
    cuMemFreeAsync(c, first);
    cuStreamSynchronize(first);
    check(std::isnan(number(b, second)), "memory that is freed before another stream has read it is empty");

    auto in_use = [&] {
        size_t free, total;
        return cuMemGetInfo_v2(&free, &total), total - free;
    };
    for (uint64_t kept : {0, 1 << 20}) {
        cuMemPoolSetAttribute(nullptr, 4, &kept);
        const size_t before = in_use();
        uint64_t large;
        cuMemAllocAsync(&large, 1 << 20, first);
        cuMemFreeAsync(large, first);
        check(in_use() > before, "freed memory belongs to the pool");
        cuStreamSynchronize(first);
        check(in_use() == (kept ? kept : before), "a synchronization leaves it as much as it may keep");
    }

    // A graph repeats its work on what is there, with memory of its own.
    cuMemcpyHtoDAsync_v2(a, &one, 4, first);
    check(cuStreamBeginCapture_v2(first, 1) == 0, "a recording begins");
    uint64_t d = alloc(first);
    cuMemcpyDtoDAsync_v2(d, a, 4, first);
    cuMemcpyDtoDAsync_v2(b, d, 4, first);
    check(cuMemFreeAsync(d, first) == 0, "a recording frees what it has allocated");
    check(cuStreamEndCapture(first, &graph) == 0 && graph, "a recording ends");
    check(cuGraphInstantiateWithFlags(&exec, graph, 1) == 0, "a graph is made");
    check(std::isnan(number(b, first)), "recorded work is not done");
    for (float x : {3.f, 4.f}) {
        cuMemcpyHtoDAsync_v2(a, &x, 4, first);
        cuGraphLaunch(exec, first);
        check(number(b, first) == x, "a launch does the recorded work");
    }

    cuStreamBeginCapture_v2(first, 1);
    check(cuStreamSynchronize(first) != 0, "a recorded stream cannot be waited for");
    check(cuStreamEndCapture(first, &graph) != 0 && !graph, "the recording is broken by that");

    std::fprintf(stderr, "the next message of the host GPU is wanted\n");
    cuMemsetD8Async(a, 0, 5, first);
    check(cuStreamSynchronize(first) != 0, "a setting beyond the end of memory is refused");
    std::printf(wrong ? "%d wrong\n" : "the host GPU shows what it should\n", wrong);
    return wrong != 0;
}
