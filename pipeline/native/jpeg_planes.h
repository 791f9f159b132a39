// A JPEG's colour planes through libjpeg's public interface, stopping after the last row that is needed.
//
// Planes are taken as they are coded (jpeg_read_raw_data): no upsampling and no colour conversion at full size.
// Nothing here prints, exits or throws: libjpeg's errors, and those of its warnings that mean damaged data, come back
// as a status.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <jpeglib.h>

#include <jerror.h>

#include "exif.h"
#include "layouts.h"
#include "plane.h"

namespace regatta {

constexpr int kMaxScans = 500;  // a progressive file of more scans is made to burn time

struct ErrorManager {
  jpeg_error_mgr base;
  std::jmp_buf jump;
};

inline bool is_damage(int code) {
  switch (code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
      return false;
    default:
      return true;
  }
}

inline void on_error(j_common_ptr info) { std::longjmp(reinterpret_cast<ErrorManager*>(info->err)->jump, 1); }
inline void on_message(j_common_ptr info, int level) {
  if (level < 0 && is_damage(info->err->msg_code)) on_error(info);
}
inline void on_output(j_common_ptr) {}
inline void on_progress(j_common_ptr info) {
  if (info->is_decompressor && reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMaxScans) on_error(info);
}

// One thread's decompressor and the planes of the image it decoded last.
class PlaneDecoder {
 public:
  PlaneDecoder() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = on_error;
    errors_.base.emit_message = on_message;
    errors_.base.output_message = on_output;
    progress_.progress_monitor = on_progress;
  }
  ~PlaneDecoder() {
    if (created_) jpeg_destroy_decompress(&info_);
  }
  PlaneDecoder(const PlaneDecoder&) = delete;
  PlaneDecoder& operator=(const PlaneDecoder&) = delete;

  // Parse the header; fills width, height and color.
  int32_t open(const uint8_t* data, size_t size, int64_t max_pixels, bool refuse_rotated) {
    width = height = 0;
    if (size == 0 || !renew()) return kDamaged;
    if (setjmp(errors_.jump)) {
      jpeg_abort_decompress(&info_);
      return kDamaged;
    }
    errors_.base.num_warnings = 0;
    jpeg_mem_src(&info_, const_cast<unsigned char*>(data), static_cast<unsigned long>(size));
    info_.progress = &progress_;
    jpeg_save_markers(&info_, JPEG_APP0 + 1, refuse_rotated ? 0xFFFF : 0);
    jpeg_read_header(&info_, TRUE);
    width = static_cast<int>(info_.image_width);
    height = static_cast<int>(info_.image_height);
    int32_t status = kOk;
    if (static_cast<int64_t>(width) * height > max_pixels) status = kTooLarge;
    if (refuse_rotated)
      for (jpeg_saved_marker_ptr marker = info_.marker_list; marker && status == kOk; marker = marker->next)
        if (exif_orientation(marker->data, marker->data_length) != 1) status = kUnsupported;
    if (info_.data_precision != 8 || info_.arith_code)
      status = kUnsupported;
    else if (info_.jpeg_color_space == JCS_GRAYSCALE && info_.num_components == 1)
      color = kGray;
    else if (info_.jpeg_color_space == JCS_YCbCr && info_.num_components == 3)
      color = kYcc;
    else if (info_.jpeg_color_space == JCS_RGB && info_.num_components == 3)
      color = kRgb;
    else
      status = kUnsupported;
    // The second and third plane share one set of resize weights.
    if (status == kOk && color != kGray &&
        (info_.comp_info[1].h_samp_factor != info_.comp_info[2].h_samp_factor ||
         info_.comp_info[1].v_samp_factor != info_.comp_info[2].v_samp_factor))
      status = kUnsupported;
    if (status != kOk) jpeg_abort_decompress(&info_);
    return status;
  }

  // Decode the planes down to image row `last_row` (exclusive); to the end of the data where `whole` is set, so that
  // damage anywhere is noticed.
  int32_t decode(int last_row, bool whole) {
    if (setjmp(errors_.jump)) {
      jpeg_abort_decompress(&info_);
      return kDamaged;
    }
    info_.raw_data_out = TRUE;
    info_.out_color_space = info_.jpeg_color_space;
    info_.dct_method = JDCT_ISLOW;
    info_.do_fancy_upsampling = FALSE;
    jpeg_start_decompress(&info_);
    const int lines = info_.max_v_samp_factor * DCTSIZE;  // image rows of one call
    const int total = static_cast<int>(info_.output_height);
    const int rounds = (total + lines - 1) / lines;
    for (int c = 0; c < info_.num_components; ++c) prepare_plane(c, rounds);
    JSAMPARRAY rows[3] = {rows_[0], rows_[1], rows_[2]};
    const int wanted = whole ? total : std::min(total, last_row);
    while (static_cast<int>(info_.output_scanline) < wanted) {
      const int round = static_cast<int>(info_.output_scanline) / lines;
      for (int c = 0; c < info_.num_components; ++c) {
        const int height_in_round = info_.comp_info[c].v_samp_factor * DCTSIZE;
        uint8_t* start = buffers_[c].data() + static_cast<size_t>(round) * height_in_round * planes[c].pitch;
        for (int row = 0; row < height_in_round; ++row) rows_[c][row] = start + row * planes[c].pitch;
      }
      if (jpeg_read_raw_data(&info_, rows, lines) == 0) on_error(reinterpret_cast<j_common_ptr>(&info_));
    }
    if (whole)
      jpeg_finish_decompress(&info_);
    else
      jpeg_abort_decompress(&info_);
    return kOk;
  }

  Plane planes[3];
  int width = 0, height = 0;
  int32_t color = kGray;

 private:
  // A new decompressor for each image: an old one would lend its tables to a file that lacks them.
  bool renew() {
    if (created_) jpeg_destroy_decompress(&info_);
    created_ = false;
    if (setjmp(errors_.jump)) return false;
    jpeg_create_decompress(&info_);
    return created_ = true;
  }

  void prepare_plane(int c, int rounds) {
    const jpeg_component_info& component = info_.comp_info[c];
    Plane& plane = planes[c];
    plane.pitch = (static_cast<ptrdiff_t>(component.width_in_blocks) * DCTSIZE + 2 * 64) / 64 * 64;
    const size_t size = static_cast<size_t>(plane.pitch) * rounds * component.v_samp_factor * DCTSIZE + kPad;
    if (buffers_[c].size() < size) buffers_[c].resize(size);
    plane.data = buffers_[c].data();
    plane.width = static_cast<int>(component.downsampled_width);
    plane.height = static_cast<int>(component.downsampled_height);
    plane.x_ratio = static_cast<double>(component.h_samp_factor) / info_.max_h_samp_factor;
    plane.y_ratio = static_cast<double>(component.v_samp_factor) / info_.max_v_samp_factor;
  }

  jpeg_decompress_struct info_{};
  ErrorManager errors_{};
  jpeg_progress_mgr progress_{};
  bool created_ = false;
  JSAMPROW rows_[3][4 * DCTSIZE] = {};
  std::vector<uint8_t> buffers_[3];
};

}  // namespace regatta
