// The augmentation of a batch of views on a GPU: uint8 in, normalised and interleaved out. The definition is
// pipeline/augment.py.
//
// Two kernels. `mean_luma` sums the luma of each jittered image as it is when its contrast operation comes (a few
// partial sums an image, added in a fixed order, so that a run repeats bit for bit). `augment` cuts images into tiles:
//
//   1. pointwise operations on the tile and the blur's halo, from bytes to three float planes in shared memory;
//   2. horizontal and vertical blur there, eight outputs a thread, so that a loaded value is used up to eight times;
//   3. solarize, flip, normalise, interleave, and write whole runs of a row, four values at a time where they align.
//
// Gray precedes blur and the flip comes last whatever the profile says: see pipeline/native/augment.cpp.
//
// The same source is compiled for the host in the tests: a kernel is a sequence of phases, each run by all threads of a
// block, and a host "block" is a loop over the threads of each phase. Nothing but shared memory outlives a phase.

#ifdef __CUDACC__
#define ON_GPU
#endif

#ifdef ON_GPU
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ float name[]
#define EACH_THREAD(t) if (const int t = threadIdx.x; true)
#define END_PHASE __syncthreads()
#define BLOCK_X blockIdx.x
#define BLOCK_Y blockIdx.y
#else
#include <algorithm>
#include <cmath>
#include <cstring>
#define DEVICE static inline
using std::min;
#define SHARED(name) float* name = host_shared
#define EACH_THREAD(t) for (int t = 0; t < THREADS; ++t)
#define END_PHASE ((void)0)
static unsigned BLOCK_X, BLOCK_Y;
#endif

typedef unsigned char Byte;
typedef unsigned short Half;

constexpr int THREADS = 256;
constexpr int PARTS = 8;         // partial sums of an image's luma
constexpr int REACH = 8;         // taps on each side of the centre at most
constexpr int TILE_H = 32, TILE_W = 64;
constexpr int RUN = 8;           // outputs of a blur that one thread makes together
constexpr int HALO_H = TILE_H + 2 * REACH, HALO_W = TILE_W + 2 * REACH;
// Odd strides: the threads of a warp, in different rows, then meet in different memory banks.
constexpr int STRIDE = HALO_W + 1, BLURRED_STRIDE = TILE_W + 1;
constexpr int PLANE = HALO_H * STRIDE;
// Weights stand between zeros, so that a thread may ask for one past either end.
constexpr int WEIGHTS = 2 * REACH + 1 + 2 * RUN;
constexpr int SHARED_FLOATS = 3 * PLANE + HALO_H * BLURRED_STRIDE + WEIGHTS;

#ifndef ON_GPU
static float host_shared[SHARED_FLOATS];
#endif

enum Column { FLIP, JITTER, GRAY, BLUR, SOLARIZE, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, SIGMA = ORDER + 4, COLUMNS };
enum Operation { DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, DO_HUE };
enum Output { AS_FLOAT, AS_HALF, AS_BFLOAT16 };

struct Arguments {
    const Byte* images;        // (B, H, W, 3)
    const float* table;        // (B, COLUMNS)
    float* partial;            // (B, PARTS): sums of luma
    void* out;                 // (B, H, W, 3)
    int height, width;
    int gray_first;            // the profile greys before it jitters
    int radius;                // taps on each side of the blur's centre, at most REACH
    int output;
};

struct Pixel {
    float red, green, blue;
};

DEVICE float clamp_to(float value, float highest) { return fminf(fmaxf(value, 0.0f), highest); }
DEVICE float luma(const Pixel& p) { return 0.299f * p.red + 0.587f * p.green + 0.114f * p.blue; }

DEVICE Pixel scaled(const Pixel& p, float factor, float offset) {
    return {clamp_to(p.red * factor + offset, 255.0f), clamp_to(p.green * factor + offset, 255.0f),
            clamp_to(p.blue * factor + offset, 255.0f)};
}

// With the hue h in sextants the channels are lowest + chroma * clamp(|h - 3| - 1), clamp(2 - |h - 2|),
// clamp(2 - |h - 4|). `turn` is the shift, wrapped to [0, 6).
DEVICE Pixel hue(const Pixel& p, float turn) {
    const float highest = fmaxf(fmaxf(p.red, p.green), p.blue);
    const float lowest = fminf(fminf(p.red, p.green), p.blue);
    const float chroma = highest - lowest;
    float across = p.red - p.green, base = 4.0f;
    if (highest == p.green) across = p.blue - p.red, base = 2.0f;
    if (highest == p.red) across = p.green - p.blue, base = 0.0f;
    float h = across / fmaxf(chroma, 1e-20f) + (base + turn);  // in [-1, 11); grey pixels have `across` 0
    if (h < 0.0f) h += 6.0f;
    if (h >= 6.0f) h -= 6.0f;
    return {lowest + chroma * clamp_to(fabsf(h - 3.0f) - 1.0f, 1.0f),
            lowest + chroma * clamp_to(2.0f - fabsf(h - 2.0f), 1.0f),
            lowest + chroma * clamp_to(2.0f - fabsf(h - 4.0f), 1.0f)};
}

