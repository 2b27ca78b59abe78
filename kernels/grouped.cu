// Products of matrices of different shapes in one launch, with plain multiplications and additions in the matrices' own type, and what
// becomes of each on its way out.
//
// A block of threads computes one tile of one product. Tiles of both operands lie in shared memory by rows of k, those of the coming k
// loaded while those at hand are multiplied. The warps divide the tile's columns and the k at hand, so that a small tile has enough of
// them; their sums are added up in order at the end.
#include "mma.cuh"
#include "step.cuh"

constexpr u32 WARPS = STEP_THREADS / WARP;

// `kind`
constexpr u32 A_TURNED = 1, B_TURNED = 2;
constexpr u32 SCALED = 4; // by `other`; else only the inner product with it is wanted

struct ProductItem {
    const void *a;     // [groups, m, k], or turned [groups, k, m]
    const void *b;     // [groups, k, n], or turned [groups, n, k]
    void *out;         // [groups, m, n]
    const void *other; // [groups, m, n], or null
    double *sums;      // a partial sum a tile: of product^2 other where that scales, else of product other
    u32 m, n, k;
    u32 first, blocks;
    u32 kind;
};

struct ProductArgs {
    ProductItem items[TABLE];
    u32 count, pad;
};

// Elements that are read at once.
template <class T> struct __align__(16) Wide {
    static constexpr u32 COUNT = 16 / sizeof(T);
    T x[COUNT];
};

// Rows of k in shared memory at once: with more of them, small tiles take longer than what they wait for.
template <class T, u32 TILE> constexpr u32 BK = TILE == 32 && sizeof(T) == 4 ? 64 : 32;

// A row of a tile with padding: keeps the rows on 16 bytes, and apart in their banks what `load` and `put_down` write at once.
template <class T, u32 TILE> constexpr u32 ROW = TILE + 16 / sizeof(T);

// `count` rows of k and `width` columns from `from` on, zeros beyond, which lie `step` apart: rows, or, turned, columns.
template <class T, u32 TILE> DEVICE void load(T *tile, const T *from, bool turned, u32 step, u32 count, u32 width) {
    if (!turned) {
        constexpr u32 LINES = STEP_THREADS / TILE;
        const u32 column = threadIdx.x % TILE, row = threadIdx.x / TILE;
        tile += row * ROW<T, TILE> + column, from += (u64)row * step + column;
#pragma unroll
        for (u32 i = 0; i < BK<T, TILE>; i += LINES)
            copy_async<sizeof(T)>(tile + i * ROW<T, TILE>, from + (u64)i * step, row + i < count && column < width);
    } else {
        // A warp reads 8 neighbours of 4 columns, and writes them to banks of their own.
        constexpr u32 COLUMNS = STEP_THREADS / 8;
        const u32 row = threadIdx.x % 8, column = threadIdx.x / 8;
        tile += row * ROW<T, TILE> + column, from += (u64)column * step + row;
#pragma unroll
        for (u32 j = 0; j < TILE; j += COLUMNS)
#pragma unroll
            for (u32 i = 0; i < BK<T, TILE>; i += 8)
                copy_async<sizeof(T)>(tile + i * ROW<T, TILE> + j, from + (u64)j * step + i,
                                      row + i < count && column + j < width);
    }
}

// A warp's sums: TILE rows of WIDTH columns, M x 4 a thread, over its part of k. A thread of eight rows takes three reads for 32
// multiplications, one of four rows two for 16; in f64 each is two.
template <class T, u32 TILE> struct Sums {
    static constexpr u32 V = Wide<T>::COUNT, M = sizeof(T) == 4 ? 8 : 4, N = 4;
    static constexpr u32 ROWS = TILE / M, COLUMNS = WARP / ROWS, WIDTH = COLUMNS * N;
    static constexpr u32 PARTS = WARPS / (TILE / WIDTH), K = BK<T, TILE> / PARTS;
    T sums[M][N];
    u32 row, column, part;
    bool active;

    // `width` columns of the tile are wanted.
    DEVICE void start(u32 width) {
        // Of eight lanes in a row, two read different rows and four different columns.
        const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, from = warp % (TILE / WIDTH) * WIDTH;
        row = (lane / (2 * COLUMNS) * 2 + lane % 2) * V;
        column = from + lane / 2 % COLUMNS * V;
        part = warp / (TILE / WIDTH);
        active = from < width;
#pragma unroll
        for (u32 i = 0; i < M; ++i)
#pragma unroll
            for (u32 j = 0; j < N; ++j) sums[i][j] = 0;
    }

    static DEVICE constexpr u32 row_of(u32 i) { return i / V * ROWS * V + i % V; }
    static DEVICE constexpr u32 column_of(u32 j) { return j / V * COLUMNS * V + j % V; }

    // With `count` rows of k.
    DEVICE void add(const T *a, const T *b, u32 count) {
        if (!active || part * K >= count) return;
        a += part * K * ROW<T, TILE> + row, b += part * K * ROW<T, TILE> + column;
#pragma unroll 4
        for (u32 k = 0; k < K; ++k, a += ROW<T, TILE>, b += ROW<T, TILE>) {
            Wide<T> left[M / V], right[N / V];
#pragma unroll
            for (u32 i = 0; i < M; i += V) left[i / V] = *reinterpret_cast<const Wide<T> *>(a + row_of(i));
#pragma unroll
            for (u32 j = 0; j < N; j += V) right[j / V] = *reinterpret_cast<const Wide<T> *>(b + column_of(j));
#pragma unroll
            for (u32 i = 0; i < M; ++i)
#pragma unroll
                for (u32 j = 0; j < N; ++j) sums[i][j] += left[i / V].x[i % V] * right[j / V].x[j % V];
        }
    }

    // The sums of each part, TILE rows of it.
    DEVICE void put_down(T *scratch) const {
        scratch += (part * TILE + row) * ROW<T, TILE> + column;
#pragma unroll
        for (u32 i = 0; i < M; ++i)
#pragma unroll
            for (u32 j = 0; j < N; j += V) {
                Wide<T> wide;
#pragma unroll
                for (u32 q = 0; q < V; ++q) wide.x[q] = sums[i][j + q];
                *reinterpret_cast<Wide<T> *>(scratch + row_of(i) * ROW<T, TILE> + column_of(j)) = wide;
            }
    }

    static DEVICE T total(const T *scratch, u32 i, u32 j) {
        T sum = 0;
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part) sum += scratch[(part * TILE + i) * ROW<T, TILE> + j];
        return sum;
    }
};

