// The colour planes that both decoders make and the resize reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace regatta {

// Bytes that a kernel may touch past the end of a row or a plane: three of the widest registers. Whoever allocates a
// plane adds them, so that no kernel needs a special case for the last columns.
constexpr int kPad = 192;

enum Color : int32_t { kGray = 1, kYcc = 3, kRgb = 4 };

// One plane of a decoded image. `x_ratio` and `y_ratio` say how many of its samples fit an image pixel.
struct Plane {
  const uint8_t* data = nullptr;
  ptrdiff_t pitch = 0;  // bytes from one row to the next
  int width = 0, height = 0;
  double x_ratio = 1.0, y_ratio = 1.0;
};

// The part of an image that is wanted, in image pixels: rows [top, bottom), columns [left, right).
struct Region {
  int64_t top, bottom, left, right;
};

}  // namespace regatta
