// What stands between the matrix products of a transformer's layer, forward and backward, in one pass each: root mean
// square norm, the gate of a feed-forward layer, the rotation of queries and keys by their positions.
//
// float32 throughout, the last dimension without gaps. tests/native/test_layers.py holds each to plain torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace {

constexpr int64_t SMALL = 1 << 15;  // numbers that one thread works through before another has started

template <bool GELU>
inline float inner_slope(float x) {
    return GELU ? 1.5957691216f * (1.0f + 0.134145f * x * x) : 1.0f;
}

template <bool GELU>
void gate_forward(const float* gate, const float* up, float* out, int64_t size, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (parallel : size > SMALL)
    for (int64_t i = 0; i < size; ++i) out[i] = activation<GELU>(gate[i]) * up[i];
}

template <bool GELU>
void gate_backward(const float* grad, const float* gate, const float* up, float* grad_gate, float* grad_up,
                   int64_t size, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (parallel : size > SMALL)
    for (int64_t i = 0; i < size; ++i) {
        const float x = gate[i], s = sigmoid(inner<GELU>(x));
        grad_up[i] = grad[i] * x * s;
        grad_gate[i] = grad[i] * up[i] * s * (1.0f + x * (1.0f - s) * inner_slope<GELU>(x));
    }
}

}  // namespace

extern "C" {

// out = x / sqrt(mean(x^2) + eps) * (offset + weight), row by row; `inverse` keeps 1 / sqrt(...) of each row
void norm_forward(const float* x, const float* weight, float offset, float eps, float* out, float* inverse,
                  int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; ++r)
        inverse[r] = norm_row(x + r * width, weight, offset, eps, out + r * width, width);
}

// With s = offset + weight and i = inverse: grad_x = i s g - x i^3 mean(s g x); grad_weight = sum over rows of g x i,
// left out where it is null. `partial` has `threads` rows of `width`.
void norm_backward(const float* grad, const float* x, const float* weight, float offset, const float* inverse,
                   float* grad_x, float* grad_weight, float* partial, int64_t rows, int64_t width, int threads) {
    const int64_t share = (rows + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > SMALL)
    for (int64_t t = 0; t < threads; ++t) {
        float* sum = partial + t * width;
        if (grad_weight) std::fill(sum, sum + width, 0.0f);
        for (int64_t r = t * share; r < std::min(rows, (t + 1) * share); ++r) {
            const float *g = grad + r * width, *from = x + r * width;
            float* to = grad_x + r * width;
            const float inv = inverse[r];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < width; ++j) dot += g[j] * (offset + weight[j]) * from[j];
            const float back = dot * inv * inv * inv / static_cast<float>(width);
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) to[j] = g[j] * (offset + weight[j]) * inv - from[j] * back;
            if (!grad_weight) continue;
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) sum[j] += g[j] * from[j] * inv;
        }
    }
    if (!grad_weight) return;
    for (int64_t t = 0; t < threads; ++t)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) grad_weight[j] = (t ? grad_weight[j] : 0.0f) + partial[t * width + j];
}

void gate(const float* gate, const float* up, float* out, int64_t size, int gelu, int threads) {
    (gelu ? gate_forward<true> : gate_forward<false>)(gate, up, out, size, threads);
}

void gate_back(const float* grad, const float* gate, const float* up, float* grad_gate, float* grad_up, int64_t size,
               int gelu, int threads) {
    (gelu ? gate_backward<true> : gate_backward<false>)(grad, gate, up, grad_gate, grad_up, size, threads);
}

// x [B, H, L, D] turned by cos and sin [B or 1, L, D], or, with `back`, by the transposed turn; each with its own
// strides, in sizes = {B, H, L, D, x's three, out's three, those of cos and sin (b, l)}.
void rotate(const float* x, const float* cosine, const float* sine, float* out, const int64_t* sizes, int back,
            int threads) {
    const int64_t B = sizes[0], H = sizes[1], L = sizes[2], half = sizes[3] / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (B * H * L * half > SMALL / 2)
    for (int64_t b = 0; b < B; ++b)
        for (int64_t l = 0; l < L; ++l) {
            const float* c = cosine + b * sizes[10] + l * sizes[11];
            const float* s = sine + b * sizes[10] + l * sizes[11];
            for (int64_t h = 0; h < H; ++h) {
                const float* from = x + b * sizes[4] + h * sizes[5] + l * sizes[6];
                float* to = out + b * sizes[7] + h * sizes[8] + l * sizes[9];
                if (back) {
#pragma omp simd
                    for (int64_t i = 0; i < half; ++i) {
                        to[i] = from[i] * c[i] + from[i + half] * s[i + half];
                        to[i + half] = from[i + half] * c[i + half] - from[i] * s[i];
                    }
                } else {
                    rotate_row(from, c, s, to, half);
                }
            }
        }
}
}
