// What is done to one image: a row of the parameter table, decoded, and the sizes of the buffers for it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "targets.h"

namespace regatta {

// Columns of a parameter row, as in pipeline/augment.py.
enum Column {
  kFlip,
  kJitter,
  kGray,
  kBlur,
  kSolarize,
  kBrightness,
  kContrast,
  kSaturation,
  kHue,
  kOrder,
  kSigma = kOrder + 4,
  kColumns
};
enum Operation { kDoBrightness, kDoContrast, kDoSaturation, kDoHue };
enum Output { kAsFloat, kAsBfloat16, kAsUint8, kAsHalf };

constexpr size_t bytes_of(int output) { return output == kAsFloat ? 4 : output == kAsUint8 ? 1 : 2; }

constexpr int kMaxRadius = 480;
// Floats before and after a row: the blur's reach, and two of the widest registers that are read past it.
constexpr int kMargin = kMaxRadius + 32;
// Taps farther than this many sigmas from the centre are left out, as the definition does.
constexpr float kReach = 4.0f;

struct Recipe {
  bool flip, jitter, gray_early, gray_late, solarize, changes_before_contrast;
  float brightness, contrast, contrast_offset, saturation, turn;
  int order[4], contrast_place;
  int reach;  // taps on each side of the centre; 0 where nothing is blurred
  float taps[kMaxRadius + 1];
};

// Index of a row or column outside [0, size) mirrored at the border pixel, which is not repeated.
REGATTA_INLINE int mirror(int position, int size) {
  if (position < 0) position = -position;
  return position >= size ? 2 * (size - 1) - position : position;
}

// Floats from one row of a plane to the next: whole vectors of the widest kind.
constexpr size_t row_stride(int width) { return (static_cast<size_t>(width) + 15) / 16 * 16; }
// Floats of a row with its margins.
constexpr size_t row_floats(int width) { return row_stride(width) + 2 * kMargin; }

// One-sided taps, the centre first, normalised over both sides.
inline void make_taps(float sigma, int radius, Recipe& recipe) {
  float total = recipe.taps[0] = 1.0f;
  recipe.reach = 0;
  for (int distance = 1; distance <= radius && static_cast<float>(distance) <= kReach * sigma; ++distance) {
    const float ratio = static_cast<float>(distance) / sigma;
    recipe.taps[distance] = std::exp(-0.5f * ratio * ratio);
    total += 2.0f * recipe.taps[distance];
    recipe.reach = distance;
  }
  for (int distance = 0; distance <= recipe.reach; ++distance) recipe.taps[distance] /= total;
}

inline void decode_recipe(const float* row, bool gray_first, int radius, Recipe& recipe) {
  recipe.flip = row[kFlip] != 0.0f;
  recipe.jitter = row[kJitter] != 0.0f;
  recipe.gray_early = row[kGray] != 0.0f && gray_first;
  recipe.gray_late = row[kGray] != 0.0f && !gray_first;
  recipe.solarize = row[kSolarize] != 0.0f;
  recipe.brightness = row[kBrightness];
  recipe.contrast = row[kContrast];
  recipe.contrast_offset = 0.0f;  // needs the image's mean; filled in by the first pass
  recipe.saturation = row[kSaturation];
  const float shift = 6.0f * row[kHue];
  recipe.turn = shift - 6.0f * std::floor(shift / 6.0f);
  recipe.contrast_place = 0;
  for (int place = 0; place < 4; ++place) {
    recipe.order[place] = static_cast<int>(row[kOrder + place]);
    if (recipe.order[place] == kDoContrast) recipe.contrast_place = place;
  }
  recipe.changes_before_contrast = recipe.jitter && recipe.contrast_place > 0;
  recipe.reach = 0;
  if (row[kBlur] != 0.0f) make_taps(row[kSigma], radius, recipe);
}

// Augments one image; compiled once for each target (per_target/augment.cpp). `out_offset` counts values, `scratch` is
// aligned to 64 bytes.
using AugmentOne = void(const uint8_t* image, int height, int width, Recipe& recipe, int output, void* out,
                        size_t out_offset, float* scratch);
namespace plain {
AugmentOne augment_one;
}
#if REGATTA_X86
namespace avx2 {
AugmentOne augment_one;
}
namespace avx512 {
AugmentOne augment_one;
}
#endif

// The function of the widest target that this processor has and the caller allows: `lanes` is the number of floats in a
// register, 0 for the most that is allowed. Null where the processor has no such registers.
inline AugmentOne* choose_augment(int lanes) {
#if REGATTA_X86
  const Level best = lanes == 0 ? current_level() : best_level();
  if (best >= kAvx512 && (lanes == 0 || lanes == 16)) return avx512::augment_one;
  if (best >= kAvx2 && (lanes == 0 || lanes == 8)) return avx2::augment_one;
#endif
  return lanes == 0 || lanes == 4 ? plain::augment_one : nullptr;
}

}  // namespace regatta
