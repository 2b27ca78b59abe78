// A step's numbers, and the writing of all parameters and of what the next step looks back at.
#include "step.cuh"

// The numbers of a step that the options alone decide. One thread.
struct BeginArgs {
    u32 *flags;
    double *numbers;
    double lr;
    double given;       // 1 / lambda, below 0 where a divergence decides
    double wake_decay;  // rho_d
    double power;       // of the average's weights, below 0 without an average
    double rest_lr;     // of the parameters without a block
    u64 step;           // the step's number
};

DEVICE void prepare(const BeginArgs &p) {
    if (threadIdx.x != 0) return;
    p.flags[CULPRIT] = NOBODY;
    double *n = p.numbers;
    n[LR] = p.lr;
    n[REST_LR] = p.rest_lr;
    n[STEP] = p.step;
    n[GIVEN] = p.given;
    // At a rate of 0 nothing moves, whatever is looked back at; a divergence's rate is taken for constant.
    double ratio = 1;
    if (p.given == 0) ratio = 0;
    else if (p.given > 0 && n[PREVIOUS] >= 0) ratio = n[PREVIOUS] / p.given;
    n[WAKE] = p.wake_decay * ratio;
    n[MIXING] = p.power < 0 ? 0 : (p.power + 1) / (n[DONE] + 1 + p.power);
}

KERNEL(begin, WARP, BeginArgs, prepare)

// The step's length from the inner products of its directions, and whether it is taken. One block of threads.
struct RateArgs {
    u32 *flags;
    double *numbers;
    const double *products;   // <V, w>, one a block
    const double *lr_scales;  // one a block
    const double *slope;      // <last step, g>
    const double *last_slope; // <last step, its own gradient>
    u64 blocks;
    double scale;             // what rates are multiplied by
    double longest;           // the largest rate where a divergence decides
    double longest_by_lr;     // and at a learning rate of 1, in proportion to it
    double beyond;            // how far the length that is kept may lead beyond that
    double rest_share;        // Adam's rate for the rest, times the rate; below 0 where it has one of its own
    double target;            // the divergence of a step at length 1, below 0 where a rate decides
    double slope_aim, pace;   // of the length that follows the slopes; a pace below 0 leaves it
    double kl_clip;           // below 0 without
    u64 skips;                // whether a step that is not finite is left out, and no more
};

DEVICE void decide(const RateArgs &p) {
    SHARED(double, sums, STEP_THREADS / WARP);
    double sum = 0;
    for (u64 b = threadIdx.x; b < p.blocks; b += STEP_THREADS) {
        if (!isfinite(p.products[b])) atomicMin(&p.flags[CULPRIT], BLOCK + (u32)b);
        sum += p.lr_scales[b] * p.lr_scales[b] * p.products[b];
    }
    const double squared = block_sum(sum, sums);
    if (threadIdx.x != 0) return;
    double *n = p.numbers;
    // Where a bad step is an error, nothing moves until the host has reported it.
    if (p.flags[CULPRIT] != NOBODY || (!p.skips && p.flags[BLAMED] != NOBODY)) {
        if (p.flags[BLAMED] == NOBODY) {
            p.flags[BLAMED] = p.flags[CULPRIT];
            p.flags[FAILED_AT] = n[STEP];
        }
        p.flags[SKIPPED] += 1;
        p.flags[GO] = 0;
        return;
    }
    p.flags[GO] = 1;
    if (p.pace >= 0) {
        const double share = 0.05;
        n[LAST] = fabs(*p.last_slope);
        n[AFTER] += share * (*p.slope - n[AFTER]);
        n[BEFORE] += share * (n[LAST] - n[BEFORE]);
        double quotient = n[AFTER] / n[BEFORE];
        if (n[BEFORE] > 0 && isfinite(quotient)) {
            quotient = fmin(1.0, fmax(-1.0, quotient));
            n[LENGTH] *= exp(p.pace * (p.slope_aim * n[LR] - quotient));
        }
    }
    const double full = sqrt(2 * p.target / fmax(squared, 0.0)); // the rate at lengths and learning rates of 1
    const double longest = fmin(p.longest, p.longest_by_lr * n[LR]);
    const double rate = p.target < 0 ? n[LR] * p.scale : fmin(longest, n[LR] * n[LENGTH] * full);
    if (p.target >= 0 && squared > 0) n[LENGTH] = fmin(n[LENGTH], p.beyond * p.longest_by_lr / full);
    const double kl = rate * rate * squared;
    n[CLIP] = p.kl_clip >= 0 && kl > p.kl_clip ? sqrt(p.kl_clip / kl) : 1;
    n[RATE] = rate;
    if (p.rest_share >= 0 && squared > 0) n[REST_LR] = p.rest_share * rate;
    n[PREVIOUS] = rate;
    n[DONE] += 1;
}

