// NVIDIA's NCCL between processes that have a GPU on the host each. They meet in files of a folder: what a rank gives to a group of messages is
// one file, written when the work is done that was queued before. As in the library, a communicator that does not block queues a group some time
// after the call, adds in the order of a ring, and waits without end for a rank that does not come, until it is aborted.
// KRONWAKE_HOST_NCCL_FAULT=KIND:RANK:GROUP makes a rank die, hang or fail in a group of messages, which are counted from 1.
#include "host_gpu.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sys/stat.h>
#include <unistd.h>

using namespace host_gpu;

namespace {

enum Code { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum Kind { ALL_REDUCE, REDUCE, BROADCAST };

struct Id {
    char folder[128];
};

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

// As it lies in a file: without addresses and without gaps.
struct Shape {
    size_t count;
    int64_t kind;
    int type, root;
};

struct Op {
    Shape shape;
    uint64_t from, to;
};

struct Comm {
    std::string folder;
    int rank, size;
    int error = SUCCESS;
    bool met = false, aborted = false, written = false;
    uint64_t groups = 0;
    // Of the last group, until it is queued, and how often was asked.
    std::vector<Op> pending;
    Stream *stream = nullptr;
    int asked = 0;

    std::string file(const std::string &name, int of) const { return folder + "/" + name + "." + std::to_string(of); }
    bool all_have(const std::string &name) const {
        struct stat found;
        for (int of = 0; of < size; ++of)
            if (stat(file(name, of).c_str(), &found)) return false;
        return true;
    }
    void write(const std::string &name, const std::string &bytes) const {
        std::string whole = file(name, rank), part = whole + ".part";
        std::ofstream(part, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
        std::rename(part.c_str(), whole.c_str());
    }
    // Whether this rank has such a fault in the group that it begins.
    bool fault(const char *kind, uint64_t group) const {
        const char *set = std::getenv("KRONWAKE_HOST_NCCL_FAULT");
        return set && set == kind + (":" + std::to_string(rank)) + ":" + std::to_string(group);
    }
};

std::map<void *, std::shared_ptr<Comm>> comms;
thread_local std::vector<Op> group;
thread_local Comm *group_of = nullptr;
thread_local Stream *group_on = nullptr;
thread_local int depth = 0;

size_t bytes_of(int type) {
    const std::map<int, size_t> known = {{1, 1}, {6, 2}, {7, 4}, {8, 8}, {9, 2}};
    auto found = known.find(type);
    return found == known.end() ? 0 : found->second;
}

double read(const char *at, int type) {
    if (type == 7) return *reinterpret_cast<const float *>(at);
    if (type == 8) return *reinterpret_cast<const double *>(at);
    if (type == 1) return *reinterpret_cast<const unsigned char *>(at);
    uint32_t wide = uint32_t(*reinterpret_cast<const uint16_t *>(at)) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

void store(char *at, int type, double value) {
    if (type == 8) *reinterpret_cast<double *>(at) = value;
    if (type == 1) *reinterpret_cast<unsigned char *>(at) = static_cast<unsigned char>(value);
    float single = static_cast<float>(value);
    if (type == 7) *reinterpret_cast<float *>(at) = single;
    if (type != 9) return;
    uint32_t wide;
    std::memcpy(&wide, &single, 4);
    // To the nearest, ties to even; what is not finite has no mantissa to round.
    if ((wide & 0x7f800000) != 0x7f800000) wide += 0x7fff + (wide >> 16 & 1);
    *reinterpret_cast<uint16_t *>(at) = uint16_t(wide >> 16);
}

// The sum of the ranks' elements, from a rank on that differs from piece to piece, each partial sum rounded.
void sum(char *to, const std::vector<const char *> &rows, const Shape &shape) {
    size_t width = bytes_of(shape.type), ranks = rows.size();
    for (size_t i = 0; i < shape.count; ++i) {
        char *at = to + i * width;
        size_t first = i / 7 % ranks;
        std::memcpy(at, rows[first] + i * width, width);
        for (size_t k = 1; k < ranks; ++k) {
            double a = read(at, shape.type), b = read(rows[(first + k) % ranks] + i * width, shape.type);
            store(at, shape.type, a + b);
        }
    }
}

bool gives(const Comm &comm, const Shape &shape) { return shape.kind != BROADCAST || shape.root == comm.rank; }

// What a rank gives to a group: the shapes, and the elements.
std::string given(const Comm &comm, const std::vector<Op> &ops) {
    std::string bytes;
    for (const Op &op : ops) bytes.append(reinterpret_cast<const char *>(&op.shape), sizeof(Shape));
    for (const Op &op : ops)
        if (gives(comm, op.shape)) bytes.append(reinterpret_cast<const char *>(op.from), op.shape.count * bytes_of(op.shape.type));
    return bytes;
}

// Does a group that all have come to.
void finish(Comm &comm, const std::vector<Op> &ops, const std::string &name) {
    std::vector<std::string> all;
    std::vector<size_t> at(size_t(comm.size), ops.size() * sizeof(Shape));
    for (int of = 0; of < comm.size; ++of) {
        std::ifstream file(comm.file(name, of), std::ios::binary);
        all.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        const std::string &first = all.front();
        if (all.back().size() < at[0] || std::memcmp(all.back().data(), first.data(), at[0])) {
            comm.error = INVALID_USAGE;
            return host_gpu::fail("NCCL: rank " + std::to_string(of) + " sends other messages in group " + name);
        }
    }
    for (const Op &op : ops) {
        size_t bytes = op.shape.count * bytes_of(op.shape.type);
        std::vector<const char *> rows;
        for (int of = 0; of < comm.size; ++of) {
            bool has = op.shape.kind != BROADCAST || op.shape.root == of;
            if (has) rows.push_back(all[size_t(of)].data() + at[size_t(of)]);
            if (has) at[size_t(of)] += bytes;
        }
        char *to = reinterpret_cast<char *>(op.to);
        if (op.shape.kind == BROADCAST) std::memcpy(to, rows[0], bytes);
        else if (op.shape.kind == ALL_REDUCE || op.shape.root == comm.rank) sum(to, rows, op.shape);
        // Nobody may read there what the library leaves open.
        else std::memset(to, 0xff, bytes);
    }
}

void enqueue(const std::shared_ptr<Comm> &comm) {
    uint64_t number = ++comm->groups;
    auto name = std::to_string(number);
    auto ops = std::make_shared<std::vector<Op>>(std::move(comm->pending));
    comm->pending.clear();
    auto written = std::make_shared<bool>(false);
    auto ready = [=] {
        if (comm->aborted || comm->error != SUCCESS) return comm->aborted;
        if (comm->fault("die", number)) std::raise(SIGKILL);
        if (comm->fault("hang", number)) return false;
        if (comm->fault("fail", number)) return comm->error = REMOTE_ERROR, false;
        if (!*written) comm->write(name, given(*comm, *ops));
        *written = true;
        return comm->all_have(name);
    };
    auto run = [=] {
        if (comm->aborted) return;
        finish(*comm, *ops, name);
        // Who has come to this group has read the last.
        unlink(comm->file(std::to_string(number - 1), comm->rank).c_str());
    };
    queue_when(comm->stream, ready, run);
}

int add(Kind kind, const void *from, void *to, size_t count, int type, int root, void *handle, void *stream) {
    LOCKED;
    auto comm = comms.find(handle);
    size_t bytes = count * bytes_of(type);
    if (comm == comms.end() || !bytes_of(type) || root < 0 || root >= comm->second->size) return INVALID_ARGUMENT;
    if (type == 6 && kind != BROADCAST) return INVALID_ARGUMENT; // not done here
    if (!depth || (group_of && group_of != handle)) return INVALID_USAGE;
    uint64_t source = reinterpret_cast<uint64_t>(from), goal = reinterpret_cast<uint64_t>(to);
    if (!inside(source, bytes, "a message") || !inside(goal, bytes, "a message")) return UNHANDLED_CUDA_ERROR;
    group_of = comm->second.get();
    group_on = stream_of(stream);
    group.push_back({{count, kind, type, root}, source, goal});
    return SUCCESS;
}

} // namespace

SHOWN int ncclGetVersion(int *version) {
    const char *set = std::getenv("KRONWAKE_HOST_NCCL_VERSION");
    return *version = set ? std::atoi(set) : 22800, SUCCESS;
}
SHOWN const char *ncclGetErrorString(int code) {
    return code == REMOTE_ERROR ? "remote process exited or there was a network error" : code == INVALID_USAGE ? "invalid usage" : "refused by the host's NCCL";
}
SHOWN const char *ncclGetLastError(void *) { return ""; }
SHOWN int ncclGetUniqueId(Id *id) {
    const char *set = std::getenv("KRONWAKE_HOST_NCCL");
    std::string folder = std::string(set ? set : "/dev/shm") + "/kronwake-nccl-XXXXXX";
    if (folder.size() >= sizeof(Id) || !mkdtemp(&folder[0])) return SYSTEM_ERROR;
    std::memset(id, 0, sizeof(Id));
    std::memcpy(id->folder, folder.data(), folder.size());
    return SUCCESS;
}
SHOWN int ncclCommInitRankConfig(void **made, int size, Id id, int rank, Config *config) {
    LOCKED;
    // This crate's communicators do not block, and its config is that of 2.17.
    if (config->magic != 0xcafebeef || config->size != 48 || config->version != 21700 || config->blocking != 0) return INVALID_ARGUMENT;
    if (rank < 0 || rank >= size) return INVALID_ARGUMENT;
    auto comm = std::make_shared<Comm>();
    comm->folder = id.folder;
    comm->rank = rank;
    comm->size = size;
    if (comm->fault("fail", 0)) return *made = nullptr, SYSTEM_ERROR;
    comm->write("here", "");
    comms[comm.get()] = comm;
    return *made = comm.get(), IN_PROGRESS;
}
SHOWN int ncclCommGetAsyncError(void *handle, int *error) {
    LOCKED;
    auto found = comms.find(handle);
    if (found == comms.end()) return INVALID_ARGUMENT;
    auto &comm = found->second;
    if (!comm->met) comm->met = comm->all_have("here");
    if (comm->error == SUCCESS && !comm->pending.empty() && ++comm->asked > 2) enqueue(comm);
    *error = comm->error != SUCCESS ? comm->error : !comm->met || !comm->pending.empty() ? IN_PROGRESS : SUCCESS;
    return SUCCESS;
}
SHOWN int ncclGroupStart() { return ++depth, SUCCESS; }
SHOWN int ncclGroupEnd() {
    LOCKED;
    if (--depth || !group_of) return depth < 0 ? INVALID_USAGE : SUCCESS;
    Comm *comm = group_of;
    group_of = nullptr;
    std::vector<Op> ops = std::move(group);
    group.clear();
    // Before the last call is done nothing else may begin.
    if (!comm->met || !comm->pending.empty() || group_on->recording) return INVALID_USAGE;
    comm->pending = std::move(ops);
    comm->stream = group_on;
    comm->asked = 0;
    return IN_PROGRESS;
}
SHOWN int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, void *comm, void *stream) {
    return op ? int(INVALID_ARGUMENT) : add(ALL_REDUCE, from, to, count, type, 0, comm, stream);
}
SHOWN int ncclReduce(const void *from, void *to, size_t count, int type, int op, int root, void *comm, void *stream) {
    return op ? int(INVALID_ARGUMENT) : add(REDUCE, from, to, count, type, root, comm, stream);
}
SHOWN int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *comm, void *stream) {
    return add(BROADCAST, from, to, count, type, root, comm, stream);
}
SHOWN int ncclCommAbort(void *handle) {
    LOCKED;
    auto found = comms.find(handle);
    if (found == comms.end()) return INVALID_ARGUMENT;
    found->second->aborted = true;
    comms.erase(found);
    return SUCCESS;
}
// All that was queued is waited for by those who queued it.
SHOWN int ncclCommFinalize(void *handle) {
    LOCKED;
    return comms.count(handle) ? SUCCESS : INVALID_ARGUMENT;
}
SHOWN int ncclCommDestroy(void *handle) {
    LOCKED;
    auto found = comms.find(handle);
    if (found == comms.end()) return INVALID_ARGUMENT;
    Comm &comm = *found->second;
    comm.write("gone", "");
    if (comm.all_have("gone")) {
        // The last one.
        for (int of = 0; of < comm.size; ++of)
            for (auto name : {std::string("here"), std::string("gone"), std::to_string(comm.groups)}) unlink(comm.file(name, of).c_str());
        rmdir(comm.folder.c_str());
    }
    comms.erase(found);
    return SUCCESS;
}
