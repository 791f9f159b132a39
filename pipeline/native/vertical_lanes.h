// The vertical pass of the resize: out[x] is the sum over k of (source[k * pitch + x] << kInputShift) *
// weight[k * weight_stride]. Included once for each target, so there is no include guard.

// `kTaps` is the number of taps, or 0 where it is known at run time only.
template <int kTaps>
void vertical_taps(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight, ptrdiff_t weight_stride, int taps,
                   int width, int16_t* out) {
  const int count = kTaps ? kTaps : taps;
  for (int x = 0; x < width; x += kWords) {
    Words sum = all<Words>(0);
    for (int k = 0; k < count; ++k) {
      const Words product = multiply_round(load_pixels(source + k * pitch + x), all<Words>(weight[k * weight_stride]));
      sum = add_saturated(sum, product);
    }
    store_words(out + x, sum);
  }
}

// Up to four taps, which is a reduction by up to 1.5, the compiler keeps all weights in registers.
inline void vertical(const uint8_t* source, ptrdiff_t pitch, const int16_t* weight, ptrdiff_t weight_stride, int taps,
                     int width, int16_t* out) {
  switch (taps) {
    case 2:
      return vertical_taps<2>(source, pitch, weight, weight_stride, taps, width, out);
    case 3:
      return vertical_taps<3>(source, pitch, weight, weight_stride, taps, width, out);
    case 4:
      return vertical_taps<4>(source, pitch, weight, weight_stride, taps, width, out);
    default:
      return vertical_taps<0>(source, pitch, weight, weight_stride, taps, width, out);
  }
}
