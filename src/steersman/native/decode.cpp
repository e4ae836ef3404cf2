// The two inner loops of decoding on a CPU: attention of one new token per sequence, and one draw per row.
//
// Compiled at first use (see __init__.py), called through ctypes, float32 throughout. Both functions do what their
// torch counterparts do, to rounding; tests/rollout/test_native.py holds them to that.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exp.h"

namespace {

struct Attention {
    const float *query, *keys, *values, *mask;
    float* out;
    int64_t rows, heads, kv_heads, columns;
    int64_t width, value_width;                      // used where the template's WIDTH is 0
    int64_t key_row, key_head, value_row, value_head;  // strides in elements; columns lie side by side
    int64_t mask_row;
    float scale;
};

// exp(scores - their maximum), in place; returns 1 / their sum
inline float soften(float* scores, int64_t columns) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < columns; ++j) top = scores[j] > top ? scores[j] : top;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < columns; ++j) {
        scores[j] = exp_nonpositive(scores[j] - top);
        total += scores[j];
    }
    return 1.0f / total;
}

// Sixteen numbers at once; compilers split them where the processor's registers are narrower.
typedef float lanes __attribute__((vector_size(64)));
typedef int32_t lane_ids __attribute__((vector_size(64)));

inline lanes load(const float* from) {
    lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// Lane l: a[l] + a[l ^ STEP] where bit STEP of l is 0, else the same of b. Folding 16 vectors in four such steps
// leaves in lane l the sum over all lanes of vector l.
template <int STEP>
inline lanes fold(lanes a, lanes b) {
    lane_ids same, other;
    for (int l = 0; l < 16; ++l) {
        same[l] = (l & STEP) ? 16 + l : l;
        other[l] = same[l] ^ STEP;
    }
#ifdef __clang__
    lanes out;
    for (int l = 0; l < 16; ++l) out[l] = (l & STEP) ? b[l] + b[l ^ STEP] : a[l] + a[l ^ STEP];
    return out;
#else
    return __builtin_shuffle(a, b, same) + __builtin_shuffle(a, b, other);
#endif
}

template <int STEP>
inline lanes fold_all(const lanes* x) {  // 2 * STEP vectors
    if constexpr (STEP == 1) {
        return fold<1>(x[0], x[1]);
    } else {
        lanes half[STEP];
        for (int i = 0; i < STEP; ++i) half[i] = fold<STEP>(x[i], x[i + STEP]);
        return fold_all<STEP / 2>(half);
    }
}

// The dot products of one query with 16 keys that lie side by side; WIDTH is 8 or a multiple of 16.
template <int WIDTH>
inline lanes dots(const lanes* query, const float* keys) {
    if constexpr (WIDTH == 8) {  // two keys to a vector: those of vector i end in lanes i and i + 8
        lanes x[8];
        for (int i = 0; i < 8; ++i) x[i] = query[0] * load(keys + 16 * i);
        const lanes sums = fold_all<4>(x);  // lane l: key 2 * (l % 8) + l / 8
        lane_ids order;
        for (int l = 0; l < 16; ++l) order[l] = l / 2 + 8 * (l % 2);
#ifdef __clang__
        lanes out;
        for (int l = 0; l < 16; ++l) out[l] = sums[l / 2 + 8 * (l % 2)];
        return out;
#else
        return __builtin_shuffle(sums, order);
#endif
    } else {
        lanes x[16];
        for (int i = 0; i < 16; ++i) {
            x[i] = query[0] * load(keys + i * WIDTH);
            for (int c = 1; c < WIDTH / 16; ++c) x[i] += query[c] * load(keys + i * WIDTH + 16 * c);
        }
        return fold_all<8>(x);
    }
}

// Sixteen columns of keys or values: where they lie, or, of the last few, a copy filled up with zeros.
template <int WIDTH>
inline const float* tile(const float* from, int64_t at, int64_t columns, float* copy) {
    if (at + 16 <= columns) return from + at * WIDTH;
    std::memcpy(copy, from + at * WIDTH, (columns - at) * WIDTH * sizeof(float));
    std::fill(copy + (columns - at) * WIDTH, copy + 16 * WIDTH, 0.0f);
    return copy;
}

// scores[j] = scale * query . key j, for `columns` columns rounded up to 16
template <int WIDTH>
void scores_of(const float* query, const float* keys, float scale, int64_t width, int64_t columns, float* scores) {
    if constexpr (WIDTH > 0) {
        float copy[16 * WIDTH];
        lanes q[WIDTH == 8 ? 1 : WIDTH / 16];
        if constexpr (WIDTH == 8) {
            for (int l = 0; l < 16; ++l) q[0][l] = query[l % 8];
        } else {
            for (int c = 0; c < WIDTH / 16; ++c) q[c] = load(query + 16 * c);
        }
        for (int64_t j = 0; j < columns; j += 16) {
            const lanes some = scale * dots<WIDTH>(q, tile<WIDTH>(keys, j, columns, copy));
            std::memcpy(scores + j, &some, sizeof some);
        }
    } else {
        for (int64_t j = 0; j < columns; ++j) {
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < width; ++d) dot += query[d] * keys[j * width + d];
            scores[j] = scale * dot;
        }
    }
}

