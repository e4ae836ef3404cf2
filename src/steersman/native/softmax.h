// Exponentials of a row of scores, sixteen at a time.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exp.h"
#include "lanes.h"

namespace {

inline int64_t padded_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Lane l of x where lane l ^ STEP was.
template <int STEP>
inline lanes swapped(const lanes& x) {
#ifdef __clang__
    lanes out;
    for (int l = 0; l < 16; ++l) out[l] = x[l ^ STEP];
    return out;
#else
    lane_ids other;
    for (int l = 0; l < 16; ++l) other[l] = l ^ STEP;
    return __builtin_shuffle(x, other);
#endif
}

inline lanes larger(const lanes& a, const lanes& b) { return a > b ? a : b; }

// The largest of `size` scores; `size` is a multiple of 16 here and below, filled up with minus infinity.
inline float largest(const float* scores, int64_t size) {
    lanes top = load(scores);
    for (int64_t j = 16; j < size; j += 16) top = larger(load(scores + j), top);
    top = larger(swapped<8>(top), top);
    top = larger(swapped<4>(top), top);
    top = larger(swapped<2>(top), top);
    return larger(swapped<1>(top), top)[0];
}

// scores = exp(scale (scores - top)), none of which is above 1; returns their sum
inline float exponentials(float* scores, float scale, float top, int64_t size) {
    lanes total = {};
    for (int64_t j = 0; j < size; j += 16) {
        float* some = scores + j;
#pragma omp simd
        for (int l = 0; l < 16; ++l) some[l] = exp_nonpositive(scale * (some[l] - top));
        total += load(some);
    }
    total += swapped<8>(total);
    total += swapped<4>(total);
    total += swapped<2>(total);
    return total[0] + total[1];
}

inline void multiply_row(float* x, float factor, int64_t size) {
    for (int64_t j = 0; j < size; j += 16) store(x + j, load(x + j) * factor);
}

}  // namespace
