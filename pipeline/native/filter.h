// The resize filter along one axis, and the buffers that a thread keeps for resizing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plane.h"

namespace regatta {

constexpr int kGroup = 32;  // outputs that the widest horizontal kernel computes at once

// Output x is the sum over k of weight[k * stride + x] * input[start[x] + k].
struct Filter {
  int taps = 0, stride = 0;
  int first = 0, last = 0;  // inputs that are touched: [first, last)
  std::vector<int32_t> start;
  std::vector<int16_t> weight;
  std::vector<float> raw, offset, sum;
  std::vector<int16_t> index;    // AVX-512: start relative to the group's first start
  std::vector<int32_t> base;     // that first start, one per group of 32; for AVX2, one per 8 outputs
  std::vector<uint8_t> shuffle;  // AVX2: byte shuffles, [window][output] of 2 bytes
  int windows = 0;

  // These methods stand here, not in a target: a target must not allocate (target_begin.h).
  void size_outputs(int outputs) {
    stride = (outputs + kGroup - 1) / kGroup * kGroup;
    start.resize(stride);
    offset.resize(stride);
    sum.resize(stride);
  }
  void size_weights() {
    const size_t total = static_cast<size_t>(taps) * stride;
    raw.resize(total);
    weight.assign(total, 0);  // the columns from `outputs` to `stride` are read too
  }
  void size_groups(int group) {
    index.resize(stride);
    base.resize(stride / group);
  }
  void size_shuffle() { shuffle.resize(static_cast<size_t>(windows) * stride * 2); }
};

// Buffers of one thread, kept between images so that steady running allocates nothing.
struct ResizeScratch {
  Filter x[2], y[2];  // for the first plane, and for the other two, which share their geometry
  std::vector<int16_t> row[3];
  std::vector<float> float_row;
  std::vector<int16_t> out[3];

  // Room for the rows of a view whose horizontal filters are the first `kinds` of `x`.
  void size_rows(int kinds) {
    size_t row_size = 0;
    int float_size = 0;
    for (int kind = 0; kind < kinds; ++kind) {
      const int inputs = x[kind].last - x[kind].first;
      row_size = std::max<size_t>(row_size, inputs + x[kind].taps + x[kind].windows * 8 + 2 * kPad);
      float_size = std::max(float_size, inputs);
    }
    for (auto& each : row)
      if (each.size() < row_size) each.resize(row_size);
    if (float_row.size() < static_cast<size_t>(float_size)) float_row.resize(float_size);
    const size_t out_size = static_cast<size_t>(x[0].stride) + kGroup;
    for (auto& each : out)
      if (each.size() < out_size) each.resize(out_size);
  }
};

}  // namespace regatta