// One image's parameters, the same for all threads of a block.
struct Recipe {
    const float* row;
    float turn, contrast_offset;
    int contrast_place;
    bool jitter, gray_early, gray_late;
};

DEVICE Recipe decode(const Arguments& a, int image) {
    Recipe r;
    r.row = a.table + (long long)image * COLUMNS;
    r.jitter = r.row[JITTER] != 0.0f;
    r.gray_early = r.row[GRAY] != 0.0f && a.gray_first;
    r.gray_late = r.row[GRAY] != 0.0f && !a.gray_first;
    const float shift = 6.0f * r.row[HUE];
    r.turn = shift - 6.0f * floorf(shift / 6.0f);
    r.contrast_place = 0;
    for (int place = 1; place < 4; ++place)
        if ((int)r.row[ORDER + place] == DO_CONTRAST) r.contrast_place = place;
    r.contrast_offset = 0.0f;
    return r;
}

DEVICE Pixel jitter(Pixel p, const Recipe& r, int first, int last) {
    for (int place = first; place < last; ++place) {
        switch ((int)r.row[ORDER + place]) {
            case DO_BRIGHTNESS: p = scaled(p, r.row[BRIGHTNESS], 0.0f); break;
            case DO_CONTRAST: p = scaled(p, r.row[CONTRAST], r.contrast_offset); break;
            case DO_SATURATION: p = scaled(p, r.row[SATURATION], (1.0f - r.row[SATURATION]) * luma(p)); break;
            default: p = hue(p, r.turn); break;
        }
    }
    return p;
}

DEVICE Pixel load_pixel(const Byte* at, const Recipe& r) {
    Pixel p = {(float)at[0], (float)at[1], (float)at[2]};
    if (r.gray_early) {
        const float grey = luma(p);
        p = {grey, grey, grey};
    }
    return p;
}

// Grid (PARTS, B). Block part sums every PARTS-th run of THREADS pixels.
DEVICE void mean_luma_block(const Arguments& a) {
    SHARED(sums);
    const int image = BLOCK_Y;
    const Recipe r = decode(a, image);
    if (!r.jitter) return;
    const int area = a.height * a.width;
    const Byte* pixels = a.images + (long long)image * area * 3;
    EACH_THREAD(t) {
        float sum = 0.0f;
        for (int at = BLOCK_X * THREADS + t; at < area; at += PARTS * THREADS)
            sum += luma(jitter(load_pixel(pixels + 3LL * at, r), r, 0, r.contrast_place));
        sums[t] = sum;
    }
    END_PHASE;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        EACH_THREAD(t) if (t < half) sums[t] += sums[t + half];
        END_PHASE;
    }
    EACH_THREAD(t) if (t == 0) a.partial[image * PARTS + BLOCK_X] = sums[0];
}

// Index outside [0, size) mirrored at the border pixel, which is not repeated.
DEVICE int mirror(int position, int size) {
    if (position < 0) position = -position;
    return position >= size ? 2 * (size - 1) - position : position;
}

// `RUN` blurred values of a line of shared memory: outputs `first`.. of a line whose element i stands at line[i * step],
// output o taken from elements o .. o + 2 * reach. weights[RUN + i] is tap i, with zeros on both sides. Elements from
// `available` on were never written: zero times one of them could be NaN.
DEVICE void blur_run(const float* line, int step, int available, const float* weights, int reach, float* total) {
    float held[RUN];  // weights of the next input for each output: output o sees input i with tap i - o
#pragma unroll
    for (int o = 0; o < RUN; ++o) total[o] = 0.0f, held[o] = weights[RUN - o];
    for (int input = 0; input < RUN + 2 * reach; ++input) {
        const float value = input < available ? line[input * step] : 0.0f;
#pragma unroll
        for (int o = 0; o < RUN; ++o) total[o] += held[o] * value;
#pragma unroll
        for (int o = RUN - 1; o > 0; --o) held[o] = held[o - 1];
        held[0] = weights[RUN + input + 1];
    }
}

DEVICE unsigned float_to_bits(float value) {
#ifdef ON_GPU
    return __float_as_uint(value);
#else
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
#endif
}

template <int OUTPUT> struct Stored { typedef Half Type; };
template <> struct Stored<AS_FLOAT> { typedef float Type; };

