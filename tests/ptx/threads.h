// Runs a kernel's own source with one thread of the operating system for each CUDA thread, for the sanitizers.
//
// Included before an unchanged source. Blocks run one after another, so that a static array serves as shared memory; it
// is filled with NaN before each. Barriers are real ones. A shuffle exchanges through relaxed atomics alone: on a GPU
// it orders no other memory, so it must not hide a race from ThreadSanitizer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <pthread.h>
#include <sched.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct Index {
    unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx, blockDim;
static thread_local int own_number, own_turn;

static inline float __uint_as_float(unsigned word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned word;
    memcpy(&word, &value, 4);
    return word;
}
static inline float shim_half_to_float(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
static inline unsigned short shim_float_to_half(float value) {
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

enum { MOST_THREADS = 1024, RETURNED = -1, NEXT_BLOCK = -2, SPINS = 2000000 };
static pthread_barrier_t meeting;
static std::atomic<int> places[2][MOST_THREADS];

// All threads of the block meet here; each says from which line it came, and the lines must be one. The two halves of
// `places` take turns, so that none is overwritten before all have read it.
static void meet(int line) {
    std::atomic<int>* const said = places[own_turn++ % 2];
    said[own_number].store(line, std::memory_order_relaxed);
    pthread_barrier_wait(&meeting);
    const int other = said[0].load(std::memory_order_relaxed);
    if (other == line) return;
    fprintf(stderr, "divergence: thread %d waits at line %d, thread 0 at %d (%d: it returned)\n", own_number, line, other,
            RETURNED);
    _Exit(3);
}
#define __syncthreads() meet(__LINE__)

struct Warp {
    std::atomic<int> arrived, round;
    std::atomic<unsigned> slot[32];
};
static Warp warps[MOST_THREADS / 32];
static void meet_warp(Warp& warp) {
    const int round = warp.round.load(std::memory_order_relaxed);
    if (warp.arrived.fetch_add(1, std::memory_order_relaxed) == 31) {
        warp.arrived.store(0, std::memory_order_relaxed);
        warp.round.store(round + 1, std::memory_order_relaxed);
        return;
    }
    for (long spins = 0; warp.round.load(std::memory_order_relaxed) == round; ++spins) {
        sched_yield();
        if (spins < SPINS) continue;
        fprintf(stderr, "divergence: lanes are missing from a shuffle of thread %d\n", own_number);
        _Exit(3);
    }
}
static inline float __shfl_xor_sync(unsigned, float value, int lanes) {
    Warp& warp = warps[own_number / 32];
    warp.slot[own_number % 32].store(__float_as_uint(value), std::memory_order_relaxed);
    meet_warp(warp);
    const float taken = __uint_as_float(warp.slot[(own_number % 32) ^ lanes].load(std::memory_order_relaxed));
    meet_warp(warp);
    return taken;
}

static float dynamic_shared[64 * 1024 / 4];

// --- a recorded launch, read back and run ---------------------------------------------------------------------------

struct Tensor {
    std::vector<int64_t> fields;  // where its address stands in the arguments
    char* memory;                 // of exactly its size, so that AddressSanitizer guards both ends
    std::vector<char> after;
};
struct Launch {
    void* kernel;
    std::vector<char> arguments;
    std::vector<Tensor> tensors;
    int64_t grid[3], block[3];
};
static Launch launch;

static int64_t read_number(FILE* file) {
    int64_t value;
    if (fread(&value, sizeof value, 1, file) != 1) abort();
    return value;
}
static std::vector<char> read_bytes(FILE* file) {
    std::vector<char> bytes(read_number(file));
    if (fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) abort();
    return bytes;
}
static Tensor read_tensor(FILE* file) {
    Tensor tensor;
    for (int64_t i = read_number(file); i > 0; --i) tensor.fields.push_back(read_number(file));
    const std::vector<char> before = read_bytes(file);
    tensor.memory = (char*)malloc(before.size());
    std::copy(before.begin(), before.end(), tensor.memory);
    tensor.after = read_bytes(file);
    for (int64_t field : tensor.fields) memcpy(&launch.arguments[field], &tensor.memory, sizeof tensor.memory);
    return tensor;
}

template <typename Arguments> static void* run_thread(void* number) {
    own_number = (int)(intptr_t)number, own_turn = 0;
    blockDim = {(unsigned)launch.block[0], (unsigned)launch.block[1], (unsigned)launch.block[2]};
    threadIdx = {own_number % blockDim.x, own_number / blockDim.x % blockDim.y, own_number / (blockDim.x * blockDim.y)};
    Arguments arguments;
    memcpy(&arguments, launch.arguments.data(), sizeof arguments);
    for (int64_t at = 0; at < launch.grid[0] * launch.grid[1] * launch.grid[2]; ++at) {
        blockIdx = {unsigned(at % launch.grid[0]), unsigned(at / launch.grid[0] % launch.grid[1]),
                    unsigned(at / (launch.grid[0] * launch.grid[1]))};
        if (own_number == 0) memset(dynamic_shared, 0xff, sizeof dynamic_shared);
        meet(NEXT_BLOCK);
        ((void (*)(Arguments))launch.kernel)(arguments);
        meet(RETURNED);
    }
    return nullptr;
}
template <typename Arguments> static void run_launch() {
    const int count = launch.block[0] * launch.block[1] * launch.block[2];
    std::vector<pthread_t> threads(count);
    pthread_barrier_init(&meeting, nullptr, count);
    for (int i = 0; i < count; ++i)
        if (pthread_create(&threads[i], nullptr, run_thread<Arguments>, (void*)(intptr_t)i)) abort();
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
    pthread_barrier_destroy(&meeting);
}
// Runs every launch of a file; the number of tensors whose bytes are not those of the recording.
template <typename Arguments> static int replay(const char* path, void* (*find)(const char*)) {
    FILE* file = fopen(path, "rb");
    if (!file) abort();
    int different = 0;
    for (int64_t left = read_number(file); left > 0; --left) {
        launch = Launch();
        std::vector<char> name = read_bytes(file);
        name.push_back(0);
        launch.kernel = find(name.data());
        for (int64_t& size : launch.grid) size = read_number(file);
        for (int64_t& size : launch.block) size = read_number(file);
        launch.arguments = read_bytes(file);
        for (int64_t i = read_number(file); i > 0; --i) launch.tensors.push_back(read_tensor(file));
        run_launch<Arguments>();
        for (Tensor& tensor : launch.tensors) {
            different += memcmp(tensor.memory, tensor.after.data(), tensor.after.size()) != 0;
            free(tensor.memory);
        }
    }
    fclose(file);
    return different;
}
