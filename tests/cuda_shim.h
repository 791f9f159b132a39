// Lets a C++ compiler build a CUDA source as it stands and runs its threads on the CPU, for tests.
//
// The threads of a block are fibers of one OS thread, run in turn; blocks run one after another, so that a static
// variable serves as shared memory. A barrier or shuffle parks a fiber until every fiber that takes part has come.
#pragma once

#include "cuda_source.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

struct ShimIndex {
    int x, y, z;
};
static ShimIndex threadIdx, blockIdx, blockDim;

enum ShimState { READY, AT_BARRIER, AT_WARP, DONE };
struct ShimFiber {
    ucontext_t context;
    std::vector<char> stack;
    ShimIndex index;
    ShimState state;
    float slot;
};
static std::vector<ShimFiber> shim_fibers;
static ucontext_t shim_scheduler;
static int shim_current;

static void shim_park(ShimState state) {
    ShimFiber& fiber = shim_fibers[shim_current];
    fiber.state = state;
    swapcontext(&fiber.context, &shim_scheduler);
}
static inline void __syncthreads() { shim_park(AT_BARRIER); }

static inline float __shfl_xor_sync(unsigned int, float value, int mask) {
    const int self = shim_current;
    shim_fibers[self].slot = value;
    shim_park(AT_WARP);  // every lane has written
    const float other = shim_fibers[self ^ mask].slot;
    shim_park(AT_WARP);  // every lane has read
    return other;
}

// Wakes the fibers [first, last) if all of them wait in `state`; a finished fiber among waiting ones is a kernel's bug.
static bool shim_release(int first, int last, ShimState state) {
    for (int i = first; i < last; ++i)
        if (shim_fibers[i].state != state) return false;
    for (int i = first; i < last; ++i) shim_fibers[i].state = READY;
    return true;
}

static void shim_run_block(void (*body)()) {
    const int count = blockDim.x * blockDim.y * blockDim.z;
    shim_fibers.resize(count);
    for (int i = 0; i < count; ++i) {
        ShimFiber& fiber = shim_fibers[i];
        fiber.stack.resize(64 * 1024);
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        fiber.state = READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &shim_scheduler;
        makecontext(&fiber.context, body, 0);
    }
    for (int done = 0; done < count;) {
        bool moved = false;
        for (int i = 0; i < count; ++i) {
            if (shim_fibers[i].state != READY) continue;
            shim_current = i;
            threadIdx = shim_fibers[i].index;
            shim_fibers[i].state = DONE;  // unless it parks
            swapcontext(&shim_scheduler, &shim_fibers[i].context);
            done += shim_fibers[i].state == DONE;
            moved = true;
        }
        for (int warp = 0; warp < count; warp += 32) moved |= shim_release(warp, warp + 32 < count ? warp + 32 : count, AT_WARP);
        moved |= shim_release(0, count, AT_BARRIER);
        if (!moved && done < count) {
            std::fprintf(stderr, "cuda_shim: threads wait for others that will not come\n");
            std::abort();
        }
    }
}

template <typename Arguments>
struct ShimLaunch {
    static inline void (*kernel)(Arguments);
    static inline Arguments arguments;
    static void body() { kernel(arguments); }
    static void run(void (*function)(Arguments), const Arguments& given, const int* grid, const int* block) {
        kernel = function;
        arguments = given;
        blockDim = {block[0], block[1], block[2]};
        for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
            for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) shim_run_block(&body);
    }
};
