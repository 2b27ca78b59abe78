// The exponentials of a row less its largest element, which cannot overflow. A row of -inf alone has none: its sum is 0.
#pragma once
#include "rows.cuh"

template <class A> DEVICE A minus_infinity() { return -(A)__uint_as_float(0x7f800000); }

template <class A> struct Exponentials {
    A max, sum;

    // What an exponential is multiplied by to be a probability: 0 where there is none.
    DEVICE A scale() const { return sum == (A)0 ? (A)0 : (A)1 / sum; }
    // So that `x - max - log_sum()` is -inf where there is none.
    DEVICE A log_sum() const { return sum == (A)0 ? (A)0 : (A)log(sum); }
};

// The largest element of a row that was opened with -inf beyond its end, and the sum of `exp(x - max)`; 0 for both where all are -inf.
template <class T, class A> DEVICE Exponentials<A> exponentials(const Team &team, const Row<T> &x, A *slots) {
    // Of the packs that are kept the largest alone; of the others also the sum so far, to read them once.
    A top = minus_infinity<A>(), rest_top = top, rest_sum = 0;
    each_pack<T>(team, x.d, [&](u32 slot, u64 first) {
        A v[PACK<T>];
        x.get(slot, first, v);
#pragma unroll
        for (u32 e = 0; e < PACK<T>; ++e) {
            if (slot < HELD<T>) {
                if (v[e] > top) top = v[e];
                continue;
            }
            if (v[e] > rest_top) {
                rest_sum *= (A)exp(rest_top - v[e]);
                rest_top = v[e];
            }
            // -inf adds nothing, and less itself it would be NaN.
            if (!(v[e] == minus_infinity<A>())) rest_sum += (A)exp(v[e] - rest_top);
        }
    });
    A max = team_max(team, rest_top > top ? rest_top : top, slots);
    // `-inf - -inf` would be NaN; a NaN in the row is one in the sum all the same.
    if (max == minus_infinity<A>()) max = 0;
    // A thread may have seen -inf alone, which leaves its sum at 0.
    A sum = rest_top == minus_infinity<A>() ? rest_sum : rest_sum * (A)exp(rest_top - max);
    each_pack<T>(team, x.d, [&](u32 slot, u64) {
        if (slot < HELD<T>)
#pragma unroll
            for (u32 e = 0; e < PACK<T>; ++e) sum += (A)exp(x.held[slot][e] - max);
    });
    return {max, team_sum(team, sum, slots)};
}
