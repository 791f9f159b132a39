// The vector code of views.cpp; compiled once for each target and linked with it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../crc32.h"
#include "../fixed_point.h"
#include "../view_kernels.h"

#if defined(REGATTA_TARGET_AVX512)
// Only the colours gain from byte permutations, so they alone are compiled with them.
REGATTA_PUSH_TARGET(REGATTA_ISA_AVX512_VBMI)
#define REGISTER_BYTES 64
#define REGISTER __m512i
#define OP(name) _mm512_##name
namespace regatta {
namespace avx512_vbmi {
#include "../words_lanes.h"
#include "../color_lanes.h"
}  // namespace avx512_vbmi
}  // namespace regatta
REGATTA_POP_TARGET
#undef REGISTER_BYTES
#undef REGISTER
#undef OP
#endif

#include "../target_begin.h"

#include "../words_lanes.h"
#if REGISTER_BYTES < 64
#include "../color_lanes.h"
#endif
#include "../resize_lanes.h"
#if REGISTER_BYTES > 0
#include "../crc32_lanes.h"
#include "../jpeg_idct_lanes.h"
#include "../jpeg_scan_lanes.h"

extern const ViewKernels kViewKernels = {resize_view, decode_scan, kIdctBlocks, crc32_folded};
#else
extern const ViewKernels kViewKernels = {resize_view, nullptr, 0, crc32_by_table};
#endif

#include "../target_end.h"
