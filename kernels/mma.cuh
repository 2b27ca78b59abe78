// Tensor-core products of a warp, and copies into shared memory that run beside the arithmetic, on devices of compute capability
// 8.0 and later.
//
// A fragment is a word of 32 bits per register: one f32 whose low 13 bits the tensor cores ignore (TF32), or two numbers of
// 16 bits, the one of the even row in the low half. With `lane = 4 g + t`, the words of one product are
//     a[0] = A[g][t]   a[1] = A[g + 8][t]   a[2] = A[g][t + 4]   a[3] = A[g + 8][t + 4]     A: 16 rows of 8 words
//     b[0] = B[t][g]   b[1] = B[t + 4][g]                                                   B: 8 words by 8 columns
//     d[0] = D[g][2 t] d[1] = D[g][2 t + 1] d[2] = D[g + 8][2 t] d[3] = D[g + 8][2 t + 1]   D: 16 by 8, in f32
// (PTX ISA, "Warp-level matrix instructions", m16n8k8 for .tf32 and m16n8k16 for .f16 and .bf16).
#pragma once
#include "common.cuh"

#ifdef KRONWAKE_EMULATE

namespace emulator {

struct Words {
    u32 a[4], b[2];
};

// A sum as the tensor cores leave it: towards zero.
inline float truncated(double sum) {
    float value = (float)sum;
    return std::fabs((double)value) > std::fabs(sum) ? std::nextafter(value, 0.f) : value;
}

// D += A B with `dot(word of A, word of B)` for the products of two words.
template <class Dot> void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Dot dot) {
    Words own, all[32];
    std::memcpy(own.a, a, sizeof a);
    std::memcpy(own.b, b, sizeof b);
    exchange(ALL_LANES, own, all);
    u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 4; ++i) {
        u32 upper = i / 2, column = 2 * t + i % 2;
        double sum = d[i];
        for (u32 k = 0; k < 8; ++k) sum += dot(all[4 * g + k % 4].a[upper + k / 4 * 2], all[4 * column + k % 4].b[k / 4]);
        d[i] = truncated(sum);
    }
}

template <class T> double dot16(u32 a, u32 b) {
    double sum = 0;
    for (u32 half = 0; half < 2; ++half)
        sum += (double)widen(T{(uint16_t)(a >> 16 * half)}) * widen(T{(uint16_t)(b >> 16 * half)});
    return sum;
}

} // namespace emulator

DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    auto seen = [](u32 word) { return (double)__uint_as_float(word & 0xffffe000u); };
    emulator::mma(d, a, b, [&](u32 a, u32 b) { return seen(a) * seen(b); });
}
template <class T> DEVICE void mma_16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma(d, a, b, emulator::dot16<T>);
}

DEVICE u32 nearest_tf32(float x) {
    u32 bits = __float_as_uint(x);
    return isnan(x) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <bool TRANSPOSED> DEVICE void load_matrices(u32 (&words)[4], const void *row) {
    const void *rows[32];
    emulator::exchange(ALL_LANES, row, rows);
    u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a row of a matrix that begins on no multiple of 16 bytes");
    for (u32 i = 0; i < 4; ++i) {
        auto at = [&](u32 k, u32 j) { return (u32)static_cast<const uint16_t *>(rows[8 * i + k])[j]; };
        words[i] = TRANSPOSED ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}

template <u32 BYTES> DEVICE void copy_async(void *to, const void *from, bool inside) {
    emulator::copy_async(to, inside ? from : nullptr, BYTES);
}
DEVICE void wait_for_copies() { emulator::wait_for_copies(); }

#else

// D += A B in TF32.
DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D += A B in f16 or bf16.
template <class T> DEVICE void mma_16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> DEVICE void mma_16<__half>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> DEVICE void mma_16<__nv_bfloat16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of the nearest number that TF32 has.
DEVICE u32 nearest_tf32(float x) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// Four 8 by 8 matrices of 16-bit numbers in shared memory: lane `8 i + k` gives where row `k` of matrix `i` begins, on 16 bytes, and
// gets, of matrix `i`, row `g` at columns `2 t` and `2 t + 1`; of its transpose, if it is to be transposed.
template <bool TRANSPOSED> DEVICE void load_matrices(u32 (&words)[4], const void *row) {
    u32 from = (u32)__cvta_generic_to_shared(row);
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(from)
                     : "memory");
}

// Starts a copy of BYTES (4, 8 or 16) from global to shared memory, both on such an address, or of zeros where not
// `inside`; `from` may then lie anywhere.
template <u32 BYTES> DEVICE void copy_async(void *to, const void *from, bool inside) {
    u32 target = (u32)__cvta_generic_to_shared(to), count = inside ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(count) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(BYTES), "r"(count) : "memory");
}

// Waits for the copies that this thread has started.
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif
