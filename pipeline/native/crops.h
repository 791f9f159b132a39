// Crop boxes, bit for bit those of pipeline/geometry.py: the same operations in the same order, and no contraction
// into fused multiply-adds (the build passes -ffp-contract=off).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "layouts.h"
#include "philox.h"

namespace regatta {

struct Box {
  int64_t top, left, height, width;
};

inline double portable_exp(double x) {
  const double eighth = x * 0.125;
  double total = 1.0;
  for (int term = 12; term > 0; --term) total = 1.0 + total * eighth / static_cast<double>(term);
  total = total * total;
  total = total * total;
  return total * total;
}

inline Box draw_crop(const ViewSpec& spec, uint64_t seed, uint32_t epoch, uint32_t index, int64_t height,
                     int64_t width) {
  if (spec.kind == kWhole) return {0, 0, height, width};
  if (spec.kind == kCenter) {
    const double short_side = static_cast<double>(std::min(height, width));
    const int64_t side = std::max<int64_t>(static_cast<int64_t>(std::nearbyint(short_side / spec.resize_ratio)), 1);
    return {(height - side) / 2, (width - side) / 2, side, side};
  }
  const double area = static_cast<double>(height * width);
  for (uint32_t attempt = 0; attempt < 10; ++attempt) {
    const Words words = philox(seed, index, epoch, spec.draw_id, attempt);
    const double target = area * (spec.scale[0] + uniform(words.word[0]) * (spec.scale[1] - spec.scale[0]));
    const double aspect =
        portable_exp(spec.log_ratio[0] + uniform(words.word[1]) * (spec.log_ratio[1] - spec.log_ratio[0]));
    const int64_t crop_width = static_cast<int64_t>(std::nearbyint(std::sqrt(target * aspect)));
    const int64_t crop_height = static_cast<int64_t>(std::nearbyint(std::sqrt(target / aspect)));
    if (crop_width < 1 || crop_width > width || crop_height < 1 || crop_height > height) continue;
    const double top = std::floor(uniform(words.word[2]) * static_cast<double>(height - crop_height + 1));
    const double left = std::floor(uniform(words.word[3]) * static_cast<double>(width - crop_width + 1));
    return {static_cast<int64_t>(top), static_cast<int64_t>(left), crop_height, crop_width};
  }
  const double in_ratio = static_cast<double>(width) / static_cast<double>(height);
  double crop_width = static_cast<double>(width), crop_height = static_cast<double>(height);
  if (in_ratio > spec.ratio[1]) crop_width = std::nearbyint(static_cast<double>(height) * spec.ratio[1]);
  if (in_ratio < spec.ratio[0]) crop_height = std::nearbyint(static_cast<double>(width) / spec.ratio[0]);
  const int64_t whole_width = std::max<int64_t>(static_cast<int64_t>(crop_width), 1);
  const int64_t whole_height = std::max<int64_t>(static_cast<int64_t>(crop_height), 1);
  return {(height - whole_height) / 2, (width - whole_width) / 2, whole_height, whole_width};
}

}  // namespace regatta
