// Batch norm of a channels-last map with ReLU and a residual sum, statistics by groups of images, forward and backward.
//
//   y = relu((x - mean[g]) * weight / sqrt(variance[g] + eps) + bias + residual)
//
// The map is (groups, rows, C) in memory, a row being one position of one image. Compiled at first use by NVRTC with the
// macros of storage.h (nvrtc.py, batch_norm_act_kernels.py). Sums are float32 and in a fixed order: blocks leave partial sums,
// and a second launch joins them, so that no result depends on which block comes first. How many blocks there are follows
// from the card, so two kinds of card may differ in the last digits.
//
// A block is lanes x slices threads (256): lanes walk along the channels, which are contiguous, slices share out the
// rows. Each group's rows are cut into `splits` runs, one for each block along y.

#include "storage.h"
#include "batch_norm_act.h"

#define PLANE (THREADS + 32 / VECTOR)  // spreads the values of neighbouring channels over the banks of shared memory
#define ROW (32 + 32 / VECTOR)         // the same where there is one value a channel
#define AHEAD 2                       // rows that a thread loads before it stores any

// The rows of one block, and where one of its threads stands.
struct Place {
    int lane, slice, lanes, slices, channel, group, count;
    long long first;  // row in the whole map
    __device__ __forceinline__ long long offset(const Arguments& a, int row) const {
        return (first + row) * a.channels + channel;
    }
};

static __device__ __forceinline__ long long rows_in_split(const Arguments& a) {
    return (a.rows + a.splits - 1) / a.splits;
}

static __device__ __forceinline__ int count_of(const Arguments& a, int split) {
    const long long each = rows_in_split(a), left = a.rows - split * each;
    return (int)(left < each ? left : each);
}

static __device__ __forceinline__ Place place_of(const Arguments& a, int split) {
    Place p;
    p.lane = threadIdx.x, p.slice = threadIdx.y, p.lanes = blockDim.x, p.slices = blockDim.y;
    p.channel = (blockIdx.x * p.lanes + p.lane) * VECTOR;
    p.group = blockIdx.z;
    p.count = count_of(a, split);
    p.first = p.group * a.rows + split * rows_in_split(a);
    return p;
}

// Rows that the threads of one slice see, of `count` rows of a block.
static __device__ __forceinline__ int rows_of_slice(int count, int slice, int slices) {
    return slice < count ? (count - slice - 1) / slices + 1 : 0;
}

// Where a thread leaves value v of its channels in shared memory, and where the block's column (channel) is found there.
static __device__ __forceinline__ int spot(const Place& p, int v) { return v * PLANE + p.slice * p.lanes + p.lane; }

static __device__ __forceinline__ int spot_of(const Place& p, int column, int slice) {
    return column % VECTOR * PLANE + slice * p.lanes + column / VECTOR;
}

// Where one value a channel is kept for the whole block.
static __device__ __forceinline__ int shelf_of(int column) { return column % VECTOR * ROW + column / VECTOR; }

// The channel that is this thread's column of the block, or -1: a block has at most as many columns as threads.
static __device__ __forceinline__ int own_column(const Arguments& a, const Place& p) {
    const int column = p.slice * p.lanes + p.lane;
    return column < p.lanes * VECTOR && blockIdx.x * p.lanes * VECTOR + column < a.channels ? column : -1;
}

static __device__ __forceinline__ float inverse_std(const Arguments& a, int index) {
    return 1.0f / sqrtf(a.variance[index] + a.eps);
}

// A block's two results for one of its channels.
static __device__ __forceinline__ void leave_partial(
    const Arguments& a, const Place& p, int column, float one, float two) {
    const int c = blockIdx.x * p.lanes * VECTOR + column;
    const long long at = ((long long)p.group * a.splits + blockIdx.y) * a.channels + c;
    a.partial[at] = one;
    a.partial[(long long)a.groups * a.splits * a.channels + at] = two;
}

