// Products of a few dozen rows with weights that were rearranged beforehand; float32 throughout.
//
// The weights [outputs, inputs] lie in panels of PANEL outputs, [panel][input][output], so that one panel is read from
// end to end for every few rows. A number is the sum over its inputs in their order, whatever else is computed with it.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

#ifdef __AVX512F__
constexpr int VECTORS = 2, ROWS = 8;  // sums kept in registers: 16 of 32
#else
constexpr int VECTORS = 1, ROWS = 6;  // 12 of 16 where a register has eight numbers
#endif
constexpr int64_t PANEL = 16 * VECTORS;

struct Range {
    int64_t from, to;
};

// The part of `items` that thread `t` of `threads` works on.
inline Range share(int64_t items, int64_t t, int64_t threads) {
    return {items * t / threads, items * (t + 1) / threads};
}

inline int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

constexpr int64_t TILE = 64, DEEP = 128;  // rows worked on together; inputs whose part of a panel stays in the cache

// sums[r][c] (+)= R rows of x times some inputs of a panel. Meanwhile the processor is told to fetch `next`, `lines`
// lines of 16 numbers for every four inputs.
template <int R>
inline void block(const float* x, int64_t stride, const float* panel, int64_t inputs, bool first, const float* next,
                  int64_t lines, float* sums) {
    lanes sum[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < VECTORS; ++c) sum[r][c] = first ? lanes{} : load(sums + r * PANEL + 16 * c);
    for (int64_t k = 0; k < inputs; k += 4) {
        for (int64_t i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 2);
        const int64_t end = std::min<int64_t>(k + 4, inputs);
#pragma GCC unroll 4
        for (int64_t j = k; j < end; ++j) {
            lanes w[VECTORS];
            for (int c = 0; c < VECTORS; ++c) w[c] = load(panel + j * PANEL + 16 * c);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < VECTORS; ++c) sum[r][c] += x[r * stride + j] * w[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < VECTORS; ++c) store(sums + r * PANEL + 16 * c, sum[r][c]);
}

template <int R = ROWS>
inline void some_rows(int64_t rows, const float* x, int64_t stride, const float* panel, int64_t inputs, bool first,
                      const float* next, int64_t lines, float* sums) {
    if constexpr (R > 1) {
        if (rows < R) return some_rows<R - 1>(rows, x, stride, panel, inputs, first, next, lines, sums);
    }
    block<R>(x, stride, panel, inputs, first, next, lines, sums);
}

struct Rows {
    const float* x;
    int64_t count, stride, inputs;
};

// sums [rows, PANEL] = up to TILE rows of x, from `row`, times a panel, part by part; the part that lies behind is
// fetched while one is worked on.
inline void tile_of(const Rows& in, int64_t row, int64_t rows, const float* panel, float* sums) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS, lines = (4 * VECTORS + blocks - 1) / blocks;
    for (int64_t k = 0; k < in.inputs; k += DEEP) {
        const int64_t deep = std::min(DEEP, in.inputs - k), fetched = (deep + 3) / 4 * lines * 16;
        const float *part = panel + k * PANEL, *next = part + deep * PANEL;
        for (int64_t r = 0; r < rows; r += ROWS, next += fetched)
            some_rows(std::min<int64_t>(ROWS, rows - r), in.x + (row + r) * in.stride + k, in.stride, part, deep,
                      k == 0, next, lines, sums + r * PANEL);
    }
}

// Calls work(panel, first row, rows) for this thread's share of panels and of tiles of rows. Where there are fewer
// panels than threads, tiles are smaller.
template <typename Work>
inline void divided(int64_t panels, int64_t rows, int64_t t, int64_t threads, Work work) {
    const int64_t parts = std::max((rows + TILE - 1) / TILE, (threads + panels - 1) / panels);
    const int64_t height = ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
    const Range mine = share(panels * parts, t, threads);
    for (int64_t item = mine.from; item < mine.to; ++item) {
        const int64_t row = item % parts * height;
        if (row < rows) work(item / parts, row, std::min(height, rows - row));
    }
}

// out (+)= x weights^T + bias; `bias` may be null
template <bool ADD>
inline void multiply(const Rows& in, const float* weights, const float* bias, float* out, int64_t outputs, int64_t t,
                     int64_t threads) {
    divided(panels_of(outputs), in.count, t, threads, [&](int64_t panel, int64_t row, int64_t rows) {
        float sums[(TILE + ROWS) * PANEL];
        tile_of(in, row, rows, weights + panel * in.inputs * PANEL, sums);
        const int64_t first = panel * PANEL, columns = std::min(PANEL, outputs - first);
        for (int64_t r = 0; r < rows; ++r) {
            float* to = out + (row + r) * outputs + first;
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j)
                to[j] = sums[r * PANEL + j] + (bias ? bias[first + j] : 0.0f) + (ADD ? to[j] : 0.0f);
        }
    });
}

// out = act(x gate^T) * (x up^T)
template <typename Act>
inline void multiply_gated(const Rows& in, const float* gate, const float* up, float* out, int64_t outputs, int64_t t,
                           int64_t threads, Act act) {
    divided(panels_of(outputs), in.count, t, threads, [&](int64_t panel, int64_t row, int64_t rows) {
        float opened[(TILE + ROWS) * PANEL], values[(TILE + ROWS) * PANEL];
        tile_of(in, row, rows, gate + panel * in.inputs * PANEL, opened);
        tile_of(in, row, rows, up + panel * in.inputs * PANEL, values);
        const int64_t first = panel * PANEL, columns = std::min(PANEL, outputs - first);
        for (int64_t r = 0; r < rows; ++r) {
            float* to = out + (row + r) * outputs + first;
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j) to[j] = act(opened[r * PANEL + j]) * values[r * PANEL + j];
        }
    });
}

}  // namespace
