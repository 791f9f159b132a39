// Baseline JPEGs to colour planes without libjpeg: the same planes, in less time.
//
// All coefficients have to be read, since each code says where the next one starts, but only the blocks that the wanted
// region touches are kept and transformed, and nothing below it is read.
//
// Whatever is not plainly a sound file of a usual kind is given back, and libjpeg decides; see jpeg_header.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "jpeg_header.h"
#include "jpeg_scan.h"
#include "plane.h"
#include "view_kernels.h"

namespace regatta {

// A unit has at most 10 blocks of 64 codes, each with at most 16 bits and a value of at most 15.
constexpr size_t kLongestMcu = kMaxBlocksInMcu * 64 * 31 / 8 + 1;

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

  // Decode what `region` needs; with `whole` read on to the end, so that damage anywhere is noticed. False leaves the
  // file to libjpeg. `kernels` must have a decode_scan.
  bool decode(const Region& region, bool whole, const ViewKernels& kernels) {
    lay_out(region, kernels.idct_blocks);
    return find_segments(whole) && kernels.decode_scan(scan_, whole);
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
      if (!renew(dc_slot_[component.dc], scan_.dc[component.dc], header_.dc[component.dc]) ||
          !renew(ac_slot_[component.ac], scan_.ac[component.ac], header_.ac[component.ac]))
        return false;
      // A category above 15 is none; libjpeg refuses the table.
      const HuffmanCodes& codes = header_.dc[component.dc];
      for (uint8_t symbol : codes.symbols)
        if (symbol > 15) return false;
    }
    return true;
  }

  void lay_out(const Region& region, int idct_blocks) {
    static const CoefficientOrder order;
    scan_.group_shift = idct_blocks == 4 ? 2 : 1;
    scan_.order = order.place[scan_.group_shift];
    scan_.components = header_.components;
    scan_.restart_interval = header_.restart_interval;
    select_units(region);
    scan_.block_count = 0;
    for (int c = 0; c < header_.components; ++c) {
      prepare_strip(c, idct_blocks, order.place[0]);
      prepare_plane(c);
    }
  }

  // Which units of the image the region touches.
  void select_units(const Region& region) {
    const int unit_width = header_.max_h * 8, unit_height = header_.max_v * 8;
    const auto units = [](int64_t pixels, int unit) { return static_cast<int>((pixels + unit - 1) / unit); };
    scan_.units_wide = units(width, unit_width);
    scan_.units_high = units(height, unit_height);
    scan_.first_unit = static_cast<int>(region.left / unit_width);
    scan_.last_unit = std::min(scan_.units_wide, units(region.right, unit_width));
    scan_.first_row = static_cast<int>(region.top / unit_height);
    scan_.last_row = std::min(scan_.units_high, units(region.bottom, unit_height));
  }

  // The coefficients of one row of units of a component, and the blocks that it has in a unit. `natural` is the place
  // of each coefficient in a single block.
  void prepare_strip(int c, int idct_blocks, const uint8_t* natural) {
    const JpegComponent& component = header_.component[c];
    Strip& strip = scan_.strips[c];
    const int wanted = (scan_.last_unit - scan_.first_unit) * component.h;
    strip.columns = (wanted + idct_blocks - 1) / idct_blocks * idct_blocks;
    strip.v = component.v;
    const size_t blocks = static_cast<size_t>(strip.columns) * component.v;
    if (strip.coefficients.size() < blocks * 64) strip.coefficients.resize(blocks * 64);
    for (int k = 0; k < 64; ++k)
      strip.quantizer[natural[k]] = static_cast<int16_t>(header_.quantizer[component.quantizer][k]);
    for (int v = 0; v < component.v; ++v)
      for (int h = 0; h < component.h; ++h)
        scan_.blocks[scan_.block_count++] = {&scan_.dc[component.dc],
                                             &scan_.ac[component.ac],
                                             &scan_.predictor[c],
                                             h,
                                             component.h,
                                             strip.coefficients.data() + static_cast<size_t>(v) * strip.columns * 64};
  }

  void prepare_plane(int c) {
    const JpegComponent& component = header_.component[c];
    Plane& plane = planes[c];
    const int blocks_wide = scan_.units_wide * component.h;
    // Two cache lines more than the blocks need, because the last group of blocks may stick out.
    plane.pitch = (static_cast<ptrdiff_t>(blocks_wide) * 8 + 2 * 64) / 64 * 64;
    const size_t size = static_cast<size_t>(plane.pitch) * scan_.units_high * component.v * 8 + kPad;
    if (buffers_[c].size() < size) buffers_[c].resize(size);
    plane.data = buffers_[c].data();
    plane.width = (width * component.h + header_.max_h - 1) / header_.max_h;
    plane.height = (height * component.v + header_.max_v - 1) / header_.max_v;
    plane.x_ratio = static_cast<double>(component.h) / header_.max_h;
    plane.y_ratio = static_cast<double>(component.v) / header_.max_v;
    scan_.strips[c].out = buffers_[c].data() + static_cast<ptrdiff_t>(scan_.first_unit) * component.h * 8;
    scan_.strips[c].pitch = plane.pitch;
  }

  // Copy the coded data without stuffing and note where its segments between restart markers begin. False where they
  // are not as many as they must be, or what ends the data is no marker, or for `whole` not the end of the image.
  bool find_segments(bool whole) {
    // Zeros follow the data, as many as one unit and the widest load can read.
    constexpr size_t kMargin = kLongestMcu + 16;
    const size_t rest = size_ - header_.scan;
    std::vector<uint8_t>& coded = scan_.coded;
    std::vector<size_t>& starts = scan_.starts;
    if (coded.size() < rest + kMargin) coded.resize(rest + kMargin);
    starts.clear();
    starts.push_back(0);
    const uint8_t* at = data_ + header_.scan;
    const uint8_t* const end = data_ + size_;
    uint8_t* to = coded.data();
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
        // Restart markers count from 0 to 7 and again; one that is out of turn means that something is missing.
        if (mark[1] != 0xD0 + (starts.size() - 1) % 8) return false;
        starts.push_back(to - coded.data());
      } else {
        if (mark[1] == 0xFF || (whole && mark[1] != 0xD9)) return false;
        break;
      }
    }
    starts.push_back(to - coded.data());
    std::memset(to, 0, kMargin);
    const int64_t units = static_cast<int64_t>(scan_.units_wide) * scan_.units_high;
    const int64_t interval = header_.restart_interval ? header_.restart_interval : units;
    return static_cast<int64_t>(starts.size()) - 1 == (units + interval - 1) / interval;
  }

  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  JpegHeader header_;
  Scan scan_;
  TableSlot dc_slot_[4], ac_slot_[4];
  std::vector<uint8_t> buffers_[3];
};

}  // namespace regatta
