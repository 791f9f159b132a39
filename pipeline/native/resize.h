// Antialiased separable resize of one plane or three, row by row, in 16-bit fixed point.
//
// For each output row: a weighted sum of source rows (vertical), then of its columns (horizontal), then colour
// conversion and interleaving, all in rows that stay in the first-level cache. A pixel enters as value << 7 and each
// pass multiplies by weights of `kWeightBits` bits with rounding (the pmulhrsw operation), so the bilinear path ends
// with 7 fraction bits. Weights of bicubic can exceed 1 and its sums overshoot 255: it gives up one bit a pass.
// The scalar, AVX2 and AVX-512 kernels compute the same bits.
//
// Source: the filter and its support are those of PIL's resize: a triangle (or Keys' cubic, a = -0.5) as wide as one
// output pixel when reducing, normalised over the pixels inside the crop.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "crops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define REGATTA_X86 1
#else
#define REGATTA_X86 0
#endif

namespace regatta {

constexpr int kPad = 192;    // elements that a kernel may touch past the end of a row
constexpr int kGroup = 32;   // outputs that the widest horizontal kernel computes at once
constexpr int kInputShift = 7;

enum Level : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

inline int32_t best_level() {
#if REGATTA_X86
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kScalar;
}

// The filter along one axis: output x is the sum over k of weight[k * stride + x] * input[start[x] + k].
struct Filter {
  int taps = 0, stride = 0;
  int first = 0, last = 0;  // inputs that are touched: [first, last)
  std::vector<int32_t> start;
  std::vector<int16_t> weight;
  std::vector<float> raw, offset, sum;
  std::vector<int16_t> index;    // AVX-512: start relative to the group's first start
  std::vector<int32_t> base;     // that first start, one per group of 32; for AVX2, one per 8 outputs
  std::vector<uint8_t> shuffle;  // AVX2: byte shuffles, [window][output] of 2 bytes
  int windows = 0;
};

// Multiply-and-round of two 16-bit numbers, as pmulhrsw does it.
inline int16_t mul_round(int16_t a, int16_t b) {
  return static_cast<int16_t>((static_cast<int32_t>(a) * b + 0x4000) >> 15);
}
inline int16_t add_saturated(int16_t a, int16_t b) {
  return static_cast<int16_t>(std::clamp(static_cast<int32_t>(a) + b, -32768, 32767));
}

// Unnormalised weights for all outputs, one tap at a time so that the compiler can vectorise over outputs.
#if REGATTA_X86 && defined(__GNUC__) && !defined(__clang__) && !defined(REGATTA_NO_CLONES)
#define REGATTA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REGATTA_CLONES
#endif

REGATTA_CLONES
inline void triangle_weights(const float* offset, const int32_t* start, int last, float inverse, int taps, int stride,
                             int outputs, float* raw, float* sum) {
  for (int x = 0; x < outputs; ++x) sum[x] = 0.0f;
  for (int k = 0; k < taps; ++k) {
    float* row = raw + static_cast<size_t>(k) * stride;
    for (int x = 0; x < outputs; ++x) {
      const float distance = std::fabs(offset[x] + static_cast<float>(k)) * inverse;
      float value = std::max(1.0f - distance, 0.0f);
      value = start[x] + k < last ? value : 0.0f;
      row[x] = value;
      sum[x] += value;
    }
  }
}

REGATTA_CLONES
inline void cubic_weights(const float* offset, const int32_t* start, int last, float inverse, int taps, int stride,
                          int outputs, float* raw, float* sum) {
  for (int x = 0; x < outputs; ++x) sum[x] = 0.0f;
  for (int k = 0; k < taps; ++k) {
    float* row = raw + static_cast<size_t>(k) * stride;
    for (int x = 0; x < outputs; ++x) {
      const float t = std::fabs(offset[x] + static_cast<float>(k)) * inverse;
      const float near = (1.5f * t - 2.5f) * t * t + 1.0f;
      const float far = ((-0.5f * t + 2.5f) * t - 4.0f) * t + 2.0f;
      float value = t < 1.0f ? near : (t < 2.0f ? far : 0.0f);
      value = start[x] + k < last ? value : 0.0f;
      row[x] = value;
      sum[x] += value;
    }
  }
}

REGATTA_CLONES
inline void fix_weights(const float* raw, const float* sum, float one, int taps, int stride, int outputs,
                        int16_t* weight) {
  for (int k = 0; k < taps; ++k)
    for (int x = 0; x < outputs; ++x) {
      const size_t at = static_cast<size_t>(k) * stride + x;
      const int32_t fixed = static_cast<int32_t>(raw[at] * (one / sum[x]) + 65536.5f) - 65536;
      weight[at] = static_cast<int16_t>(std::min(fixed, 32767));
    }
}

// Positions at which the horizontal kernels pick their inputs.
inline void plan_horizontal(Filter& filter, int outputs, int32_t level) {
  const int groups = filter.stride / kGroup;
  for (int x = outputs; x < filter.stride; ++x) filter.start[x] = filter.start[outputs - 1];
  if (level == kAvx512) {
    filter.index.resize(filter.stride);
    filter.base.resize(groups);
    for (int group = 0; group < groups; ++group) {
      const int base = filter.start[group * kGroup];
      filter.base[group] = base;
      for (int x = group * kGroup; x < (group + 1) * kGroup; ++x)
        filter.index[x] = static_cast<int16_t>(filter.start[x] - base);
    }
    return;
  }
  if (level != kAvx2) return;
  const int eighths = filter.stride / 8;
  filter.base.resize(eighths);
  filter.windows = 1;
  for (int eighth = 0; eighth < eighths; ++eighth) {
    filter.base[eighth] = filter.start[eighth * 8];
    filter.windows = std::max(filter.windows, (filter.start[eighth * 8 + 7] - filter.base[eighth]) / 8 + 1);
  }
  filter.shuffle.resize(static_cast<size_t>(filter.windows) * filter.stride * 2);
  for (int window = 0; window < filter.windows; ++window)
    for (int x = 0; x < filter.stride; ++x) {
      const int at = filter.start[x] - filter.base[x / 8] - window * 8;
      uint8_t* bytes = filter.shuffle.data() + (static_cast<size_t>(window) * filter.stride + x) * 2;
      const bool inside = at >= 0 && at < 8;
      bytes[0] = inside ? static_cast<uint8_t>(2 * at) : 0x80;
      bytes[1] = inside ? static_cast<uint8_t>(2 * at + 1) : 0x80;
    }
}

// First input, its distance from the output's centre, and how many inputs there are: the most over all outputs.
REGATTA_CLONES
inline int place_taps(double from, double scale, double support, int lowest, int highest, int outputs, int32_t* start,
                      float* offset) {
  int taps = 1;
  for (int x = 0; x < outputs; ++x) {
    const double center = from + (x + 0.5) * scale;
    // Samples whose centre lies within the support, as far as the crop reaches; both ends are positive after the
    // addition or clamped, so truncation is a floor.
    int begin = static_cast<int>(center - support + 0.5), end = static_cast<int>(center + support + 0.5);
    begin = std::min(std::max(begin, lowest), highest - 1);
    end = std::min(std::max(end, begin + 1), highest);
    start[x] = begin;
    offset[x] = static_cast<float>(begin + 0.5 - center);
    taps = std::max(taps, end - begin);
  }
  return taps;
}

// The filter that maps the interval [from, from + length) of a row of `limit` samples to `outputs` pixels.
inline void build_filter(Filter& filter, double from, double length, int limit, int outputs, int interpolation) {
  const int lowest = std::clamp(static_cast<int>(std::floor(from)), 0, limit - 1);
  const int highest = std::clamp(static_cast<int>(std::ceil(from + length)), lowest + 1, limit);
  const double scale = length / outputs;
  const double widening = std::max(scale, 1.0);
  const double support = (interpolation == kBicubic ? 2.0 : 1.0) * widening;
  filter.stride = (outputs + kGroup - 1) / kGroup * kGroup;
  filter.start.resize(filter.stride);
  filter.offset.resize(filter.stride);
  filter.sum.resize(filter.stride);
  filter.taps = place_taps(from, scale, support, lowest, highest, outputs, filter.start.data(), filter.offset.data());
  filter.first = lowest;
  filter.last = highest;
  const size_t total = static_cast<size_t>(filter.taps) * filter.stride;
  filter.raw.resize(total);
  filter.weight.assign(total, 0);
  auto* weights = interpolation == kBicubic ? cubic_weights : triangle_weights;
  weights(filter.offset.data(), filter.start.data(), highest, static_cast<float>(1.0 / widening), filter.taps,
          filter.stride, outputs, filter.raw.data(), filter.sum.data());
  // The samples reach as far as the interval, so the one nearest to an output's centre is at most half a sample away and
  // no sum is below a half.
  fix_weights(filter.raw.data(), filter.sum.data(), interpolation == kBicubic ? 16384.0f : 32768.0f, filter.taps,
              filter.stride, outputs, filter.weight.data());
}

// ---- vertical: out[x] = sum over k of (rows[k][x] << 7) * weight[k]

inline void vertical_scalar(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight, ptrdiff_t weight_stride,
                            int taps, int width, int16_t* out) {
  for (int x = 0; x < width; ++x) {
    int16_t sum = 0;
    for (int k = 0; k < taps; ++k)
      sum = add_saturated(sum, mul_round(static_cast<int16_t>(source[k * pitch + x] << kInputShift),
                                         weight[k * weight_stride]));
    out[x] = sum;
  }
}

inline void horizontal_scalar(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  for (int x = 0; x < outputs; ++x) {
    int16_t sum = 0;
    for (int k = 0; k < filter.taps; ++k)
      sum = add_saturated(sum, mul_round(row[filter.start[x] + k], filter.weight[k * filter.stride + x]));
    out[x] = sum;
  }
}

// Full-range YCbCr to RGB with the coefficients of JFIF in Q15; the integer parts of 1.402 and 1.772 are added apart.
constexpr int16_t kRedCr = 13173;     // 0.402
constexpr int16_t kGreenCb = -11277;  // -0.344136
constexpr int16_t kGreenCr = -23401;  // -0.714136
constexpr int16_t kBlueCb = 25297;    // 0.772

inline uint8_t to_byte(int16_t value, int bits) {
  return static_cast<uint8_t>(std::clamp(add_saturated(value, static_cast<int16_t>(1 << (bits - 1))) >> bits, 0, 255));
}

inline void color_scalar(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int first, int outputs,
                         uint8_t* rgb) {
  const int16_t middle = static_cast<int16_t>(128 << bits);
  for (int x = first; x < outputs; ++x) {
    const int16_t blue = static_cast<int16_t>(cb[x] - middle), red = static_cast<int16_t>(cr[x] - middle);
    const int16_t r = add_saturated(y[x], add_saturated(red, mul_round(red, kRedCr)));
    const int16_t g = add_saturated(y[x], add_saturated(mul_round(blue, kGreenCb), mul_round(red, kGreenCr)));
    const int16_t b = add_saturated(y[x], add_saturated(blue, mul_round(blue, kBlueCb)));
    rgb[3 * x] = to_byte(r, bits);
    rgb[3 * x + 1] = to_byte(g, bits);
    rgb[3 * x + 2] = to_byte(b, bits);
  }
}

inline void interleave_scalar(const int16_t* r, const int16_t* g, const int16_t* b, int bits, int outputs,
                              uint8_t* rgb) {
  for (int x = 0; x < outputs; ++x) {
    rgb[3 * x] = to_byte(r[x], bits);
    rgb[3 * x + 1] = to_byte(g[x], bits);
    rgb[3 * x + 2] = to_byte(b[x], bits);
  }
}

#if REGATTA_X86
#define REGATTA_AVX2 __attribute__((target("avx2")))
#define REGATTA_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512vl")))

template <int kTaps>
REGATTA_AVX2 inline void vertical_avx2_taps(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight,
                                            ptrdiff_t weight_stride, int taps, int width, int16_t* out) {
  const int count = kTaps ? kTaps : taps;
  for (int x = 0; x < width; x += 16) {
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < count; ++k) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k * pitch + x));
      const __m256i value = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kInputShift);
      sum = _mm256_adds_epi16(sum, _mm256_mulhrs_epi16(value, _mm256_set1_epi16(weight[k * weight_stride])));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), sum);
  }
}

