// The instruction sets that vector code is compiled for, and which of them this processor has.
//
// Whatever gains from vector instructions stands in a `*_lanes.h` file, written once. A source in per_target/ includes
// these files between target_begin.h and target_end.h, and native_build.py compiles it once for each target, side by
// side, with REGATTA_TARGET_<NAME> defined. Each target has its own namespace. The rest of the library reaches it
// through a table of functions (view_kernels.h) or one function (augment_recipe.h).
//
// A pragma after the standard headers switches the instructions on, not a compiler flag. A flag would compile the
// inline functions of those headers with the same instructions. The linker keeps one copy of such a function for the
// whole library, so a processor without AVX-512 could be given the AVX-512 copy.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define REGATTA_X86 1
#else
#define REGATTA_X86 0
#endif

// AVX2 processors have had the other four since Haswell and Zen. They belong to the target because entropy decoding
// shifts by any register (BMI2), blurring multiplies and adds (FMA), and checksums multiply without carries (PCLMUL).
#define REGATTA_ISA_AVX2 "avx2,fma,bmi,bmi2,pclmul"
#define REGATTA_ISA_AVX512 REGATTA_ISA_AVX2 ",avx512f,avx512bw,avx512vl,avx512dq"
#define REGATTA_ISA_AVX512_VBMI REGATTA_ISA_AVX512 ",avx512vbmi"

#define REGATTA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define REGATTA_PUSH_TARGET(isa) REGATTA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define REGATTA_POP_TARGET REGATTA_PRAGMA(clang attribute pop)
#else
#define REGATTA_PUSH_TARGET(isa) REGATTA_PRAGMA(GCC push_options) REGATTA_PRAGMA(GCC target(isa))
#define REGATTA_POP_TARGET REGATTA_PRAGMA(GCC pop_options)
#endif

// For what sits inside a hot loop: it takes the instructions of the function that it is inlined into.
#define REGATTA_INLINE inline __attribute__((always_inline))

namespace regatta {

// The numbers are those of pipeline/simd.py.
enum Level : int32_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The best target of this processor.
inline Level best_level() {
#if REGATTA_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("pclmul");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx2) return has_avx512 ? kAvx512 : kAvx2;
#endif
  return kPlain;
}

// The most that a caller allows, for tests and measurements; -1 for no limit. Each library has its own.
inline std::atomic<int32_t> forced_level{-1};

// The target in use.
inline Level current_level() {
  static const Level best = best_level();
  const int32_t forced = forced_level.load(std::memory_order_relaxed);
  return forced < 0 ? best : std::min(static_cast<Level>(forced), best);
}

// AVX-512 came without byte permutations until Ice Lake and Zen 4. Only the interleaving of colours uses them.
inline bool has_vbmi() {
#if REGATTA_X86
  static const bool found = __builtin_cpu_supports("avx512vbmi") != 0;
  return found;
#else
  return false;
#endif
}

}  // namespace regatta
