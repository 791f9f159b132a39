// The inverse DCT of several blocks at once, one in each 128-bit lane of a register, with the bits of libjpeg's
// accurate integer method (JDCT_ISLOW). Included once for each vector target, so there is no include guard.
//
// A block's rows lie in a lane each: the first pass works down the columns, a transpose turns the block, and the second
// pass does the rows. Sums of two inputs wrap at 16 bits and results saturate, as in libjpeg-turbo's vector code.
//
// Source: C. Loeffler, A. Ligtenberg, G. Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications", 1989;
// 13 bits of fraction in the factors, 2 kept between the passes, each pass rounded once.

constexpr int kDctBits = 13, kPassBits = 2;
// Factors times 2^13, named after their first digits.
constexpr int16_t kF0298 = 2446, kF0390 = 3196, kF0541 = 4433, kF0765 = 6270, kF0899 = 7373, kF1175 = 9633;
constexpr int16_t kF1501 = 12299, kF1847 = 15137, kF1961 = 16069, kF2053 = 16819, kF2562 = 20995, kF3072 = 25172;

// Bound of a block's first row, dequantised; in a picture no number exceeds 1024 by much. Beyond it a shortcut of
// libjpeg-turbo's vector code wraps, and which blocks take that differs; files with such numbers are left to it.
constexpr int16_t kOrdinary = 8192;

constexpr int kIdctBlocks = REGISTER_BYTES / 16;

#if REGISTER_BYTES == 64
REGATTA_INLINE REGISTER zero() { return _mm512_setzero_si512(); }
REGATTA_INLINE bool none_set(REGISTER value, REGISTER bits) { return _mm512_test_epi16_mask(value, bits) == 0; }
REGATTA_INLINE REGISTER load_row(const int16_t* from) { return _mm512_loadu_si512(from); }
// Eight numbers into every lane.
REGATTA_INLINE REGISTER broadcast(const int16_t* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
// The low halves of the lanes side by side to one row of samples, the high halves to the next.
REGATTA_INLINE void store_two_rows(REGISTER value, uint8_t* even, uint8_t* odd) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i sorted = _mm512_permutexvar_epi64(order, value);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_castsi512_si256(sorted));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm512_extracti64x4_epi64(sorted, 1));
}
#else
REGATTA_INLINE REGISTER zero() { return _mm256_setzero_si256(); }
REGATTA_INLINE bool none_set(REGISTER value, REGISTER bits) { return _mm256_testz_si256(value, bits) != 0; }
REGATTA_INLINE REGISTER load_row(const int16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
REGATTA_INLINE REGISTER broadcast(const int16_t* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
REGATTA_INLINE void store_two_rows(REGISTER value, uint8_t* even, uint8_t* odd) {
  const __m256i sorted = _mm256_permute4x64_epi64(value, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(sorted));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_extracti128_si256(sorted, 1));
}
#endif

struct Rows {
  REGISTER row[8];
};

REGATTA_INLINE REGISTER pair(int16_t even, int16_t odd) {
  return OP(set1_epi32)(
      static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(odd)) << 16 | static_cast<uint16_t>(even)));
}

// Half of the columns: sums of products in 32 bits, taken through one descale and back to 16.
struct Halves {
  REGISTER low, high;
};
REGATTA_INLINE Halves multiply(Halves pairs, REGISTER factors) {
  return {OP(madd_epi16)(pairs.low, factors), OP(madd_epi16)(pairs.high, factors)};
}
REGATTA_INLINE Halves interleave(REGISTER even, REGISTER odd) {
  return {OP(unpacklo_epi16)(even, odd), OP(unpackhi_epi16)(even, odd)};
}
REGATTA_INLINE Halves add(Halves a, Halves b) { return {OP(add_epi32)(a.low, b.low), OP(add_epi32)(a.high, b.high)}; }
REGATTA_INLINE Halves subtract(Halves a, Halves b) {
  return {OP(sub_epi32)(a.low, b.low), OP(sub_epi32)(a.high, b.high)};
}
// 16-bit numbers to 32 bits with kDctBits fraction bits, plus `rounding`.
REGATTA_INLINE Halves widen(REGISTER value, REGISTER rounding) {
  const Halves top = interleave(zero(), value);
  return {OP(add_epi32)(OP(srai_epi32)(top.low, 16 - kDctBits), rounding),
          OP(add_epi32)(OP(srai_epi32)(top.high, 16 - kDctBits), rounding)};
}
template <int kShift>
REGATTA_INLINE REGISTER descale(Halves value) {
  return OP(packs_epi32)(OP(srai_epi32)(value.low, kShift), OP(srai_epi32)(value.high, kShift));
}

