// The augmentation of a batch of views on the CPU, in as few passes over memory as the mathematics allows.
//
// The definition is pipeline/augment.py; this computes the same in float, without rounding between operations. Rows
// are split into three planes that stay in the nearest cache while everything pointwise happens to them in registers:
//
//   pass 1 (only where colours are jittered): operations before contrast, and the mean luma;
//   pass 2: contrast and what follows it, gray, and the horizontal blur;
//   pass 3 (only where the image is blurred): the vertical blur.
//
// The last pass solarizes, flips, normalises and writes the interleaved result. Two freedoms are taken, both exact but
// for the order of float sums: gray is done before blur also where the profile blurs first (both are linear, and one
// plane is a third of the work), and the flip comes where it is cheapest (everything else is pointwise or symmetric).
// Gray before jitter is another matter and is kept: jitter clamps, and greys have no hue.
//
// A plain C interface; any number of threads may call it. Nothing is allocated but each thread's scratch, once.

// Pixels are finite and their zeros need no sign, so comparisons may become plain minima and maxima; nothing here has
// to agree bit for bit with another program.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3,no-math-errno,no-trapping-math,no-signed-zeros,finite-math-only,fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

// Columns of a parameter row, as in pipeline/augment.py.
enum Column { FLIP, JITTER, GRAY, BLUR, SOLARIZE, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, SIGMA = ORDER + 4, COLUMNS };
enum Operation { DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, DO_HUE };
enum Output { AS_FLOAT, AS_BFLOAT16, AS_UINT8, AS_HALF };

constexpr size_t bytes_of(int output) { return output == AS_FLOAT ? 4 : output == AS_UINT8 ? 1 : 2; }

constexpr float LUMA_RED = 0.299f, LUMA_GREEN = 0.587f, LUMA_BLUE = 0.114f;
constexpr float SCALE[3] = {1 / (255 * 0.229f), 1 / (255 * 0.224f), 1 / (255 * 0.225f)};
constexpr float SHIFT[3] = {-0.485f / 0.229f, -0.456f / 0.224f, -0.406f / 0.225f};
constexpr int MAX_RADIUS = 480;
constexpr int MARGIN = MAX_RADIUS + 32;
// Taps farther than this many sigmas from the centre are left out, as the definition does.
constexpr float REACH = 4.0f;

// One image's parameters, decoded.
struct Recipe {
    bool flip, jitter, gray_early, gray_late, solarize, changes_before_contrast;
    float brightness, contrast, contrast_offset, saturation, turn;
    int order[4], contrast_place;
    int reach;  // taps on each side of the centre; 0 where nothing is blurred
    float taps[MAX_RADIUS + 1];
};

// Index of a row or column outside [0, size) mirrored at the border pixel, which is not repeated.
INLINE int mirror(int position, int size) {
    if (position < 0) position = -position;
    return position >= size ? 2 * (size - 1) - position : position;
}

// Floats from one row of a plane to the next: whole vectors of the widest kind.
constexpr size_t row_stride(int width) { return ((size_t)width + 15) / 16 * 16; }
// Floats of a row with its margins.
constexpr size_t row_floats(int width) { return row_stride(width) + 2 * MARGIN; }

namespace plain {
#define LANES 4
#include "augment_lanes.h"
#undef LANES
}  // namespace plain

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define HAS_WIDE_LANES
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "augment_lanes.h"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "augment_lanes.h"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

using AugmentOne = void (*)(const uint8_t*, int, int, Recipe&, int, void*, size_t, float*);

// The widest of the three that this processor has and the caller allows; `lanes` 0 allows all.
AugmentOne choose(int lanes) {
#ifdef HAS_WIDE_LANES
    const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool has_256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_512 && (lanes == 0 || lanes == 16)) return avx512::augment_one;
    if (has_256 && (lanes == 0 || lanes == 8)) return avx2::augment_one;
#endif
    return lanes == 0 || lanes == 4 ? plain::augment_one : nullptr;
}

// One-sided taps, the centre first, normalised over both sides.
void make_taps(float sigma, int radius, Recipe& recipe) {
    float total = recipe.taps[0] = 1.0f;
    recipe.reach = 0;
    for (int distance = 1; distance <= radius && (float)distance <= REACH * sigma; ++distance) {
        const float ratio = (float)distance / sigma;
        recipe.taps[distance] = std::exp(-0.5f * ratio * ratio);
        total += 2.0f * recipe.taps[distance];
        recipe.reach = distance;
    }
    for (int distance = 0; distance <= recipe.reach; ++distance) recipe.taps[distance] /= total;
}

