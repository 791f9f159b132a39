// The blur of the augmentation: a separable sum over taps, symmetric around each pixel. Included once for each target,
// so there is no include guard.

constexpr int kRun = 4;  // accumulators in flight

// Sums over the taps for `count` vectors from `to` on. `centre` is the pixel itself, `left(distance)` and
// `right(distance)` the pixels at that distance from it.
template <int count, class Left, class Right>
REGATTA_INLINE void blur_run(const Recipe& recipe, const float* centre, Left left, Right right, float* to) {
  Lanes total[count];
  for (int i = 0; i < count; ++i) total[i] = recipe.taps[0] * load(centre + i * kLanes);
  for (int distance = 1; distance <= recipe.reach; ++distance) {
    const Lanes tap = all(recipe.taps[distance]);
    const float *one = left(distance), *other = right(distance);
    for (int i = 0; i < count; ++i) total[i] += tap * (load(one + i * kLanes) + load(other + i * kLanes));
  }
  for (int i = 0; i < count; ++i) store(to + i * kLanes, total[i]);
}

// Horizontal blur. `row` has kMargin floats before and after it; the margins are filled here.
void blur_row(float* row, float* to, int width, const Recipe& recipe) {
  for (int distance = 1; distance <= recipe.reach; ++distance) {
    row[-distance] = row[mirror(-distance, width)];
    row[width - 1 + distance] = row[mirror(width - 1 + distance, width)];
  }
  int x = 0;
  const auto left = [&](int distance) { return row + x - distance; };
  const auto right = [&](int distance) { return row + x + distance; };
  for (; x + kRun * kLanes <= width; x += kRun * kLanes) blur_run<kRun>(recipe, row + x, left, right, to + x);
  for (; x < width; x += kLanes) blur_run<1>(recipe, row + x, left, right, to + x);
}

// Vertical blur of row y of a plane.
void blur_column(const float* plane, size_t stride, int y, int height, float* to, int width, const Recipe& recipe) {
  int x = 0;
  const auto above = [&](int distance) { return plane + stride * mirror(y - distance, height) + x; };
  const auto below = [&](int distance) { return plane + stride * mirror(y + distance, height) + x; };
  const float* row = plane + stride * y;
  for (; x + kRun * kLanes <= width; x += kRun * kLanes) blur_run<kRun>(recipe, row + x, above, below, to + x);
  for (; x < width; x += kLanes) blur_run<1>(recipe, row + x, above, below, to + x);
}