REGATTA_AVX2 inline void vertical_avx2(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight,
                                       ptrdiff_t weight_stride, int taps, int width, int16_t* out) {
  switch (taps) {
    case 2: return vertical_avx2_taps<2>(source, pitch, weight, weight_stride, taps, width, out);
    case 3: return vertical_avx2_taps<3>(source, pitch, weight, weight_stride, taps, width, out);
    case 4: return vertical_avx2_taps<4>(source, pitch, weight, weight_stride, taps, width, out);
    default: return vertical_avx2_taps<0>(source, pitch, weight, weight_stride, taps, width, out);
  }
}

REGATTA_AVX2 inline void horizontal_avx2(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  for (int x = 0; x < outputs; x += 16) {
    const int16_t* low = row + filter.base[x / 8];
    const int16_t* high = row + filter.base[x / 8 + 1];
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < filter.taps; ++k) {
      __m256i value = _mm256_setzero_si256();
      for (int window = 0; window < filter.windows; ++window) {
        const __m256i words = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + k + window * 8))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(high + k + window * 8)), 1);
        const uint8_t* pick = filter.shuffle.data() + (static_cast<size_t>(window) * filter.stride + x) * 2;
        value = _mm256_or_si256(
            value, _mm256_shuffle_epi8(words, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pick))));
      }
      const __m256i weight =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(filter.weight.data() + k * filter.stride + x));
      sum = _mm256_adds_epi16(sum, _mm256_mulhrs_epi16(value, weight));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), sum);
  }
}

