// What the pooling kernels share: the shape of a block, and sums over its slices.
//
// A block is LANES x SLICES threads: lanes walk along the channels, which are contiguous, so that a warp reads one
// run of memory; slices share out the positions, so that enough loads are under way to fill the memory system.

#define LANES 32
#define SLICES 8
#define THREADS (LANES * SLICES)
#define STRIDE (LANES + LANES / VECTOR)  // spreads the columns that consecutive channels read over the banks
#define MAX_POSITIONS 1024

static __device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// Sum over the slices of a block what each thread holds for its VECTOR channels; `column` runs over LANES * VECTOR.
static __device__ __forceinline__ void share(float* part, int lane, int slice, const float* values) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) part[(slice * VECTOR + v) * STRIDE + lane] = values[v];
}

static __device__ __forceinline__ float collect(const float* part, int column) {
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice)
        sum += part[(slice * VECTOR + column % VECTOR) * STRIDE + column / VECTOR];
    return sum;
}
