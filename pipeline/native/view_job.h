// One job from bytes to views: read, check, decode with the first decoder that serves the file, cut, resize.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crops.h"
#include "filter.h"
#include "jpeg_baseline.h"
#include "jpeg_planes.h"
#include "layouts.h"
#include "plane.h"
#include "read_file.h"
#include "view_kernels.h"

namespace regatta {

// What a thread keeps from image to image, so that steady running allocates nothing.
struct Scratch {
  BaselineDecoder baseline;
  PlaneDecoder general;
  ResizeScratch resize;
  std::vector<uint8_t> file;
  std::vector<uint8_t> planes[3];
  std::vector<Box> boxes;
  std::vector<std::vector<uint8_t>> views;  // for a Finish
  std::vector<uint8_t*> outs;               // their addresses
};

inline Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

inline uint32_t crc32(const uint8_t* data, size_t size) {
  return ~view_kernels(current_level()).crc32(~0u, data, size);
}

inline void write_views(Scratch& own, const Plane* planes, int32_t color, const ViewSpec* specs, int32_t views,
                        int32_t slot, uint8_t* const* outs) {
  const ViewKernels& kernels = view_kernels(current_level());
  for (int32_t view = 0; view < views; ++view) {
    const size_t bytes = static_cast<size_t>(specs[view].size) * specs[view].size * 3;
    kernels.resize_view(own.resize, planes, color, own.boxes[view], specs[view].size, specs[view].interpolation,
                        outs[view] + bytes * slot);
  }
}

inline void draw_boxes(Scratch& own, const ViewSpec* specs, int32_t views, uint64_t seed, uint32_t epoch,
                       uint32_t index, int height, int width) {
  own.boxes.resize(views);
  for (int32_t view = 0; view < views; ++view)
    own.boxes[view] = draw_crop(specs[view], seed, epoch, index, height, width);
}

// The smallest region with all boxes in it.
inline Region region_of(const std::vector<Box>& boxes) {
  Region region{INT64_MAX, 0, INT64_MAX, 0};
  for (const Box& box : boxes) {
    region.top = std::min(region.top, box.top);
    region.left = std::min(region.left, box.left);
    region.bottom = std::max(region.bottom, box.top + box.height);
    region.right = std::max(region.right, box.left + box.width);
  }
  return region;
}

// What a job's views are cut from, for both decoders.
struct Cut {
  const ViewSpec* specs;
  int32_t views;
  uint8_t* const* outs;
  uint64_t seed;
  uint32_t epoch;
  int64_t max_pixels;
};

inline bool run_baseline(Job& job, const uint8_t* data, size_t size, Scratch& own, const Cut& cut) {
  BaselineDecoder& decoder = own.baseline;
  const ViewKernels& kernels = view_kernels(current_level());
  if (!kernels.decode_scan) return false;
  if (!decoder.open(data, size, cut.max_pixels, job.flags & kRefuseRotated)) return false;
  draw_boxes(own, cut.specs, cut.views, cut.seed, cut.epoch, job.index, decoder.height, decoder.width);
  if (!decoder.decode(region_of(own.boxes), job.flags & kWholeImage, kernels)) return false;
  job.width = decoder.width;
  job.height = decoder.height;
  job.decoder = kBaseline;
  write_views(own, decoder.planes, decoder.color, cut.specs, cut.views, job.slot, cut.outs);
  return true;
}

inline int32_t run_general(Job& job, const uint8_t* data, size_t size, Scratch& own, const Cut& cut) {
  PlaneDecoder& decoder = own.general;
  const int32_t opened = decoder.open(data, size, cut.max_pixels, job.flags & kRefuseRotated);
  job.width = decoder.width;
  job.height = decoder.height;
  if (opened != kOk) return opened;
  draw_boxes(own, cut.specs, cut.views, cut.seed, cut.epoch, job.index, job.height, job.width);
  const int32_t decoded = decoder.decode(static_cast<int>(region_of(own.boxes).bottom), job.flags & kWholeImage);
  if (decoded != kOk) return decoded;
  job.decoder = kLibjpeg;
  write_views(own, decoder.planes, decoder.color, cut.specs, cut.views, job.slot, cut.outs);
  return kOk;
}

inline int32_t run_job(Job& job, const Cut& cut) {
  Scratch& own = scratch();
  const uint8_t* data = job.data;
  size_t size = job.size;
  if (!data) {
    const int64_t used = read_file(job.path, own.file);
    if (used < 0) return kUnreadable;
    data = own.file.data();
    size = static_cast<size_t>(used);
  }
  if ((job.flags & kCheckCrc) && crc32(data, size) != job.crc) return kChecksum;
  if (!(job.flags & kLibjpegOnly) && run_baseline(job, data, size, own, cut)) return kOk;
  return run_general(job, data, size, own, cut);
}

// This thread's own views, room for one image.
inline uint8_t* const* own_views(Scratch& own, const ViewSpec* specs, int32_t views) {
  own.views.resize(std::max(own.views.size(), static_cast<size_t>(views)));
  own.outs.resize(own.views.size());
  for (int32_t view = 0; view < views; ++view) {
    const size_t bytes = static_cast<size_t>(specs[view].size) * specs[view].size * 3;
    if (own.views[view].size() < bytes) own.views[view].resize(bytes);
    own.outs[view] = own.views[view].data();
  }
  return own.outs.data();
}

}  // namespace regatta
