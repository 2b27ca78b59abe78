// Sums of the products of two tiles' features over their rows, a tile of a matrix for each block, on tensor cores or without.
//
// Sums of f32 take three TF32 products of the high and low parts of the numbers, which loses about as little as f32 does, or one.
#pragma once
#include "tiles.cuh"

// Fragments of f32 numbers: whole, to be split, or rounded to TF32.
template <bool SPLIT_> struct Single {
    using T = float;
    static constexpr u32 K = 8;
    static constexpr bool SPLIT = SPLIT_;
    static DEVICE u32 word(float x) { return SPLIT ? __float_as_uint(x) : nearest_tf32(x); }
    template <class C> static DEVICE void load_a(u32 (&a)[4], const float *tile) {
        u32 lane = threadIdx.x % WARP;
        const float *from = tile + lane % 4 * C::ROW + lane / 4 * C::FEATURE;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) a[i] = word(from[i / 2 * 4 * C::ROW + i % 2 * 8 * C::FEATURE]);
    }
    template <class C> static DEVICE void load_b(u32 (&b)[2][2], const float *tile) {
        u32 lane = threadIdx.x % WARP;
        const float *from = tile + lane % 4 * C::ROW + lane / 4 * C::FEATURE;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) b[i / 2][i % 2] = word(from[i % 2 * 4 * C::ROW + i / 2 * 8 * C::FEATURE]);
    }
    static DEVICE void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_tf32(d, a, b); }
};

// Fragments of f16 or bf16 numbers.
template <class T_> struct Half {
    using T = T_;
    static constexpr u32 K = 16;
    static constexpr bool SPLIT = false;
    // Lane `8 i + r` finds row `r`, or feature `r`, of matrix `i`: those from feature `f` and row `k` on.
    template <class C> static DEVICE void load(u32 (&words)[4], const T *tile, u32 f, u32 k) {
        u32 r = threadIdx.x % 8;
        if constexpr (C::BY_ROWS)
            load_matrices<true>(words, tile + (k + r) * C::ROW + f);
        else
            load_matrices<false>(words, tile + (f + r) * C::FEATURE + k);
    }
    template <class C> static DEVICE void load_a(u32 (&a)[4], const T *tile) {
        u32 i = threadIdx.x % WARP / 8;
        load<C>(a, tile, i % 2 * 8, i / 2 * 8);
    }
    template <class C> static DEVICE void load_b(u32 (&b)[2][2], const T *tile) {
        u32 i = threadIdx.x % WARP / 8, words[4];
        load<C>(words, tile, i / 2 * 8, i % 2 * 8);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) b[j / 2][j % 2] = words[j];
    }
    static DEVICE void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_16<T>(d, a, b); }
};

// A block's sums on tensor cores: the tile is divided among WM x WN warps, the rows at hand among WK.
template <class Op, bool BY_ROWS_, u32 TILE_, u32 BK_, u32 WM, u32 WN, u32 WK>
struct TensorSums : Tile<typename Op::T, BY_ROWS_, TILE_, BK_, WARP * WM * WN * WK> {
    using Base = Tile<typename Op::T, BY_ROWS_, TILE_, BK_, WARP * WM * WN * WK>;
    using typename Base::T;
    using Base::BK, Base::FEATURE, Base::ROW, Base::THREADS, Base::TILE;
    using A = float;
    static constexpr u32 M = TILE / WM, N = TILE / WN, MI = M / 16, NI = N / 8;
    // What `each` needs of the tiles' memory.
    static constexpr u32 SCRATCH = WK > 1 ? WK * TILE * TILE * sizeof(float) : 0;
    // A single tile is on the diagonal, and what lies above it is not needed.
    static constexpr bool SINGLE = TILE == 32;

    float sums[MI][NI][4];
    u32 row, column, part;
    bool active;

    // `rows` and `columns` of the tile are wanted.
    DEVICE void start(bool diagonal, u32 rows, u32 columns) {
        u32 warp = threadIdx.x / WARP;
        row = warp % (WM * WN) / WN * M;
        column = warp % WN * N;
        part = warp / (WM * WN);
        active = row < rows && column < columns && !(diagonal && column >= row + M);
#pragma unroll
        for (u32 m = 0; m < MI; ++m)
#pragma unroll
            for (u32 n = 0; n < NI; ++n)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) sums[m][n][i] = 0.f;
    }

    static DEVICE constexpr bool wanted(u32 m, u32 n) { return !SINGLE || n * 8 < m * 16 + 16; }

    DEVICE void add(const T *a, const T *b) {
        if (!active) return;
        a += part * (BK / WK) * ROW + row * FEATURE;
        b += part * (BK / WK) * ROW + column * FEATURE;
        if constexpr (Op::SPLIT)
            add_split(a, b);
        else {
#pragma unroll
            for (u32 k = 0; k < BK / WK; k += Op::K) {
                u32 fa[MI][4], fb[NI / 2][2][2];
#pragma unroll
                for (u32 m = 0; m < MI; ++m) Op::template load_a<Base>(fa[m], a + k * ROW + m * 16 * FEATURE);
#pragma unroll
                for (u32 n = 0; n < NI / 2; ++n) Op::template load_b<Base>(fb[n], b + k * ROW + n * 16 * FEATURE);
#pragma unroll
                for (u32 m = 0; m < MI; ++m)
#pragma unroll
                    for (u32 n = 0; n < NI; ++n)
                        if (wanted(m, n)) Op::multiply(sums[m][n], fa[m], fb[n / 2][n % 2]);
            }
        }
    }

    // Tensor cores round their sums towards zero: over many rows that adds up, so that theirs are short, and added to the others by
    // additions that round to nearest.
    DEVICE void add_split(const T *a, const T *b) {
        float few[MI][NI][4] = {};
#pragma unroll
        for (u32 k = 0; k < BK / WK; k += Op::K) {
            u32 a_high[MI][4], a_low[MI][4], b_high[NI / 2][2][2], b_low[NI / 2][2][2];
#pragma unroll
            for (u32 m = 0; m < MI; ++m) {
                Op::template load_a<Base>(a_low[m], a + k * ROW + m * 16 * FEATURE);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) split(a_high[m][i], a_low[m][i]);
            }
#pragma unroll
            for (u32 n = 0; n < NI / 2; ++n) {
                Op::template load_b<Base>(b_low[n], b + k * ROW + n * 16 * FEATURE);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) split(b_high[n][i / 2][i % 2], b_low[n][i / 2][i % 2]);
            }
            // The small products first.
            multiply_all(few, a_low, b_high);
            multiply_all(few, a_high, b_low);
            multiply_all(few, a_high, b_high);
        }
