// How kernels read and write features: three storage types, 16 bytes at a time, all arithmetic in float32.
//
// A source that includes this is compiled with the macros FEATURE (Float32, Float16 or BFloat16) and VECTOR (elements a
// thread takes at once: 16 bytes' worth, or 1).

struct Float32 {
    typedef float Bits;
    static __device__ __forceinline__ float load(Bits bits) { return bits; }
    static __device__ __forceinline__ Bits store(float value) { return value; }
};

struct BFloat16 {
    typedef unsigned short Bits;
    static __device__ __forceinline__ float load(Bits bits) { return __uint_as_float((unsigned int)bits << 16); }
    static __device__ __forceinline__ Bits store(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        Bits bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
#else
        // Round to nearest even by hand where there is no instruction for it; NaN stays NaN.
        unsigned int word = __float_as_uint(value);
        if (value != value) return 0x7fff;
        return (Bits)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
#endif
    }
};

struct Float16 {
    typedef unsigned short Bits;
#if defined(__CUDA_ARCH__)
    static __device__ __forceinline__ float load(Bits bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
    static __device__ __forceinline__ Bits store(float value) {
        Bits bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
#else
    static float load(Bits bits) { return shim_half_to_float(bits); }
    static Bits store(float value) { return shim_float_to_half(value); }
#endif
};

typedef FEATURE::Bits FeatureBits;

// What one thread loads or stores at a time: 16 bytes with the full VECTOR.
struct alignas(VECTOR * sizeof(FeatureBits)) Pack {
    FeatureBits bits[VECTOR];
};

static __device__ __forceinline__ Pack load_pack(const void* base, long long offset) {
    return *reinterpret_cast<const Pack*>(static_cast<const FeatureBits*>(base) + offset);
}

static __device__ __forceinline__ void store_pack(void* base, long long offset, const float* values) {
    Pack pack;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) pack.bits[v] = FEATURE::store(values[v]);
    *reinterpret_cast<Pack*>(static_cast<FeatureBits*>(base) + offset) = pack;
}
