// Rows of interleaved bytes to planes of floats, and planes to finished rows of each output type. Included once for
// each target, so there is no include guard.

// Sixteen interleaved pixels to three runs of sixteen floats.
REGATTA_INLINE void load_16(const uint8_t* pixels, float* red, float* green, float* blue) {
  const Bytes16 a = *reinterpret_cast<const Bytes16*>(pixels), b = *reinterpret_cast<const Bytes16*>(pixels + 16),
                c = *reinterpret_cast<const Bytes16*>(pixels + 32);
  const Bytes16 red_ab = {0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0};
  const Bytes16 red_c = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29};
  const Bytes16 green_ab = {1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0};
  const Bytes16 green_c = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30};
  const Bytes16 blue_ab = {2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0};
  const Bytes16 blue_c = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31};
  widen(__builtin_shuffle(__builtin_shuffle(a, b, red_ab), c, red_c), red);
  widen(__builtin_shuffle(__builtin_shuffle(a, b, green_ab), c, green_c), green);
  widen(__builtin_shuffle(__builtin_shuffle(a, b, blue_ab), c, blue_c), blue);
}

// One row of bytes to three planes; what is past the width, up to whole vectors, becomes 0.
void load_row(const uint8_t* pixels, int width, float* red, float* green, float* blue) {
  int x = 0;
  for (; x + 16 <= width; x += 16) load_16(pixels + 3 * x, red + x, green + x, blue + x);
  for (; x < width; ++x) {
    red[x] = pixels[3 * x];
    green[x] = pixels[3 * x + 1];
    blue[x] = pixels[3 * x + 2];
  }
  for (; x % 16; ++x) red[x] = green[x] = blue[x] = 0.0f;
}

// Byte levels to normalised values: the means and deviations of ImageNet.
constexpr float kScale[3] = {1 / (255 * 0.229f), 1 / (255 * 0.224f), 1 / (255 * 0.225f)};
constexpr float kShift[3] = {-0.485f / 0.229f, -0.456f / 0.224f, -0.406f / 0.225f};

// Lane l of result j holds flat element j * kLanes + l: channel (that % 3) of pixel (that / 3). `two` picks red and
// green, `three` keeps those and picks blue.
struct Interleave {
  int32_t two[3][kLanes], three[3][kLanes];
  constexpr Interleave() : two{}, three{} {
    for (int j = 0; j < 3; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int flat = j * kLanes + lane, channel = flat % 3, pixel = flat / 3;
        two[j][lane] = channel == 1 ? kLanes + pixel : pixel;
        three[j][lane] = channel == 2 ? kLanes + pixel : lane;
      }
    }
  }
};
alignas(64) constexpr Interleave kInterleave;

REGATTA_INLINE void interleave(const Pixels& p, Lanes* result) {
  for (int j = 0; j < 3; ++j) {
    const Lanes two = __builtin_shuffle(p.red, p.green, load_index(kInterleave.two[j]));
    result[j] = __builtin_shuffle(two, p.blue, load_index(kInterleave.three[j]));
  }
}

REGATTA_INLINE Pixels finished(Pixels p, bool solarize, bool normalise) {
  if (solarize)
    p = {smaller(p.red, 255.0f - p.red), smaller(p.green, 255.0f - p.green), smaller(p.blue, 255.0f - p.blue)};
  if (!normalise) return p;
  return {p.red * kScale[0] + kShift[0], p.green * kScale[1] + kShift[1], p.blue * kScale[2] + kShift[2]};
}

template <int kOutput>
REGATTA_INLINE void write(const Lanes value, void* out, size_t offset) {
  if (kOutput == kAsFloat) {
    store_past(static_cast<float*>(out) + offset, value);
  } else if (kOutput == kAsBfloat16) {
    // To nearest, ties to even; there are no infinities or NaNs here.
    const LaneIndex bits = (LaneIndex)value;
    const LaneIndex rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16;
    const LaneHalves halves = __builtin_convertvector(rounded, LaneHalves);
    std::memcpy(static_cast<uint16_t*>(out) + offset, &halves, sizeof halves);
  } else if (kOutput == kAsHalf) {
    // To nearest, ties to even, by integers: not every processor converts. Nothing here is too large for a half.
    const LaneIndex bits = (LaneIndex)value, magnitude = bits & 0x7FFFFFFF;
    const LaneIndex normal = (magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 adding a half rounds at the right place: the sum's last bit is a half's least.
    const LaneIndex tiny = (LaneIndex)((Lanes)magnitude + 0.5f) - 0x3F000000;
    const LaneIndex rounded = (magnitude < 0x38800000 ? tiny : normal) | ((bits >> 16) & 0x8000);
    const LaneHalves halves = __builtin_convertvector(rounded, LaneHalves);
    std::memcpy(static_cast<uint16_t*>(out) + offset, &halves, sizeof halves);
  } else {
    const LaneBytes bytes = __builtin_convertvector(__builtin_convertvector(value + 0.5f, LaneIndex), LaneBytes);
    std::memcpy(static_cast<uint8_t*>(out) + offset, &bytes, sizeof bytes);
  }
}

// Solarize, flip, normalise and interleave one row. `rows` are read past their width up to a whole vector.
template <int kOutput>
void store_row(const float* const rows[3], int width, const Recipe& recipe, void* out, size_t offset) {
  const bool normalise = kOutput != kAsUint8;
  int x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    const int from = recipe.flip ? width - kLanes - x : x;
    Pixels p = {load(rows[0] + from), load(rows[1] + from), load(rows[2] + from)};
    if (recipe.flip) p = {reversed(p.red), reversed(p.green), reversed(p.blue)};
    Lanes result[3];
    interleave(finished(p, recipe.solarize, normalise), result);
    for (int j = 0; j < 3; ++j) write<kOutput>(result[j], out, offset + 3 * x + j * kLanes);
  }
  if (x == width) return;
  // The last pixels, fewer than a vector: through a buffer, one by one.
  const int from = recipe.flip ? 0 : x, count = width - x;
  const Pixels p = {load(rows[0] + from), load(rows[1] + from), load(rows[2] + from)};
  Lanes result[3];
  interleave(finished(p, recipe.solarize, normalise), result);
  uint32_t room[3 * kLanes + 1], *held = room;
  if ((reinterpret_cast<uintptr_t>(held) & 7) == 0) ++held;  // read again at once, so not to be stored past the cache
  for (int j = 0; j < 3; ++j) write<kOutput>(result[j], held, j * kLanes);
  constexpr size_t kBytes = bytes_of(kOutput);
  for (int i = 0; i < count; ++i) {
    const int pixel = recipe.flip ? count - 1 - i : i;
    std::memcpy(static_cast<char*>(out) + kBytes * (offset + 3 * (x + i)),
                reinterpret_cast<const char*>(held) + kBytes * 3 * pixel, kBytes * 3);
  }
}

using StoreAs = void(const float* const rows[3], int width, const Recipe& recipe, void* out, size_t offset);

StoreAs* store_as(int output) {
  switch (output) {
    case kAsFloat:
      return store_row<kAsFloat>;
    case kAsBfloat16:
      return store_row<kAsBfloat16>;
    case kAsHalf:
      return store_row<kAsHalf>;
    default:
      return store_row<kAsUint8>;
  }
}
