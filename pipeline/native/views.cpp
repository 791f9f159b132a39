// One JPEG in, N views out: the decoder behind every loader, with a plain C interface.
//
// Each view is a crop drawn from (seed, epoch, sample, view), resized with antialiasing straight from the JPEG's colour
// planes and converted to RGB at the output size. A batch is spread over threads; none of it needs Python's lock.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "crc32.h"
#include "crops.h"
#include "jpeg_baseline.h"
#include "jpeg_planes.h"
#include "resize.h"

namespace regatta {

enum Flags : uint32_t {
  kCheckCrc = 1,       // compare the record with `crc` first
  kWholeImage = 2,     // decode to the end, to notice damage below the crops
  kRefuseRotated = 4,  // leave images with an EXIF orientation to the general path
  kLibjpegOnly = 8,    // for tests and measurements
};

enum Decoder : int32_t { kLibjpeg = 0, kBaseline = 1 };

// One image; the memory layout is shared with pipeline/decoder.py.
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

// What takes an image's views on the thread that made them, while they are in its nearest cache. `views` are written
// anew for the next image; `slot` is the job's. `regatta_augment_image` is such a function.
struct Finish {
  void (*call)(const void* context, int32_t slot, const uint8_t* const* views);
  const void* context;
};

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

Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

std::atomic<int32_t> forced_level{-1};

int32_t current_level() {
  static const int32_t best = best_level();
  const int32_t forced = forced_level.load(std::memory_order_relaxed);
  return forced < 0 ? best : std::min(forced, best);
}

// The bytes of a file in a buffer that only grows; -1 where it cannot be read or is no regular file. (A pipe would make
// the thread wait for ever, a device might never end.)
int64_t read_file(const char* path, std::vector<uint8_t>& bytes) {
  const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return -1;
  struct Closer {
    int file;
    ~Closer() { close(file); }
  } closer{file};
  struct stat facts;
  if (fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) return -1;
  // A byte more than it should have, so that one read finds its end.
  const size_t expected = static_cast<size_t>(facts.st_size) + 1;
  if (bytes.size() < expected) bytes.resize(expected);
  size_t used = 0;
  for (;;) {
    const ssize_t got = read(file, bytes.data() + used, bytes.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) return static_cast<int64_t>(used);
    used += static_cast<size_t>(got);
    if (used == bytes.size()) bytes.resize(bytes.size() * 2);
  }
}

void write_views(Scratch& own, const Plane* planes, int32_t color, const ViewSpec* specs, int32_t views, int32_t slot,
                 uint8_t* const* outs) {
  for (int32_t view = 0; view < views; ++view) {
    const size_t bytes = static_cast<size_t>(specs[view].size) * specs[view].size * 3;
    resize_view(own.resize, planes, color, own.boxes[view], specs[view].size, specs[view].interpolation,
                current_level(), outs[view] + bytes * slot);
  }
}

void draw_boxes(Scratch& own, const ViewSpec* specs, int32_t views, uint64_t seed, uint32_t epoch, uint32_t index,
                int height, int width) {
  own.boxes.resize(views);
  for (int32_t view = 0; view < views; ++view)
    own.boxes[view] = draw_crop(specs[view], seed, epoch, index, height, width);
}

// The smallest region with all boxes in it.
Region region_of(const std::vector<Box>& boxes) {
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

bool run_baseline(Job& job, const uint8_t* data, size_t size, Scratch& own, const Cut& cut) {
  BaselineDecoder& decoder = own.baseline;
  if (!BaselineDecoder::usable(current_level())) return false;
  if (!decoder.open(data, size, cut.max_pixels, job.flags & kRefuseRotated)) return false;
  draw_boxes(own, cut.specs, cut.views, cut.seed, cut.epoch, job.index, decoder.height, decoder.width);
  if (!decoder.decode(region_of(own.boxes), job.flags & kWholeImage, current_level())) return false;
  job.width = decoder.width;
  job.height = decoder.height;
  job.decoder = kBaseline;
  write_views(own, decoder.planes, decoder.color, cut.specs, cut.views, job.slot, cut.outs);
  return true;
}

int32_t run_general(Job& job, const uint8_t* data, size_t size, Scratch& own, const Cut& cut) {
  PlaneDecoder& decoder = own.general;
  const int32_t opened = decoder.open(data, size, cut.max_pixels, job.flags & kRefuseRotated);
  job.width = decoder.width;
  job.height = decoder.height;
  if (opened != kOk) return opened;
  draw_boxes(own, cut.specs, cut.views, cut.seed, cut.epoch, job.index, job.height, job.width);
  const int32_t decoded =
      decoder.decode(static_cast<int>(region_of(own.boxes).bottom), job.flags & kWholeImage);
  if (decoded != kOk) return decoded;
  job.decoder = kLibjpeg;
  write_views(own, decoder.planes, decoder.color, cut.specs, cut.views, job.slot, cut.outs);
  return kOk;
}

int32_t run_job(Job& job, const Cut& cut) {
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
uint8_t* const* own_views(Scratch& own, const ViewSpec* specs, int32_t views) {
  own.views.resize(std::max(own.views.size(), static_cast<size_t>(views)));
  own.outs.resize(own.views.size());
  for (int32_t view = 0; view < views; ++view) {
    const size_t bytes = static_cast<size_t>(specs[view].size) * specs[view].size * 3;
    if (own.views[view].size() < bytes) own.views[view].resize(bytes);
    own.outs[view] = own.views[view].data();
  }
  return own.outs.data();
}

// What the threads of one call share.
struct Work {
  Job* jobs;
  int32_t count;
  Cut cut;
  const Finish* finish;  // null where the views go to `cut.outs`
  std::atomic<int32_t> next{0};

  int32_t run_and_finish(Job& job) {
    Cut own = cut;
    own.outs = own_views(scratch(), cut.specs, cut.views);
    const int32_t slot = job.slot;
    job.slot = 0;
    const int32_t status = run_job(job, own);
    job.slot = slot;
    if (status == kOk) finish->call(finish->context, slot, own.outs);
    return status;
  }

  // Images differ in cost, so threads take them one by one.
  void drain() {
    for (int32_t at = next.fetch_add(1); at < count; at = next.fetch_add(1)) {
      try {
        jobs[at].status = finish ? run_and_finish(jobs[at]) : run_job(jobs[at], cut);
      } catch (const std::bad_alloc&) {
        jobs[at].status = kTooLarge;
      }
    }
  }
};

// Threads that wait for work; the caller works along, so a pool of one thread starts none.
class Pool {
 public:
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {
      stop();  // destroying a thread that still runs would end the process
      throw;
    }
  }
  ~Pool() { stop(); }

  void run(Work& work) {
    std::lock_guard<std::mutex> one_call_at_a_time(calls_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      busy_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    work.drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
  }

 private:
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      Work* work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return closing_ || generation_ != seen; });
        if (closing_) return;
        seen = generation_;
        work = work_;
      }
      work->drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_, calls_;
  std::condition_variable wake_, done_;
  Work* work_ = nullptr;
  int busy_ = 0;
  uint64_t generation_ = 0;
  bool closing_ = false;
};

}  // namespace regatta

