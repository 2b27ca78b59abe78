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
    bool finite = true;
    T slope = 0;
    each_stage_of(item, [&](const Stage &stage) {
        T g[STAGES];
        fetch_as(item.gradient, item.type, stage, g);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) finite = finite && isfinite(g[j]);
        if (!out) return;
        u64 at[STAGES];
        T theta[STAGES], means[STAGES], carries[STAGES], lasts[STAGES];
        places_of(item.place, stage, at);
        fetch(value, stage, theta);
        fetch(rho > 0 ? mean : nullptr, at, stage.in, means);
        fetch(carry, at, stage.in, carries);
        fetch(last, at, stage.in, lasts);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            if (value) g[j] += in_loss * theta[j];
            if (gradient_out) gradient_out[at[j]] = g[j];
            if (last) slope += lasts[j] * g[j];
            T m = g[j];
            if (mean && rho > 0) m = (1 - rho) * g[j] + rho * means[j];
            if (model) model[at[j]] = m;
            if (carry) m -= wake * carries[j];
            if (value) m += after_wake * theta[j];
            out[at[j]] = m;
        }
    });
    if (!finite) atomicMin(&p.flags[CULPRIT], item.index);
    const double sum = block_sum<double>(slope, sums);
    if (threadIdx.x == 0) p.slopes[blockIdx.x] = sum;
}

KERNEL(wake_f32, STEP_THREADS, WakeArgs, wake<float>)
KERNEL(wake_f64, STEP_THREADS, WakeArgs, wake<double>)