// out = factor * sum over columns of weight * value; weights beyond the columns, up to a multiple of 16, are 0
template <int WIDTH>
void weigh(const float* weights, const float* values, float factor, int64_t width, int64_t columns, float* out) {
    if constexpr (WIDTH >= 16) {
        constexpr int parts = WIDTH / 16, chains = parts >= 4 ? 1 : 4 / parts;  // one chain waits for itself
        float copy[16 * WIDTH];
        lanes sum[chains][parts] = {};
        for (int64_t j = 0; j < columns; j += 16) {
            const float* some = tile<WIDTH>(values, j, columns, copy);
            for (int i = 0; i < 16; ++i)
                for (int c = 0; c < parts; ++c)
                    sum[i % chains][c] += weights[j + i] * load(some + i * WIDTH + 16 * c);
        }
        for (int c = 0; c < parts; ++c) {
            for (int i = 1; i < chains; ++i) sum[0][c] += sum[i][c];
            sum[0][c] *= factor;
            std::memcpy(out + 16 * c, &sum[0][c], sizeof(lanes));
        }
    } else if constexpr (WIDTH == 8) {
        float copy[16 * 8];
        lanes sum[2] = {};
        for (int64_t j = 0; j < columns; j += 16) {
            const float* some = tile<8>(values, j, columns, copy);
            const lanes weight = load(weights + j);
            for (int i = 0; i < 8; ++i) {  // two columns to a vector
                lane_ids pair;
                for (int l = 0; l < 16; ++l) pair[l] = 2 * i + l / 8;
#ifdef __clang__
                lanes both;
                for (int l = 0; l < 16; ++l) both[l] = weight[2 * i + l / 8];
#else
                const lanes both = __builtin_shuffle(weight, pair);
#endif
                sum[i % 2] += both * load(some + 16 * i);
            }
        }
        sum[0] += sum[1];
        for (int d = 0; d < 8; ++d) out[d] = factor * (sum[0][d] + sum[0][d + 8]);
    } else {
        std::fill(out, out + width, 0.0f);
        for (int64_t j = 0; j < columns; ++j) {
            const float weight = weights[j] * factor;
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) out[d] += weight * values[j * width + d];
        }
    }
}

template <int WIDTH>
void attend(const Attention& a, int64_t row, int64_t kv_head, float* scores) {
    const float* mask = a.mask ? a.mask + row * a.mask_row : nullptr;
    int64_t first = 0;  // columns before this sequence began
    while (mask && first + 1 < a.columns && mask[first] == -INFINITY) ++first;
    const float* keys = a.keys + row * a.key_row + kv_head * a.key_head + first * a.width;
    const float* values = a.values + row * a.value_row + kv_head * a.value_head + first * a.value_width;
    const int64_t group = a.heads / a.kv_heads, columns = a.columns - first;
    for (int64_t head = row * a.heads + kv_head * group, g = 0; g < group; ++g, ++head) {
        scores_of<WIDTH>(a.query + head * a.width, keys, a.scale, a.width, columns, scores);
        if (mask)
            for (int64_t j = 0; j < columns; ++j) scores[j] += mask[first + j];
        const float inverse = soften(scores, columns);
        std::fill(scores + columns, scores + (columns + 15) / 16 * 16, 0.0f);
        weigh<WIDTH>(scores, values, inverse, a.value_width, columns, a.out + head * a.value_width);
    }
}

template <int WIDTH>
void attend_all(const Attention& a, int threads) {
    const int64_t items = a.rows * a.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores((a.columns + 15) / 16 * 16);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; ++i) attend<WIDTH>(a, i / a.kv_heads, i % a.kv_heads, scores.data());
    }
}

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
    const Attention a{query,    keys,     values,   mask,     out,      sizes[0], sizes[1],  sizes[2],
                      sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], scale};
    const int64_t width = a.width == a.value_width ? a.width : 0;
    switch (width) {
        case 8: return attend_all<8>(a, threads);
        case 16: return attend_all<16>(a, threads);
        case 32: return attend_all<32>(a, threads);
        case 64: return attend_all<64>(a, threads);
        case 128: return attend_all<128>(a, threads);
        default: return attend_all<0>(a, threads);
    }
}

void draw(const float* x, const float* uniform, int64_t* ids, float* logp, int64_t rows, int64_t size, int64_t stride,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) draw_row(x + r * stride, size, uniform[r], ids + r, logp + r);
}
}
