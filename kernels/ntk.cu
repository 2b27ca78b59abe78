// A layer's part of a neural tangent kernel, and its trace against another matrix, from the inner products of gradients and of inputs.
//
// Rows and columns are pairs (example, output), `each` outputs an example. Of a layer without shared positions the kernel is
//
//     k[(n, c), (m, d)] = (weight inputs[n, m] + bias) grads[(n, c), (m, d)]
//
// A launch works on `rows` rows from `first` on and on the columns 0 .. `columns`.
#include "common.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / WARP;

struct NtkArgs {
    void *m;            // [size, size]
    const void *grads;  // [rows, columns]
    const void *inputs; // [rows / each, columns / each], or null: 1
    double *partial;    // [blocks, 2]; of the traces
    u64 size, first, rows, columns, each;
    double weight, bias;
};

// m += k
template <class T> DEVICE void ntk_add(const NtkArgs &p) {
    const T *grads = static_cast<const T *>(p.grads), *inputs = static_cast<const T *>(p.inputs);
    T *m = static_cast<T *>(p.m);
    const u64 across = p.columns / p.each;
    for (u64 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const u64 column = (u64)blockIdx.x * THREADS + threadIdx.x;
        if (column >= p.columns) continue;
        const T input = inputs ? inputs[row / p.each * across + column / p.each] : T(1);
        m[(p.first + row) * p.size + column] += (T(p.weight) * input + T(p.bias)) * grads[row * p.columns + column];
    }
}

KERNEL(ntk_add_f32, 256, NtkArgs, ntk_add<float>)
KERNEL(ntk_add_f64, 256, NtkArgs, ntk_add<double>)

// The sums over the symmetric matrices, of which only what is not above the diagonal is read, of m grads inputs and of m grads.
template <class T> DEVICE void ntk_trace(const NtkArgs &p) {
    SHARED(double, slots, WARPS);
    const T *grads = static_cast<const T *>(p.grads), *inputs = static_cast<const T *>(p.inputs);
    const T *m = static_cast<const T *>(p.m);
    const u64 across = p.columns / p.each;
    double of_weight = 0, of_bias = 0;
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const u64 end = min(p.columns, p.first + row + 1);
        for (u64 column = threadIdx.x; column < end; column += THREADS) {
            const double input = inputs ? inputs[row / p.each * across + column / p.each] : T(1);
            const double twice = column == p.first + row ? 1 : 2;
            const double both = twice * m[(p.first + row) * p.size + column] * grads[row * p.columns + column];
            of_weight += both * input;
            of_bias += both;
        }
    }
    of_weight = block_sum(of_weight, slots);
    of_bias = block_sum(of_bias, slots);
    if (threadIdx.x == 0) {
        p.partial[2 * blockIdx.x] = of_weight;
        p.partial[2 * blockIdx.x + 1] = of_bias;
    }
}

KERNEL(ntk_trace_f32, 256, NtkArgs, ntk_trace<float>)
KERNEL(ntk_trace_f64, 256, NtkArgs, ntk_trace<double>)
