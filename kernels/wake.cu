// The wake gradients of all parameters: what the preconditioner is applied to, gathered from parameters into matrices.
//
//     g     = gradient (+ wd theta, where decay is a penalty)
//     model = rho_m mean + (1 - rho_m) g          (g before the first step)
//     wake  = model - rho_d (lambda_k / lambda_{k-1}) carry
//     out   = wake (+ wd theta / scale, where decay enters after the wake)
//
// Also the slope <last step, g>, in partial sums, and a flag where a gradient is not finite.
#include "step.cuh"

struct WakeItem {
    const void *gradient;
    const void *value;   // for the decay, or null
    const void *mean;    // and all below in the block's matrix, or null
    const void *carry;
    const void *last;    // the last step
    void *gradient_out;  // g
    void *model;
    void *out;           // null: only the check for finite elements
    u64 len;
    double decay;
    Place place;
    u32 first, type, index, pad;
};

struct WakeArgs {
    WakeItem items[TABLE];
    u32 *flags;
    const double *numbers;
    double *slopes;      // a partial sum a block of threads
    double model_decay;
    double after_wake;   // what wd theta is multiplied by after the wake
    u32 count, in_loss;
};

template <class T> DEVICE void wake(const WakeArgs &p) {
    SHARED(double, sums, STEP_THREADS / WARP);
    const WakeItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    const T *value = static_cast<const T *>(item.value);
    const T *mean = static_cast<const T *>(item.mean);
    const T *carry = static_cast<const T *>(item.carry);
    const T *last = static_cast<const T *>(item.last);
    T *gradient_out = static_cast<T *>(item.gradient_out);
    T *model = static_cast<T *>(item.model);
    T *out = static_cast<T *>(item.out);
    // Before the first step there is no earlier model, and the newest counts whole.
    const T rho = p.numbers[DONE] > 0 ? p.model_decay : 0, wake = p.numbers[WAKE];
    const T in_loss = p.in_loss ? item.decay : 0, after_wake = p.in_loss ? 0 : item.decay * p.after_wake;
    const u64 begin = (u64)(blockIdx.x - item.first) * CHUNK;
    const u64 end = min(begin + CHUNK, item.len);
    bool finite = true;
    T slope = 0;
#pragma unroll 4
    for (u64 i = begin + threadIdx.x; i < end; i += STEP_THREADS) {
        T g = load_as<T>(item.gradient, i, item.type);
        finite = finite && isfinite(g);
        if (!out) continue;
        const u64 at = place_of(item.place, i);
        const T theta = value ? value[i] : 0;
        if (value) g += in_loss * theta;
        if (gradient_out) gradient_out[at] = g;
        if (last) slope += last[at] * g;
        T m = g;
        if (mean && rho > 0) m = (1 - rho) * g + rho * mean[at];
        if (model) model[at] = m;
        if (carry) m -= wake * carry[at];
        if (value) m += after_wake * theta;
        out[at] = m;
    }
    if (!finite) atomicMin(&p.flags[CULPRIT], item.index);
    const double sum = block_sum<double>(slope, sums);
    if (threadIdx.x == 0) p.slopes[blockIdx.x] = sum;
}

KERNEL(wake_f32, STEP_THREADS, WakeArgs, wake<float>)
KERNEL(wake_f64, STEP_THREADS, WakeArgs, wake<double>)
