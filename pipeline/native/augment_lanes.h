// The augmentation of one image for one instruction set. augment.cpp includes this once for each, in a namespace of its
// own and with LANES, the floats in a vector register, defined; so there is no include guard.

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t LaneIndex __attribute__((vector_size(LANES * 4)));
typedef uint8_t Bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
// As many bytes or halves as there are lanes, for conversions in registers.
typedef uint8_t LaneBytes __attribute__((vector_size(LANES)));
typedef uint16_t LaneHalves __attribute__((vector_size(LANES * 2)));

struct Pixels {
    Lanes red, green, blue;
};

INLINE Lanes load(const float* from) { return *(const Lanes*)from; }
INLINE void store(float* to, Lanes value) { *(Lanes*)to = value; }
INLINE Lanes all(float value) { return value - (Lanes){}; }
INLINE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
INLINE Lanes clamp_level(Lanes v) { return smaller(larger(v, all(0.0f)), all(255.0f)); }
INLINE Lanes clamp_unit(Lanes v) { return smaller(larger(v, all(0.0f)), all(1.0f)); }
INLINE Lanes magnitude(Lanes v) { return larger(v, -v); }
INLINE Lanes luma(const Pixels& p) { return LUMA_RED * p.red + LUMA_GREEN * p.green + LUMA_BLUE * p.blue; }

INLINE Pixels scaled(const Pixels& p, float factor, Lanes offset) {
    const Lanes f = all(factor);
    return {clamp_level(p.red * f + offset), clamp_level(p.green * f + offset), clamp_level(p.blue * f + offset)};
}

// `turn` is the shift in sextants, wrapped to [0, 6). With the hue h in sextants the three channels are
// lowest + chroma * clamp(|h - 3| - 1), clamp(2 - |h - 2|), clamp(2 - |h - 4|).
INLINE Pixels hue(const Pixels& p, float turn) {
    const Lanes highest = larger(larger(p.red, p.green), p.blue);
    const Lanes lowest = smaller(smaller(p.red, p.green), p.blue);
    const Lanes chroma = highest - lowest;
    const auto is_red = highest == p.red, is_green = highest == p.green;
    const Lanes across = is_red ? p.green - p.blue : (is_green ? p.blue - p.red : p.red - p.green);
    const Lanes base = is_red ? all(0.0f) : (is_green ? all(2.0f) : all(4.0f));
    // A grey pixel has chroma 0 and `across` 0: any positive divisor will do.
    Lanes h = across / larger(chroma, all(1e-20f)) + (base + turn);  // in [-1, 11)
    h = h < 0.0f ? h + 6.0f : h;
    h = h >= 6.0f ? h - 6.0f : h;
    return {lowest + chroma * clamp_unit(magnitude(h - 3.0f) - 1.0f),
            lowest + chroma * clamp_unit(2.0f - magnitude(h - 2.0f)),
            lowest + chroma * clamp_unit(2.0f - magnitude(h - 4.0f))};
}

// Places first..last-1 of the jitter. The branches go the same way for a whole image, so they cost next to nothing.
INLINE Pixels jitter(Pixels p, const Recipe& recipe, int first, int last) {
    for (int place = first; place < last; ++place) {
        switch (recipe.order[place]) {
            case DO_BRIGHTNESS: p = scaled(p, recipe.brightness, all(0.0f)); break;
            case DO_CONTRAST: p = scaled(p, recipe.contrast, all(recipe.contrast_offset)); break;
            case DO_SATURATION: p = scaled(p, recipe.saturation, (1.0f - recipe.saturation) * luma(p)); break;
            default: p = hue(p, recipe.turn); break;
        }
    }
    return p;
}

INLINE Pixels gray(const Pixels& p) {
    const Lanes grey = luma(p);
    return {grey, grey, grey};
}

// Sixteen bytes to as many floats. Compilers take the bytes apart one by one, so the widening is spelled out.
INLINE void widen(const Bytes16& bytes, float* to) {
#if LANES == 16
    store(to, (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes)));
#elif LANES == 8
    store(to, (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)bytes)));
    store(to + 8, (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8))));
#else
    for (int i = 0; i < 16; ++i) to[i] = (float)bytes[i];
#endif
}

