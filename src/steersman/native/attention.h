// Attention of one new token per sequence over keys and values that lie side by side; float32 throughout.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "softmax.h"

namespace {

// Keys, values or what else has rows and heads: where it begins, and its strides in elements. Columns lie side by side.
struct Heads {
    const float* from;
    int64_t row, head, width;
};

struct Attention {
    const float* query;  // [rows, heads, width], with gaps between rows
    int64_t query_row;
    Heads keys, values;
    const float* mask;  // added to the scores, `mask_row` apart; may be null
    int64_t mask_row;
    float* out;
    int64_t rows, heads, kv_heads, columns;
    float scale;
    const int64_t* start;  // each row's first column
    int64_t base;          // what `start` and `until` call the first column here
    // What rows have in common: row `leader[r]` holds the same keys and values in all columns before `until[r]`, and
    // is read instead, so that they come from memory once. Null where nothing is.
    const int64_t *leader, *until;
};

// Keys or values of one row and head; the first `shared` columns are read elsewhere.
struct Columns {
    const float *own, *common;
    int64_t count, shared;
};

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

template <int WIDTH>
inline const float* whole_tile(const Columns& from, int64_t at) {
    return (at + 16 <= from.shared ? from.common : from.own) + at * WIDTH;
}

// Sixteen columns of keys or values: where they lie, or, of the last few, a copy filled up with zeros.
template <int WIDTH>
inline const float* tile(const Columns& from, int64_t at, float* copy) {
    if (at + 16 <= from.count) return whole_tile<WIDTH>(from, at);
    std::memcpy(copy, from.own + at * WIDTH, (from.count - at) * WIDTH * sizeof(float));
    std::fill(copy + (from.count - at) * WIDTH, copy + 16 * WIDTH, 0.0f);
    return copy;
}

// Sixteen columns; beyond the last one nothing is there, and fetching that does no harm.
template <int WIDTH>
inline void fetch(const Columns* from, int64_t at) {
    if (!from) return;
    const float* some = whole_tile<WIDTH>(*from, at);
    for (int i = 0; i < WIDTH; ++i) __builtin_prefetch(some + 16 * i, 0, 2);
}

// scores[j] = scale * query . key j, for all columns, rounded up to 16
template <int WIDTH>
void scores_of(const float* query, const Columns& keys, float scale, int64_t width, float* scores, const Columns* next) {
    if constexpr (WIDTH > 0) {
        float copy[16 * WIDTH];
        lanes q[WIDTH == 8 ? 1 : WIDTH / 16];
        if constexpr (WIDTH == 8) {
            for (int l = 0; l < 16; ++l) q[0][l] = query[l % 8];
        } else {
            for (int c = 0; c < WIDTH / 16; ++c) q[c] = load(query + 16 * c);
        }
        for (int64_t j = 0; j < keys.count; j += 16) {
            fetch<WIDTH>(next, j);
            const lanes some = scale * dots<WIDTH>(q, tile<WIDTH>(keys, j, copy));
            std::memcpy(scores + j, &some, sizeof some);
        }
    } else {
        for (int64_t j = 0; j < keys.count; ++j) {
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < width; ++d) dot += query[d] * keys.own[j * width + d];
            scores[j] = scale * dot;
        }
    }
}

// out = factor * sum over columns of weight * value; weights beyond the columns, up to a multiple of 16, are 0
template <int WIDTH>
void weigh(const float* weights, const Columns& values, float factor, int64_t width, float* out, const Columns* next) {
    if constexpr (WIDTH >= 16) {
        constexpr int parts = WIDTH / 16, chains = parts >= 4 ? 1 : 4 / parts;  // one chain waits for itself
        float copy[16 * WIDTH];
        lanes sum[chains][parts] = {};
        for (int64_t j = 0; j < values.count; j += 16) {
            fetch<WIDTH>(next, j);
            const float* some = tile<WIDTH>(values, j, copy);
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
        for (int64_t j = 0; j < values.count; j += 16) {
            fetch<8>(next, j);
            const float* some = tile<8>(values, j, copy);
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
        for (int64_t j = 0; j < values.count; ++j) {
            const float weight = weights[j] * factor;
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) out[d] += weight * values.own[j * width + d];
        }
    }
}

inline int64_t start_of(const Attention& a, int64_t row) { return std::max<int64_t>(0, a.start[row] - a.base); }

inline Columns columns_of(const Attention& a, const Heads& of, int64_t row, int64_t head) {
    const int64_t start = start_of(a, row), inside = head * of.head + start * of.width;
    const int64_t leader = a.leader ? a.leader[row] : row;
    const int64_t shared = a.until ? a.until[row] - a.base - start : 0;
    return {of.from + row * of.row + inside, of.from + leader * of.row + inside, a.columns - start, shared};
}

struct Item {
    int64_t row, head;
};

// What the query heads of one row see that share a head of keys. While keys are read the processor is told to fetch the
// values, and while those are, the keys of the item that comes next: a stream as short as a sequence ends before the
// processor has guessed it.
template <int WIDTH>
void attend(const Attention& a, Item now, Item next, float* scores) {
    const Columns keys = columns_of(a, a.keys, now.row, now.head), values = columns_of(a, a.values, now.row, now.head);
    const Columns ahead = columns_of(a, a.keys, next.row, next.head);
    const int64_t group = a.heads / a.kv_heads, width = a.values.width;
    for (int64_t head = now.head * group, g = 0; g < group; ++g, ++head) {
        const float* query = a.query + now.row * a.query_row + head * a.keys.width;
        scores_of<WIDTH>(query, keys, a.scale, a.keys.width, scores, g == 0 ? &values : nullptr);
        if (a.mask) {
            const float* mask = a.mask + now.row * a.mask_row + start_of(a, now.row);
            for (int64_t j = 0; j < keys.count; ++j) scores[j] += mask[j];
        }
        const int64_t padded = padded_to(keys.count, 16);
        std::fill(scores + keys.count, scores + padded, -INFINITY);
        float* out = a.out + (now.row * a.heads + head) * width;
        const float top = largest(scores, padded);
        if (top == -INFINITY && std::all_of(scores, scores + keys.count, [](float s) { return s == -INFINITY; })) {
            std::fill(out, out + width, 0.0f);  // it sees nothing, and torch gives zeros
            continue;
        }
        const float inverse = 1.0f / exponentials(scores, 1.0f, top, padded);
        weigh<WIDTH>(scores, values, inverse, width, out, g + 1 == group ? &ahead : nullptr);
    }
}

using Attend = void (*)(const Attention&, Item now, Item next, float* scores);

inline Attend attend_for(int64_t width, int64_t value_width) {
    switch (width == value_width ? width : 0) {
        case 8: return attend<8>;
        case 16: return attend<16>;
        case 32: return attend<32>;
        case 64: return attend<64>;
        case 128: return attend<128>;
        default: return attend<0>;
    }
}

}  // namespace
