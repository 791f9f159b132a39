// A baseline scan to samples: one row of units after the other, decoded into a buffer that stays in the nearest cache
// and transformed at once. Included once for each vector target, so there is no include guard.

// The blocks of one unit, into the strips or, where it is not wanted, only to know where the next one begins.
REGATTA_INLINE bool decode_unit(Scan& scan, BitReader& reader, int unit, bool wanted) {
  // Copies, because the compiler cannot know that writing coefficients leaves the members alone.
  const int shift = scan.group_shift;
  const uint8_t* const order = scan.order;
  int16_t* const trash = scan.trash;
  const UnitBlock* const end = scan.blocks + scan.block_count;
  for (const UnitBlock* block = scan.blocks; block < end; ++block) {
    int16_t* to = trash;
    if (wanted) {
      const int column = unit * block->step + block->column;
      to = block->row + ((column >> shift) << (6 + shift)) + ((column & ((1 << shift) - 1)) << 3);
    }
    int32_t difference;
    if (!decode_dc(reader, *block->dc, difference)) return false;
    const int32_t level = *block->predictor + difference;
    if (level != static_cast<int16_t>(level)) return false;
    *block->predictor = level;
    to[0] = static_cast<int16_t>(level);
    if (!decode_ac(reader, *block->ac, order, to)) return false;
  }
  return true;
}

inline void clear_strips(Scan& scan) {
  for (int c = 0; c < scan.components; ++c) {
    Strip& strip = scan.strips[c];
    std::memset(strip.coefficients.data(), 0, static_cast<size_t>(strip.columns) * strip.v * 64 * sizeof(int16_t));
  }
}

// The samples of one row of units; false where a block has numbers that no picture has.
inline bool transform_row(const Scan& scan, int row) {
  bool ordinary = true;
  for (int c = 0; c < scan.components; ++c) {
    const Strip& strip = scan.strips[c];
    for (int v = 0; v < strip.v; ++v) {
      uint8_t* out = strip.out + (static_cast<ptrdiff_t>(row) * strip.v + v) * 8 * strip.pitch;
      const int16_t* from = strip.coefficients.data() + static_cast<size_t>(v) * strip.columns * 64;
      for (int column = 0; column < strip.columns; column += kIdctBlocks)
        ordinary &=
            inverse_dct(from + static_cast<ptrdiff_t>(column) * 64, strip.quantizer, out + column * 8, strip.pitch);
    }
  }
  return ordinary;
}

// The reader and the predictors go back to the start of a segment.
inline void start_segment(Scan& scan, BitReader& reader, size_t segment) {
  reader = BitReader();
  reader.next = scan.coded.data() + scan.starts[segment];
  for (int c = 0; c < 3; ++c) scan.predictor[c] = 0;
}

// Decodes the rows that are wanted; with `whole` all of them, so that damage anywhere is noticed. False where the data
// is damaged or unusual.
bool decode_scan(Scan& scan, bool whole) {
  BitReader reader;
  size_t segment = 0;
  start_segment(scan, reader, segment);
  int until_restart = scan.restart_interval ? scan.restart_interval : -1;
  const int stop = whole ? scan.units_high : scan.last_row;
  for (int row = 0; row < stop; ++row) {
    const bool row_wanted = row >= scan.first_row && row < scan.last_row;
    if (row_wanted) clear_strips(scan);
    for (int unit = 0; unit < scan.units_wide; ++unit) {
      if (until_restart == 0) {
        if (!scan.at_end(reader, segment)) return false;
        start_segment(scan, reader, ++segment);
        until_restart = scan.restart_interval;
      }
      --until_restart;
      // A unit reads at most kLongestMcu bytes, and so many zeros follow the data: one check a unit is enough.
      if (reader.next > scan.coded.data() + scan.starts[segment + 1] + 8) return false;
      const bool wanted = row_wanted && unit >= scan.first_unit && unit < scan.last_unit;
      if (!decode_unit(scan, reader, unit - scan.first_unit, wanted)) return false;
    }
    if (row_wanted && !transform_row(scan, row)) return false;
  }
  if (whole) return scan.at_end(reader, segment) && segment + 2 == scan.starts.size();
  return scan.bits_left(reader, segment) >= 0;
}
