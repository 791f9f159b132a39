// Three rows of fixed-point numbers to one row of interleaved bytes, converted to RGB where they are YCbCr. Included
// once for each target, so there is no include guard.

// Full-range YCbCr to RGB with the coefficients of JFIF in Q15. A Q15 number is below 1, so the integer parts of 1.402
// and 1.772 are added apart.
constexpr int16_t kRedCr = 13173;     // 0.402
constexpr int16_t kGreenCb = -11277;  // -0.344136
constexpr int16_t kGreenCr = -23401;  // -0.714136
constexpr int16_t kBlueCb = 25297;    // 0.772

template <class T>
struct Rgb {
  T r, g, b;
};

// `middle` is 128 with as many bits of fraction as the numbers have.
template <class T>
REGATTA_INLINE Rgb<T> to_rgb(T luma, T cb, T cr, T middle) {
  const T blue = subtract(cb, middle), red = subtract(cr, middle);
  return {
      add_saturated(luma, add_saturated(red, multiply_round(red, all<T>(kRedCr)))),
      add_saturated(luma, add_saturated(multiply_round(blue, all<T>(kGreenCb)), multiply_round(red, all<T>(kGreenCr)))),
      add_saturated(luma, add_saturated(blue, multiply_round(blue, all<T>(kBlueCb))))};
}

// Pixels first..outputs-1, one by one.
template <bool kConvert>
void store_pixels(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int first, int outputs,
                  uint8_t* rgb) {
  const int16_t middle = static_cast<int16_t>(128 << bits);
  for (int x = first; x < outputs; ++x) {
    Rgb<int16_t> pixel{y[x], cb[x], cr[x]};
    if (kConvert) pixel = to_rgb(y[x], cb[x], cr[x], middle);
    rgb[3 * x] = to_byte(pixel.r, bits);
    rgb[3 * x + 1] = to_byte(pixel.g, bits);
    rgb[3 * x + 2] = to_byte(pixel.b, bits);
  }
}

#if REGISTER_BYTES > 0
// Numbers with `bits` bits of fraction to whole ones; packing them to bytes clamps afterwards.
REGATTA_INLINE Words round_bits(Words value, Words half, __m128i bits) {
  return OP(sra_epi16)(add_saturated(value, half), bits);
}

// kWords pixels of the three rows, rounded.
template <bool kConvert>
REGATTA_INLINE Rgb<Words> rounded_rgb(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits) {
  const Words half = all<Words>(static_cast<int16_t>(1 << (bits - 1)));
  const __m128i shift = _mm_cvtsi32_si128(bits);
  Rgb<Words> rgb{load_words(y), load_words(cb), load_words(cr)};
  if (kConvert) rgb = to_rgb(rgb.r, rgb.g, rgb.b, all<Words>(static_cast<int16_t>(128 << bits)));
  return {round_bits(rgb.r, half, shift), round_bits(rgb.g, half, shift), round_bits(rgb.b, half, shift)};
}
#endif

#if REGISTER_BYTES == 64

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

template <bool kConvert>
void store_converted(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int outputs, uint8_t* rgb) {
  static const InterleaveTable table;
  for (int x = 0; x < outputs; x += 2 * kWords) {
    const Rgb<Words> first = rounded_rgb<kConvert>(y + x, cb + x, cr + x, bits);
    const Rgb<Words> second = rounded_rgb<kConvert>(y + x + kWords, cb + x + kWords, cr + x + kWords, bits);
    const Words reds = _mm512_packus_epi16(first.r, second.r);
    const Words greens = _mm512_packus_epi16(first.g, second.g);
    const Words blues = _mm512_packus_epi16(first.b, second.b);
    const int bytes = (outputs - x) * 3;
    for (int part = 0; part < 3; ++part) {
      const int left = bytes - part * 64;
      if (left <= 0) break;
      const Words red_green = _mm512_permutex2var_epi8(reds, _mm512_load_si512(table.red_green[part]), greens);
      const Words mixed =
          _mm512_mask_permutexvar_epi8(red_green, table.is_blue[part], _mm512_load_si512(table.blue[part]), blues);
      uint8_t* target = rgb + 3 * x + 64 * part;
      if (left >= 64)
        _mm512_storeu_si512(target, mixed);
      else  // a masked store costs more than a plain one
        _mm512_mask_storeu_epi8(target, (UINT64_C(1) << left) - 1, mixed);
    }
  }
}

#elif REGISTER_BYTES == 32

// Three rows of 16 bytes become 48 interleaved ones.
REGATTA_INLINE void store_rgb(__m128i r, __m128i g, __m128i b, uint8_t* rgb) {
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
  _mm_storeu_si128(
      out, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r0), _mm_shuffle_epi8(g, g0)), _mm_shuffle_epi8(b, b0)));
  _mm_storeu_si128(
      out + 1, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r1), _mm_shuffle_epi8(g, g1)), _mm_shuffle_epi8(b, b1)));
  _mm_storeu_si128(
      out + 2, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r2), _mm_shuffle_epi8(g, g2)), _mm_shuffle_epi8(b, b2)));
}

REGATTA_INLINE __m128i pack_bytes(Words value) {
  return _mm_packus_epi16(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
}

template <bool kConvert>
void store_converted(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int outputs, uint8_t* rgb) {
  int x = 0;
  for (; x + kWords <= outputs; x += kWords) {
    const Rgb<Words> pixels = rounded_rgb<kConvert>(y + x, cb + x, cr + x, bits);
    store_rgb(pack_bytes(pixels.r), pack_bytes(pixels.g), pack_bytes(pixels.b), rgb + 3 * x);
  }
  // Whole registers would write past the view.
  store_pixels<kConvert>(y, cb, cr, bits, x, outputs, rgb);
}

#else

template <bool kConvert>
void store_converted(const int16_t* y, const int16_t* cb, const int16_t* cr, int bits, int outputs, uint8_t* rgb) {
  store_pixels<kConvert>(y, cb, cr, bits, 0, outputs, rgb);
}

#endif

// Three rows with `bits` bits of fraction to `size` pixels at `target`. Rows of a gray image are all the same one.
void store_row(const int16_t* first, const int16_t* second, const int16_t* third, int32_t color, int bits, int size,
               uint8_t* target) {
  auto* const store = color == kYcc ? store_converted<true> : store_converted<false>;
  store(first, second, third, bits, size, target);
}