template <int OUTPUT> DEVICE typename Stored<OUTPUT>::Type convert(float value) {
    if constexpr (OUTPUT == AS_FLOAT) {
        return value;
    } else if constexpr (OUTPUT == AS_BFLOAT16) {  // to nearest, ties to even; finite only
        const unsigned bits = float_to_bits(value);
        return (Half)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    } else {
#ifdef ON_GPU
        Half result;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
        return result;
#else
        _Float16 result = (_Float16)value;
        Half bits;
        std::memcpy(&bits, &result, 2);
        return bits;
#endif
    }
}

// Values that are stored together.
template <typename T, int GROUP> struct alignas(GROUP * sizeof(T)) Group {
    T value[GROUP];
};

// One store for a group. As members of a structure the compiler stores them one by one, a quarter of each sector at a time.
#ifdef __CUDACC__
DEVICE void store_together(Half* to, const Group<Half, 4>& values) {
    const Half* v = values.value;
    asm volatile("st.global.v4.b16 [%0], {%1, %2, %3, %4};"
                 ::"l"(__cvta_generic_to_global(to)), "h"(v[0]), "h"(v[1]), "h"(v[2]), "h"(v[3]) : "memory");
}
DEVICE void store_together(float* to, const Group<float, 4>& values) {
    const float* v = values.value;
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"l"(__cvta_generic_to_global(to)), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
#else
template <typename T> DEVICE void store_together(T* to, const Group<T, 4>& values) { *(Group<T, 4>*)to = values; }
#endif
template <typename T> DEVICE void store_together(T* to, const Group<T, 1>& values) { *to = values.value[0]; }

DEVICE float pick(int channel, float red, float green, float blue) { return channel == 0 ? red : channel == 1 ? green : blue; }

// Phase 3: the finished tile from shared memory to the result. The tile shows source columns x0 .. x0 + columns - 1.
template <int OUTPUT, int GROUP>
DEVICE void write_tile(const Arguments& a, const Recipe& r, const float* planes, int image, int y0, int x0, int rows, int columns) {
    typedef typename Stored<OUTPUT>::Type T;
    typedef Group<T, GROUP> Values;
    const bool flip = r.row[FLIP] != 0.0f, solarize = r.row[SOLARIZE] != 0.0f;
    const int left = flip ? a.width - x0 - columns : x0;  // the result's first column
    const int groups = columns * 3 / GROUP;
    const long long image_values = 3LL * a.height * a.width;
    T* out = (T*)a.out + image * image_values;
    EACH_THREAD(t) {
        for (int item = t; item < rows * groups; item += THREADS) {
            const int row = item / groups, first = (item - row * groups) * GROUP;
            Values values;
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                const int pixel = (first + i) / 3, channel = first + i - 3 * pixel;
                const int column = flip ? columns - 1 - pixel : pixel;
                float value = planes[(r.gray_late ? 0 : channel * PLANE) + row * STRIDE + column];
                if (solarize) value = fminf(value, 255.0f - value);
                value = value * pick(channel, 1 / (255 * 0.229f), 1 / (255 * 0.224f), 1 / (255 * 0.225f)) +
                        pick(channel, -0.485f / 0.229f, -0.456f / 0.224f, -0.406f / 0.225f);
                values.value[i] = convert<OUTPUT>(value);
            }
            const long long at = (long long)(y0 + row) * a.width * 3 + left * 3 + first;
            store_together(out + at, values);
        }
    }
}

template <int OUTPUT>
DEVICE void write_tile(const Arguments& a, const Recipe& r, const float* planes, int image, int y0, int x0, int rows, int columns) {
    if (a.width % 4 == 0) {  // then every tile begins and ends at a multiple of four pixels
        write_tile<OUTPUT, 4>(a, r, planes, image, y0, x0, rows, columns);
    } else {
        write_tile<OUTPUT, 1>(a, r, planes, image, y0, x0, rows, columns);
    }
}

