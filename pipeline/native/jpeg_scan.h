// What the decoding of a baseline scan works on: tables, the places of blocks, coded data, and planes to write to.
// BaselineDecoder (jpeg_baseline.h) fills it in; decode_scan (jpeg_scan_lanes.h) reads the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "jpeg_header.h"
#include "jpeg_huffman.h"

namespace regatta {

// Place of each coefficient in the layout of inverse_dct, for groups of 1, 2 or 4 blocks.
struct CoefficientOrder {
  uint8_t place[3][64];  // by the binary logarithm of the blocks in a group
  CoefficientOrder() {
    int row = 0, column = 0;
    for (int k = 0; k < 64; ++k) {
      for (int shift = 0; shift < 3; ++shift) place[shift][k] = static_cast<uint8_t>((row << shift) * 8 + column);
      // The zigzag runs up and to the right on even diagonals, down and to the left on odd ones.
      const bool up = (row + column) % 2 == 0;
      int& forward = up ? column : row;
      int& backward = up ? row : column;
      if (forward == 7) {
        ++backward;
      } else {
        ++forward;
        if (backward > 0) --backward;
      }
    }
  }
};

// One block of a unit: where it lies and how it is decoded.
struct UnitBlock {
  const DcTable* dc;
  const AcTable* ac;
  int32_t* predictor;  // the last DC coefficient of its component
  int column, step;    // of blocks: in unit 0 and from unit to unit
  int16_t* row;        // coefficients of its row of blocks
};

// What a component keeps of one row of units, and where its samples go.
struct Strip {
  int columns = 0;  // of blocks, whole groups
  int v = 1;        // rows of blocks
  std::vector<int16_t> coefficients;
  alignas(64) int16_t quantizer[64];
  uint8_t* out = nullptr;  // of the first wanted block of unit row 0
  ptrdiff_t pitch = 0;
};

struct Scan {
  int components = 0;
  DcTable dc[4];
  AcTable ac[4];
  UnitBlock blocks[kMaxBlocksInMcu];
  int block_count = 0;
  int32_t predictor[3] = {};
  Strip strips[3];
  int16_t trash[64 * 4];           // for blocks that are read only to know where the next one begins
  const uint8_t* order = nullptr;  // of CoefficientOrder
  int group_shift = 0;             // binary logarithm of the blocks in a group
  std::vector<uint8_t> coded;      // without stuffing, and zeros after its end
  std::vector<size_t> starts;      // of its segments between restart markers, and the end of the last one
  int restart_interval = 0;        // units, 0 for none
  int units_wide = 0, units_high = 0;
  int first_unit = 0, last_unit = 0, first_row = 0, last_row = 0;  // of units that are wanted

  // Bits of the segment that were not taken; negative where some of what follows it was.
  int64_t bits_left(const BitReader& reader, size_t segment) const {
    const int64_t used = (reader.next - coded.data()) * 8 - static_cast<int64_t>(reader.count);
    return static_cast<int64_t>(starts[segment + 1]) * 8 - used;
  }

  // Whether less than a byte of the segment is left, and none of the next was taken.
  bool at_end(const BitReader& reader, size_t segment) const {
    const int64_t left = bits_left(reader, segment);
    return left >= 0 && left < 8;
  }
};

}  // namespace regatta