// Grid (channel blocks, splits, groups). Leaves mean, as distance from the group's first value, and sum of squared
// deviations of each block's rows. Distances are small where the mean is large, so its last digits are not lost.
//
// A thread sums deviations from its own first value. That value is among those summed, so sum((x - shift)^2) is at most
// n + 1 times the squared deviations from the mean, and taking the mean off cannot cancel more than that.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_statistics(const Arguments a) {
    __shared__ float means[VECTOR * PLANE];
    __shared__ float squares[VECTOR * PLANE];
    const Place p = place_of(a, blockIdx.y);
    const int own_rows = rows_of_slice(p.count, p.slice, p.slices);
    float shift[VECTOR] = {}, away[VECTOR] = {}, first[VECTOR] = {}, second[VECTOR] = {};
    if (p.channel < a.channels && own_rows > 0) {
        const Pack own = load_pack(a.x, p.offset(a, p.slice));
        const Pack origin = load_pack(a.x, p.group * a.rows * a.channels + p.channel);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            shift[v] = FEATURE::load(own.bits[v]);
            away[v] = shift[v] - FEATURE::load(origin.bits[v]);
        }
#pragma unroll 4
        for (int row = p.slice + p.slices; row < p.count; row += p.slices) {
            const Pack pack = load_pack(a.x, p.offset(a, row));
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                const float deviation = FEATURE::load(pack.bits[v]) - shift[v];
                first[v] += deviation;
                second[v] = fmaf(deviation, deviation, second[v]);
            }
        }
    }
    const float per_row = own_rows > 0 ? 1.0f / (float)own_rows : 0.0f;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        means[spot(p, v)] = fmaf(first[v], per_row, away[v]);
        squares[spot(p, v)] = second[v] - first[v] * first[v] * per_row;
    }
    __syncthreads();
    const int column = own_column(a, p);
    if (column < 0) return;
    float sum = 0.0f, square = 0.0f;
    for (int slice = 0; slice < p.slices; ++slice)
        sum += (float)rows_of_slice(p.count, slice, p.slices) * means[spot_of(p, column, slice)];
    const float mean = sum / (float)p.count;
    for (int slice = 0; slice < p.slices; ++slice) {
        const float apart = means[spot_of(p, column, slice)] - mean;
        square += squares[spot_of(p, column, slice)];
        square += (float)rows_of_slice(p.count, slice, p.slices) * apart * apart;
    }
    leave_partial(a, p, column, mean, square);
}

// A launch of its own joins, not the last block of a pass to arrive. That block has a thread or a few for each of its up
// to 256 channels, where the launch has 16, so its threads would walk over up to 16 times the splits: over a ResNet-50's
// 53 layers (256 images of 224 pixels, one group, an A100's 432 blocks, eight loads at a time) one walk would wait for
// memory 1,601 times instead of 157. It would also want a counter for each stream, which passes on two streams must not
// share, and a fence in every block.

// The splits that a joining thread walks over: none for a lane beyond the channels. As a bound of the loop, not as a
// condition in it, this lets the compiler issue the loads of several splits before it waits for the first: a thread has
// up to 64 of them, and one wait for memory each would take longer than the pass over the map.
static __device__ __forceinline__ int splits_to_join(const Arguments& a, bool here) { return here ? a.splits : 0; }

// Sum over the slices of a joining block what each thread holds for its channel; every thread gets the sum.
static __device__ __forceinline__ float join(float* shared, float value) {
    __syncthreads();
    shared[threadIdx.y * JOIN_LANES + threadIdx.x] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < JOIN_SLICES; ++slice) sum += shared[slice * JOIN_LANES + threadIdx.x];
    return sum;
}

// Grid (blocks of 32 channels, groups). Joins the blocks' statistics: mean and biased variance of every group.
extern "C" __global__ void __launch_bounds__(JOIN_LANES * JOIN_SLICES) batch_norm_join_statistics(const Arguments a) {
    __shared__ float shared[JOIN_LANES * JOIN_SLICES];
    const int c = blockIdx.x * JOIN_LANES + threadIdx.x, group = blockIdx.y;
    const bool here = c < a.channels;
    const int splits = splits_to_join(a, here);
    const float* means = a.partial + (long long)group * a.splits * a.channels + c;
    const float* squares = means + (long long)a.groups * a.splits * a.channels;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = threadIdx.y; split < splits; split += JOIN_SLICES)
        sum += (float)count_of(a, split) * means[(long long)split * a.channels];
    const float mean = join(shared, sum) / (float)a.rows;
    float square = 0.0f;
