// The EXIF orientation of a JPEG, which both decoders ask for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace regatta {

// The EXIF orientation in an APP1 segment, 1 where there is none.
inline int exif_orientation(const uint8_t* data, size_t size) {
  if (size < 14 || std::memcmp(data, "Exif\0\0", 6) != 0) return 1;
  const uint8_t* tiff = data + 6;
  size -= 6;
  const bool little = tiff[0] == 'I';
  auto half = [&](size_t at) -> uint32_t {
    return little ? tiff[at] | tiff[at + 1] << 8 : tiff[at] << 8 | tiff[at + 1];
  };
  auto whole = [&](size_t at) -> uint32_t {
    return little ? half(at) | half(at + 2) << 16 : half(at) << 16 | half(at + 2);
  };
  const size_t directory = whole(4);
  if (directory + 2 > size) return 1;
  const size_t entries = half(directory);
  for (size_t entry = 0; entry < entries; ++entry) {
    const size_t at = directory + 2 + entry * 12;
    if (at + 12 > size) return 1;
    if (half(at) == 0x0112) return static_cast<int>(half(at + 8));
  }
  return 1;
}

}  // namespace regatta
