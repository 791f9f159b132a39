// Arithmetic on 16-bit fixed-point numbers, one at a time. Vector targets have the same operations on registers of them
// (words_lanes.h), so formulas can be written once for both.
#pragma once

#include <algorithm>
#include <cstdint>

namespace regatta {

// A pixel enters the resize as value << kInputShift.
constexpr int kInputShift = 7;

// Multiply-and-round of two 16-bit numbers, as the instruction pmulhrsw does it.
inline int16_t multiply_round(int16_t a, int16_t b) {
  return static_cast<int16_t>((static_cast<int32_t>(a) * b + 0x4000) >> 15);
}

inline int16_t add_saturated(int16_t a, int16_t b) {
  return static_cast<int16_t>(std::clamp(static_cast<int32_t>(a) + b, -32768, 32767));
}

inline int16_t subtract(int16_t a, int16_t b) { return static_cast<int16_t>(a - b); }

// A number with `bits` bits of fraction, rounded to a byte.
inline uint8_t to_byte(int16_t value, int bits) {
  return static_cast<uint8_t>(std::clamp(add_saturated(value, static_cast<int16_t>(1 << (bits - 1))) >> bits, 0, 255));
}

}  // namespace regatta
