// What is done to one row of numbers: root mean square norm, gate, rotation by position.

#pragma once

#include <cmath>
#include <cstdint>

#include "exp.h"

namespace {

inline float sigmoid(float z) {
    const float e = exp_nonpositive(z > 0.0f ? -z : z);
    return (z > 0.0f ? 1.0f : e) / (1.0f + e);
}

// Both gates are x * sigmoid(z(x)): SiLU has z = x, the tanh form of GELU z = 2 c (x + 0.044715 x^3).
template <bool GELU>
inline float inner(float x) {
    return GELU ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
}

template <bool GELU>
inline float activation(float x) {
    return x * sigmoid(inner<GELU>(x));
}

// to = x / sqrt(mean(x^2) + eps) * (offset + weight); returns 1 / sqrt(...)
inline float norm_row(const float* x, const float* weight, float offset, float eps, float* to, int64_t width) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; ++j) squares += x[j] * x[j];
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) to[j] = x[j] * inverse * (offset + weight[j]);
    return inverse;
}

// to = x turned by an angle per pair (i, i + half); x and to are the same or apart
inline void rotate_row(const float* x, const float* cosine, const float* sine, float* to, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        to[i] = a * cosine[i] - b * sine[i];
        to[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

}  // namespace