// Three rows of 16 bytes become 48 interleaved ones.
REGATTA_AVX2 inline void store_rgb(__m128i r, __m128i g, __m128i b, uint8_t* rgb) {
  const __m128i r0 = _mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5);
  const __m128i g0 = _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1);
  const __m128i b0 = _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1);
  const __m128i r1 = _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1);
  const __m128i g1 = _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10);
  const __m128i b1 = _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1);
  const __m128i r2 = _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1);
  const __m128i g2 = _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1);
  const __m128i b2 = _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15);
  __m128i* out = reinterpret_cast<__m128i*>(rgb);
  _mm_storeu_si128(out, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r0), _mm_shuffle_epi8(g, g0)),
                                     _mm_shuffle_epi8(b, b0)));
  _mm_storeu_si128(out + 1, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r1), _mm_shuffle_epi8(g, g1)),
                                         _mm_shuffle_epi8(b, b1)));
  _mm_storeu_si128(out + 2, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r2), _mm_shuffle_epi8(g, g2)),
                                         _mm_shuffle_epi8(b, b2)));
}

REGATTA_AVX2 inline __m128i pack_bytes(__m256i value, __m256i half, __m128i bits) {
  const __m256i rounded = _mm256_sra_epi16(_mm256_adds_epi16(value, half), bits);
  return _mm_packus_epi16(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

// `convert` is false where the three rows are red, green and blue already.
template <bool convert>
REGATTA_AVX2 inline void color_avx2(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int outputs,
                                    uint8_t* rgb) {
  const __m256i middle = _mm256_set1_epi16(static_cast<int16_t>(128 << bits));
  const __m256i half = _mm256_set1_epi16(static_cast<int16_t>(1 << (bits - 1)));
  const __m128i shift = _mm_cvtsi32_si128(bits);
  const __m256i red_cr = _mm256_set1_epi16(kRedCr), green_cb = _mm256_set1_epi16(kGreenCb);
  const __m256i green_cr = _mm256_set1_epi16(kGreenCr), blue_cb = _mm256_set1_epi16(kBlueCb);
  int x = 0;
  for (; x + 16 <= outputs; x += 16) {
    __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y + x));
    __m256i g = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cb + x));
    __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cr + x));
    if (convert) {
      const __m256i luma = r, blue = _mm256_sub_epi16(g, middle), red = _mm256_sub_epi16(b, middle);
      r = _mm256_adds_epi16(luma, _mm256_adds_epi16(red, _mm256_mulhrs_epi16(red, red_cr)));
      g = _mm256_adds_epi16(
          luma, _mm256_adds_epi16(_mm256_mulhrs_epi16(blue, green_cb), _mm256_mulhrs_epi16(red, green_cr)));
      b = _mm256_adds_epi16(luma, _mm256_adds_epi16(blue, _mm256_mulhrs_epi16(blue, blue_cb)));
    }
    store_rgb(pack_bytes(r, half, shift), pack_bytes(g, half, shift), pack_bytes(b, half, shift), rgb + 3 * x);
  }
  if (x == outputs) return;
  if (convert) return color_scalar(y, cb, cr, bits, x, outputs, rgb);
  interleave_scalar(y + x, cb + x, cr + x, bits, outputs - x, rgb + 3 * x);
}