#pragma unroll 8
    for (int split = threadIdx.y; split < splits; split += JOIN_SLICES) {
        const float apart = means[(long long)split * a.channels] - mean;
        square += squares[(long long)split * a.channels];
        square += (float)count_of(a, split) * apart * apart;
    }
    square = join(shared, square);
    if (here && threadIdx.y == 0) {
        const FeatureBits* origin = static_cast<const FeatureBits*>(a.x) + group * a.rows * a.channels;
        a.mean[group * a.channels + c] = FEATURE::load(origin[c]) + mean;
        a.variance[group * a.channels + c] = square / (float)a.rows;
    }
}

// What a thread keeps of its channels' statistics. The forward pass and the recomputed gate use the same operations in
// the same order, so that both see the same sign. Each thread works out one channel of the block, for all to read.
struct Affine {
    float mean[VECTOR], scale[VECTOR], bias[VECTOR];
    __device__ __forceinline__ void load(const Arguments& a, const Place& p, float (*staged)[VECTOR * ROW]) {
        const int column = own_column(a, p), c = blockIdx.x * p.lanes * VECTOR + column;
        if (column >= 0) {
            const int index = p.group * a.channels + c, at = shelf_of(column);
            staged[0][at] = a.mean[index];
            staged[1][at] = (a.weight ? a.weight[c] : 1.0f) * inverse_std(a, index);
            staged[2][at] = a.bias ? a.bias[c] : 0.0f;
        }
        __syncthreads();
        // Nobody wrote the columns of lanes beyond the channels, which have no rows to work on either.
        if (p.channel >= a.channels) return;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            mean[v] = staged[0][v * ROW + p.lane];
            scale[v] = staged[1][v * ROW + p.lane];
            bias[v] = staged[2][v * ROW + p.lane];
        }
    }
    __device__ __forceinline__ float apply(float x, int v) const { return fmaf(x - mean[v], scale[v], bias[v]); }
};

// Passes what is above zero, and NaN, which must not be lost on the way to the loss.
static __device__ __forceinline__ bool passes(float value) { return !(value <= 0.0f); }

// The splits in reverse: the rows that the pass before this one read last may still be in the cache.
static __device__ __forceinline__ int reversed_split(const Arguments& a) { return a.splits - 1 - blockIdx.y; }

// The passes below take what decides about the ReLU (GATE) and whether a residual takes part (ADDED) as choices of the
// compiler. Asked of an argument in the loop over rows they cost the last pass backward 12 registers a thread or more,
// and so the third block of a multiprocessor. Each choice that the host makes has a kernel, which stands below its pass.

