// The random numbers of src/ops/rng.rs, bit for bit: Philox 4x32-10.
#pragma once
#include "common.cuh"

struct Words {
    u32 a, b, c, d;
};

// The 128 bits of place `index` in `stream` under `seed`.
DEVICE Words random_bits(u64 seed, u64 stream, u64 index) {
    u32 a = (u32)index, b = (u32)(index >> 32), c = (u32)stream, d = (u32)(stream >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (u32 round = 0; round < 10; ++round) {
        const u32 high0 = __umulhi(0xD2511F53u, a), low0 = 0xD2511F53u * a;
        const u32 high1 = __umulhi(0xCD9E8D57u, c), low1 = 0xCD9E8D57u * c;
        a = high1 ^ b ^ k0;
        b = low1;
        c = high0 ^ d ^ k1;
        d = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {a, b, c, d};
}

// 53 bits as a multiple of 2^-53 in [0, 1).
DEVICE double unit(u32 low, u32 high) {
    return (double)(((u64)high << 32 | low) >> 11) / 9007199254740992.0;
}
