// The header of a baseline JPEG in one pass over its markers.
//
// Strict on purpose: anything unusual is answered with "not ours", and libjpeg then decides what the file is. So the
// two agree on every file that is accepted here.
//
// Source: ITU-T T.81, annex B; colour space by libjpeg's rules.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "exif.h"
#include "plane.h"

namespace regatta {

constexpr int kMaxSide = 65500;      // libjpeg's limit
constexpr int kMaxBlocksInMcu = 10;  // T.81 B.2.3

// A Huffman table as it stands in the file: how many codes there are of each length, and what they mean.
struct HuffmanCodes {
  uint8_t counts[16] = {};
  uint8_t symbols[256] = {};
  bool given = false;
};

struct JpegComponent {
  int identifier = 0, h = 1, v = 1;
  int quantizer = 0, dc = 0, ac = 0;  // table numbers
};

struct JpegHeader {
  int width = 0, height = 0;
  int32_t color = kGray;
  int components = 0;
  JpegComponent component[3];
  int max_h = 1, max_v = 1;
  bool has_quantizer[4] = {};
  uint16_t quantizer[4][64];  // in zigzag order
  HuffmanCodes dc[4], ac[4];
  int restart_interval = 0;  // MCUs, 0 for none
  size_t scan = 0;           // where the entropy-coded data begins
};

class HeaderParser {
 public:
  HeaderParser(const uint8_t* data, size_t size, JpegHeader& header) : data_(data), size_(size), header_(header) {}

  // Whether this is a baseline JPEG of a usual kind: 8 bits, Huffman, one scan, gray or three components of which the
  // first may have more samples than the other two. With `refuse_rotated` also: no EXIF orientation other than 1.
  bool parse(bool refuse_rotated) {
    header_.has_quantizer[0] = header_.has_quantizer[1] = header_.has_quantizer[2] = header_.has_quantizer[3] = false;
    for (int slot = 0; slot < 4; ++slot) header_.dc[slot].given = header_.ac[slot].given = false;
    header_.components = header_.restart_interval = 0;
    if (size_ < 4 || data_[0] != 0xFF || data_[1] != 0xD8) return false;
    size_t at = 2;
    for (;;) {
      if (size_ - at < 4 || data_[at] != 0xFF) return false;
      const int marker = data_[at + 1];
      const size_t length = word(at + 2);
      if (length < 2 || length > size_ - at - 2) return false;
      const uint8_t* body = data_ + at + 4;
      const size_t bytes = length - 2;
      at += 2 + length;
      if (marker == 0xDA) {
        header_.scan = at;
        return scan(body, bytes) && choose_color();
      }
      if (!segment(marker, body, bytes, refuse_rotated)) return false;
    }
  }

 private:
  size_t word(size_t at) const { return static_cast<size_t>(data_[at]) << 8 | data_[at + 1]; }

  bool segment(int marker, const uint8_t* body, size_t bytes, bool refuse_rotated) {
    switch (marker) {
      case 0xC0:
      case 0xC1:
        return frame(body, bytes);
      case 0xC4:
        return huffman_codes(body, bytes);
      case 0xDB:
        return quantizers(body, bytes);
      case 0xDD:
        if (bytes != 2) return false;
        header_.restart_interval = body[0] << 8 | body[1];
        return true;
      case 0xE0:
        jfif_ |= bytes >= 14 && std::memcmp(body, "JFIF", 5) == 0;
        return true;
      case 0xE1:
        return !refuse_rotated || exif_orientation(body, bytes) == 1;
      case 0xEE:
        if (bytes >= 12 && std::memcmp(body, "Adobe", 5) == 0) adobe_transform_ = body[11];
        return true;
      default:
        return marker == 0xFE || (marker >= 0xE2 && marker <= 0xEF);
    }
  }