// Grid (channel blocks, splits, groups). Writes y, and the mask where one is wanted.
template <int GATE, bool ADDED>
static __device__ __forceinline__ void normalise(const Arguments& a) {
    __shared__ float staged[3][VECTOR * ROW];
    const Place p = place_of(a, reversed_split(a));
    Affine affine;
    affine.load(a, p, staged);
    if (p.channel >= a.channels) return;
    for (int start = p.slice; start < p.count; start += AHEAD * p.slices) {
        Pack packs[AHEAD], added[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i * p.slices >= p.count) break;
            const long long offset = p.offset(a, start + i * p.slices);
            packs[i] = load_pack(a.x, offset);
            if constexpr (ADDED) added[i] = load_pack(a.residual, offset);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i * p.slices >= p.count) break;
            const long long offset = p.offset(a, start + i * p.slices);
            float values[VECTOR];
            unsigned int bits = 0;
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                values[v] = affine.apply(FEATURE::load(packs[i].bits[v]), v);
                if constexpr (ADDED) values[v] += FEATURE::load(added[i].bits[v]);
                if constexpr (GATE == GATE_NONE) continue;
                const bool on = passes(values[v]);
                bits |= (on ? 1u : 0u) << v;
                values[v] = on ? values[v] : 0.0f;
            }
            store_pack(a.out, offset, values);
            if constexpr (GATE == GATE_MASK) a.mask[offset / VECTOR] = (unsigned char)bits;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_normalise(const Arguments a) {
    normalise<GATE_NONE, false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_normalise_added(const Arguments a) {
    normalise<GATE_NONE, true>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_normalise_recompute(const Arguments a) {
    normalise<GATE_RECOMPUTE, false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_normalise_recompute_added(const Arguments a) {
    normalise<GATE_RECOMPUTE, true>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_normalise_mask_added(const Arguments a) {
    normalise<GATE_MASK, true>(a);
}

// One pack of x and of the gradient of y, as they come from memory.
template <int GATE>
struct Pair {
    Pack x, grad;
    unsigned int bits;
    __device__ __forceinline__ void load(const Arguments& a, long long offset) {
        x = load_pack(a.x, offset);
        grad = load_pack(a.grad, offset);
        if constexpr (GATE == GATE_MASK) bits = a.mask[offset / VECTOR];
    }
    // The deviation of x from the mean, and the gradient where the ReLU let y through.
    __device__ __forceinline__ void take(const Affine& affine, float* deviation, float* passed) const {
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            const float value = FEATURE::load(x.bits[v]);
            bool on = true;
            if constexpr (GATE == GATE_MASK) on = bits >> v & 1;
            if constexpr (GATE == GATE_RECOMPUTE) on = passes(affine.apply(value, v));
            deviation[v] = value - affine.mean[v];
            passed[v] = on ? FEATURE::load(grad.bits[v]) : 0.0f;
        }
    }
};

// Grid (channel blocks, splits, groups). Leaves sums of dy and of dy * (x - mean) over each block's rows.
template <int GATE>
static __device__ __forceinline__ void backward_sums(const Arguments& a) {
    __shared__ float plain_part[VECTOR * PLANE];
    __shared__ float product_part[VECTOR * PLANE];
    __shared__ float staged[3][VECTOR * ROW];
    const Place p = place_of(a, blockIdx.y);
    Affine affine;
    affine.load(a, p, staged);
    float plain[VECTOR] = {}, product[VECTOR] = {};
    if (p.channel < a.channels) {
#pragma unroll 2
        for (int row = p.slice; row < p.count; row += p.slices) {
            Pair<GATE> pair;
            float deviation[VECTOR], grad[VECTOR];
            pair.load(a, p.offset(a, row));
            pair.take(affine, deviation, grad);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                plain[v] += grad[v];
                product[v] = fmaf(grad[v], deviation[v], product[v]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        plain_part[spot(p, v)] = plain[v];
        product_part[spot(p, v)] = product[v];
    }
    __syncthreads();
    const int column = own_column(a, p);
    if (column < 0) return;
    float plain_sum = 0.0f, product_sum = 0.0f;
    for (int slice = 0; slice < p.slices; ++slice) {
        plain_sum += plain_part[spot_of(p, column, slice)];
        product_sum += product_part[spot_of(p, column, slice)];
    }
    leave_partial(a, p, column, plain_sum, product_sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_sums(const Arguments a) {
    backward_sums<GATE_NONE>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_sums_recompute(const Arguments a) {
    backward_sums<GATE_RECOMPUTE>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_sums_mask(const Arguments a) {
    backward_sums<GATE_MASK>(a);
}

// Grid (blocks of 32 channels). Joins the blocks' sums group by group, and over groups to the parameters' gradients.
extern "C" __global__ void __launch_bounds__(JOIN_LANES * JOIN_SLICES) batch_norm_join_sums(const Arguments a) {
    __shared__ float shared[JOIN_LANES * JOIN_SLICES];
    const int c = blockIdx.x * JOIN_LANES + threadIdx.x;
    const bool here = c < a.channels;
    const int splits = splits_to_join(a, here);
    float grad_weight = 0.0f, grad_bias = 0.0f;
    for (int group = 0; group < a.groups; ++group) {
        const float* plains = a.partial + (long long)group * a.splits * a.channels + c;
        const float* products = plains + (long long)a.groups * a.splits * a.channels;
        float plain = 0.0f, product = 0.0f;
#pragma unroll 8
        for (int split = threadIdx.y; split < splits; split += JOIN_SLICES) {
            plain += plains[(long long)split * a.channels];
            product += products[(long long)split * a.channels];
        }
        plain = join(shared, plain);
        product = join(shared, product);
        if (!here || threadIdx.y != 0) continue;
        const int index = group * a.channels + c;
        a.sums[index] = plain;
        a.sums[a.groups * a.channels + index] = product;
        grad_bias += plain;
        grad_weight = fmaf(product, inverse_std(a, index), grad_weight);
    }
    if (here && threadIdx.y == 0) {
        a.grad_weight[c] = grad_weight;
        a.grad_bias[c] = grad_bias;
    }
}

// Grid (channel blocks, splits, groups). Writes the gradient of x, and that of the residual behind a ReLU:
//   dx = weight / std * (dy - sum(dy) / n - (x - mean) / std^2 * sum(dy (x - mean)) / n)
template <int GATE, bool ADDED>
static __device__ __forceinline__ void backward_input(const Arguments& a) {
    __shared__ float levels[VECTOR * ROW];
    __shared__ float slopes[VECTOR * ROW];
    __shared__ float staged[3][VECTOR * ROW];
    const Place p = place_of(a, reversed_split(a));
    const int column = own_column(a, p);
    if (column >= 0) {
        const int index = p.group * a.channels + blockIdx.x * p.lanes * VECTOR + column;
        const float inverse = inverse_std(a, index), per_row = 1.0f / (float)a.rows;
        levels[shelf_of(column)] = a.sums[index] * per_row;
        slopes[shelf_of(column)] = a.sums[a.groups * a.channels + index] * per_row * inverse * inverse;
    }
    Affine affine;
    affine.load(a, p, staged);  // waits for all threads
    if (p.channel >= a.channels) return;
    float level[VECTOR], slope[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        level[v] = levels[v * ROW + p.lane];
        slope[v] = slopes[v * ROW + p.lane];
    }
    for (int start = p.slice; start < p.count; start += AHEAD * p.slices) {
        Pair<GATE> pairs[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i * p.slices >= p.count) break;
            pairs[i].load(a, p.offset(a, start + i * p.slices));
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i * p.slices >= p.count) break;
            const long long offset = p.offset(a, start + i * p.slices);
            float deviation[VECTOR], grad[VECTOR];
            pairs[i].take(affine, deviation, grad);
            if constexpr (ADDED) store_pack(a.grad_residual, offset, grad);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v)
                grad[v] = affine.scale[v] * (grad[v] - fmaf(deviation[v], slope[v], level[v]));
            store_pack(a.out, offset, grad);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_input(const Arguments a) {
    backward_input<GATE_NONE, false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_input_recompute(const Arguments a) {
    backward_input<GATE_RECOMPUTE, false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward_input_mask(const Arguments a) {
    backward_input<GATE_MASK, false>(a);
}
// Three blocks a multiprocessor, as the other forms have them: left alone the compiler takes 89 registers on sm_90.
extern "C" __global__ void __launch_bounds__(THREADS, 3) batch_norm_backward_input_mask_added(const Arguments a) {
    backward_input<GATE_MASK, true>(a);
}

// Grid (blocks of 256 channels). Running statistics take a step towards the mean over a view's groups of mean and unbiased
// variance, one view after the other; the arithmetic of `lerp`.
static __device__ __forceinline__ float toward(float from, float to, float share) {
    return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1.0f - share);
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_move_running(const Arguments a) {
    const int c = blockIdx.x * THREADS + threadIdx.x;
    if (c == 0) *a.batches += a.views;
    if (c >= a.channels) return;
    const int per_view = a.groups / a.views;
    const float unbiased = (float)a.rows / (float)(a.rows - 1);
    float mean = a.running_mean[c], variance = a.running_variance[c];
    for (int view = 0; view < a.views; ++view) {
        float mean_sum = 0.0f, variance_sum = 0.0f;
        for (int group = view * per_view; group < (view + 1) * per_view; ++group) {
            mean_sum += a.mean[group * a.channels + c];
            variance_sum += a.variance[group * a.channels + c] * unbiased;
        }
        mean = toward(mean, mean_sum / (float)per_view, a.momentum);
        variance = toward(variance, variance_sum / (float)per_view, a.momentum);
    }
    a.running_mean[c] = mean;
    a.running_variance[c] = variance;
}
