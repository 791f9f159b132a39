// Opens the namespace of the target that this file is compiled for and switches its instructions on; target_end.h
// closes both. Defines TARGET (the namespace's name) and REGISTER_BYTES (0 for plain C++) and, for vector targets,
// REGISTER (the type of an integer register) and OP (its intrinsics without their prefix).
//
// Include the standard headers and everything that is the same for all targets before this file (targets.h says why).
// For the same reason nothing between the two may allocate or instantiate a template of the standard library that the
// compiler does not inline. Buffers are sized before a target's function is called, or by a method from outside.
// There is no include guard: a source may open several targets, one after the other.

#if defined(REGATTA_TARGET_AVX512)
#define TARGET avx512
#define REGISTER_BYTES 64
#define REGISTER __m512i
#define OP(name) _mm512_##name
#if defined(__clang__)
REGATTA_PUSH_TARGET(REGATTA_ISA_AVX512)
#else
// Loops without intrinsics would use 256 bits otherwise.
REGATTA_PUSH_TARGET(REGATTA_ISA_AVX512 ",prefer-vector-width=512")
#endif
#elif defined(REGATTA_TARGET_AVX2)
#define TARGET avx2
#define REGISTER_BYTES 32
#define REGISTER __m256i
#define OP(name) _mm256_##name
REGATTA_PUSH_TARGET(REGATTA_ISA_AVX2)
#elif defined(REGATTA_TARGET_PLAIN)
#define TARGET plain
#define REGISTER_BYTES 0
#else
#error "compile this with REGATTA_TARGET_PLAIN, REGATTA_TARGET_AVX2 or REGATTA_TARGET_AVX512"
#endif

namespace regatta {
namespace TARGET {
