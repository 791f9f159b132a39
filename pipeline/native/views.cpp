// One JPEG in, N views out: the decoder behind every loader, with a plain C interface.
//
// Each view is a crop drawn from (seed, epoch, sample, view), resized with antialiasing straight from the JPEG's colour
// planes and converted to RGB at the output size. A batch is spread over threads; none of it needs Python's lock.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "layouts.h"
#include "thread_pool.h"
#include "view_job.h"

namespace regatta {

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

  // Images differ in cost, so threads take them one by one. Run on every thread of a pool.
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

}  // namespace regatta

using regatta::Box;
using regatta::Finish;
using regatta::Job;
using regatta::PackedCall;
using regatta::Plane;
using regatta::Scratch;
using regatta::ThreadPool;
using regatta::ViewSpec;

// Runs the work and counts its failures.
static int32_t decode_all(void* pool, regatta::Work&& work) {
  static_cast<ThreadPool*>(pool)->run([&work] { work.drain(); });
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
    return new ThreadPool(threads);
  } catch (...) {
    return nullptr;
  }
}

REGATTA_API void rg_pool_close(void* pool) { delete static_cast<ThreadPool*>(pool); }

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
  const regatta::Cut cut{call.specs, static_cast<int32_t>(call.views),  call.outs + turn * call.views,
                         call.seed,  static_cast<uint32_t>(call.epoch), call.max_pixels};
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
