// A register of 16-bit numbers: kWords of them, with the operations of fixed_point.h. For the plain target it is one
// number. Included once for each target, so there is no include guard.

#if REGISTER_BYTES > 0
// A type of its own, because a bare register loses its attributes as a template's argument. It converts both ways, so
// intrinsics take and give it.
struct Words {
  REGISTER bits;
  REGATTA_INLINE Words(REGISTER given) : bits(given) {}
  REGATTA_INLINE operator REGISTER() const { return bits; }
};
constexpr int kWords = REGISTER_BYTES / 2;

// Single numbers are needed beside registers, for the last columns; the overloads below would hide these.
using regatta::add_saturated;
using regatta::multiply_round;
using regatta::subtract;

REGATTA_INLINE Words add_saturated(Words a, Words b) { return OP(adds_epi16)(a, b); }
REGATTA_INLINE Words multiply_round(Words a, Words b) { return OP(mulhrs_epi16)(a, b); }
REGATTA_INLINE Words subtract(Words a, Words b) { return OP(sub_epi16)(a, b); }
#else
typedef int16_t Words;
constexpr int kWords = 1;
#endif

// The same number in every place of a register, or the number itself.
template <class T>
REGATTA_INLINE T all(int16_t value) {
#if REGISTER_BYTES > 0
  if constexpr (sizeof(T) == REGISTER_BYTES)
    return OP(set1_epi16)(value);
  else
#endif
    return value;
}

#if REGISTER_BYTES == 64
REGATTA_INLINE Words load_words(const int16_t* from) { return _mm512_loadu_si512(from); }
REGATTA_INLINE void store_words(int16_t* to, Words value) { _mm512_storeu_si512(to, value); }
// Bytes as numbers with kInputShift bits of fraction.
REGATTA_INLINE Words load_pixels(const uint8_t* from) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), kInputShift);
}
#elif REGISTER_BYTES == 32
REGATTA_INLINE Words load_words(const int16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
REGATTA_INLINE void store_words(int16_t* to, Words value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}
REGATTA_INLINE Words load_pixels(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), kInputShift);
}
#else
REGATTA_INLINE Words load_words(const int16_t* from) { return *from; }
REGATTA_INLINE void store_words(int16_t* to, Words value) { *to = value; }
REGATTA_INLINE Words load_pixels(const uint8_t* from) { return static_cast<int16_t>(*from << kInputShift); }
#endif