// Grid (tiles, B).
DEVICE void augment_block(const Arguments& a) {
    SHARED(planes);
    float* blurred = planes + 3 * PLANE;
    float* weights = blurred + HALO_H * BLURRED_STRIDE;
    const int image = BLOCK_Y, tiles_across = (a.width + TILE_W - 1) / TILE_W;
    const int y0 = (int)BLOCK_X / tiles_across * TILE_H, x0 = (int)BLOCK_X % tiles_across * TILE_W;
    const int rows = min(TILE_H, a.height - y0), columns = min(TILE_W, a.width - x0);
    const int area = a.height * a.width;
    const Byte* pixels = a.images + (long long)image * area * 3;

    Recipe r = decode(a, image);
    if (r.jitter) {
        float total = 0.0f;
        for (int part = 0; part < PARTS; ++part) total += a.partial[image * PARTS + part];
        r.contrast_offset = (1.0f - r.row[CONTRAST]) * (total / (float)area);
    }
    const float sigma = r.row[SIGMA];
    const int reach = r.row[BLUR] != 0.0f ? min(a.radius, (int)(4.0f * sigma)) : 0;
    float weight_sum = 1.0f;
    for (int distance = 1; distance <= reach; ++distance)
        weight_sum += 2.0f * expf(-0.5f * (distance / sigma) * (distance / sigma));
    EACH_THREAD(t) {
        const int distance = t - RUN - reach;
        if (t < WEIGHTS) {
            const float ratio = distance / sigma;
            weights[t] = distance < -reach || distance > reach ? 0.0f : expf(-0.5f * ratio * ratio) / weight_sum;
        }
    }
    // Phase 1. Rows and columns past the image are mirrored; past the halo nothing is needed.
    const int halo_rows = rows + 2 * reach, halo_columns = columns + 2 * reach;
    EACH_THREAD(t) {
        for (int item = t; item < halo_rows * halo_columns; item += THREADS) {
            const int row = item / halo_columns, column = item - row * halo_columns;
            const int y = mirror(y0 + row - reach, a.height), x = mirror(x0 + column - reach, a.width);
            Pixel p = load_pixel(pixels + 3 * (y * a.width + x), r);
            if (r.jitter) p = jitter(p, r, 0, 4);
            float* to = planes + row * STRIDE + column;
            if (r.gray_late) {
                to[0] = luma(p);
            } else {
                to[0] = p.red;
                to[PLANE] = p.green;
                to[2 * PLANE] = p.blue;
            }
        }
    }
    END_PHASE;
    // Phase 2, one plane after another.
    for (int channel = 0; reach > 0 && channel < (r.gray_late ? 1 : 3); ++channel) {
        float* plane = planes + channel * PLANE;
        EACH_THREAD(t) {
            for (int item = t; item < halo_rows * (TILE_W / RUN); item += THREADS) {
                const int run = item / halo_rows, row = item - run * halo_rows;  // lanes in different rows
                if (run * RUN >= columns) continue;
                float total[RUN];
                blur_run(plane + row * STRIDE + run * RUN, 1, halo_columns - run * RUN, weights, reach, total);
                for (int o = 0; o < RUN; ++o) blurred[row * BLURRED_STRIDE + run * RUN + o] = total[o];
            }
        }
        END_PHASE;
        EACH_THREAD(t) {
            for (int item = t; item < TILE_W * (TILE_H / RUN); item += THREADS) {
                const int run = item / TILE_W, column = item % TILE_W;  // lanes in different columns
                if (column >= columns || run * RUN >= rows) continue;
                float total[RUN];
                const float* line = blurred + run * RUN * BLURRED_STRIDE + column;
                blur_run(line, BLURRED_STRIDE, halo_rows - run * RUN, weights, reach, total);
                for (int o = 0; o < RUN; ++o) plane[(run * RUN + o) * STRIDE + column] = total[o];
            }
        }
        END_PHASE;
    }
    if (a.output == AS_FLOAT) {
        write_tile<AS_FLOAT>(a, r, planes, image, y0, x0, rows, columns);
    } else if (a.output == AS_HALF) {
        write_tile<AS_HALF>(a, r, planes, image, y0, x0, rows, columns);
    } else {
        write_tile<AS_BFLOAT16>(a, r, planes, image, y0, x0, rows, columns);
    }
}

#ifdef ON_GPU
extern "C" __global__ void __launch_bounds__(THREADS) mean_luma(const Arguments a) { mean_luma_block(a); }
extern "C" __global__ void __launch_bounds__(THREADS) augment(const Arguments a) { augment_block(a); }
#else
// One call runs a whole grid, block after block. Shared memory starts as garbage, as on a GPU.
static void run_grid(void (*block)(const Arguments&), const Arguments& a, int blocks_x, int blocks_y) {
    for (BLOCK_Y = 0; BLOCK_Y < (unsigned)blocks_y; ++BLOCK_Y) {
        for (BLOCK_X = 0; BLOCK_X < (unsigned)blocks_x; ++BLOCK_X) {
            std::fill(host_shared, host_shared + SHARED_FLOATS, NAN);
            block(a);
        }
    }
}
extern "C" __attribute__((visibility("default"))) void host_mean_luma(const Arguments* a, int blocks_x, int blocks_y) {
    run_grid(mean_luma_block, *a, blocks_x, blocks_y);
}
extern "C" __attribute__((visibility("default"))) void host_augment(const Arguments* a, int blocks_x, int blocks_y) {
    run_grid(augment_block, *a, blocks_x, blocks_y);
}
#endif
