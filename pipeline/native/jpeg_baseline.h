// Baseline JPEGs to colour planes without libjpeg: the same planes, in less time.
//
// One unit row after the other: its coefficients are decoded into a buffer that stays in the nearest cache and turned
// into samples at once. All coefficients have to be read, since each code says where the next one starts, but only the
// blocks that the wanted region touches are kept and transformed, and nothing below it is read.
//
// Whatever is not plainly a sound file of a usual kind is given back, and libjpeg decides; see jpeg_header.h.
#pragma once

#include <vector>

#include "jpeg_header.h"
#include "jpeg_huffman.h"
#include "jpeg_idct.h"

namespace regatta {

// A unit has at most 10 blocks of 64 codes, each with at most 16 bits and a value of at most 15.
constexpr size_t kLongestMcu = kMaxBlocksInMcu * 64 * 31 / 8 + 1;

// Place of each coefficient in the layout of inverse_dct, for groups of `lanes` blocks.
struct CoefficientOrder {
  uint8_t place[3][64];  // by the binary logarithm of `lanes`
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

class BaselineDecoder {
 public:
  // Parse the header; fills width, height and color. False leaves the file to libjpeg.
  bool open(const uint8_t* data, size_t size, int64_t max_pixels, bool refuse_rotated) {
    data_ = data;
    size_ = size;
    if (!HeaderParser(data, size, header_).parse(refuse_rotated)) return false;
    width = header_.width;
    height = header_.height;
    color = header_.color;
    return static_cast<int64_t>(width) * height <= max_pixels && prepare_tables();
  }

  // Whether there is an inverse DCT for this processor; libjpeg's is faster than what a compiler makes of plain C++.
  static bool usable(int32_t level) {
#if REGATTA_X86
    static const bool has_shifts = __builtin_cpu_supports("bmi2") != 0;
    return level >= kAvx2 && has_shifts;
#else
    (void)level;
    return false;
#endif
  }

  // Decode what `region` needs; with `whole` read on to the end, so that damage anywhere is noticed. False leaves the
  // file to libjpeg.
  bool decode(const Region& region, bool whole, int32_t level) {
    lay_out(region, level);
    return find_segments(whole) && decode_rows(whole, level);
  }

  Plane planes[3];
  int width = 0, height = 0;
  int32_t color = kGray;

 private:
  struct TableSlot {
    HuffmanCodes codes;
    bool sound = false;
  };
  template <typename Table>
  static bool renew(TableSlot& slot, Table& table, const HuffmanCodes& codes) {
    // Nearly all files use the tables of T.81 annex K, so those of the last file fit nearly always.
    if (slot.sound && !std::memcmp(slot.codes.counts, codes.counts, 16) &&
        !std::memcmp(slot.codes.symbols, codes.symbols, 256))
      return true;
    slot.codes = codes;
    return slot.sound = table.build(codes);
  }

  bool prepare_tables() {
    for (int c = 0; c < header_.components; ++c) {
      const JpegComponent& component = header_.component[c];
      if (!renew(dc_slot_[component.dc], dc_[component.dc], header_.dc[component.dc]) ||
          !renew(ac_slot_[component.ac], ac_[component.ac], header_.ac[component.ac]))
        return false;
      // A category above 15 is none; libjpeg refuses the table.
      const HuffmanCodes& codes = header_.dc[component.dc];
      for (uint8_t symbol : codes.symbols)
        if (symbol > 15) return false;
    }
    return true;
  }

  // One block of a unit: where it lies and how it is decoded.
  struct UnitBlock {
    const DcTable* dc;
    const AcTable* ac;
    int32_t* predictor;  // the last DC coefficient of its component
    int column, step;    // of blocks: in unit 0 and from unit to unit
    int16_t* row;        // coefficients of its row of blocks
  };

  // What a component keeps of one row of units.
  struct Strip {
    int columns = 0;  // of blocks, whole groups
    std::vector<int16_t> coefficients;
    alignas(64) int16_t quantizer[64];
  };

