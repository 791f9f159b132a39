// Antialiased separable resize of one plane or three, row by row, in 16-bit fixed point. Included once for each target,
// so there is no include guard. All targets compute the same bits.
//
// For each output row: a weighted sum of source rows (vertical), then of its columns (horizontal), then colour
// conversion and interleaving, all in rows that stay in the first-level cache. A pixel enters as value << kInputShift
// and each pass multiplies by 16-bit weights with rounding (multiply_round), so the bilinear path ends with 7 fraction
// bits. Weights of bicubic can exceed 1 and its sums overshoot 255: it gives up one bit a pass.

#include "filter_lanes.h"
#include "horizontal_lanes.h"
#include "vertical_lanes.h"

// One row of a plane in floating point. For reductions so strong that a 16-bit weight would be left with a few bits;
// they are rare, so this needs no vector code.
inline void resample_row_float(const Plane& plane, const Filter& across, const Filter& down, int y, int size, int bits,
                               float* row, int16_t* out) {
  const int width = across.last - across.first;
  const int taps = std::min(down.taps, down.last - down.start[y]);
  for (int x = 0; x < width; ++x) row[x] = 0.0f;
  for (int k = 0; k < taps; ++k) {
    const uint8_t* source = plane.data + (down.start[y] + k) * plane.pitch + across.first;
    const float weight = down.raw[static_cast<size_t>(k) * down.stride + y] / down.sum[y];
    for (int x = 0; x < width; ++x) row[x] += weight * source[x];
  }
  for (int x = 0; x < size; ++x) {
    double sum = 0.0;
    for (int k = 0; k < across.taps && across.start[x] + k < width; ++k)
      sum += across.raw[static_cast<size_t>(k) * across.stride + x] * row[across.start[x] + k];
    const double value = sum / across.sum[x] * (1 << bits);
    out[x] = static_cast<int16_t>(std::lrint(std::clamp(value, -32768.0, 32767.0)));
  }
}

constexpr int kMostFixedTaps = 64;

inline bool too_strong(const Filter& across, const Filter& down) {
  return across.taps > kMostFixedTaps || down.taps > kMostFixedTaps;
}

inline void build_filters(ResizeScratch& scratch, const Plane& plane, int kind, const Box& box, int size,
                          int interpolation) {
  Filter& across = scratch.x[kind];
  build_filter(across, box.left * plane.x_ratio, box.width * plane.x_ratio, plane.width, size, interpolation);
  build_filter(scratch.y[kind], box.top * plane.y_ratio, box.height * plane.y_ratio, plane.height, size, interpolation);
  // From here on the columns count from the first one that is touched.
  for (int x = 0; x < size; ++x) across.start[x] -= across.first;
  plan_horizontal(across, size);
}

// Row y of one plane's vertical sums into its `row`, or its finished row into its `out` where floats are needed.
inline void resize_down(ResizeScratch& scratch, const Plane& plane, int channel, int y, int size, int bits) {
  const Filter& across = scratch.x[std::min(channel, 1)];
  const Filter& down = scratch.y[std::min(channel, 1)];
  if (too_strong(across, down)) {
    resample_row_float(plane, across, down, y, size, bits, scratch.float_row.data(), scratch.out[channel].data());
    return;
  }
  const uint8_t* source = plane.data + down.start[y] * plane.pitch + across.first;
  // Near the bottom of the crop an output has fewer taps than the widest one, and no more rows may be read.
  const int taps = std::min(down.taps, down.last - down.start[y]);
  vertical(source, plane.pitch, down.weight.data() + y, down.stride, taps, across.last - across.first,
           scratch.row[channel].data());
}

inline void resize_across(ResizeScratch& scratch, int channel, int size) {
  const Filter& across = scratch.x[std::min(channel, 1)];
  if (too_strong(across, scratch.y[std::min(channel, 1)])) return;
  horizontal(scratch.row[channel].data(), across, size, scratch.out[channel].data());
}

// Processors with AVX-512 but without its byte permutations store rows as AVX2 does.
inline StoreRow* chosen_store_row() {
#if REGISTER_BYTES == 64
  return has_vbmi() ? avx512_vbmi::store_row : avx2::store_row;
#else
  return store_row;
#endif
}

void resize_view(ResizeScratch& scratch, const Plane* planes, int32_t color, const Box& box, int size,
                 int interpolation, uint8_t* rgb) {
  const int kinds = color == kGray ? 1 : 2, count = color == kGray ? 1 : 3;
  for (int kind = 0; kind < kinds; ++kind) build_filters(scratch, planes[kind], kind, box, size, interpolation);
  scratch.size_rows(kinds);
  const int bits = interpolation == kBicubic ? kInputShift - 2 : kInputShift;
  StoreRow* const store = chosen_store_row();
  const int16_t* first = scratch.out[0].data();
  const int16_t* second = color == kGray ? first : scratch.out[1].data();
  const int16_t* third = color == kGray ? first : scratch.out[2].data();
  for (int y = 0; y < size; ++y) {
    // All vertical sums first: a row that was written just now would still be on its way to the cache.
    for (int channel = 0; channel < count; ++channel) resize_down(scratch, planes[channel], channel, y, size, bits);
    for (int channel = 0; channel < count; ++channel) resize_across(scratch, channel, size);
    store(first, second, third, color, bits, size, rgb + static_cast<size_t>(y) * size * 3);
  }
}
