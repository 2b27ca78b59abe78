// Tiles of a matrix of rows in shared memory: rows that lie as they are, or the patches of images, which are never stored.
//
// A row is a position of a sample, and its elements are features. By rows, the rows lie one after the other. Else a sample is an
// image [channels, height, width], position `p` is an output of a convolution, and feature `f` is `(channel, ky, kx)` of the
// patch under its kernel; with a kernel of one element that is a sample whose features lie one after the other,
// [features, positions].
#pragma once
#include "divide.cuh"
#include "mma.cuh"

struct Rows {
    const void *x;
    u64 count;
    // Elements from one row to the next by rows, else from one sample to the next.
    u64 step;
    // Elements from one group of features to the next, and features of a group.
    u32 group_step;
    u32 dim;
    // Whether 16 bytes can be read at once: of a row, or of a feature's positions where the kernel has one element.
    u32 wide;
    u32 unused;
    Divisor positions, out_width;
    u32 height, width;
    u32 kernel_height, kernel_width; // at most 31 together
    u32 stride_y, stride_x;
    u32 padding_y, padding_x;
    u32 dilation_y, dilation_x;
};

// A feature of a patch: where it lies from the patch's first element, in bytes, and in which of the kernel's rows (the lowest
// bits) and columns (those above).
struct __align__(8) Tap {
    int offset;
    u32 bits;
};

// The last bit is missing from every patch.
constexpr u32 NOWHERE = 1u << 31;

// A patch: its first element, possibly in the padding, and the kernel's rows and columns that are in the padding.
struct __align__(16) Spot {
    const char *first;
    u32 missing, unused;
};

// `BK` rows of `TILE` features. By rows, neighbours are features; else they are rows. Either way the padding keeps the lanes that
// read the fragments of a product off one another's banks.
template <class T_, bool BY_ROWS_, u32 TILE_, u32 BK_, u32 THREADS_> struct Tile {
    using T = T_;
    static constexpr bool BY_ROWS = BY_ROWS_;
    static constexpr u32 TILE = TILE_, BK = BK_, THREADS = THREADS_, WIDE = 16 / sizeof(T);
    static constexpr u32 PAD = BY_ROWS || sizeof(T) == 2 ? 8 : sizeof(T) == 4 ? 4 : 2;
    // From one row, or feature, to the next.
    static constexpr u32 ROW = BY_ROWS ? TILE + PAD : 1, FEATURE = BY_ROWS ? 1 : BK + PAD;
    static constexpr u32 SIZE = BY_ROWS ? BK * ROW : TILE * FEATURE;
};

template <class T> DEVICE void put(T *to, const T *from, bool inside) {
    if constexpr (sizeof(T) >= 4)
        copy_async<sizeof(T)>(to, from, inside);
    else
        *to = inside ? __ldg(from) : narrow<T>(0.f);
}

// Rows from `from` on, `count` of them, of `features` features; zeros beyond.
template <class C>
DEVICE void load_rows(typename C::T *tile, const typename C::T *from, const Rows &rows, u32 count, u32 features) {
    if (rows.wide) {
        constexpr u32 LINE = C::TILE / C::WIDE, LINES = C::THREADS / LINE;
        u32 f = threadIdx.x % LINE * C::WIDE, k = threadIdx.x / LINE;
        tile += k * C::ROW + f, from += k * rows.step + f;
#pragma unroll
        for (u32 i = 0; i < C::BK; i += LINES)
            copy_async<16>(tile + i * C::ROW, from + i * rows.step, k + i < count && f < features);
    } else {
        constexpr u32 LINES = C::THREADS / C::TILE;
        u32 f = threadIdx.x % C::TILE, k = threadIdx.x / C::TILE;
        tile += k * C::ROW + f, from += k * rows.step + f;
#pragma unroll 8
        for (u32 i = 0; i < C::BK; i += LINES)
            put(tile + i * C::ROW, from + i * rows.step, k + i < count && f < features);
    }
}

// The taps of features `feature` and following.
template <class C> DEVICE void find_taps(Tap *taps, const Rows &rows, u32 feature) {
    u32 area = rows.kernel_height * rows.kernel_width;
    for (u32 i = threadIdx.x; i < C::TILE; i += C::THREADS) {
        u32 f = feature + i, channel = f / area, y = f % area / rows.kernel_width, x = f % rows.kernel_width;
        bool inside = f < rows.dim;
        u32 offset = (channel * rows.height + y * rows.dilation_y) * rows.width + x * rows.dilation_x;
        taps[i].offset = inside ? (int)(offset * sizeof(typename C::T)) : 0;
        taps[i].bits = inside ? 1u << y | 1u << (rows.kernel_height + x) : NOWHERE;
    }
}

// The patches of rows `row` and following, of `count`, counted from `position` of `sample`. The warps take turns at it.
template <class C>
DEVICE void find_spots(Spot *spots, const Rows &rows, u32 group, u64 sample, u32 position, u32 row, u32 count) {
    u32 i = (threadIdx.x - row) % C::THREADS;
    if (i >= C::BK) return;
    u32 at, p, y, x, missing = NOWHERE;
    divide(position + row + i, rows.positions, at, p);
    divide(p, rows.out_width, y, x);
    // In the padding before the image, these are beyond its height or width as unsigned numbers.
    y = y * rows.stride_y - rows.padding_y, x = x * rows.stride_x - rows.padding_x;
    for (u32 k = 0; k < rows.kernel_height; ++k)
        if (y + k * rows.dilation_y >= rows.height) missing |= 1u << k;
    for (u32 k = 0; k < rows.kernel_width; ++k)
        if (x + k * rows.dilation_x >= rows.width) missing |= 1u << (rows.kernel_height + k);
    int64_t element = (int64_t)((sample + at) * rows.step + (u64)group * rows.group_step);
    element += (int64_t)(int)y * rows.width + (int)x;
    spots[i].first = static_cast<const char *>(rows.x) + element * (int64_t)sizeof(typename C::T);
    spots[i].missing = row + i < count ? missing : ~0u;
}

// The patches at `spots`; zeros in the padding, and where there are none.
template <class C> DEVICE void load_patches(typename C::T *tile, const Rows &rows, const Spot *spots, const Tap *taps) {
    using T = typename C::T;
    if (rows.wide) {
        constexpr u32 LINE = C::BK / C::WIDE, LINES = C::THREADS / LINE;
        u32 k = threadIdx.x % LINE * C::WIDE, f = threadIdx.x / LINE;
        const Spot spot = spots[k];
        tile += f * C::FEATURE + k, taps += f;
#pragma unroll
        for (u32 i = 0; i < C::TILE / LINES; ++i) {
            const Tap tap = taps[i * LINES];
            copy_async<16>(tile + i * LINES * C::FEATURE, spot.first + tap.offset, !(tap.bits & spot.missing));
        }
    } else {
        // Lanes go along 8 positions, which mostly are 8 neighbours in memory.
        constexpr u32 LINES = C::THREADS / 8, N = C::TILE / LINES;
        u32 f = threadIdx.x / 8;
        Tap own[N];
#pragma unroll
        for (u32 i = 0; i < N; ++i) own[i] = taps[f + i * LINES];
        tile += f * C::FEATURE;
#pragma unroll 1
        for (u32 k = threadIdx.x % 8; k < C::BK; k += 8) {
            const Spot spot = spots[k];
#pragma unroll
            for (u32 i = 0; i < N; ++i) {
                const T *from = reinterpret_cast<const T *>(spot.first + own[i].offset);
                put(tile + i * LINES * C::FEATURE + k, from, !(own[i].bits & spot.missing));
            }
        }
    }
}
