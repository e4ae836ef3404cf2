// Sixteen numbers at once; compilers split them where the processor's registers are narrower.

#pragma once

#include <cstdint>
#include <cstring>

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t lane_ids __attribute__((vector_size(64)));

inline lanes load(const float* from) {
    lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, const lanes& x) { std::memcpy(to, &x, sizeof x); }
