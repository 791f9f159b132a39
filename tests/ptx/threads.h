// Runs a kernel's own source with one thread of the operating system for each CUDA thread, for the sanitizers.
//
// Included before an unchanged source. Blocks run one after another, so that a static array serves as shared memory.
// Barriers are real ones. A shuffle exchanges through relaxed atomics alone: on a GPU it orders no other memory, so it
// must not hide a race from ThreadSanitizer.
#pragma once

#include "launches.h"

#include <atomic>
#include <pthread.h>
#include <sched.h>

static thread_local Index threadIdx, blockIdx, blockDim;
static thread_local int own_number, own_turn;

enum { NEXT_BLOCK = -2, SPINS = 2000000 };
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

template <typename Arguments> static void* run_thread(void* number) {
    own_number = (int)(intptr_t)number, own_turn = 0;
    blockDim = {(unsigned)launch.block[0], (unsigned)launch.block[1], (unsigned)launch.block[2]};
    threadIdx = place(own_number, launch.block);
    Arguments arguments;
    memcpy(&arguments, launch.arguments.data(), sizeof arguments);
    for (int block = 0; block < blocks_of_the_launch(); ++block) {
        blockIdx = place(block, launch.grid);
        // Set bits are NaN: what a kernel takes from there without writing it spoils the result.
        if (own_number == 0) memset(dynamic_shared, 0xff, sizeof dynamic_shared);
        meet(NEXT_BLOCK);
        ((void (*)(Arguments))launch.kernel)(arguments);
        meet(RETURNED);
    }
    return nullptr;
}
// Which thread goes first is the operating system's choice, so there is no reverse of it.
template <typename Arguments> static void run_launch(bool) {
    const int count = threads_of_a_block();
    std::vector<pthread_t> threads(count);
    pthread_barrier_init(&meeting, nullptr, count);
    for (int i = 0; i < count; ++i)
        if (pthread_create(&threads[i], nullptr, run_thread<Arguments>, (void*)(intptr_t)i)) abort();
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
    pthread_barrier_destroy(&meeting);
}
