// CRC-32 as zlib computes it, eight bytes a step by tables. Vector targets fold (crc32_lanes.h) and end with this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace regatta {

struct CrcTables {
  uint32_t at[8][256];
  CrcTables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0xEDB88320u : 0u);
      at[0][byte] = value;
    }
    for (int lane = 1; lane < 8; ++lane)
      for (int byte = 0; byte < 256; ++byte)
        at[lane][byte] = (at[lane - 1][byte] >> 8) ^ at[0][at[lane - 1][byte] & 255];
  }
};

// `state` is the inverted checksum, as between the pre- and post-conditioning of CRC-32.
inline uint32_t crc32_by_table(uint32_t state, const uint8_t* data, size_t size) {
  static const CrcTables tables;
  for (; size >= 8; size -= 8, data += 8) {
    const uint32_t low = state ^ (data[0] | data[1] << 8 | data[2] << 16 | static_cast<uint32_t>(data[3]) << 24);
    state = tables.at[7][low & 255] ^ tables.at[6][low >> 8 & 255] ^ tables.at[5][low >> 16 & 255] ^
            tables.at[4][low >> 24] ^ tables.at[3][data[4]] ^ tables.at[2][data[5]] ^ tables.at[1][data[6]] ^
            tables.at[0][data[7]];
  }
  while (size--) state = (state >> 8) ^ tables.at[0][(state ^ *data++) & 255];
  return state;
}

}  // namespace regatta