using regatta::Box;
using regatta::Finish;
using regatta::Job;
using regatta::Plane;
using regatta::Pool;
using regatta::Scratch;
using regatta::ViewSpec;

// Runs the work and counts its failures.
static int32_t decode_all(void* pool, regatta::Work&& work) {
  static_cast<Pool*>(pool)->run(work);
  int32_t failed = 0;
  for (int32_t at = 0; at < work.count; ++at) failed += work.jobs[at].status != regatta::kOk;
  return failed;
}

#define REGATTA_API extern "C" __attribute__((visibility("default")))

REGATTA_API int32_t rg_job_bytes() { return sizeof(Job); }
REGATTA_API int32_t rg_view_bytes() { return sizeof(ViewSpec); }

// Instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512.
REGATTA_API int32_t rg_level() { return regatta::current_level(); }

// Use at most this instruction set; -1 for the best there is. For tests and measurements.
REGATTA_API void rg_force_level(int32_t level) { regatta::forced_level.store(level); }

REGATTA_API uint32_t rg_crc32(const uint8_t* data, uint64_t size) { return regatta::crc32(data, size); }

REGATTA_API void* rg_pool_open(int32_t threads) {
  try {
    return new Pool(threads);
  } catch (...) {
    return nullptr;
  }
}

REGATTA_API void rg_pool_close(void* pool) { delete static_cast<Pool*>(pool); }

// Decode every job into row `slot` of the outputs, uint8 (rows, size, size, 3) per view. Returns how many failed; each
// job says why in `status`, and the rows of failed jobs keep what was in them.
REGATTA_API int32_t rg_decode(void* pool, Job* jobs, int32_t count, const ViewSpec* specs, int32_t views,
                              uint8_t* const* outs, uint64_t seed, uint32_t epoch, int64_t max_pixels) {
  return decode_all(pool, {jobs, count, {specs, views, outs, seed, epoch, max_pixels}, nullptr});
}

