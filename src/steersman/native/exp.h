// The exponential that the loops of this folder share.

#pragma once

#include <cstdint>
#include <cstring>

// exp(x) for x <= 0, within 2 ulp; exactly 0 below the smallest normal number, minus infinity included; NaN stays NaN.
// Branch-free, so that loops over it become vector instructions; no number that has no integer is converted to one.
inline float exp_nonpositive(float x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
    const float smallest = -87.3365447f;
    const float c = x >= smallest ? x : smallest;  // NaN too
    const float n = (c * 1.44269504f + shift) - shift;
    const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < smallest ? 0.0f : (x == x ? y * scale : x);
}