KERNEL(rate, STEP_THREADS, RateArgs, decide)

// The writing: nothing at all where the step is not taken.
struct UpdateItem {
    const void *direction; // and all below in the block's matrix, or null, but for the value
    const void *gradient;
    const void *model;
    void *velocity;
    void *step;
    void *carry;
    void *mean;            // null also where it is the carry
    void *value;           // the parameter, in the state's type
    void *var;             // the parameter that the model sees, where it has another type
    void *average;
    const double *squares; // sum V^2 of the block, where its root mean square is clipped
    u64 len;
    u64 block_len;
    double lr_scale;
    double decay;          // decoupled
    Place place;
    u32 first, type;
};

struct UpdateArgs {
    UpdateItem items[TABLE];
    const u32 *flags;
    const double *numbers;
    double *slopes;        // partial sums of <step, gradient>
    double momentum;
    double rms_clip;
    u32 count, pad;
};

template <class T> DEVICE void update(const UpdateArgs &p) {
    SHARED(double, sums, STEP_THREADS / WARP);
    if (!p.flags[GO]) return;
    const UpdateItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    const double rate = p.numbers[RATE] * item.lr_scale;
    double clip = p.numbers[CLIP];
    if (item.squares) {
        const double rms = sqrt(*item.squares / (double)item.block_len);
        if (rms > p.rms_clip) clip *= p.rms_clip / rms;
    }
    const T *direction = static_cast<const T *>(item.direction);
    const T *gradient = static_cast<const T *>(item.gradient);
    const T *model = static_cast<const T *>(item.model);
    T *velocity = static_cast<T *>(item.velocity);
    T *steps = static_cast<T *>(item.step);
    T *carry = static_cast<T *>(item.carry);
    T *mean = static_cast<T *>(item.mean);
    T *value = static_cast<T *>(item.value);
    T *average = static_cast<T *>(item.average);
    const T along = -rate * clip, moved_by = -rate, clipped = clip, momentum = p.momentum, decay = -rate * item.decay;
    const T mixing = p.numbers[MIXING];
    T slope = 0;
    each_stage_of(item, [&](const Stage &stage) {
        u64 at[STAGES];
        T moved[STAGES], old[STAGES], theta[STAGES], averages[STAGES], gradients[STAGES], models[STAGES];
        places_of(item.place, stage, at);
        fetch(direction, at, stage.in, moved);
        fetch<T>(velocity, at, stage.in, old);
        fetch<T>(value, stage, theta);
        fetch<T>(average, stage, averages);
        fetch(gradient, at, stage.in, gradients);
        fetch(model, at, stage.in, models);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            const u64 i = stage.at[j];
            T step;
            if (velocity) {
                const T faster = momentum * old[j] + clipped * moved[j];
                velocity[at[j]] = faster;
                step = faster * moved_by;
            } else {
                step = moved[j] * along;
            }
            step += decay * theta[j];
            const T there = theta[j] + step;
            value[i] = there;
            if (item.var) store_as<T>(item.var, i, item.type, there);
            if (average) average[i] = (1 - mixing) * averages[j] + mixing * there;
            if (steps) steps[at[j]] = step;
            if (gradient) slope += step * gradients[j];
            if (model) {
                if (carry) carry[at[j]] = models[j];
                if (mean) mean[at[j]] = models[j];
            }
        }
    });
    if (!p.slopes) return;
    const double sum = block_sum<double>(slope, sums);
    if (threadIdx.x == 0) p.slopes[blockIdx.x] = sum;
}