template <int kShift>
REGATTA_INLINE void one_pass(Rows& rows) {
  REGISTER* in = rows.row;
  const Halves two_six = interleave(in[2], in[6]);
  const Halves even3 = multiply(two_six, pair(kF0541 + kF0765, kF0541));
  const Halves even2 = multiply(two_six, pair(kF0541, kF0541 - kF1847));
  const REGISTER rounding = OP(set1_epi32)(1 << (kShift - 1));
  const Halves even0 = widen(OP(add_epi16)(in[0], in[4]), rounding);
  const Halves even1 = widen(OP(sub_epi16)(in[0], in[4]), rounding);
  const Halves t10 = add(even0, even3), t13 = subtract(even0, even3);
  const Halves t11 = add(even1, even2), t12 = subtract(even1, even2);

  const Halves sums = interleave(OP(add_epi16)(in[7], in[3]), OP(add_epi16)(in[5], in[1]));
  const Halves z3 = multiply(sums, pair(kF1175 - kF1961, kF1175));
  const Halves z4 = multiply(sums, pair(kF1175, kF1175 - kF0390));
  const Halves seven_one = interleave(in[7], in[1]), five_three = interleave(in[5], in[3]);
  const Halves odd0 = add(multiply(seven_one, pair(kF0298 - kF0899, -kF0899)), z3);
  const Halves odd3 = add(multiply(seven_one, pair(-kF0899, kF1501 - kF0899)), z4);
  const Halves odd1 = add(multiply(five_three, pair(kF2053 - kF2562, -kF2562)), z4);
  const Halves odd2 = add(multiply(five_three, pair(-kF2562, kF3072 - kF2562)), z3);

  rows.row[0] = descale<kShift>(add(t10, odd3));
  rows.row[7] = descale<kShift>(subtract(t10, odd3));
  rows.row[1] = descale<kShift>(add(t11, odd2));
  rows.row[6] = descale<kShift>(subtract(t11, odd2));
  rows.row[2] = descale<kShift>(add(t12, odd1));
  rows.row[5] = descale<kShift>(subtract(t12, odd1));
  rows.row[3] = descale<kShift>(add(t13, odd0));
  rows.row[4] = descale<kShift>(subtract(t13, odd0));
}

REGATTA_INLINE void transpose(Rows& rows) {
  REGISTER* r = rows.row;
  REGISTER a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = OP(unpacklo_epi16)(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = OP(unpackhi_epi16)(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = OP(unpacklo_epi32)(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = OP(unpackhi_epi32)(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = OP(unpacklo_epi32)(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = OP(unpackhi_epi32)(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = OP(unpacklo_epi64)(b[i], b[4 + i]);
    r[2 * i + 1] = OP(unpackhi_epi64)(b[i], b[4 + i]);
  }
}

// `coefficients` holds the first rows of all blocks of the group, then their second rows, and so on. False for numbers
// that no picture has, see kOrdinary.
REGATTA_INLINE bool inverse_dct(const int16_t* coefficients, const int16_t* quantizer, uint8_t* out, ptrdiff_t pitch) {
  Rows rows;
  for (int i = 0; i < 8; ++i)
    rows.row[i] = OP(mullo_epi16)(load_row(coefficients + i * 8 * kIdctBlocks), broadcast(quantizer + i * 8));
  const bool ordinary =
      none_set(OP(add_epi16)(rows.row[0], OP(set1_epi16)(kOrdinary)), OP(set1_epi16)(~(2 * kOrdinary - 1)));
  one_pass<kDctBits - kPassBits>(rows);
  transpose(rows);
  one_pass<kDctBits + kPassBits + 3>(rows);
  // Now columns lie in a lane each. As bytes, turned back: two rows of a block in each lane.
  const REGISTER middle = OP(set1_epi8)(static_cast<char>(128));
  REGISTER* r = rows.row;
  REGISTER bytes[4], mixed[4], turned[4];
  for (int i = 0; i < 4; ++i) bytes[i] = OP(add_epi8)(OP(packs_epi16)(r[i], r[i + 4]), middle);  // columns i, i + 4
  mixed[0] = OP(unpacklo_epi8)(bytes[0], bytes[1]);                                              // columns 0 1
  mixed[1] = OP(unpackhi_epi8)(bytes[0], bytes[1]);                                              // columns 4 5
  mixed[2] = OP(unpacklo_epi8)(bytes[2], bytes[3]);                                              // columns 2 3
  mixed[3] = OP(unpackhi_epi8)(bytes[2], bytes[3]);                                              // columns 6 7
  const REGISTER left_top = OP(unpacklo_epi16)(mixed[0], mixed[2]);     // columns 0..3 of rows 0..3
  const REGISTER left_bottom = OP(unpackhi_epi16)(mixed[0], mixed[2]);  // of rows 4..7
  const REGISTER right_top = OP(unpacklo_epi16)(mixed[1], mixed[3]);    // columns 4..7
  const REGISTER right_bottom = OP(unpackhi_epi16)(mixed[1], mixed[3]);
  turned[0] = OP(unpacklo_epi32)(left_top, right_top);  // rows 0 1
  turned[1] = OP(unpackhi_epi32)(left_top, right_top);
  turned[2] = OP(unpacklo_epi32)(left_bottom, right_bottom);
  turned[3] = OP(unpackhi_epi32)(left_bottom, right_bottom);
  for (int i = 0; i < 4; ++i) store_two_rows(turned[i], out + 2 * i * pitch, out + (2 * i + 1) * pitch);
  return ordinary;
}
