// The weights of a resize filter. Plain loops over outputs, one tap at a time, so that the compiler makes vectors of
// them for each target. Included once for each target, so there is no include guard.
//
// Source: the filter and its support are those of PIL's resize: a triangle (or Keys' cubic, a = -0.5) as wide as one
// output pixel when reducing, normalised over the pixels inside the crop.

inline float triangle(float distance) { return std::max(1.0f - distance, 0.0f); }

inline float cubic(float t) {
  const float near = (1.5f * t - 2.5f) * t * t + 1.0f;
  const float far = ((-0.5f * t + 2.5f) * t - 4.0f) * t + 2.0f;
  return t < 1.0f ? near : (t < 2.0f ? far : 0.0f);
}

// Unnormalised weights and their sums. `inverse` is one over the filter's widening.
template <float (*kShape)(float)>
void raw_weights(const float* offset, const int32_t* start, int last, float inverse, int taps, int stride, int outputs,
                 float* raw, float* sum) {
  for (int x = 0; x < outputs; ++x) sum[x] = 0.0f;
  for (int k = 0; k < taps; ++k) {
    float* row = raw + static_cast<size_t>(k) * stride;
    for (int x = 0; x < outputs; ++x) {
      float value = kShape(std::fabs(offset[x] + static_cast<float>(k)) * inverse);
      // All outputs have as many taps as the widest one; those past the crop count nothing.
      value = start[x] + k < last ? value : 0.0f;
      row[x] = value;
      sum[x] += value;
    }
  }
}

// Weights as 16-bit numbers. Adding 65536.5 and taking it away again rounds without a call, and also below zero.
inline void fix_weights(const float* raw, const float* sum, float one, int taps, int stride, int outputs,
                        int16_t* weight) {
  for (int k = 0; k < taps; ++k)
    for (int x = 0; x < outputs; ++x) {
      const size_t at = static_cast<size_t>(k) * stride + x;
      const int32_t fixed = static_cast<int32_t>(raw[at] * (one / sum[x]) + 65536.5f) - 65536;
      weight[at] = static_cast<int16_t>(std::min(fixed, 32767));
    }
}

// First input of each output and its distance from the output's centre. Returns the most inputs that one output has.
inline int place_taps(double from, double scale, double support, int lowest, int highest, int outputs, int32_t* start,
                      float* offset) {
  int taps = 1;
  for (int x = 0; x < outputs; ++x) {
    const double center = from + (x + 0.5) * scale;
    // Samples whose centre lies within the support, as far as the crop reaches. Both ends are positive after the
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
  const bool bicubic = interpolation == kBicubic;
  const double support = (bicubic ? 2.0 : 1.0) * widening;
  filter.size_outputs(outputs);
  filter.taps = place_taps(from, scale, support, lowest, highest, outputs, filter.start.data(), filter.offset.data());
  filter.first = lowest;
  filter.last = highest;
  filter.size_weights();
  auto* weights = bicubic ? raw_weights<cubic> : raw_weights<triangle>;
  weights(filter.offset.data(), filter.start.data(), highest, static_cast<float>(1.0 / widening), filter.taps,
          filter.stride, outputs, filter.raw.data(), filter.sum.data());
  // The samples reach as far as the interval, so the one nearest to an output's centre is at most half a sample away
  // and no sum is below a half. Weights of bicubic can exceed 1, so they have one bit less.
  fix_weights(filter.raw.data(), filter.sum.data(), bicubic ? 16384.0f : 32768.0f, filter.taps, filter.stride, outputs,
              filter.weight.data());
}
