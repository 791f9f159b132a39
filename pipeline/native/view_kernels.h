// The functions behind a view that are compiled once for each target (per_target/views.cpp), and the choice of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "crops.h"
#include "filter.h"
#include "jpeg_scan.h"
#include "plane.h"
#include "targets.h"

namespace regatta {

using StoreRow = void(const int16_t* first, const int16_t* second, const int16_t* third, int32_t color, int bits,
                      int size, uint8_t* target);

struct ViewKernels {
  // Cuts `box` out of the planes and resizes it to an interleaved RGB square.
  void (*resize_view)(ResizeScratch& scratch, const Plane* planes, int32_t color, const Box& box, int size,
                      int interpolation, uint8_t* rgb);
  // Decodes and transforms a scan. Null where there is no inverse DCT in vector code: libjpeg's is faster than what a
  // compiler makes of plain C++.
  bool (*decode_scan)(Scan& scan, bool whole);
  int idct_blocks;  // that decode_scan transforms at once
  // Continues the inverted CRC-32 `state` over the data.
  uint32_t (*crc32)(uint32_t state, const uint8_t* data, size_t size);
};

namespace plain {
extern const ViewKernels kViewKernels;
}
#if REGATTA_X86
namespace avx2 {
extern const ViewKernels kViewKernels;
StoreRow store_row;
}  // namespace avx2
namespace avx512 {
extern const ViewKernels kViewKernels;
}
namespace avx512_vbmi {
StoreRow store_row;
}
#endif

inline const ViewKernels& view_kernels(Level level) {
#if REGATTA_X86
  if (level == kAvx512) return avx512::kViewKernels;
  if (level == kAvx2) return avx2::kViewKernels;
#else
  (void)level;
#endif
  return plain::kViewKernels;
}

}  // namespace regatta
