// What a CUDA source needs of a C++ compiler, whatever then runs its threads: qualifiers, and floats as words and halves.
#pragma once

#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

static inline float __uint_as_float(unsigned int word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
static inline unsigned int __float_as_uint(float value) {
    unsigned int word;
    std::memcpy(&word, &value, 4);
    return word;
}

static inline float shim_half_to_float(unsigned short bits) {
    const unsigned int sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent) return __uint_as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float small = (float)fraction * 5.9604644775390625e-8f;  // subnormal: fraction * 2^-24
    return sign ? -small : small;
}
static inline unsigned short shim_float_to_half(float value) {
    const unsigned int word = __float_as_uint(value), magnitude = word & 0x7fffffffu;
    const unsigned short sign = (word >> 16) & 0x8000u;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
    if (magnitude < 0x38800000u) {                        // subnormal: scale so that the float adder rounds
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return sign | (unsigned short)(__float_as_uint(shifted) - 0x3f000000u);
    }
    const unsigned int rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
    return sign | (unsigned short)((rounded - 0x38000000u) >> 13);
}
