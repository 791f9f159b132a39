// The horizontal pass of the resize: out[x] is the sum over k of row[start[x] + k] * weight[k * stride + x]. What
// differs between targets is how the inputs of neighbouring outputs come into one register; plan_horizontal prepares
// that for a filter. Included once for each target, so there is no include guard.

// The weighted sum for outputs x..x + kWords - 1; `inputs(k)` gives their k-th inputs, in order of k.
template <class Inputs>
REGATTA_INLINE Words weighted_sum(const Filter& filter, int x, Inputs inputs) {
  const int16_t* weight = filter.weight.data() + x;
  Words sum = all<Words>(0);
  for (int k = 0; k < filter.taps; ++k)
    sum = add_saturated(sum, multiply_round(inputs(k), load_words(weight + k * filter.stride)));
  return sum;
}

// Outputs past the last one repeat it, so that a whole register of them reads nothing from elsewhere.
inline void repeat_last_start(Filter& filter, int outputs) {
  for (int x = outputs; x < filter.stride; ++x) filter.start[x] = filter.start[outputs - 1];
}

#if REGISTER_BYTES == 64

inline void plan_horizontal(Filter& filter, int outputs) {
  repeat_last_start(filter, outputs);
  filter.size_groups(kGroup);
  for (int group = 0; group < filter.stride / kGroup; ++group) {
    const int base = filter.start[group * kGroup];
    filter.base[group] = base;
    for (int x = group * kGroup; x < (group + 1) * kGroup; ++x)
      filter.index[x] = static_cast<int16_t>(filter.start[x] - base);
  }
}

// Numbers `index` of a row from `from` on, of which `span` are needed: a permutation reaches 64 of them.
REGATTA_INLINE Words pick_far(const int16_t* from, Words index, int span) {
  Words value = _mm512_setzero_si512();
  for (int window = 0; window < span; window += 64) {
    const Words local = _mm512_sub_epi16(index, _mm512_set1_epi16(static_cast<int16_t>(window)));
    const __mmask32 inside = _mm512_cmplt_epu16_mask(local, _mm512_set1_epi16(64));
    const Words picked = _mm512_permutex2var_epi16(load_words(from + window), local, load_words(from + window + 32));
    value = _mm512_mask_mov_epi16(value, inside, picked);
  }
  return value;
}

inline void horizontal(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  const Words one = _mm512_set1_epi16(1);
  for (int x = 0; x < outputs; x += kGroup) {
    const int16_t* from = row + filter.base[x / kGroup];
    Words index = load_words(filter.index.data() + x);
    const int span = filter.index[x + kGroup - 1] + filter.taps;
    if (span <= 64) {
      // The usual case, up to a reduction by about 1.9: two registers hold all that 32 outputs need.
      const Words low = load_words(from), high = load_words(from + 32);
      const Words sum = weighted_sum(filter, x, [&](int) {
        const Words value = _mm512_permutex2var_epi16(low, index, high);
        index = _mm512_add_epi16(index, one);
        return value;
      });
      store_words(out + x, sum);
    } else {
      const Words sum = weighted_sum(filter, x, [&](int) {
        const Words value = pick_far(from, index, span);
        index = _mm512_add_epi16(index, one);
        return value;
      });
      store_words(out + x, sum);
    }
  }
}

#elif REGISTER_BYTES == 32

// Bytes of a shuffle that gives zero.
constexpr uint8_t kNothing = 0x80;

// A byte shuffle reaches the 8 numbers of its half register. So 8 outputs share a first input, and what lies farther
// from it comes through further windows of 8.
inline void plan_horizontal(Filter& filter, int outputs) {
  repeat_last_start(filter, outputs);
  filter.size_groups(8);
  filter.windows = 1;
  for (int eighth = 0; eighth < filter.stride / 8; ++eighth) {
    filter.base[eighth] = filter.start[eighth * 8];
    filter.windows = std::max(filter.windows, (filter.start[eighth * 8 + 7] - filter.base[eighth]) / 8 + 1);
  }
  filter.size_shuffle();
  for (int window = 0; window < filter.windows; ++window)
    for (int x = 0; x < filter.stride; ++x) {
      const int at = filter.start[x] - filter.base[x / 8] - window * 8;
      uint8_t* bytes = filter.shuffle.data() + (static_cast<size_t>(window) * filter.stride + x) * 2;
      const bool inside = at >= 0 && at < 8;
      bytes[0] = inside ? static_cast<uint8_t>(2 * at) : kNothing;
      bytes[1] = inside ? static_cast<uint8_t>(2 * at + 1) : kNothing;
    }
}

REGATTA_INLINE Words load_halves(const int16_t* low, const int16_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

REGATTA_INLINE Words load_order(const Filter& filter, int window, int x) {
  const uint8_t* pick = filter.shuffle.data() + (static_cast<size_t>(window) * filter.stride + x) * 2;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pick));
}

// `kWindows` is the number of windows. The shuffles are the same for all taps, so they stay in registers.
template <int kWindows>
void horizontal_windows(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  for (int x = 0; x < outputs; x += kWords) {
    const int16_t* low = row + filter.base[x / 8];
    const int16_t* high = row + filter.base[x / 8 + 1];
    __m256i order[kWindows];
    for (int window = 0; window < kWindows; ++window) order[window] = load_order(filter, window, x);
    const Words sum = weighted_sum(filter, x, [&](int k) {
      __m256i value = _mm256_shuffle_epi8(load_halves(low + k, high + k), order[0]);
      for (int window = 1; window < kWindows; ++window) {
        const Words words = load_halves(low + k + window * 8, high + k + window * 8);
        value = _mm256_or_si256(value, _mm256_shuffle_epi8(words, order[window]));
      }
      return Words(value);
    });
    store_words(out + x, sum);
  }
}

// For reductions by more than about 3.4, with as many windows as they need.
inline void horizontal_far(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  for (int x = 0; x < outputs; x += kWords) {
    const int16_t* low = row + filter.base[x / 8];
    const int16_t* high = row + filter.base[x / 8 + 1];
    const Words sum = weighted_sum(filter, x, [&](int k) {
      __m256i value = _mm256_setzero_si256();
      for (int window = 0; window < filter.windows; ++window) {
        const Words words = load_halves(low + k + window * 8, high + k + window * 8);
        value = _mm256_or_si256(value, _mm256_shuffle_epi8(words, load_order(filter, window, x)));
      }
      return Words(value);
    });
    store_words(out + x, sum);
  }
}

inline void horizontal(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  switch (filter.windows) {
    case 1:
      return horizontal_windows<1>(row, filter, outputs, out);
    case 2:
      return horizontal_windows<2>(row, filter, outputs, out);
    case 3:
      return horizontal_windows<3>(row, filter, outputs, out);
    default:
      return horizontal_far(row, filter, outputs, out);
  }
}

#else

inline void plan_horizontal(Filter&, int) {}

inline void horizontal(const int16_t* row, const Filter& filter, int outputs, int16_t* out) {
  for (int x = 0; x < outputs; ++x) out[x] = weighted_sum(filter, x, [&](int k) { return row[filter.start[x] + k]; });
}

#endif