  bool frame(const uint8_t* body, size_t bytes) {
    if (header_.components || bytes < 6 || body[0] != 8) return false;
    header_.height = body[1] << 8 | body[2];
    header_.width = body[3] << 8 | body[4];
    const int count = body[5];
    if ((count != 1 && count != 3) || bytes != 6 + 3 * static_cast<size_t>(count)) return false;
    if (std::min(header_.width, header_.height) < 1 || std::max(header_.width, header_.height) > kMaxSide) return false;
    header_.components = count;
    for (int c = 0; c < count; ++c) {
      const uint8_t* entry = body + 6 + 3 * c;
      JpegComponent& component = header_.component[c];
      component.identifier = entry[0];
      component.h = entry[1] >> 4;
      component.v = entry[1] & 15;
      component.quantizer = entry[2];
      if (component.h < 1 || component.h > 4 || component.v < 1 || component.v > 4 || entry[2] > 3) return false;
      for (int other = 0; other < c; ++other)
        if (header_.component[other].identifier == entry[0]) return false;
    }
    return sampling();
  }

  // One component is coded block by block whatever its factors. Of three, the second and third have one block a unit,
  // and the first a number of rows and columns that divides evenly.
  bool sampling() {
    JpegComponent* component = header_.component;
    if (header_.components == 1) component[0].h = component[0].v = 1;
    header_.max_h = component[0].h;
    header_.max_v = component[0].v;
    int blocks = component[0].h * component[0].v;
    for (int c = 1; c < header_.components; ++c) {
      if (component[c].h != 1 || component[c].v != 1) return false;
      ++blocks;
    }
    return header_.max_h != 3 && header_.max_v != 3 && blocks <= kMaxBlocksInMcu;
  }

  bool huffman_codes(const uint8_t* body, size_t bytes) {
    while (bytes > 0) {
      if (bytes < 17 || (body[0] & 0xEC)) return false;
      HuffmanCodes& codes = body[0] & 0x10 ? header_.ac[body[0] & 3] : header_.dc[body[0] & 3];
      size_t total = 0;
      for (int length = 0; length < 16; ++length) total += body[1 + length];
      if (total > 256 || bytes < 17 + total) return false;
      std::memcpy(codes.counts, body + 1, 16);
      std::memset(codes.symbols, 0, 256);
      std::memcpy(codes.symbols, body + 17, total);
      codes.given = true;
      body += 17 + total;
      bytes -= 17 + total;
    }
    return true;
  }

  bool quantizers(const uint8_t* body, size_t bytes) {
    while (bytes > 0) {
      const bool wide = body[0] >> 4 != 0;
      const size_t length = wide ? 129 : 65;
      if (bytes < length || (body[0] & 15) > 3) return false;
      uint16_t* table = header_.quantizer[body[0] & 15];
      for (int k = 0; k < 64; ++k)
        table[k] = static_cast<uint16_t>(wide ? body[1 + 2 * k] << 8 | body[2 + 2 * k] : body[1 + k]);
      header_.has_quantizer[body[0] & 15] = true;
      body += length;
      bytes -= length;
    }
    return true;
  }

  bool scan(const uint8_t* body, size_t bytes) {
    const int count = header_.components;
    if (count == 0 || bytes != 4 + 2 * static_cast<size_t>(count) || body[0] != count) return false;
    for (int c = 0; c < count; ++c) {
      JpegComponent& component = header_.component[c];
      component.dc = body[2 + 2 * c] >> 4;
      component.ac = body[2 + 2 * c] & 15;
      if (body[1 + 2 * c] != component.identifier || component.dc > 3 || component.ac > 3) return false;
      if (!header_.has_quantizer[component.quantizer] || !header_.dc[component.dc].given ||
          !header_.ac[component.ac].given)
        return false;
    }
    const uint8_t* progression = body + 1 + 2 * count;
    return progression[0] == 0 && progression[1] == 63 && progression[2] == 0;
  }

  bool choose_color() {
    if (header_.components == 1) {
      header_.color = kGray;
      return true;
    }
    const JpegComponent* component = header_.component;
    const bool named_rgb =
        component[0].identifier == 'R' && component[1].identifier == 'G' && component[2].identifier == 'B';
    const bool rgb = !jfif_ && (adobe_transform_ < 0 ? named_rgb : adobe_transform_ == 0);
    header_.color = rgb ? kRgb : kYcc;
    return true;
  }

  const uint8_t* data_;
  size_t size_;
  JpegHeader& header_;
  bool jfif_ = false;
  int adobe_transform_ = -1;
};

}  // namespace regatta