  void lay_out(const Region& region, int32_t level) {
    lane_shift_ = level == kAvx512 ? 2 : 1;
    const int lanes = 1 << lane_shift_;
    static const CoefficientOrder order;
    order_ = order.place[lane_shift_];
    const int unit_width = header_.max_h * 8, unit_height = header_.max_v * 8;
    units_wide_ = (width + unit_width - 1) / unit_width;
    units_high_ = (height + unit_height - 1) / unit_height;
    first_unit_ = static_cast<int>(region.left / unit_width);
    last_unit_ = std::min<int>(units_wide_, static_cast<int>((region.right + unit_width - 1) / unit_width));
    first_row_ = static_cast<int>(region.top / unit_height);
    last_row_ = std::min<int>(units_high_, static_cast<int>((region.bottom + unit_height - 1) / unit_height));
    block_count_ = 0;
    trash_.resize(64 * 4);
    for (int c = 0; c < header_.components; ++c) {
      const JpegComponent& component = header_.component[c];
      Strip& strip = strips_[c];
      strip.columns = ((last_unit_ - first_unit_) * component.h + lanes - 1) / lanes * lanes;
      const size_t blocks = static_cast<size_t>(strip.columns) * component.v;
      if (strip.coefficients.size() < blocks * 64) strip.coefficients.resize(blocks * 64);
      for (int k = 0; k < 64; ++k)
        strip.quantizer[order.place[0][k]] = static_cast<int16_t>(header_.quantizer[component.quantizer][k]);
      for (int v = 0; v < component.v; ++v)
        for (int h = 0; h < component.h; ++h)
          blocks_[block_count_++] = {&dc_[component.dc],
                                     &ac_[component.ac],
                                     &predictor_[c],
                                     h,
                                     component.h,
                                     strip.coefficients.data() + static_cast<size_t>(v) * strip.columns * 64};
      prepare_plane(c);
    }
  }

  void prepare_plane(int c) {
    const JpegComponent& component = header_.component[c];
    Plane& plane = planes[c];
    const int blocks_wide = units_wide_ * component.h;
    plane.pitch = (static_cast<ptrdiff_t>(blocks_wide) * 8 + 2 * 64) / 64 * 64;
    const size_t size = static_cast<size_t>(plane.pitch) * units_high_ * component.v * 8 + kPad;
    if (buffers_[c].size() < size) buffers_[c].resize(size);
    plane.data = buffers_[c].data();
    plane.width = (width * component.h + header_.max_h - 1) / header_.max_h;
    plane.height = (height * component.v + header_.max_v - 1) / header_.max_v;
    plane.x_ratio = static_cast<double>(component.h) / header_.max_h;
    plane.y_ratio = static_cast<double>(component.v) / header_.max_v;
  }

  // Copy the coded data without stuffing and note where its segments between restart markers begin. False where they
  // are not as many as they must be, or what ends the data is no marker, or for `whole` not the end of the image.
  bool find_segments(bool whole) {
    const size_t rest = size_ - header_.scan;
    if (coded_.size() < rest + kLongestMcu + 16) coded_.resize(rest + kLongestMcu + 16);
    starts_.clear();
    starts_.push_back(0);
    const uint8_t* at = data_ + header_.scan;
    const uint8_t* const end = data_ + size_;
    uint8_t* to = coded_.data();
    for (;;) {
      const uint8_t* mark = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at));
      if (!mark || end - mark < 2) return false;
      const size_t run = mark - at;
      std::memcpy(to, at, run);
      to += run;
      at = mark + 2;
      if (mark[1] == 0) {
        *to++ = 0xFF;
      } else if (mark[1] >= 0xD0 && mark[1] <= 0xD7) {
        if (mark[1] != 0xD0 + (starts_.size() - 1) % 8) return false;
        starts_.push_back(to - coded_.data());
      } else {
        if (mark[1] == 0xFF || (whole && mark[1] != 0xD9)) return false;
        break;
      }
    }
    starts_.push_back(to - coded_.data());
    std::memset(to, 0, kLongestMcu + 16);
    const int64_t units = static_cast<int64_t>(units_wide_) * units_high_;
    const int64_t interval = header_.restart_interval ? header_.restart_interval : units;
    return static_cast<int64_t>(starts_.size()) - 1 == (units + interval - 1) / interval;
  }

