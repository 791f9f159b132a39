// Box pooling: means of a channels-last feature map inside a box, outside it and over all of it, forward and backward.
//
// Compiled at first use by NVRTC with these macros (nvrtc.py, box_pool_kernels.py):
//   FEATURE   storage type: Float32, Float16 or BFloat16; all sums are float32
//   VECTOR    channels a thread loads at once (16 bytes' worth, or 1 where channels do not divide)
// It includes no header of a toolkit, so that none is needed, and has no host part, so that the tests can compile this
// very file with a C++ compiler under a shim that runs the threads of a block in a loop.

#include "storage.h"
#include "pooling.h"

struct Arguments {
    const void* features;     // (B, H, W, C)
    const void* grad;         // (B, 3, C), of `pooled`
    const long long* boxes;   // (B, 4) top, left, height, width
    void* out;                // forward (B, 3, C); backward (B, H, W, C)
    int channels, height, width;
};

struct Box {
    int top, bottom, left, right, cells;
    __device__ __forceinline__ bool holds(int row, int column) const {
        return row >= top && row < bottom && column >= left && column < right;
    }
};

static __device__ __forceinline__ int clamp_to(long long value, int limit) {
    return value < 0 ? 0 : value > limit ? limit : (int)value;
}

// The part of image `image`'s box that lies on the map.
static __device__ __forceinline__ Box load_box(const Arguments& a, long long image) {
    const long long* given = a.boxes + image * 4;
    Box box;
    box.top = clamp_to(given[0], a.height);
    box.left = clamp_to(given[1], a.width);
    box.bottom = clamp_to(given[0] + given[2], a.height);
    box.right = clamp_to(given[1] + given[3], a.width);
    int rows = box.bottom - box.top, columns = box.right - box.left;
    box.cells = rows > 0 && columns > 0 ? rows * columns : 0;
    return box;
}

// Grid (channel blocks, images). Writes the means of box, rest and everything: (B, 3, C).
extern "C" __global__ void __launch_bounds__(THREADS) box_pool_forward(const Arguments a) {
    __shared__ float paste_part[SLICES * VECTOR * STRIDE];
    __shared__ float canvas_part[SLICES * VECTOR * STRIDE];
    const int lane = threadIdx.x, slice = threadIdx.y;
    const long long image = blockIdx.y;
    const int channel = (blockIdx.x * LANES + lane) * VECTOR, positions = a.height * a.width;
    const Box box = load_box(a, image);
    float paste[VECTOR] = {}, canvas[VECTOR] = {};
    if (channel < a.channels) {
#pragma unroll 4
        for (int s = slice; s < positions; s += SLICES) {
            const Pack pack = load_pack(a.features, (image * positions + s) * a.channels + channel);
            const bool inside = box.holds(s / a.width, s % a.width);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                const float value = FEATURE::load(pack.bits[v]);
                paste[v] += inside ? value : 0.0f;
                canvas[v] += inside ? 0.0f : value;
            }
        }
    }
    share(paste_part, lane, slice, paste);
    share(canvas_part, lane, slice, canvas);
    __syncthreads();
    FeatureBits* out = static_cast<FeatureBits*>(a.out) + image * 3 * a.channels;
    for (int column = slice * LANES + lane; column < LANES * VECTOR; column += THREADS) {
        const int c = blockIdx.x * LANES * VECTOR + column;
        if (c >= a.channels) continue;
        const float in_box = collect(paste_part, column), rest = collect(canvas_part, column);
        out[c] = FEATURE::store(in_box * inverse((float)box.cells));
        out[a.channels + c] = FEATURE::store(rest * inverse((float)(positions - box.cells)));
        out[2 * a.channels + c] = FEATURE::store((in_box + rest) / (float)positions);
    }
}

// Grid (channel blocks, images). Writes the gradient of the map: (B, H, W, C).
extern "C" __global__ void __launch_bounds__(THREADS) box_pool_backward(const Arguments a) {
    const int lane = threadIdx.x, slice = threadIdx.y;
    const long long image = blockIdx.y;
    const int channel = (blockIdx.x * LANES + lane) * VECTOR, positions = a.height * a.width;
    if (channel >= a.channels) return;
    const Box box = load_box(a, image);
    const Pack paste = load_pack(a.grad, (image * 3 + 0) * a.channels + channel);
    const Pack canvas = load_pack(a.grad, (image * 3 + 1) * a.channels + channel);
    const Pack all = load_pack(a.grad, (image * 3 + 2) * a.channels + channel);
    const float per_paste = inverse((float)box.cells), per_canvas = inverse((float)(positions - box.cells));
    float inside[VECTOR], outside[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        const float shared = FEATURE::load(all.bits[v]) / (float)positions;
        inside[v] = FEATURE::load(paste.bits[v]) * per_paste + shared;
        outside[v] = FEATURE::load(canvas.bits[v]) * per_canvas + shared;
    }
    for (int s = slice; s < positions; s += SLICES) {
        const long long offset = (image * positions + s) * a.channels + channel;
        store_pack(a.out, offset, box.holds(s / a.width, s % a.width) ? inside : outside);
    }
}