void decode(const float* row, bool gray_first, int radius, Recipe& recipe) {
    recipe.flip = row[FLIP] != 0.0f;
    recipe.jitter = row[JITTER] != 0.0f;
    recipe.gray_early = row[GRAY] != 0.0f && gray_first;
    recipe.gray_late = row[GRAY] != 0.0f && !gray_first;
    recipe.solarize = row[SOLARIZE] != 0.0f;
    recipe.brightness = row[BRIGHTNESS];
    recipe.contrast = row[CONTRAST];
    recipe.contrast_offset = 0.0f;
    recipe.saturation = row[SATURATION];
    const float shift = 6.0f * row[HUE];
    recipe.turn = shift - 6.0f * std::floor(shift / 6.0f);
    recipe.contrast_place = 0;
    for (int place = 0; place < 4; ++place) {
        recipe.order[place] = (int)row[ORDER + place];
        if (recipe.order[place] == DO_CONTRAST) recipe.contrast_place = place;
    }
    recipe.changes_before_contrast = recipe.jitter && recipe.contrast_place > 0;
    recipe.reach = 0;
    if (row[BLUR] != 0.0f) make_taps(row[SIGMA], radius, recipe);
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Floats in a parameter row, so that a caller that has another layout notices.
EXPORT int regatta_augment_columns() { return COLUMNS; }

// Bytes of scratch that one call needs for images of this size.
EXPORT size_t regatta_augment_scratch(int height, int width) {
    return sizeof(float) * (3 * row_floats(width) + 3 * row_stride(width) * (size_t)height + 32);
}

// Augments `count` images of height x width x 3 bytes each, one after another.
//
// images: uint8, interleaved RGB, contiguous. table: count rows of float. gray_first: the profile greys before it
// jitters. radius: taps on each side of the blur's centre, less than height and width. output: 0 float, 1 bfloat16,
// 3 half, normalised; 2 uint8, rounded to grey levels. out: count images of the same shape. scratch: as many bytes as
// regatta_augment_scratch says. lanes: 16, 8 or 4 floats in a register, 0 for the most there are. Returns 0; 1 for
// arguments that make no sense; 2 for lanes that this processor does not have.
EXPORT int regatta_augment(const uint8_t* images, int64_t count, int height, int width, const float* table, int gray_first,
                           int radius, int output, void* out, void* scratch, int lanes) {
    if (height < 1 || width < 1 || count < 0 || radius < 0 || radius > MAX_RADIUS) return 1;
    if (radius >= height || radius >= width || output < AS_FLOAT || output > AS_HALF) return 1;
    const AugmentOne augment_one = choose(lanes);
    if (augment_one == nullptr) return 2;
    // Aligned to a cache line; the 32 floats more in the scratch are for this.
    float* aligned = (float*)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    const size_t values = (size_t)height * width * 3;
    Recipe recipe;
    for (int64_t n = 0; n < count; ++n) {
        decode(table + n * COLUMNS, gray_first != 0, radius, recipe);
        augment_one(images + n * values, height, width, recipe, output, out, n * values, aligned);
    }
    return 0;
}

// What becomes of the images of a batch; the memory layout is shared with pipeline/host_augment.py.
struct BatchPlan {
    const int32_t* sizes;        // (views): side of a view in pixels
    const int32_t* radii;        // (views): taps on each side of its blur's centre
    const float* const* tables;  // (views): (rows, COLUMNS)
    void* const* outs;           // (views): (rows, size, size, 3) of the output's type
    int32_t views, gray_first, output, reserved;
};

EXPORT int32_t regatta_augment_plan_bytes() { return sizeof(BatchPlan); }

// Augments all views of one image into row `slot` of the outputs: a Finish of native/views.cpp, so that views are
// augmented on the thread that decoded them while they are in its cache.
EXPORT void regatta_augment_image(const void* batch, int32_t slot, const uint8_t* const* views) {
    static thread_local std::vector<char> scratch;
    const BatchPlan& plan = *static_cast<const BatchPlan*>(batch);
    for (int32_t view = 0; view < plan.views; ++view) {
        const int32_t size = plan.sizes[view];
        const size_t needed = regatta_augment_scratch(size, size), values = (size_t)size * size * 3;
        if (scratch.size() < needed) scratch.resize(needed);
        char* out = static_cast<char*>(plan.outs[view]) + bytes_of(plan.output) * values * slot;
        regatta_augment(views[view], 1, size, size, plan.tables[view] + (size_t)slot * COLUMNS, plan.gray_first,
                        plan.radii[view], plan.output, out, scratch.data(), 0);
    }
}

}  // extern "C"