template <class T, u32 TILE> DEVICE void products(const ProductArgs &p) {
    using S = Sums<T, TILE>;
    // Two tiles of each operand, and at the end the sums of all parts.
    constexpr u32 K = BK<T, TILE>, SIZE = K * ROW<T, TILE>;
    static_assert(S::PARTS * TILE <= 4 * K, "the sums have no room");
    SHARED_ALIGNED(T, tiles, 4 * SIZE);
    SHARED(double, slots, WARPS);

    const ProductItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    const u32 m = item.m, n = item.n, k = item.k, kind = item.kind;
    const u32 rows = (m + TILE - 1) / TILE, columns = (n + TILE - 1) / TILE;
    const u32 block = blockIdx.x - item.first, group = block / (rows * columns), at = block % (rows * columns);
    const u32 i0 = at / columns * TILE, j0 = at % columns * TILE;
    const bool a_turned = kind & A_TURNED, b_turned = kind & B_TURNED;
    const T *a = static_cast<const T *>(item.a) + (u64)group * m * k + (a_turned ? i0 : (u64)i0 * k);
    const T *b = static_cast<const T *>(item.b) + (u64)group * k * n + (b_turned ? (u64)j0 * k : j0);

    auto fetch = [&](u32 chunk) {
        const u32 from = chunk * K;
        T *tile = tiles + chunk % 2 * 2 * SIZE;
        // As it lies, a row of `a` has one i and all k: turned, as the tile sees it.
        load<T, TILE>(tile, a + (a_turned ? (u64)from * m : from), !a_turned, a_turned ? m : k, k - from, m - i0);
        load<T, TILE>(tile + SIZE, b + (b_turned ? from : (u64)from * n), b_turned, b_turned ? k : n, k - from, n - j0);
    };
    S sums;
    sums.start(n - j0);
    const u32 chunks = (k + K - 1) / K;
    if (chunks > 0) fetch(0);
    for (u32 chunk = 0; chunk < chunks; ++chunk) {
        wait_for_copies();
        __syncthreads();
        if (chunk + 1 < chunks) fetch(chunk + 1);
        const T *tile = tiles + chunk % 2 * 2 * SIZE;
        sums.add(tile, tile + SIZE, k - chunk * K);
    }
    __syncthreads();
    sums.put_down(tiles);
    __syncthreads();

    const T *other = static_cast<const T *>(item.other);
    T *out = static_cast<T *>(item.out);
    T share = 0;
    for (u32 e = threadIdx.x; e < TILE * TILE; e += STEP_THREADS) {
        const u32 i = i0 + e / TILE, j = j0 + e % TILE;
        if (i >= m || j >= n) continue;
        const u64 to = ((u64)group * m + i) * n + j;
        T x = S::total(tiles, e / TILE, e % TILE);
        if (other) {
            const T by = other[to];
            share += kind & SCALED ? x * by * x : x * by;
            if (kind & SCALED) x *= by;
        }
        out[to] = x;
    }
    if (!other) return;
    const double sum = block_sum<double>(share, slots);
    if (threadIdx.x == 0) item.sums[block] = sum;
}

template <class T> DEVICE void small_tiles(const ProductArgs &p) { products<T, 32>(p); }
DEVICE void large_tiles(const ProductArgs &p) { products<float, 64>(p); }

KERNEL(products_32_f32, STEP_THREADS, ProductArgs, small_tiles<float>)
KERNEL(products_32_f64, STEP_THREADS, ProductArgs, small_tiles<double>)
KERNEL(products_64_f32, STEP_THREADS, ProductArgs, large_tiles)
