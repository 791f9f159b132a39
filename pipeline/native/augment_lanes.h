// The augmentation of one image, in as few passes over memory as the mathematics allows. Included once for each target,
// so there is no include guard.
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
// Pixels are finite and their zeros need no sign, so native_build.py compiles this with plain minima and maxima for
// comparisons and with fused multiply-adds. Nothing here has to agree bit for bit with another program.

#include "floats_lanes.h"

#include "augment_color_lanes.h"

#include "augment_blur_lanes.h"
#include "augment_rows_lanes.h"

// Pass 1 on one row: the operations before contrast, in place, and the sum of what luma is then.
double before_contrast(float* red, float* green, float* blue, int width, const Recipe& recipe) {
  Lanes sum = {};
  double tail = 0.0;
  for (int x = 0; x < width; x += kLanes) {
    Pixels p = {load(red + x), load(green + x), load(blue + x)};
    if (recipe.gray_early) p = gray(p);
    p = jitter(p, recipe, 0, recipe.contrast_place);
    const Lanes level = luma(p);
    if (x + kLanes <= width) {
      sum += level;
    } else {
      for (int i = 0; x + i < width; ++i) tail += level[i];
    }
    if (!recipe.changes_before_contrast) continue;
    store(red + x, p.red);
    store(green + x, p.green);
    store(blue + x, p.blue);
  }
  return sum_of(sum) + tail;
}

// Pass 2 on one row: contrast and all that follows it but blur; a grey image keeps only its red plane.
void from_contrast(const float* const from[3], float* const to[3], int width, const Recipe& recipe) {
  for (int x = 0; x < width; x += kLanes) {
    Pixels p = {load(from[0] + x), load(from[1] + x), load(from[2] + x)};
    if (recipe.gray_early && !recipe.changes_before_contrast) p = gray(p);
    if (recipe.jitter) p = jitter(p, recipe, recipe.contrast_place, 4);
    if (recipe.gray_late) {
      store(to[0] + x, luma(p));
    } else {
      store(to[0] + x, p.red);
      store(to[1] + x, p.green);
      store(to[2] + x, p.blue);
    }
  }
}

// One image, its buffers, and where its result goes.
struct Canvas {
  const uint8_t* image;
  int height, width;
  size_t stride, plane;  // floats from row to row and from plane to plane
  float* rows[3];        // one row of each colour, with margins
  float* planes;         // room for three planes
  StoreAs* store;
  void* out;
  size_t out_offset;

  const uint8_t* source(int y) const { return image + static_cast<size_t>(y) * width * 3; }
  size_t target(int y) const { return out_offset + static_cast<size_t>(y) * width * 3; }
};

// Pass 1: the mean luma before contrast, and with it the offset that contrast adds.
void measure_contrast(const Canvas& canvas, Recipe& recipe) {
  double total = 0.0;
  for (int y = 0; y < canvas.height; ++y) {
    float *red = canvas.rows[0], *green = canvas.rows[1], *blue = canvas.rows[2];
    if (recipe.changes_before_contrast) {  // pass 2 goes on from the result
      red = canvas.planes + canvas.stride * y, green = red + canvas.plane, blue = green + canvas.plane;
    }
    load_row(canvas.source(y), canvas.width, red, green, blue);
    total += before_contrast(red, green, blue, canvas.width, recipe);
  }
  const double pixels = static_cast<double>(canvas.height) * canvas.width;
  recipe.contrast_offset = (1.0f - recipe.contrast) * static_cast<float>(total / pixels);
}

// Pass 2 on row y into `canvas.rows`.
void shade_row(const Canvas& canvas, int y, const Recipe& recipe) {
  const float* base = canvas.planes + canvas.stride * y;
  const float* from[3] = {base, base + canvas.plane, base + 2 * canvas.plane};
  if (!recipe.changes_before_contrast) {
    load_row(canvas.source(y), canvas.width, canvas.rows[0], canvas.rows[1], canvas.rows[2]);
    for (int c = 0; c < 3; ++c) from[c] = canvas.rows[c];
  }
  from_contrast(from, canvas.rows, canvas.width, recipe);
}

void augment_one(const uint8_t* image, int height, int width, Recipe& recipe, int output, void* out, size_t out_offset,
                 float* scratch) {
  const size_t stride = row_stride(width), row = row_floats(width);
  const Canvas canvas{image,
                      height,
                      width,
                      stride,
                      stride * height,
                      {scratch + kMargin, scratch + row + kMargin, scratch + 2 * row + kMargin},
                      scratch + 3 * row,
                      store_as(output),
                      out,
                      out_offset};
  if (recipe.jitter) measure_contrast(canvas, recipe);
  const int held = recipe.gray_late ? 1 : 3;  // a grey image has one plane, shown three times
  const float* shown[3] = {canvas.rows[0], canvas.rows[held == 1 ? 0 : 1], canvas.rows[held == 1 ? 0 : 2]};
  for (int y = 0; y < height; ++y) {
    shade_row(canvas, y, recipe);
    if (recipe.reach == 0) {
      canvas.store(shown, width, recipe, out, canvas.target(y));
      continue;
    }
    // Its own place in the plane may be overwritten: pass 1's values of this row have just been used.
    float* blurred = canvas.planes + stride * y;
    for (int c = 0; c < held; ++c) blur_row(canvas.rows[c], blurred + c * canvas.plane, width, recipe);
  }
  for (int y = 0; recipe.reach > 0 && y < height; ++y) {
    for (int c = 0; c < held; ++c)
      blur_column(canvas.planes + c * canvas.plane, stride, y, height, canvas.rows[c], width, recipe);
    canvas.store(shown, width, recipe, out, canvas.target(y));
  }
  finish_stores();
}
