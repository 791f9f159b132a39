// CRC-32 as zlib computes it, by carry-less multiplication where the processor has it: about 3 us for a 40 KB record,
// so that checking every record on every read costs one percent of decoding it.
//
// Source: Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ instruction", Intel, 2009.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace regatta {

struct CrcTables {
  uint32_t at[8][256];
  CrcTables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0xEDB88320u : 0u);
      at[0][byte] = value;
    }
    for (int lane = 1; lane < 8; ++lane)
      for (int byte = 0; byte < 256; ++byte) at[lane][byte] = (at[lane - 1][byte] >> 8) ^ at[0][at[lane - 1][byte] & 255];
  }
};

// `state` is the inverted checksum, as between the pre- and post-conditioning of CRC-32.
inline uint32_t crc32_scalar(uint32_t state, const uint8_t* data, size_t size) {
  static const CrcTables tables;
  for (; size >= 8; size -= 8, data += 8) {
    const uint32_t low = state ^ (data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24);
    state = tables.at[7][low & 255] ^ tables.at[6][low >> 8 & 255] ^ tables.at[5][low >> 16 & 255] ^
            tables.at[4][low >> 24] ^ tables.at[3][data[4]] ^ tables.at[2][data[5]] ^ tables.at[1][data[6]] ^
            tables.at[0][data[7]];
  }
  while (size--) state = (state >> 8) ^ tables.at[0][(state ^ *data++) & 255];
  return state;
}

#if defined(__x86_64__)
__attribute__((target("pclmul,sse4.1"))) inline __m128i crc_fold(__m128i value, __m128i constants, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(value, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Folds all whole 16-byte words (at least four) into one and leaves the last reduction to the table.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t crc32_clmul(uint32_t state, const uint8_t* data, size_t size) {
  // x^(4*128+32), x^(4*128-32), x^(128+32) and x^(128-32) modulo the polynomial, bit-reflected.
  const __m128i by_four = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by_one = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i* words = reinterpret_cast<const __m128i*>(data);
  __m128i x0 = _mm_xor_si128(_mm_loadu_si128(words), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i x1 = _mm_loadu_si128(words + 1), x2 = _mm_loadu_si128(words + 2), x3 = _mm_loadu_si128(words + 3);
  words += 4;
  size -= 64;
  for (; size >= 64; size -= 64, words += 4) {
    x0 = crc_fold(x0, by_four, _mm_loadu_si128(words));
    x1 = crc_fold(x1, by_four, _mm_loadu_si128(words + 1));
    x2 = crc_fold(x2, by_four, _mm_loadu_si128(words + 2));
    x3 = crc_fold(x3, by_four, _mm_loadu_si128(words + 3));
  }
  x0 = crc_fold(x0, by_one, x1);
  x0 = crc_fold(x0, by_one, x2);
  x0 = crc_fold(x0, by_one, x3);
  for (; size >= 16; size -= 16, ++words) x0 = crc_fold(x0, by_one, _mm_loadu_si128(words));
  alignas(16) uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), x0);
  return crc32_scalar(crc32_scalar(0, rest, 16), reinterpret_cast<const uint8_t*>(words), size);
}
#endif

inline uint32_t crc32(const uint8_t* data, size_t size) {
#if defined(__x86_64__)
  static const bool clmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (clmul && size >= 64) return ~crc32_clmul(~0u, data, size);
#endif
  return ~crc32_scalar(~0u, data, size);
}

}  // namespace regatta