template <int kTaps>
REGATTA_AVX512 inline void vertical_avx512_taps(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight,
                                                ptrdiff_t weight_stride, int taps, int width, int16_t* out) {
  const int count = kTaps ? kTaps : taps;
  for (int x = 0; x < width; x += 32) {
    __m512i sum = _mm512_setzero_si512();
    for (int k = 0; k < count; ++k) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + k * pitch + x));
      const __m512i value = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), kInputShift);
      sum = _mm512_adds_epi16(sum, _mm512_mulhrs_epi16(value, _mm512_set1_epi16(weight[k * weight_stride])));
    }
    _mm512_storeu_si512(out + x, sum);
  }
}

REGATTA_AVX512 inline void vertical_avx512(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight,
                                           ptrdiff_t weight_stride, int taps, int width, int16_t* out) {
  switch (taps) {
    case 2: return vertical_avx512_taps<2>(source, pitch, weight, weight_stride, taps, width, out);
    case 3: return vertical_avx512_taps<3>(source, pitch, weight, weight_stride, taps, width, out);
    case 4: return vertical_avx512_taps<4>(source, pitch, weight, weight_stride, taps, width, out);
    default: return vertical_avx512_taps<0>(source, pitch, weight, weight_stride, taps, width, out);
  }
}