// The same, but every image's views go to `finish` instead, on the thread that made them.
REGATTA_API int32_t rg_decode_finish(void* pool, Job* jobs, int32_t count, const ViewSpec* specs, int32_t views,
                                     const Finish* finish, uint64_t seed, uint32_t epoch, int64_t max_pixels) {
  return decode_all(pool, {jobs, count, {specs, views, nullptr, seed, epoch, max_pixels}, finish});
}

// What a batch of a packed file needs beside its sample numbers; prepared and kept by pipeline/ffcv_loader.py.
struct PackedCall {
  void* pool;
  const ViewSpec* specs;
  int64_t views;
  uint64_t seed;
  int64_t epoch, max_pixels;
  const int64_t* offsets;     // of each record in the file
  const int64_t* sizes;
  const uint32_t* checksums;  // null where none are known
  Job* jobs;                  // (ring, rows): how each image of a batch fared
  uint8_t* const* outs;       // (ring, views): where its views go
  const Finish* finish;       // (ring): what takes them instead, or null
  int64_t ring, rows;
};

REGATTA_API int32_t rg_packed_bytes() { return sizeof(PackedCall); }

// Decode one batch of a packed file. Integers only, so that compiled Python can call it: `call` is the address of a
// PackedCall, `file` that of the mapped file, `order` that of (count, 2) int64 rows: sample, number of the batch.
REGATTA_API int32_t rg_packed_batch(uint64_t call_address, uint64_t file, uint64_t order_address, uint64_t count) {
  const PackedCall& call = *reinterpret_cast<const PackedCall*>(call_address);
  const int64_t* order = reinterpret_cast<const int64_t*>(order_address);
  if (count == 0 || count > static_cast<uint64_t>(call.rows)) return -1;
  const int64_t turn = order[1] % call.ring;
  Job* jobs = call.jobs + turn * call.rows;
  for (uint64_t at = 0; at < count; ++at) {
    const int64_t sample = order[2 * at];
    const uint32_t flags = call.checksums ? regatta::kCheckCrc : regatta::kWholeImage;
    jobs[at] = {reinterpret_cast<const uint8_t*>(file + call.offsets[sample]),
                static_cast<uint64_t>(call.sizes[sample]),
                nullptr,
                static_cast<uint32_t>(sample),
                call.checksums ? call.checksums[sample] : 0,
                flags,
                static_cast<int32_t>(at),
                regatta::kOk,
                0,
                0,
                0};
  }
  const regatta::Cut cut{call.specs, static_cast<int32_t>(call.views), call.outs + turn * call.views, call.seed,
                         static_cast<uint32_t>(call.epoch), call.max_pixels};
  return decode_all(call.pool, {jobs, static_cast<int32_t>(count), cut, call.finish ? call.finish + turn : nullptr});
}

// The same views from pixels that the general path decoded: uint8 (height, width, 3), contiguous.
REGATTA_API int32_t rg_views_of_rgb(const uint8_t* pixels, int32_t height, int32_t width, const ViewSpec* specs,
                                    int32_t views, int32_t slot, uint8_t* const* outs, uint64_t seed, uint32_t epoch,
                                    uint32_t index) {
  try {
    Scratch& own = regatta::scratch();
    Plane planes[3];
    const ptrdiff_t pitch = width + regatta::kPad;
    for (int channel = 0; channel < 3; ++channel) {
      std::vector<uint8_t>& buffer = own.planes[channel];
      if (buffer.size() < static_cast<size_t>(pitch) * height) buffer.resize(static_cast<size_t>(pitch) * height);
      for (int64_t row = 0; row < height; ++row)
        for (int64_t column = 0; column < width; ++column)
          buffer[row * pitch + column] = pixels[(row * width + column) * 3 + channel];
      planes[channel] = {buffer.data(), pitch, width, height, 1.0, 1.0};
    }
    regatta::draw_boxes(own, specs, views, seed, epoch, index, height, width);
    regatta::write_views(own, planes, regatta::kRgb, specs, views, slot, outs);
    return regatta::kOk;
  } catch (const std::bad_alloc&) {
    return regatta::kTooLarge;
  }
}

// One crop box as (top, left, height, width); for tests against pipeline/geometry.py.
REGATTA_API void rg_crop(const ViewSpec* spec, uint64_t seed, uint32_t epoch, uint32_t index, int64_t height,
                         int64_t width, int64_t* out) {
  const Box box = regatta::draw_crop(*spec, seed, epoch, index, height, width);
  out[0] = box.top;
  out[1] = box.left;
  out[2] = box.height;
  out[3] = box.width;
}
