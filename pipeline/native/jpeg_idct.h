// The inverse DCT of JPEG blocks, with the bits of libjpeg's accurate integer method (JDCT_ISLOW).
//
// Source: C. Loeffler, A. Ligtenberg, G. Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications", 1989;
// 13 bits of fraction in the factors, 2 kept between the passes, each pass rounded once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "resize.h"

namespace regatta {

constexpr int kDctBits = 13, kPassBits = 2;
// Factors times 2^13, named after their first digits.
constexpr int16_t kF0298 = 2446, kF0390 = 3196, kF0541 = 4433, kF0765 = 6270, kF0899 = 7373, kF1175 = 9633;
constexpr int16_t kF1501 = 12299, kF1847 = 15137, kF1961 = 16069, kF2053 = 16819, kF2562 = 20995, kF3072 = 25172;

inline int lanes_of(int32_t level) { return level == kAvx512 ? 4 : level == kAvx2 ? 2 : 1; }

#if REGATTA_X86
namespace idct_avx2 {
#define OP(name) _mm256_##name
#define REGISTER __m256i
#define LANES 2
#define TARGET REGATTA_AVX2 __attribute__((always_inline))
#define ZERO _mm256_setzero_si256()
#define LOAD(from) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
#define BROADCAST(from) _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))
#define STORE_TWO_ROWS(value, even, odd)                                                               \
  do {                                                                                                 \
    const __m256i sorted = _mm256_permute4x64_epi64(value, 0xD8);                                      \
    _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(sorted));                \
    _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_extracti128_si256(sorted, 1));            \
  } while (0)
#include "jpeg_idct_lanes.h"
#undef OP
#undef REGISTER
#undef LANES
#undef TARGET
#undef ZERO
#undef LOAD
#undef BROADCAST
#undef STORE_TWO_ROWS
}  // namespace idct_avx2

namespace idct_avx512 {
#define OP(name) _mm512_##name
#define REGISTER __m512i
#define LANES 4
#define TARGET REGATTA_AVX512 __attribute__((always_inline))
#define ZERO _mm512_setzero_si512()
#define LOAD(from) _mm512_loadu_si512(from)
#define BROADCAST(from) _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))
#define STORE_TWO_ROWS(value, even, odd)                                                               \
  do {                                                                                                 \
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);                                   \
    const __m512i sorted = _mm512_permutexvar_epi64(order, value);                                     \
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_castsi512_si256(sorted));             \
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm512_extracti64x4_epi64(sorted, 1));        \
  } while (0)
#include "jpeg_idct_lanes.h"
#undef OP
#undef REGISTER
#undef LANES
#undef TARGET
#undef ZERO
#undef LOAD
#undef BROADCAST
#undef STORE_TWO_ROWS
}  // namespace idct_avx512

REGATTA_AVX2 inline void inverse_dct_2(const int16_t* coefficients, const int16_t* quantizer, uint8_t* out,
                                       ptrdiff_t pitch) {
  idct_avx2::inverse_dct(coefficients, quantizer, out, pitch);
}
REGATTA_AVX512 inline void inverse_dct_4(const int16_t* coefficients, const int16_t* quantizer, uint8_t* out,
                                         ptrdiff_t pitch) {
  idct_avx512::inverse_dct(coefficients, quantizer, out, pitch);
}
#endif

// Sixteen-bit results of the vector code: sums wrap, descaled values saturate.
inline int32_t wrap16(int32_t value) { return static_cast<int16_t>(value); }
inline int32_t saturate16(int32_t value) { return std::clamp(value, -32768, 32767); }

// One pass over eight numbers that lie `stride` apart.
template <int kShift>
inline void one_pass_scalar(int16_t* at, ptrdiff_t stride) {
  int32_t in[8];
  for (int i = 0; i < 8; ++i) in[i] = at[i * stride];
  const int32_t rounding = 1 << (kShift - 1);
  // Sums of products are taken modulo 2^32, as the vector code does.
  auto sum = [](int32_t a, int32_t x, int32_t b, int32_t y) {
    return static_cast<uint32_t>(a * x) + static_cast<uint32_t>(b * y);
  };
  const uint32_t even3 = sum(in[2], kF0541 + kF0765, in[6], kF0541);
  const uint32_t even2 = sum(in[2], kF0541, in[6], kF0541 - kF1847);
  const uint32_t even0 = static_cast<uint32_t>(wrap16(in[0] + in[4])) * (1 << kDctBits) + rounding;
  const uint32_t even1 = static_cast<uint32_t>(wrap16(in[0] - in[4])) * (1 << kDctBits) + rounding;
  const int32_t s73 = wrap16(in[7] + in[3]), s51 = wrap16(in[5] + in[1]);
  const uint32_t z3 = sum(s73, kF1175 - kF1961, s51, kF1175);
  const uint32_t z4 = sum(s73, kF1175, s51, kF1175 - kF0390);
  const uint32_t odd[4] = {
      sum(in[7], kF0298 - kF0899, in[1], -kF0899) + z3,
      sum(in[5], kF2053 - kF2562, in[3], -kF2562) + z4,
      sum(in[5], -kF2562, in[3], kF3072 - kF2562) + z3,
      sum(in[7], -kF0899, in[1], kF1501 - kF0899) + z4,
  };
  const uint32_t even[4] = {even0 + even3, even1 + even2, even1 - even2, even0 - even3};
  for (int i = 0; i < 4; ++i) {
    at[i * stride] = static_cast<int16_t>(saturate16(static_cast<int32_t>(even[i] + odd[3 - i]) >> kShift));
    at[(7 - i) * stride] = static_cast<int16_t>(saturate16(static_cast<int32_t>(even[i] - odd[3 - i]) >> kShift));
  }
}

inline void inverse_dct_scalar(const int16_t* coefficients, const int16_t* quantizer, uint8_t* out, ptrdiff_t pitch) {
  int16_t block[64];
  for (int i = 0; i < 64; ++i) block[i] = static_cast<int16_t>(coefficients[i] * quantizer[i]);
  for (int column = 0; column < 8; ++column) one_pass_scalar<kDctBits - kPassBits>(block + column, 8);
  for (int row = 0; row < 8; ++row) {
    one_pass_scalar<kDctBits + kPassBits + 3>(block + row * 8, 1);
    for (int column = 0; column < 8; ++column)
      out[row * pitch + column] = static_cast<uint8_t>(std::clamp(block[row * 8 + column] + 128, 0, 255));
  }
}

// The samples of `lanes_of(level)` blocks side by side, from coefficients laid out row of blocks by row of blocks.
inline void inverse_dct(int32_t level, const int16_t* coefficients, const int16_t* quantizer, uint8_t* out,
                        ptrdiff_t pitch) {
#if REGATTA_X86
  if (level == kAvx512) return inverse_dct_4(coefficients, quantizer, out, pitch);
  if (level == kAvx2) return inverse_dct_2(coefficients, quantizer, out, pitch);
#else
  (void)level;
#endif
  inverse_dct_scalar(coefficients, quantizer, out, pitch);
}

}  // namespace regatta