#define REGATTA_VBMI __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512vbmi")))

// Byte positions that turn packed rows of 64 reds, greens and blues into 192 interleaved bytes, by output register.
struct InterleaveTable {
  alignas(64) uint8_t red_green[3][64], blue[3][64];
  uint64_t is_blue[3];
  InterleaveTable() {
    for (int at = 0; at < 192; ++at) {
      const int pixel = at / 3, color = at % 3;
      // Where packing two registers of words lane by lane leaves the pixel's byte.
      const int packed = (pixel % 32) / 8 * 16 + pixel / 32 * 8 + pixel % 8;
      red_green[at / 64][at % 64] = static_cast<uint8_t>(color == 1 ? 64 + packed : packed);
      blue[at / 64][at % 64] = static_cast<uint8_t>(packed);
    }
    for (int part = 0; part < 3; ++part) {
      is_blue[part] = 0;
      for (int at = 0; at < 64; ++at)
        if ((part * 64 + at) % 3 == 2) is_blue[part] |= UINT64_C(1) << at;
    }
  }
};

REGATTA_VBMI inline __m512i round_bits(__m512i value, __m512i half, __m128i bits) {
  return _mm512_sra_epi16(_mm512_adds_epi16(value, half), bits);
}

template <bool convert>
REGATTA_VBMI inline void color_vbmi(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int outputs,
                                    uint8_t* rgb) {
  static const InterleaveTable table;
  const __m512i middle = _mm512_set1_epi16(static_cast<int16_t>(128 << bits));
  const __m512i half = _mm512_set1_epi16(static_cast<int16_t>(1 << (bits - 1)));
  const __m128i shift = _mm_cvtsi32_si128(bits);
  const __m512i red_cr = _mm512_set1_epi16(kRedCr), green_cb = _mm512_set1_epi16(kGreenCb);
  const __m512i green_cr = _mm512_set1_epi16(kGreenCr), blue_cb = _mm512_set1_epi16(kBlueCb);
  for (int x = 0; x < outputs; x += 64) {
    __m512i r[2], g[2], b[2];
    for (int part = 0; part < 2; ++part) {
      r[part] = _mm512_loadu_si512(y + x + 32 * part);
      g[part] = _mm512_loadu_si512(cb + x + 32 * part);
      b[part] = _mm512_loadu_si512(cr + x + 32 * part);
      if (convert) {
        const __m512i luma = r[part], blue = _mm512_sub_epi16(g[part], middle), red = _mm512_sub_epi16(b[part], middle);
        r[part] = _mm512_adds_epi16(luma, _mm512_adds_epi16(red, _mm512_mulhrs_epi16(red, red_cr)));
        g[part] = _mm512_adds_epi16(
            luma, _mm512_adds_epi16(_mm512_mulhrs_epi16(blue, green_cb), _mm512_mulhrs_epi16(red, green_cr)));
        b[part] = _mm512_adds_epi16(luma, _mm512_adds_epi16(blue, _mm512_mulhrs_epi16(blue, blue_cb)));
      }
      r[part] = round_bits(r[part], half, shift);
      g[part] = round_bits(g[part], half, shift);
      b[part] = round_bits(b[part], half, shift);
    }
    const __m512i reds = _mm512_packus_epi16(r[0], r[1]);
    const __m512i greens = _mm512_packus_epi16(g[0], g[1]);
    const __m512i blues = _mm512_packus_epi16(b[0], b[1]);
    const int bytes = (outputs - x) * 3;
    for (int part = 0; part < 3; ++part) {
      const int left = bytes - part * 64;
      if (left <= 0) break;
      const __m512i red_green = _mm512_permutex2var_epi8(reds, _mm512_load_si512(table.red_green[part]), greens);
      const __m512i mixed = _mm512_mask_permutexvar_epi8(red_green, table.is_blue[part],
                                                         _mm512_load_si512(table.blue[part]), blues);
      uint8_t* target = rgb + 3 * x + 64 * part;
      if (left >= 64)
        _mm512_storeu_si512(target, mixed);
      else  // a masked store costs more than a plain one
        _mm512_mask_storeu_epi8(target, (UINT64_C(1) << left) - 1, mixed);
    }
  }
}

