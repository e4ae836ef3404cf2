// Transposition, square by square: rows often lie a power of two apart, where few of them fit the first cache together.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

// Rows of `width` numbers that lie `step` apart become columns: to[d * to_step + j] = x[j * step + d], and zeros for
// `rows` <= j < `to_step`, which is a multiple of 16.
inline void turn(const float* x, int64_t step, int64_t rows, int64_t width, float* to, int64_t to_step) {
    for (int64_t j = 0; j < to_step; j += 16)
        for (int64_t d = 0; d < width; d += 16) {
            const int64_t wide = std::min<int64_t>(16, width - d);
            float square[16][16] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, rows - j); ++i) {
                const float* from = x + (j + i) * step + d;
                if (wide == 16)
                    store(square[i], load(from));
                else
                    std::copy_n(from, wide, square[i]);
            }
            for (int64_t c = 0; c < wide; ++c) {
                lanes column;
                for (int64_t i = 0; i < 16; ++i) column[i] = square[i][c];
                store(to + (d + c) * to_step + j, column);
            }
        }
}

}  // namespace
