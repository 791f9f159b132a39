// The augmentation of a batch of views on the CPU, with a plain C interface. augment_lanes.h does the work on an image.
//
// Any number of threads may call it. Nothing is allocated but each thread's scratch, once.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "augment_recipe.h"

namespace regatta {

// What becomes of the images of a batch; the memory layout is shared with pipeline/host_augment.py.
struct BatchPlan {
  const int32_t* sizes;        // (views): side of a view in pixels
  const int32_t* radii;        // (views): taps on each side of its blur's centre
  const float* const* tables;  // (views): (rows, kColumns)
  void* const* outs;           // (views): (rows, size, size, 3) of the output's type
  int32_t views, gray_first, output, reserved;
};

}  // namespace regatta

using regatta::BatchPlan;

#define REGATTA_API extern "C" __attribute__((visibility("default")))

// Floats in a parameter row, so that a caller that has another layout notices.
REGATTA_API int regatta_augment_columns() { return regatta::kColumns; }

// Use at most this instruction set where a call leaves the choice; -1 for the best there is. For measurements.
REGATTA_API void regatta_augment_force_level(int32_t level) { regatta::forced_level.store(level); }

// Bytes of scratch that one call needs for images of this size.
REGATTA_API size_t regatta_augment_scratch(int height, int width) {
  // The 32 floats more are for aligning it.
  return sizeof(float) *
         (3 * regatta::row_floats(width) + 3 * regatta::row_stride(width) * static_cast<size_t>(height) + 32);
}

// Augments `count` images of height x width x 3 bytes each, one after another.
//
// images: uint8, interleaved RGB, contiguous. table: count rows of float. gray_first: the profile greys before it
// jitters. radius: taps on each side of the blur's centre, less than height and width. output: 0 float, 1 bfloat16,
// 3 half, normalised; 2 uint8, rounded to grey levels. out: count images of the same shape. scratch: as many bytes as
// regatta_augment_scratch says. lanes: 16, 8 or 4 floats in a register, 0 for the most there are. Returns 0; 1 for
// arguments that make no sense; 2 for lanes that this processor does not have.
REGATTA_API int regatta_augment(const uint8_t* images, int64_t count, int height, int width, const float* table,
                                int gray_first, int radius, int output, void* out, void* scratch, int lanes) {
  if (height < 1 || width < 1 || count < 0 || radius < 0 || radius > regatta::kMaxRadius) return 1;
  if (radius >= height || radius >= width || output < regatta::kAsFloat || output > regatta::kAsHalf) return 1;
  regatta::AugmentOne* const augment_one = regatta::choose_augment(lanes);
  if (augment_one == nullptr) return 2;
  // Aligned to a cache line, so that no vector of a row is split between two.
  float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~static_cast<uintptr_t>(63));
  const size_t values = static_cast<size_t>(height) * width * 3;
  regatta::Recipe recipe;
  for (int64_t n = 0; n < count; ++n) {
    regatta::decode_recipe(table + n * regatta::kColumns, gray_first != 0, radius, recipe);
    augment_one(images + n * values, height, width, recipe, output, out, n * values, aligned);
  }
  return 0;
}

REGATTA_API int32_t regatta_augment_plan_bytes() { return sizeof(BatchPlan); }

// Augments all views of one image into row `slot` of the outputs: a Finish of views.cpp, so that views are augmented on
// the thread that decoded them while they are in its cache.
REGATTA_API void regatta_augment_image(const void* batch, int32_t slot, const uint8_t* const* views) {
  static thread_local std::vector<char> scratch;
  const BatchPlan& plan = *static_cast<const BatchPlan*>(batch);
  for (int32_t view = 0; view < plan.views; ++view) {
    const int32_t size = plan.sizes[view];
    const size_t needed = regatta_augment_scratch(size, size), values = static_cast<size_t>(size) * size * 3;
    if (scratch.size() < needed) scratch.resize(needed);
    char* out = static_cast<char*>(plan.outs[view]) + regatta::bytes_of(plan.output) * values * slot;
    regatta_augment(views[view], 1, size, size, plan.tables[view] + static_cast<size_t>(slot) * regatta::kColumns,
                    plan.gray_first, plan.radii[view], plan.output, out, scratch.data(), 0);
  }
}
