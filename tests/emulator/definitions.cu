// What the emulator's CUDA computes, for comparison with its definition.
#include "common.cuh"

struct ConvertArgs {
    const void *from;
    void *to;
    u64 len;
};

template <class From, class To> DEVICE void convert(const ConvertArgs &p) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.len) static_cast<To *>(p.to)[i] = narrow<To>(widen(static_cast<const From *>(p.from)[i]));
}
#define CONVERT(from, to) convert<from, to>
KERNEL(widen_f16, 256, ConvertArgs, CONVERT(__half, float))
KERNEL(widen_bf16, 256, ConvertArgs, CONVERT(__nv_bfloat16, float))
KERNEL(narrow_f16, 256, ConvertArgs, CONVERT(float, __half))
KERNEL(narrow_bf16, 256, ConvertArgs, CONVERT(float, __nv_bfloat16))

// What each lane gets, for the operations shfl, xor, down, up, ballot, any and all, with `operand` the same or each lane's own.
struct WarpArgs {
    const u32 *operand; // one a lane
    u32 *out;
    u32 operation;
    u32 width;
};

DEVICE void warp_operations(const WarpArgs &p) {
    u32 lane = threadIdx.x, b = p.operand[lane], value = lane * 3 + 7;
    switch (p.operation) {
    case 0: value = __shfl_sync(ALL_LANES, value, (int)b, (int)p.width); break;
    case 1: value = __shfl_xor_sync(ALL_LANES, value, (int)b, (int)p.width); break;
    case 2: value = __shfl_down_sync(ALL_LANES, value, b, (int)p.width); break;
    case 3: value = __shfl_up_sync(ALL_LANES, value, b, (int)p.width); break;
    case 4: value = __ballot_sync(ALL_LANES, (int)b); break;
    case 5: value = __any_sync(ALL_LANES, (int)b) ? 1 : 0; break;
    default: value = __all_sync(ALL_LANES, (int)b) ? 1 : 0;
    }
    p.out[lane] = value;
}
KERNEL(warp_operation, 32, WarpArgs, warp_operations)
