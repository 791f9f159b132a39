// The pointwise operations of the augmentation, on registers of pixels. Included once for each target, so there is no
// include guard.

constexpr float kLumaRed = 0.299f, kLumaGreen = 0.587f, kLumaBlue = 0.114f;
struct Pixels {
  Lanes red, green, blue;
};

REGATTA_INLINE Lanes luma(const Pixels& p) { return kLumaRed * p.red + kLumaGreen * p.green + kLumaBlue * p.blue; }

REGATTA_INLINE Pixels scaled(const Pixels& p, float factor, Lanes offset) {
  const Lanes f = all(factor);
  return {clamp_level(p.red * f + offset), clamp_level(p.green * f + offset), clamp_level(p.blue * f + offset)};
}

// `turn` is the shift in sextants, wrapped to [0, 6). With the hue h in sextants the three channels are
// lowest + chroma * clamp(|h - 3| - 1), clamp(2 - |h - 2|), clamp(2 - |h - 4|).
REGATTA_INLINE Pixels hue(const Pixels& p, float turn) {
  const Lanes highest = larger(larger(p.red, p.green), p.blue);
  const Lanes lowest = smaller(smaller(p.red, p.green), p.blue);
  const Lanes chroma = highest - lowest;
  const auto is_red = highest == p.red, is_green = highest == p.green;
  const Lanes across = is_red ? p.green - p.blue : (is_green ? p.blue - p.red : p.red - p.green);
  const Lanes base = is_red ? all(0.0f) : (is_green ? all(2.0f) : all(4.0f));
  // A grey pixel has chroma 0 and `across` 0: any positive divisor will do.
  Lanes h = across / larger(chroma, all(1e-20f)) + (base + turn);  // in [-1, 11)
  h = h < 0.0f ? h + 6.0f : h;
  h = h >= 6.0f ? h - 6.0f : h;
  return {lowest + chroma * clamp_unit(magnitude(h - 3.0f) - 1.0f),
          lowest + chroma * clamp_unit(2.0f - magnitude(h - 2.0f)),
          lowest + chroma * clamp_unit(2.0f - magnitude(h - 4.0f))};
}

// Places first..last-1 of the jitter. The branches go the same way for a whole image, so they cost next to nothing.
REGATTA_INLINE Pixels jitter(Pixels p, const Recipe& recipe, int first, int last) {
  for (int place = first; place < last; ++place) {
    switch (recipe.order[place]) {
      case kDoBrightness:
        p = scaled(p, recipe.brightness, all(0.0f));
        break;
      case kDoContrast:
        p = scaled(p, recipe.contrast, all(recipe.contrast_offset));
        break;
      case kDoSaturation:
        p = scaled(p, recipe.saturation, (1.0f - recipe.saturation) * luma(p));
        break;
      default:
        p = hue(p, recipe.turn);
        break;
    }
  }
  return p;
}

REGATTA_INLINE Pixels gray(const Pixels& p) {
  const Lanes grey = luma(p);
  return {grey, grey, grey};
}