inline bool has_vbmi() {
  static const bool found = __builtin_cpu_supports("avx512vbmi") != 0;
  return found;
}

REGATTA_AVX512 inline void horizontal_avx512(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  const __m512i one = _mm512_set1_epi16(1);
  for (int x = 0; x < outputs; x += kGroup) {
    const int16_t* from = row + filter.base[x / kGroup];
    const int16_t* weight = filter.weight.data() + x;
    __m512i index = _mm512_loadu_si512(filter.index.data() + x);
    __m512i sum = _mm512_setzero_si512();
    const int span = filter.index[x + kGroup - 1] + filter.taps;
    if (span <= 64) {
      // The usual case, up to a reduction by about 1.9: two registers hold all that 32 outputs need.
      const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 32);
      for (int k = 0; k < filter.taps; ++k) {
        const __m512i value = _mm512_permutex2var_epi16(low, index, high);
        sum = _mm512_adds_epi16(sum, _mm512_mulhrs_epi16(value, _mm512_loadu_si512(weight + k * filter.stride)));
        index = _mm512_add_epi16(index, one);
      }
    } else {
      for (int k = 0; k < filter.taps; ++k) {
        __m512i value = _mm512_setzero_si512();
        for (int window = 0; window < span; window += 64) {
          const __m512i local = _mm512_sub_epi16(index, _mm512_set1_epi16(static_cast<int16_t>(window)));
          const __mmask32 inside = _mm512_cmplt_epu16_mask(local, _mm512_set1_epi16(64));
          const __m512i picked = _mm512_permutex2var_epi16(_mm512_loadu_si512(from + window), local,
                                                           _mm512_loadu_si512(from + window + 32));
          value = _mm512_mask_mov_epi16(value, inside, picked);
        }
        sum = _mm512_adds_epi16(sum, _mm512_mulhrs_epi16(value, _mm512_loadu_si512(weight + k * filter.stride)));
        index = _mm512_add_epi16(index, one);
      }
    }
    _mm512_storeu_si512(out + x, sum);
  }
}
#endif