PACKED_KERNEL(update_f32, STEP_THREADS, 3, UpdateArgs, update<float>)
KERNEL(update_f64, STEP_THREADS, UpdateArgs, update<double>)

// What a quadratic wake looks back at: model + B step, with the steps that `update` took.
struct CarryItem {
    const void *model;
    const void *curved;
    void *carry;
    void *mean;
    u64 len;
    u32 first, pad;
};

struct CarryArgs {
    CarryItem items[TABLE];
    const u32 *flags;
    u32 count, pad;
};

template <class T> DEVICE void carries(const CarryArgs &p) {
    if (!p.flags[GO]) return;
    const CarryItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    const T *model = static_cast<const T *>(item.model);
    const T *curved = static_cast<const T *>(item.curved);
    T *carry = static_cast<T *>(item.carry);
    T *mean = static_cast<T *>(item.mean);
    each_stage_of(item, [&](const Stage &stage) {
        T models[STAGES], more[STAGES];
        fetch(model, stage, models);
        fetch(curved, stage, more);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            const T sum = models[j] + more[j];
            if (carry) carry[stage.at[j]] = sum;
            if (mean) mean[stage.at[j]] = sum;
        }
    });
}

KERNEL(carries_f32, STEP_THREADS, CarryArgs, carries<float>)
KERNEL(carries_f64, STEP_THREADS, CarryArgs, carries<double>)

// Adam (Kingma & Ba 2015, decay of Loshchilov & Hutter 2019) for the parameters without a block.
struct AdamItem {
    const void *gradient; // in the model's type
    void *first_moment;
    void *second_moment;
    void *value;
    void *var;
    void *average;
    u64 len;
    double lr_scale;
    double decay;
    double steps_before;  // steps taken less those that the optimizer counts
    u32 first, type, gradient_type, pad;
};

struct AdamArgs {
    AdamItem items[TABLE];
    const u32 *flags;
    const double *numbers;
    double beta1, beta2, eps;
    u32 count, pad;
};

template <class T> DEVICE void adam(const AdamArgs &p) {
    if (!p.flags[GO]) return;
    const AdamItem &item = p.items[item_of(p.items, p.count, blockIdx.x)];
    T *m = static_cast<T *>(item.first_moment);
    T *v = static_cast<T *>(item.second_moment);
    T *value = static_cast<T *>(item.value);
    T *average = static_cast<T *>(item.average);
    // The step is counted already.
    const double steps = p.numbers[DONE] + item.steps_before;
    const T bias1 = 1 - pow(p.beta1, steps), bias2 = 1 - pow(p.beta2, steps);
    const T beta1 = p.beta1, beta2 = p.beta2, eps = p.eps, lr = p.numbers[REST_LR] * item.lr_scale;
    const T rest1 = 1 - p.beta1, rest2 = 1 - p.beta2, kept = 1 - p.numbers[REST_LR] * item.lr_scale * item.decay;
    const T mixing = p.numbers[MIXING];
    each_stage_of(item, [&](const Stage &stage) {
        T g[STAGES], ms[STAGES], vs[STAGES], theta[STAGES], averages[STAGES];
        fetch_as(item.gradient, item.gradient_type, stage, g);
        fetch<T>(m, stage, ms);
        fetch<T>(v, stage, vs);
        fetch<T>(value, stage, theta);
        fetch<T>(average, stage, averages);
#pragma unroll
        for (u32 j = 0; j < STAGES; ++j) {
            if (!stage.in[j]) continue;
            const u64 i = stage.at[j];
            const T first = beta1 * ms[j] + rest1 * g[j], second = beta2 * vs[j] + rest2 * g[j] * g[j];
            m[i] = first;
            v[i] = second;
            const T there = kept * theta[j] - lr * (first / bias1) / (sqrt(second / bias2) + eps);
            value[i] = there;
            if (item.var) store_as<T>(item.var, i, item.type, there);
            if (average) average[i] = (1 - mixing) * averages[j] + mixing * there;
        }
    });
}

KERNEL(adam_f32, STEP_THREADS, AdamArgs, adam<float>)
KERNEL(adam_f64, STEP_THREADS, AdamArgs, adam<double>)
