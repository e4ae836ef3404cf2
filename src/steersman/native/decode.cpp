// The two inner loops of decoding on a CPU: attention of one new token per sequence, and one draw per row.
//
// Compiled at first use (see __init__.py), called through ctypes, float32 throughout. Both functions do what their
// torch counterparts do, to rounding; tests/rollout/test_native.py holds them to that.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "exp.h"

namespace {

void draw_row(const float* x, int64_t size, float uniform, int64_t* id, float* logp) {
    constexpr int64_t block = 256;
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < size; ++v) top = x[v] > top ? x[v] : top;
    std::vector<double> mass((size + block - 1) / block);
    double total = 0.0;
    for (size_t b = 0; b < mass.size(); ++b) {
        const int64_t end = std::min(size, static_cast<int64_t>(b + 1) * block);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = b * block; v < end; ++v) sum += exp_nonpositive(x[v] - top);
        total += mass[b] = sum;
    }
    const double target = static_cast<double>(uniform) * total;
    double before = 0.0;
    size_t b = 0;
    while (b + 1 < mass.size() && before + mass[b] <= target) before += mass[b++];
    // Rounding may leave the target just beyond its block's tokens; then the last one that may be drawn stands.
    int64_t found = -1;
    float weights[block];
    for (; b < mass.size() && found < 0; ++b) {
        const int64_t start = b * block, count = std::min(size - start, block);
#pragma omp simd
        for (int64_t v = 0; v < count; ++v) weights[v] = exp_nonpositive(x[start + v] - top);
        for (int64_t v = 0; v < count; ++v) {
            if (!(weights[v] > 0.0f)) continue;
            found = start + v;
            before += weights[v];
            if (before > target) break;
        }
    }
    for (int64_t v = size - 1; found < 0 && v > 0; --v)
        if (x[v] == top) found = v;
    *id = std::max<int64_t>(found, 0);
    *logp = static_cast<float>(static_cast<double>(x[*id] - top) - std::log(total));
}

}  // namespace

extern "C" {

void decode_attention(const float* query, const float* keys, const float* values, const float* mask, float* out,
                      const int64_t* sizes, float scale, int threads) {
    const int64_t rows = sizes[0], heads = sizes[1], kv_heads = sizes[2], columns = sizes[3], width = sizes[4];
    const int64_t mask_row = sizes[10];
    std::vector<int64_t> start(rows);  // columns before a sequence began are not read
    for (int64_t r = 0; mask && r < rows; ++r)
        while (start[r] + 1 < columns && mask[r * mask_row + start[r]] == -INFINITY) ++start[r];
    const Attention a{query, heads * width, {keys, sizes[6], sizes[7], width}, {values, sizes[8], sizes[9], sizes[5]},
                      mask,  mask_row,      out,     rows,     heads, kv_heads, columns, scale, start.data(), 0,
                      nullptr, nullptr};
    const Attend attend = attend_for(a.keys.width, a.values.width);
    const int64_t items = rows * kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(padded_to(columns, 16));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; ++i) {
            const int64_t next = std::min(i + 1, items - 1);
            attend(a, {i / kv_heads, i % kv_heads}, {next / kv_heads, next % kv_heads}, scores.data());
        }
    }
}

void draw(const float* x, const float* uniform, int64_t* ids, float* logp, int64_t rows, int64_t size, int64_t stride,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) draw_row(x + r * stride, size, uniform[r], ids + r, logp + r);
}
}