// One plane of a decoded image. `x_ratio` and `y_ratio` say how many of its samples fit an image pixel.
struct Plane {
  const uint8_t* data = nullptr;
  ptrdiff_t pitch = 0;
  int width = 0, height = 0;
  double x_ratio = 1.0, y_ratio = 1.0;
};

enum Color : int32_t { kGray = 1, kYcc = 3, kRgb = 4 };

// Buffers of one thread, kept between images so that steady running allocates nothing.
struct ResizeScratch {
  Filter x[2], y[2];  // for the first plane, and for the other two, which share their geometry
  std::vector<int16_t> row[3];
  std::vector<float> float_row;
  std::vector<int16_t> out[3];
};

// Reductions so strong that a weight would be left with a few bits: floating point, and no hurry.
constexpr int kMostFixedTaps = 64;

inline void resample_row_float(const Plane& plane, const Filter& across, const Filter& down, int y, int size, int bits,
                               std::vector<float>& row, int16_t* out) {
  const int width = across.last - across.first;
  const int taps = std::min(down.taps, down.last - down.start[y]);
  row.assign(width, 0.0f);
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

inline bool too_strong(const Filter& across, const Filter& down) {
  return across.taps > kMostFixedTaps || down.taps > kMostFixedTaps;
}

inline void vertical(int32_t level, const uint8_t* source, ptrdiff_t pitch, const int16_t* weight,
                     ptrdiff_t weight_stride, int taps, int width, int16_t* out) {
#if REGATTA_X86
  if (level == kAvx512) return vertical_avx512(source, pitch, weight, weight_stride, taps, width, out);
  if (level == kAvx2) return vertical_avx2(source, pitch, weight, weight_stride, taps, width, out);
#else
  (void)level;
#endif
  vertical_scalar(source, pitch, weight, weight_stride, taps, width, out);
}

inline void horizontal(int32_t level, const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
#if REGATTA_X86
  if (level == kAvx512) return horizontal_avx512(row, filter, outputs, out);
  if (level == kAvx2) return horizontal_avx2(row, filter, outputs, out);
#else
  (void)level;
#endif
  horizontal_scalar(row, filter, outputs, out);
}

// Three rows of fixed point to one of interleaved bytes; `color` says whether they are converted.
inline void store_row(int32_t level, const int16_t* first, const int16_t* second, const int16_t* third, int32_t color,
                      int bits, int size, uint8_t* target) {
#if REGATTA_X86
  if (level == kAvx512 && has_vbmi())
    return color == kYcc ? color_vbmi<true>(first, second, third, bits, size, target)
                         : color_vbmi<false>(first, second, third, bits, size, target);
  if (level != kScalar)
    return color == kYcc ? color_avx2<true>(first, second, third, bits, size, target)
                         : color_avx2<false>(first, second, third, bits, size, target);
#else
  (void)level;
#endif
  if (color == kYcc)
    color_scalar(first, second, third, bits, 0, size, target);
  else
    interleave_scalar(first, second, third, bits, size, target);
}

// Cut `box` out of the planes and resize it to an interleaved RGB square.
inline void resize_view(ResizeScratch& scratch, const Plane* planes, int32_t color, const Box& box, int size,
                        int interpolation, int32_t level, uint8_t* rgb) {
  const int kinds = color == kGray ? 1 : 2;
  for (int kind = 0; kind < kinds; ++kind) {
    const Plane& plane = planes[kind];
    build_filter(scratch.x[kind], box.left * plane.x_ratio, box.width * plane.x_ratio, plane.width, size,
                 interpolation);
    build_filter(scratch.y[kind], box.top * plane.y_ratio, box.height * plane.y_ratio, plane.height, size,
                 interpolation);
    // From here on the columns count from the first one that is touched.
    Filter& filter = scratch.x[kind];
    for (int x = 0; x < size; ++x) filter.start[x] -= filter.first;
    plan_horizontal(filter, size, level);
  }
  size_t row_size = 0;
  for (int kind = 0; kind < kinds; ++kind) {
    const Filter& filter = scratch.x[kind];
    row_size = std::max<size_t>(row_size, filter.last - filter.first + filter.taps + filter.windows * 8 + 2 * kPad);
  }
  for (auto& row : scratch.row)
    if (row.size() < row_size) row.resize(row_size);
  for (auto& out : scratch.out)
    if (out.size() < static_cast<size_t>(scratch.x[0].stride) + kGroup) out.resize(scratch.x[0].stride + kGroup);
  const int bits = interpolation == kBicubic ? kInputShift - 2 : kInputShift;
  const int count = color == kGray ? 1 : 3;
  for (int y = 0; y < size; ++y) {
    // All vertical sums first: a row that was written just now would still be on its way to the cache.
    for (int channel = 0; channel < count; ++channel) {
      const Filter& across = scratch.x[std::min(channel, 1)];
      const Filter& down = scratch.y[std::min(channel, 1)];
      const Plane& plane = planes[channel];
      if (too_strong(across, down)) {
        resample_row_float(plane, across, down, y, size, bits, scratch.float_row, scratch.out[channel].data());
        continue;
      }
      const uint8_t* source = plane.data + down.start[y] * plane.pitch + across.first;
      const int taps = std::min(down.taps, down.last - down.start[y]);
      vertical(level, source, plane.pitch, down.weight.data() + y, down.stride, taps, across.last - across.first,
               scratch.row[channel].data());
    }
    for (int channel = 0; channel < count; ++channel) {
      const Filter& across = scratch.x[std::min(channel, 1)];
      if (too_strong(across, scratch.y[std::min(channel, 1)])) continue;
      horizontal(level, scratch.row[channel].data(), across, size, scratch.out[channel].data());
    }
    const int16_t* first = scratch.out[0].data();
    const int16_t* second = color == kGray ? first : scratch.out[1].data();
    const int16_t* third = color == kGray ? first : scratch.out[2].data();
    store_row(level, first, second, third, color, bits, size, rgb + static_cast<size_t>(y) * size * 3);
  }
}

}  // namespace regatta
