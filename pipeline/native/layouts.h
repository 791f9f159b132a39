// What C++ and Python both know: memory layouts, flag bits and status numbers. pipeline/decoder.py and
// pipeline/host_augment.py have the same ones and compare the sizes when they load the library.
#pragma once

#include <cstdint>

namespace regatta {

enum Flags : uint32_t {
  kCheckCrc = 1,       // compare the record with `crc` first
  kWholeImage = 2,     // decode to the end, to notice damage below the crops
  kRefuseRotated = 4,  // leave images with an EXIF orientation to the general path
  kLibjpegOnly = 8,    // for tests and measurements
};

enum Status : int32_t {
  kOk = 0,
  kDamaged = 1,      // not a JPEG, or its data is damaged
  kUnsupported = 2,  // a JPEG of a kind that only the general path in Python serves (CMYK, arithmetic coding, rotated)
  kChecksum = 3,     // the bytes are not those that were packed
  kUnreadable = 4,   // the file cannot be read
  kTooLarge = 5,     // more pixels than allowed
};

enum Decoder : int32_t { kLibjpeg = 0, kBaseline = 1 };
enum Kind : int32_t { kRandom = 0, kCenter = 1, kWhole = 2 };
enum Interpolation : int32_t { kBilinear = 0, kBicubic = 1 };

// How one view is cut.
struct ViewSpec {
  int32_t size;           // side in pixels
  int32_t kind;           // Kind
  int32_t interpolation;  // Interpolation
  uint32_t draw_id;       // the view word of the random address
  double scale[2];        // area range relative to the image
  double ratio[2];        // range of width / height
  double log_ratio[2];    // its logarithms, taken on the Python side for both implementations
  double resize_ratio;    // short side before the centre crop, relative to size
};

// One image.
struct Job {
  const uint8_t* data;  // the record, or null to read `path`
  uint64_t size;
  const char* path;
  uint32_t index;  // keys the draws
  uint32_t crc;
  uint32_t flags;
  int32_t slot;    // row of the output arrays
  int32_t status;  // Status, written here
  int32_t width;   // written where the header could be read
  int32_t height;
  int32_t decoder;  // Decoder that made the pixels, written where status is kOk
};

// What takes an image's views on the thread that made them, while they are in its nearest cache. The next image
// overwrites `views`. `slot` is the job's. `regatta_augment_image` of augment.cpp is such a function.
struct Finish {
  void (*call)(const void* context, int32_t slot, const uint8_t* const* views);
  const void* context;
};

// What a batch of a packed file needs beside its sample numbers. pipeline/ffcv_loader.py prepares and keeps it.
struct PackedCall {
  void* pool;
  const ViewSpec* specs;
  int64_t views;
  uint64_t seed;
  int64_t epoch, max_pixels;
  const int64_t* offsets;  // of each record in the file
  const int64_t* sizes;
  const uint32_t* checksums;  // null where none are known
  Job* jobs;                  // (ring, rows): how each image of a batch fared
  uint8_t* const* outs;       // (ring, views): where its views go
  const Finish* finish;       // (ring): what takes them instead, or null
  int64_t ring, rows;
};

}  // namespace regatta
