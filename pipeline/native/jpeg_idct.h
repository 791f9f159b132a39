// The inverse DCT of JPEG blocks, with the bits of libjpeg's accurate integer method (JDCT_ISLOW).
//
// Source: C. Loeffler, A. Ligtenberg, G. Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications", 1989;
// 13 bits of fraction in the factors, 2 kept between the passes, each pass rounded once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "resize.h"

namespace regatta {

constexpr int kDctBits = 13, kPassBits = 2;
// Factors times 2^13, named after their first digits.
constexpr int16_t kF0298 = 2446, kF0390 = 3196, kF0541 = 4433, kF0765 = 6270, kF0899 = 7373, kF1175 = 9633;
constexpr int16_t kF1501 = 12299, kF1847 = 15137, kF1961 = 16069, kF2053 = 16819, kF2562 = 20995, kF3072 = 25172;

// Bound of a block's first row, dequantised; in a picture no number exceeds 1024 by much. Beyond it a shortcut of
// libjpeg-turbo's vector code wraps, and which blocks take that differs; files with such numbers are left to it.
constexpr int16_t kOrdinary = 8192;

#if REGATTA_X86
namespace idct_avx2 {
#define OP(name) _mm256_##name
#define REGISTER __m256i
#define LANES 2
#define TARGET REGATTA_AVX2 __attribute__((always_inline))
#define ZERO _mm256_setzero_si256()
#define NONE_SET(value, bits) (_mm256_testz_si256(value, bits) != 0)
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
#undef NONE_SET
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
#define NONE_SET(value, bits) (_mm512_test_epi16_mask(value, bits) == 0)
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
#undef NONE_SET
#undef LOAD
#undef BROADCAST
#undef STORE_TWO_ROWS
}  // namespace idct_avx512

REGATTA_AVX2 inline bool inverse_dct_2(const int16_t* coefficients, const int16_t* quantizer, uint8_t* out,
                                       ptrdiff_t pitch) {
  return idct_avx2::inverse_dct(coefficients, quantizer, out, pitch);
}
REGATTA_AVX512 inline bool inverse_dct_4(const int16_t* coefficients, const int16_t* quantizer, uint8_t* out,
                                         ptrdiff_t pitch) {
  return idct_avx512::inverse_dct(coefficients, quantizer, out, pitch);
}
#endif

// The samples of blocks side by side, four with AVX-512 and two with AVX2: coefficients and `out` as in inverse_dct_4.
inline bool inverse_dct(int32_t level, const int16_t* coefficients, const int16_t* quantizer, uint8_t* out,
                        ptrdiff_t pitch) {
#if REGATTA_X86
  if (level == kAvx512) return inverse_dct_4(coefficients, quantizer, out, pitch);
  return inverse_dct_2(coefficients, quantizer, out, pitch);
#else
  (void)level, (void)coefficients, (void)quantizer, (void)out, (void)pitch;
  return false;
#endif
}

}  // namespace regatta
