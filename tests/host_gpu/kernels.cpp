// Kernels as C++ on the emulator's fibers. Which file has them is found by the names in a module's PTX, which also says what they take.
#include "host_gpu.h"

#include "emulator.h"

#include <cstdio>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <regex>
#include <sstream>

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

namespace host_gpu {

// A kernel: its function on the host, and the classes of its parameters ('i': up to 8 bytes in an integer register, 'f' and 'd': in a
// floating-point register, 's': a struct, which is ours).
struct Kernel {
    void *function = nullptr;
    std::string name, classes;
    std::vector<size_t> sizes;
    unsigned most_threads = 1024;
    bool meets = true;
};
Module::~Module() = default;

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

Module *load(const char *ptx) {
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

int launch(Kernel *kernel, const unsigned (&blocks)[3], unsigned threads, void **params, Stream *stream) {
    const unsigned gx = blocks[0], gy = blocks[1], gz = blocks[2];
    if (threads == 0 || threads > kernel->most_threads || !gx || !gy || !gz || gx > 0x7fffffffu || gy > 65535 || gz > 65535) {
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
    queue(stream, [=] {
        if (state()) return;
        if (!kernel->meets) return run_plain(*launch, {gx, gy, gz}, threads);
        unsigned grid[3] = {gx, gy, gz};
        if (const char *error = emulate(call, launch.get(), sizeof(Launch), grid, threads, nullptr, 0, 0))
            fail("kernel " + kernel->name + ": " + error);
    });
    return state();
}

} // namespace host_gpu