// Sixteen interleaved pixels to three runs of sixteen floats.
INLINE void load_16(const uint8_t* pixels, float* red, float* green, float* blue) {
    const Bytes16 a = *(const Bytes16*)pixels, b = *(const Bytes16*)(pixels + 16), c = *(const Bytes16*)(pixels + 32);
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
INLINE void load_row(const uint8_t* pixels, int width, float* red, float* green, float* blue) {
    int x = 0;
    for (; x + 16 <= width; x += 16) load_16(pixels + 3 * x, red + x, green + x, blue + x);
    for (; x < width; ++x) {
        red[x] = pixels[3 * x];
        green[x] = pixels[3 * x + 1];
        blue[x] = pixels[3 * x + 2];
    }
    for (; x % 16; ++x) red[x] = green[x] = blue[x] = 0.0f;
}

INLINE double sum_of(Lanes lanes) {
    double total = 0.0;
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
}

// Pass 1 on one row: the operations before contrast, in place, and the sum of what luma is then.
INLINE double before_contrast(float* red, float* green, float* blue, int width, const Recipe& recipe) {
    Lanes sum = {};
    double tail = 0.0;
    for (int x = 0; x < width; x += LANES) {
        Pixels p = {load(red + x), load(green + x), load(blue + x)};
        if (recipe.gray_early) p = gray(p);
        p = jitter(p, recipe, 0, recipe.contrast_place);
        const Lanes level = luma(p);
        if (x + LANES <= width) {
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
INLINE void from_contrast(const float* const from[3], float* const to[3], int width, const Recipe& recipe) {
    for (int x = 0; x < width; x += LANES) {
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

constexpr int RUN = 4;  // accumulators in flight

// Sum over the taps of what `left(distance)` and `right(distance)` point to, for `RUN` vectors from x on.
#define BLUR_RUN(run, centre, left, right)                                                        \
    {                                                                                             \
        Lanes total[run];                                                                         \
        for (int i = 0; i < run; ++i) total[i] = recipe.taps[0] * load((centre) + i * LANES);     \
        for (int distance = 1; distance <= recipe.reach; ++distance) {                            \
            const Lanes tap = all(recipe.taps[distance]);                                         \
            const float *one = (left), *other = (right);                                          \
            for (int i = 0; i < run; ++i)                                                         \
                total[i] += tap * (load(one + i * LANES) + load(other + i * LANES));              \
        }                                                                                         \
        for (int i = 0; i < run; ++i) store(to + x + i * LANES, total[i]);                        \
    }

// Horizontal blur. `row` has room for MAX_RADIUS and a vector more on both sides; the margins are filled here.
INLINE void blur_row(float* row, float* to, int width, const Recipe& recipe) {
    for (int distance = 1; distance <= recipe.reach; ++distance) {
        row[-distance] = row[mirror(-distance, width)];
        row[width - 1 + distance] = row[mirror(width - 1 + distance, width)];
    }
    int x = 0;
    for (; x + RUN * LANES <= width; x += RUN * LANES) BLUR_RUN(RUN, row + x, row + x - distance, row + x + distance)
    for (; x < width; x += LANES) BLUR_RUN(1, row + x, row + x - distance, row + x + distance)
}

// Vertical blur of row y of a plane.
INLINE void blur_column(const float* plane, size_t stride, int y, int height, float* to, int width, const Recipe& recipe) {
#define ABOVE plane + stride * mirror(y - distance, height) + x
#define BELOW plane + stride * mirror(y + distance, height) + x
    int x = 0;
    for (; x + RUN * LANES <= width; x += RUN * LANES) BLUR_RUN(RUN, plane + stride * y + x, ABOVE, BELOW)
    for (; x < width; x += LANES) BLUR_RUN(1, plane + stride * y + x, ABOVE, BELOW)
#undef ABOVE
#undef BELOW
}
#undef BLUR_RUN

// Lane l of result j holds flat element j * LANES + l: channel (that % 3) of pixel (that / 3). `two` picks red and
// green, `three` keeps those and picks blue.
struct Interleave {
    int32_t two[3][LANES], three[3][LANES];
    constexpr Interleave() : two{}, three{} {
        for (int j = 0; j < 3; ++j) {
            for (int lane = 0; lane < LANES; ++lane) {
                const int flat = j * LANES + lane, channel = flat % 3, pixel = flat / 3;
                two[j][lane] = channel == 1 ? LANES + pixel : pixel;
                three[j][lane] = channel == 2 ? LANES + pixel : lane;
            }
        }
    }
};
alignas(64) constexpr Interleave INTERLEAVE;

INLINE LaneIndex load_index(const int32_t* from) {
    LaneIndex index;
    std::memcpy(&index, from, sizeof index);
    return index;
}

INLINE void interleave(const Pixels& p, Lanes* result) {
    for (int j = 0; j < 3; ++j) {
        const Lanes two = __builtin_shuffle(p.red, p.green, load_index(INTERLEAVE.two[j]));
        result[j] = __builtin_shuffle(two, p.blue, load_index(INTERLEAVE.three[j]));
    }
}

INLINE Lanes reversed(Lanes v) {
    LaneIndex mask = {};
    for (int lane = 0; lane < LANES; ++lane) mask[lane] = LANES - 1 - lane;
    return __builtin_shuffle(v, mask);
}

INLINE Pixels finished(Pixels p, bool solarize, bool normalise) {
    if (solarize) p = {smaller(p.red, 255.0f - p.red), smaller(p.green, 255.0f - p.green), smaller(p.blue, 255.0f - p.blue)};
    if (!normalise) return p;
    return {p.red * SCALE[0] + SHIFT[0], p.green * SCALE[1] + SHIFT[1], p.blue * SCALE[2] + SHIFT[2]};
}

// Floats go past the cache where they are aligned: a batch of them does not fit into it, and an ordinary store would
// first read the line that it overwrites. Halves gain nothing by it.
INLINE void store_past(float* to, Lanes value) {
#if LANES == 16
    if (((uintptr_t)to & 63) == 0) return _mm512_stream_ps(to, (__m512)value);
#elif LANES == 8
    if (((uintptr_t)to & 31) == 0) return _mm256_stream_ps(to, (__m256)value);
#endif
    store(to, value);
}

// Makes the results visible to other threads in order with what this one writes after them.
INLINE void finish_stores() {
#if LANES >= 8
    _mm_sfence();
#endif
}

template <int OUTPUT>
INLINE void write(const Lanes value, void* out, size_t offset) {
    if (OUTPUT == AS_FLOAT) {
        store_past((float*)out + offset, value);
    } else if (OUTPUT == AS_BFLOAT16) {
        // To nearest, ties to even; there are no infinities or NaNs here.
        const LaneIndex bits = (LaneIndex)value;
        const LaneIndex rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16;
        const LaneHalves halves = __builtin_convertvector(rounded, LaneHalves);
        std::memcpy((uint16_t*)out + offset, &halves, sizeof halves);
    } else if (OUTPUT == AS_HALF) {
        // To nearest, ties to even, by integers: not every processor converts. Nothing here is too large for a half.
        const LaneIndex bits = (LaneIndex)value, magnitude = bits & 0x7FFFFFFF;
        const LaneIndex normal = (magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
        // Below 2^-14 adding a half rounds at the right place: the sum's last bit is a half's least.
        const LaneIndex tiny = (LaneIndex)((Lanes)magnitude + 0.5f) - 0x3F000000;
        const LaneIndex rounded = (magnitude < 0x38800000 ? tiny : normal) | ((bits >> 16) & 0x8000);
        const LaneHalves halves = __builtin_convertvector(rounded, LaneHalves);
        std::memcpy((uint16_t*)out + offset, &halves, sizeof halves);
    } else {
        const LaneBytes bytes = __builtin_convertvector(__builtin_convertvector(value + 0.5f, LaneIndex), LaneBytes);
        std::memcpy((uint8_t*)out + offset, &bytes, sizeof bytes);
    }
}

// Solarize, flip, normalise and interleave one row. `rows` are read past their width up to a whole vector.
template <int OUTPUT>
INLINE void store_row(const float* const rows[3], int width, const Recipe& recipe, void* out, size_t offset) {
    const bool normalise = OUTPUT != AS_UINT8;
    int x = 0;
    for (; x + LANES <= width; x += LANES) {
        const int from = recipe.flip ? width - LANES - x : x;
        Pixels p = {load(rows[0] + from), load(rows[1] + from), load(rows[2] + from)};
        if (recipe.flip) p = {reversed(p.red), reversed(p.green), reversed(p.blue)};
        Lanes result[3];
        interleave(finished(p, recipe.solarize, normalise), result);
        for (int j = 0; j < 3; ++j) write<OUTPUT>(result[j], out, offset + 3 * x + j * LANES);
    }
    if (x == width) return;
    // The last pixels, fewer than a vector: through a buffer, one by one.
    const int from = recipe.flip ? 0 : x, count = width - x;
    const Pixels p = {load(rows[0] + from), load(rows[1] + from), load(rows[2] + from)};
    Lanes result[3];
    interleave(finished(p, recipe.solarize, normalise), result);
    uint32_t room[3 * LANES + 1], *held = room;
    if (((uintptr_t)held & 7) == 0) ++held;  // read again at once, so not to be stored past the cache
    for (int j = 0; j < 3; ++j) write<OUTPUT>(result[j], held, j * LANES);
    constexpr size_t BYTES = bytes_of(OUTPUT);
    for (int i = 0; i < count; ++i) {
        const int pixel = recipe.flip ? count - 1 - i : i;
        std::memcpy((char*)out + BYTES * (offset + 3 * (x + i)), (const char*)held + BYTES * 3 * pixel, BYTES * 3);
    }
}

template <int OUTPUT>
INLINE void augment_as(const uint8_t* image, int height, int width, Recipe& recipe, void* out, size_t out_offset, float* scratch) {
    const size_t stride = row_stride(width), plane = stride * height;
    float* rows[3];
    for (int c = 0; c < 3; ++c) rows[c] = scratch + c * row_floats(width) + MARGIN;
    float* planes = scratch + 3 * row_floats(width);

    if (recipe.jitter) {
        double total = 0.0;
        for (int y = 0; y < height; ++y) {
            float *red = rows[0], *green = rows[1], *blue = rows[2];
            if (recipe.changes_before_contrast) {  // pass 2 goes on from the result
                red = planes + stride * y, green = red + plane, blue = green + plane;
            }
            load_row(image + (size_t)y * width * 3, width, red, green, blue);
            total += before_contrast(red, green, blue, width, recipe);
        }
        recipe.contrast_offset = (1.0f - recipe.contrast) * (float)(total / ((double)height * width));
    }
    const int held = recipe.gray_late ? 1 : 3;
    const float* shown[3] = {rows[0], rows[held == 1 ? 0 : 1], rows[held == 1 ? 0 : 2]};
    for (int y = 0; y < height; ++y) {
        float* base = planes + stride * y;
        const float* from[3] = {base, base + plane, base + 2 * plane};
        if (!recipe.jitter || !recipe.changes_before_contrast) {
            load_row(image + (size_t)y * width * 3, width, rows[0], rows[1], rows[2]);
            for (int c = 0; c < 3; ++c) from[c] = rows[c];
        }
        from_contrast(from, rows, width, recipe);
        if (recipe.reach > 0) {
            for (int c = 0; c < held; ++c) blur_row(rows[c], base + c * plane, width, recipe);
        } else {
            store_row<OUTPUT>(shown, width, recipe, out, out_offset + (size_t)y * width * 3);
        }
    }
    for (int y = 0; recipe.reach > 0 && y < height; ++y) {
        for (int c = 0; c < held; ++c) blur_column(planes + c * plane, stride, y, height, rows[c], width, recipe);
        store_row<OUTPUT>(shown, width, recipe, out, out_offset + (size_t)y * width * 3);
    }
}

void augment_one(const uint8_t* image, int height, int width, Recipe& recipe, int output, void* out, size_t out_offset, float* scratch) {
    if (output == AS_FLOAT) {
        augment_as<AS_FLOAT>(image, height, width, recipe, out, out_offset, scratch);
    } else if (output == AS_BFLOAT16) {
        augment_as<AS_BFLOAT16>(image, height, width, recipe, out, out_offset, scratch);
    } else if (output == AS_HALF) {
        augment_as<AS_HALF>(image, height, width, recipe, out, out_offset, scratch);
    } else {
        augment_as<AS_UINT8>(image, height, width, recipe, out, out_offset, scratch);
    }
    finish_stores();
}
