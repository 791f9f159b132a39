// Mask pooling: means of a channels-last feature map under soft maps, forward and backward.
//
//   pooled[b, m, c] = sum_s w[b, g(c), m, s] f[b, c, s] / sum_s w[b, g(c), m, s],   g(c) = c / (C / G)
//
// Compiled at first use by NVRTC with these macros (nvrtc.py, masked_pool_kernels.py):
//   FEATURE, WEIGHT   storage types: Float32, Float16 or BFloat16; all sums are float32
//   VECTOR            channels a thread loads at once (16 bytes' worth, or 1 where channels do not divide)
//   MAPS              maps summed together: 1, 2, 4 or 8
// It includes no header of a toolkit, so that none is needed, and has no host part, so that the tests can compile this
// very file with a C++ compiler under a shim that runs the threads of a block in a loop.

#include "storage.h"
#include "pooling.h"

#define POSITIONS 8                      // positions a thread keeps in registers in the backward pass
#define MAX_SUMS 2048                    // (groups of a block's channels) x masks

struct Arguments {
    const void* features;     // (B, H, W, C)
    const void* weights;      // (B, G, M, H, W)
    const void* grad;         // (B, M, C), of `pooled`
    void* out;                // forward (B, M, C); backward (B, H, W, C) or (B, G, M, H, W)
    int channels, height, width, groups, masks;
};

typedef WEIGHT::Bits WeightBits;

static __device__ __forceinline__ float load_weight(const void* base, long long offset) {
    return WEIGHT::load(static_cast<const WeightBits*>(base)[offset]);
}

static __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Grid (channel blocks, images, blocks of MAPS masks). Writes (B, M, C).
extern "C" __global__ void __launch_bounds__(THREADS) masked_pool_forward(const Arguments a) {
    __shared__ float part[SLICES * VECTOR * STRIDE];
    __shared__ float weight_part[SLICES * LANES];
    const int lane = threadIdx.x, slice = threadIdx.y, first = blockIdx.z * MAPS;
    const long long image = blockIdx.y;
    const int channel = (blockIdx.x * LANES + lane) * VECTOR, positions = a.height * a.width;
    float sums[MAPS][VECTOR] = {}, weight_sums[MAPS] = {};
    if (channel < a.channels) {
        const long long group = channel / (a.channels / a.groups);
        const long long maps = ((image * a.groups + group) * a.masks + first) * positions;
#pragma unroll 2
        for (int s = slice; s < positions; s += SLICES) {
            const Pack pack = load_pack(a.features, (image * positions + s) * a.channels + channel);
#pragma unroll
            for (int m = 0; m < MAPS; ++m) {
                if (first + m >= a.masks) break;
                const float weight = load_weight(a.weights, maps + (long long)m * positions + s);
                weight_sums[m] += weight;
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) sums[m][v] += weight * FEATURE::load(pack.bits[v]);
            }
        }
    }
    FeatureBits* out = static_cast<FeatureBits*>(a.out) + (image * a.masks + first) * a.channels;
#pragma unroll
    for (int m = 0; m < MAPS; ++m) {
        if (first + m >= a.masks) break;  // the same for the whole block, so no thread misses a barrier
        __syncthreads();
        share(part, lane, slice, sums[m]);
        weight_part[slice * LANES + lane] = weight_sums[m];
        __syncthreads();
        for (int column = slice * LANES + lane; column < LANES * VECTOR; column += THREADS) {
            const int c = blockIdx.x * LANES * VECTOR + column;
            if (c >= a.channels) continue;
            float weight = 0.0f;
            for (int other = 0; other < SLICES; ++other) weight += weight_part[other * LANES + column / VECTOR];
            out[(long long)m * a.channels + c] = FEATURE::store(collect(part, column) * inverse(weight));
        }
    }
}