#pragma unroll
        for (u32 m = 0; m < MI; ++m)
#pragma unroll
            for (u32 n = 0; n < NI; ++n)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) sums[m][n][i] += few[m][n][i];
    }

    // The nearest TF32 number, and in `word` what is left: NaN if the number is not finite, so that the sums are not either.
    static DEVICE void split(u32 &high, u32 &word) {
        high = (word + 0x1000u) & 0xffffe000u;
        word = __float_as_uint(__uint_as_float(word) - __uint_as_float(high));
    }

    static DEVICE void multiply_all(float (&d)[MI][NI][4], const u32 (&a)[MI][4], const u32 (&b)[NI / 2][2][2]) {
#pragma unroll
        for (u32 m = 0; m < MI; ++m)
#pragma unroll
            for (u32 n = 0; n < NI; ++n)
                if (wanted(m, n)) Op::multiply(d[m][n], a[m], b[n / 2][n % 2]);
    }

    // `take(i, j, sum)` for every element of the tile that is wanted, and perhaps others.
    template <class Take> DEVICE void each(void *memory, Take take) {
        u32 lane = threadIdx.x % WARP, i0 = row + lane / 4, j0 = column + lane % 4 * 2;
        float *scratch = static_cast<float *>(memory);
        if (WK > 1) __syncthreads();
#pragma unroll
        for (u32 m = 0; m < MI; ++m)
#pragma unroll
            for (u32 n = 0; n < NI; ++n)
#pragma unroll
                for (u32 q = 0; q < 4; ++q) {
                    u32 i = i0 + m * 16 + q / 2 * 8, j = j0 + n * 8 + q % 2;
                    if constexpr (WK > 1)
                        scratch[(part * TILE + i) * TILE + j] = sums[m][n][q];
                    else if (active)
                        take(i, j, sums[m][n][q]);
                }
        if constexpr (WK > 1) {
            __syncthreads();
            for (u32 e = threadIdx.x; e < TILE * TILE; e += THREADS) {
                float sum = 0.f;
#pragma unroll
                for (u32 k = 0; k < WK; ++k) sum += scratch[k * TILE * TILE + e];
                take(e / TILE, e % TILE, sum);
            }
        }
    }
};

// A block's sums without tensor cores: 16 x 16 threads.
template <class T_, bool BY_ROWS_, u32 TILE_, u32 BK_> struct PlainSums : Tile<T_, BY_ROWS_, TILE_, BK_, 256> {
    using Base = Tile<T_, BY_ROWS_, TILE_, BK_, 256>;
    using typename Base::T;
    using Base::BK, Base::FEATURE, Base::ROW, Base::TILE;
    using A = Acc<T>;
    static constexpr u32 N = TILE / 16, SCRATCH = 0;
    static constexpr bool SINGLE = false;
    A sums[N][N];

    DEVICE void start(bool, u32, u32) {
#pragma unroll
        for (u32 i = 0; i < N; ++i)
#pragma unroll
            for (u32 j = 0; j < N; ++j) sums[i][j] = 0;
    }

    DEVICE void add(const T *a, const T *b) {
        a += threadIdx.x / 16 * FEATURE, b += threadIdx.x % 16 * FEATURE;
        for (u32 k = 0; k < BK; ++k) {
            A fa[N], fb[N];
#pragma unroll
            for (u32 i = 0; i < N; ++i) fa[i] = widen(a[k * ROW + i * 16 * FEATURE]), fb[i] = widen(b[k * ROW + i * 16 * FEATURE]);
#pragma unroll
            for (u32 i = 0; i < N; ++i)
#pragma unroll
                for (u32 j = 0; j < N; ++j) sums[i][j] += fa[i] * fb[j];
        }
    }

    template <class Take> DEVICE void each(void *, Take take) {
#pragma unroll
        for (u32 i = 0; i < N; ++i)
#pragma unroll
            for (u32 j = 0; j < N; ++j) take(threadIdx.x / 16 + i * 16, threadIdx.x % 16 + j * 16, sums[i][j]);
    }
};
