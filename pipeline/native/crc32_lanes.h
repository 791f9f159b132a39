// CRC-32 by carry-less multiplication: about 3 us for a 40 KB record, so that checking every record on every read costs
// one percent of decoding it. Included once for each vector target, so there is no include guard.
//
// Source: Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ instruction", Intel, 2009.

REGATTA_INLINE __m128i crc_fold(__m128i value, __m128i constants, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(value, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Folds all whole 16-byte words into one and leaves the last reduction to the table. `state` is as in crc32_by_table.
inline uint32_t crc32_folded(uint32_t state, const uint8_t* data, size_t size) {
  if (size < 64) return crc32_by_table(state, data, size);  // four words are needed to begin with
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
  return crc32_by_table(crc32_by_table(0, rest, 16), reinterpret_cast<const uint8_t*>(words), size);
}