  REGATTA_BMI2 bool decode_rows(bool whole, int32_t level) {
    BitReader reader;
    reader.next = coded_.data();
    size_t segment = 0;
    int until_restart = header_.restart_interval ? header_.restart_interval : -1;
    const int stop = whole ? units_high_ : last_row_;
    for (int c = 0; c < 3; ++c) predictor_[c] = 0;
    for (int row = 0; row < stop; ++row) {
      const bool row_wanted = row >= first_row_ && row < last_row_;
      if (row_wanted) clear_strips();
      for (int unit = 0; unit < units_wide_; ++unit) {
        if (until_restart == 0) {
          if (!at_end(reader, segment)) return false;
          ++segment;
          reader = BitReader();
          reader.next = coded_.data() + starts_[segment];
          for (int c = 0; c < 3; ++c) predictor_[c] = 0;
          until_restart = header_.restart_interval;
        }
        --until_restart;
        if (reader.next > coded_.data() + starts_[segment + 1] + 8) return false;
        const bool wanted = row_wanted && unit >= first_unit_ && unit < last_unit_;
        if (!decode_unit(reader, unit - first_unit_, wanted)) return false;
      }
      if (row_wanted && !transform_row(row, level)) return false;
    }
    if (whole) return at_end(reader, segment) && segment + 2 == starts_.size();
    return bits_left(reader, segment) >= 0;
  }

  // The blocks of one unit, into the strips or, where it is not wanted, only to know where the next one begins.
  REGATTA_INLINE bool decode_unit(BitReader& reader, int unit, bool wanted) {
    const int shift = lane_shift_;
    const uint8_t* const order = order_;
    int16_t* const trash = trash_.data();
    const UnitBlock* const end = blocks_ + block_count_;
    for (const UnitBlock* block = blocks_; block < end; ++block) {
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

  void clear_strips() {
    for (int c = 0; c < header_.components; ++c) {
      Strip& strip = strips_[c];
      std::memset(strip.coefficients.data(), 0,
                  static_cast<size_t>(strip.columns) * header_.component[c].v * 64 * sizeof(int16_t));
    }
  }

  // Bits of the segment that were not taken; negative where some of what follows it was.
  int64_t bits_left(const BitReader& reader, size_t segment) const {
    const int64_t used = (reader.next - coded_.data()) * 8 - static_cast<int64_t>(reader.count);
    return static_cast<int64_t>(starts_[segment + 1]) * 8 - used;
  }

  // Whether less than a byte of the segment is left, and none of the next was taken.
  bool at_end(const BitReader& reader, size_t segment) const {
    const int64_t left = bits_left(reader, segment);
    return left >= 0 && left < 8;
  }

  bool transform_row(int row, int32_t level) {
    bool ordinary = true;
    const int lanes = 1 << lane_shift_;
    for (int c = 0; c < header_.components; ++c) {
      const JpegComponent& component = header_.component[c];
      const Strip& strip = strips_[c];
      const ptrdiff_t pitch = planes[c].pitch;
      for (int v = 0; v < component.v; ++v) {
        uint8_t* out = buffers_[c].data() + (static_cast<ptrdiff_t>(row) * component.v + v) * 8 * pitch +
                       static_cast<ptrdiff_t>(first_unit_) * component.h * 8;
        const int16_t* from = strip.coefficients.data() + static_cast<size_t>(v) * strip.columns * 64;
        for (int column = 0; column < strip.columns; column += lanes)
          ordinary &= inverse_dct(level, from + static_cast<ptrdiff_t>(column) * 64, strip.quantizer, out + column * 8,
                                  pitch);
      }
    }
    return ordinary;
  }

  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  JpegHeader header_;
  DcTable dc_[4];
  AcTable ac_[4];
  TableSlot dc_slot_[4], ac_slot_[4];
  UnitBlock blocks_[kMaxBlocksInMcu];
  int block_count_ = 0;
  int32_t predictor_[3] = {};
  Strip strips_[3];
  std::vector<int16_t> trash_;
  std::vector<uint8_t> coded_;
  std::vector<size_t> starts_;
  const uint8_t* order_ = nullptr;
  int lane_shift_ = 0;
  int units_wide_ = 0, units_high_ = 0;
  int first_unit_ = 0, last_unit_ = 0, first_row_ = 0, last_row_ = 0;
  std::vector<uint8_t> buffers_[3];
};

}  // namespace regatta
