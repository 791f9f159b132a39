// A register of floats: kLanes of them, by the vector extensions of GNU compilers, and what these cannot express.
// Included once for each target, so there is no include guard.

constexpr int kLanes = REGISTER_BYTES > 0 ? REGISTER_BYTES / 4 : 4;  // floats in a register

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t LaneIndex __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
// As many bytes or halves as there are lanes, for conversions in registers.
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes)));
typedef uint16_t LaneHalves __attribute__((vector_size(kLanes * 2)));

REGATTA_INLINE Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
REGATTA_INLINE void store(float* to, Lanes value) { *reinterpret_cast<Lanes*>(to) = value; }
REGATTA_INLINE Lanes all(float value) { return value - (Lanes){}; }
REGATTA_INLINE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
REGATTA_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
REGATTA_INLINE Lanes clamp_level(Lanes v) { return smaller(larger(v, all(0.0f)), all(255.0f)); }
REGATTA_INLINE Lanes clamp_unit(Lanes v) { return smaller(larger(v, all(0.0f)), all(1.0f)); }
REGATTA_INLINE Lanes magnitude(Lanes v) { return larger(v, -v); }

REGATTA_INLINE double sum_of(Lanes lanes) {
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

REGATTA_INLINE LaneIndex load_index(const int32_t* from) {
  LaneIndex index;
  std::memcpy(&index, from, sizeof index);
  return index;
}

REGATTA_INLINE Lanes reversed(Lanes v) {
  LaneIndex mask = {};
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = kLanes - 1 - lane;
  return __builtin_shuffle(v, mask);
}

// Sixteen bytes to as many floats. Compilers take the bytes apart one by one, so the widening is spelled out.
REGATTA_INLINE void widen(const Bytes16& bytes, float* to) {
#if REGISTER_BYTES == 64
  store(to, (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes)));
#elif REGISTER_BYTES == 32
  store(to, (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)bytes)));
  store(to + 8, (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8))));
#else
  for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(bytes[i]);
#endif
}

// Floats go past the cache where they are aligned: a batch of them does not fit into it, and an ordinary store would
// first read the line that it overwrites. Halves gain nothing by it.
REGATTA_INLINE void store_past(float* to, Lanes value) {
#if REGISTER_BYTES == 64
  if ((reinterpret_cast<uintptr_t>(to) & 63) == 0) return _mm512_stream_ps(to, (__m512)value);
#elif REGISTER_BYTES == 32
  if ((reinterpret_cast<uintptr_t>(to) & 31) == 0) return _mm256_stream_ps(to, (__m256)value);
#endif
  store(to, value);
}

// Makes the results visible to other threads in order with what this one writes after them.
REGATTA_INLINE void finish_stores() {
#if REGISTER_BYTES > 0
  _mm_sfence();
#endif
}