// Grid (channel blocks, images). Writes the gradient of the features: (B, H, W, C). Every thread keeps POSITIONS cells
// of its channels in registers while it runs over the masks, so any number of masks costs one write of the map.
extern "C" __global__ void __launch_bounds__(THREADS) masked_pool_backward_features(const Arguments a) {
    __shared__ float scale[MAX_SUMS];
    const int lane = threadIdx.x, slice = threadIdx.y, positions = a.height * a.width;
    const int per_group = a.channels / a.groups, block_channel = blockIdx.x * LANES * VECTOR;
    const int channel = block_channel + lane * VECTOR;
    const int end_channel = block_channel + LANES * VECTOR < a.channels ? block_channel + LANES * VECTOR : a.channels;
    const int first_group = block_channel / per_group, groups = (end_channel - 1) / per_group - first_group + 1;
    const long long image = blockIdx.y;
    const long long block_maps = (image * a.groups + first_group) * a.masks * (long long)positions;
    for (int i = slice; i < groups * a.masks; i += SLICES) {
        float sum = 0.0f;
        for (int s = lane; s < positions; s += LANES) sum += load_weight(a.weights, block_maps + (long long)i * positions + s);
        sum = warp_sum(sum);
        if (lane == 0) scale[i] = inverse(sum);
    }
    __syncthreads();
    if (channel >= a.channels) return;
    const int group = channel / per_group - first_group;
    const long long maps = block_maps + (long long)group * a.masks * positions;
    for (int start = slice; start < positions; start += SLICES * POSITIONS) {
        float sums[POSITIONS][VECTOR] = {};
        for (int m = 0; m < a.masks; ++m) {
            const Pack pack = load_pack(a.grad, (image * a.masks + m) * a.channels + channel);
            float grad[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) grad[v] = FEATURE::load(pack.bits[v]) * scale[group * a.masks + m];
#pragma unroll
            for (int p = 0; p < POSITIONS; ++p) {
                const int s = start + p * SLICES;
                if (s >= positions) break;
                const float weight = load_weight(a.weights, maps + (long long)m * positions + s);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) sums[p][v] += weight * grad[v];
            }
        }
#pragma unroll
        for (int p = 0; p < POSITIONS; ++p) {
            const int s = start + p * SLICES;
            if (s >= positions) break;
            store_pack(a.out, (image * positions + s) * a.channels + channel, sums[p]);
        }
    }
}

// Positions of which a thread keeps sums: eight are a whole 7 x 7 map, but with many maps they would fill the registers.
#define AT_ONCE (MAPS <= 2 ? 8 : 4)

// Grid (groups, images, blocks of MAPS masks). Writes the gradient of the weights: (B, G, M, H, W). A warp takes a
// position and sums over the group's channels; then warp m finishes mask m: (p[s] - sum_s' w[s'] p[s'] / n) / n.
extern "C" __global__ void __launch_bounds__(THREADS) masked_pool_backward_weights(const Arguments a) {
    __shared__ float products[MAPS][MAX_POSITIONS];
    const int lane = threadIdx.x, slice = threadIdx.y, first = blockIdx.z * MAPS, positions = a.height * a.width;
    const int per_group = a.channels / a.groups;
    const long long image = blockIdx.y, group = blockIdx.x;
    for (int start = slice; start < positions; start += AT_ONCE * SLICES) {
        float sums[AT_ONCE][MAPS] = {};
        for (int c = lane * VECTOR; c < per_group; c += LANES * VECTOR) {
            const long long channel = group * per_group + c;
            // Read once for several positions: with two maps they are twice as many bytes as the features.
            Pack grads[MAPS];
#pragma unroll
            for (int m = 0; m < MAPS; ++m) {
                if (first + m >= a.masks) break;
                grads[m] = load_pack(a.grad, (image * a.masks + first + m) * a.channels + channel);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int s = start + i * SLICES;
                if (s >= positions) break;
                const Pack feature = load_pack(a.features, (image * positions + s) * a.channels + channel);
#pragma unroll
                for (int m = 0; m < MAPS; ++m) {
                    if (first + m >= a.masks) break;
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v)
                        sums[i][m] += FEATURE::load(feature.bits[v]) * FEATURE::load(grads[m].bits[v]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int s = start + i * SLICES;
            if (s >= positions) break;  // a warp has one slice, so all of its lanes leave
#pragma unroll
            for (int m = 0; m < MAPS; ++m) {
                const float sum = warp_sum(sums[i][m]);
                if (lane == 0) products[m][s] = sum;
            }
        }
    }
    __syncthreads();
    const int mask = first + slice;
    if (slice >= MAPS || mask >= a.masks) return;
    const long long map = ((image * a.groups + group) * a.masks + mask) * positions;
    float weight_sum = 0.0f, product_sum = 0.0f;
    for (int s = lane; s < positions; s += LANES) {
        const float weight = load_weight(a.weights, map + s);
        weight_sum += weight;
        product_sum += weight * products[slice][s];
    }
    const float per_weight = inverse(warp_sum(weight_sum));
    const float mean = warp_sum(product_sum) * per_weight;
    for (int s = lane; s < positions; s += LANES)
        static_cast<WeightBits*>(a.out)[map + s] = WEIGHT::store((products[slice][s] - mean) * per_weight);
}
