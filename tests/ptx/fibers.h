// Runs a kernel's own source with a fiber for each CUDA thread, which ThreadSanitizer takes for a thread of its own.
//
// Included before an unchanged source, in place of `threads.h`: hundreds of threads of the operating system that wait for
// each other cost a second or more for a block, fibers a few milliseconds. They run in turn, each until it waits, in the
// order of their numbers or against it. ThreadSanitizer keeps a clock for each, which a switch leaves as it is and only
// barriers move, so it finds two accesses with no barrier between them although they never happen at once. Blocks run
// one after another, so that a static array serves as shared memory.
#pragma once

#include "launches.h"

#include <ucontext.h>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
// The scheduler's own data move between fibers with no barrier, so it must not be looked at.
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))
static UNSEEN void* new_clock() { return __tsan_create_fiber(0); }
static UNSEEN void* present_clock() { return __tsan_get_current_fiber(); }
#define SWITCH_CLOCK(to) __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync)
static UNSEEN void give_clock(char* to) { __tsan_release(to); }
static UNSEEN void take_clock(char* from) { __tsan_acquire(from); }
#else
#define UNSEEN
static void* new_clock() { return nullptr; }
static void* present_clock() { return nullptr; }
#define SWITCH_CLOCK(to)
static void give_clock(char*) {}
static void take_clock(char*) {}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define LEAVE_STACK(kept, to) __sanitizer_start_switch_fiber(&(kept), (to).stack, (to).stack_bytes)
#define ENTER_STACK(kept, from) __sanitizer_finish_switch_fiber(kept, &(from).stack, &(from).stack_bytes)
#else
#define LEAVE_STACK(kept, to)
#define ENTER_STACK(kept, from)
#endif

enum State { READY, AT_BARRIER, AT_SHUFFLE, AT_END };
enum { STACK = 256 * 1024 };
struct Fiber {
    ucontext_t context;
    const void* stack;
    size_t stack_bytes;
    void* clock;  // ThreadSanitizer's
    Index index;
    State state;
    int line, turns;
    float given;
};
static Fiber fibers[MOST_THREADS], scheduler;
static int self, made;
static Index the_block, block_size;
static bool backwards;
static char start, finish, meetings[2];  // addresses at which clocks meet

static UNSEEN const Index& own_index() { return fibers[self].index; }
#define threadIdx own_index()
#define blockIdx the_block
#define blockDim block_size

static UNSEEN void go(Fiber& from, Fiber& to) {
    void* kept = nullptr;
    SWITCH_CLOCK(to.clock);
    LEAVE_STACK(kept, to);
    swapcontext(&from.context, &to.context);
    ENTER_STACK(kept, to);
}
static UNSEEN void park(State state, int line) {
    Fiber& fiber = fibers[self];
    fiber.state = state, fiber.line = line;
    go(fiber, scheduler);
}
// Two addresses take turns: a fiber that goes on late must not meet the clock of one that already waits again.
static UNSEEN void meet(int line) {
    char* const place = &meetings[fibers[self].turns++ % 2];
    give_clock(place);
    park(AT_BARRIER, line);
    take_clock(place);
}
#define __syncthreads() meet(__LINE__)

// A shuffle orders no other memory on a GPU, so no clocks meet in it.
static UNSEEN float __shfl_xor_sync(unsigned, float value, int lanes) {
    Fiber& fiber = fibers[self];
    fiber.given = value;
    park(AT_SHUFFLE, 0);  // every lane has given its value
    const float taken = fibers[self ^ lanes].given;
    park(AT_SHUFFLE, 0);  // every lane has taken one
    return taken;
}

template <typename Arguments> static void run_block_of_a_fiber() {
    Arguments arguments;
    memcpy(&arguments, launch.arguments.data(), sizeof arguments);
    ((void (*)(Arguments))launch.kernel)(arguments);
}
// A fiber lives as long as the program and runs its thread of one block after another.
template <typename Arguments> static UNSEEN void fiber_body() {
    ENTER_STACK(nullptr, scheduler);
    for (;;) {
        take_clock(&start);
        run_block_of_a_fiber<Arguments>();
        give_clock(&finish);
        park(AT_END, RETURNED);
    }
}
template <typename Arguments> static UNSEEN void make_fibers(int count) {
    scheduler.clock = present_clock();
    for (; made < count; ++made) {
        Fiber& fiber = fibers[made];
        fiber.stack = malloc(STACK), fiber.stack_bytes = STACK;
        fiber.clock = new_clock();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = (void*)fiber.stack, fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, fiber_body<Arguments>, 0);
        // AddressSanitizer would take a stack of this size for unused at each switch, and forget its arrays' ends.
        fiber.context.uc_stack.ss_size = 0;
    }
}

static UNSEEN void divergence(int number, const char* what) {
    fprintf(stderr, "divergence: thread %d, at line %d, %s\n", number, fibers[number].line, what);
    _Exit(3);
}
// Lets the fibers [first, last) go on if all of them wait in `state`; true if they do.
static UNSEEN bool release(int first, int last, State state) {
    for (int i = first; i < last; ++i)
        if (fibers[i].state != state) return false;
    for (int i = first; i < last; ++i) {
        if (fibers[i].line != fibers[first].line) divergence(i, "waits at another barrier than thread 0");
        fibers[i].state = READY;
    }
    return true;
}
static UNSEEN bool run_round(int count) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
        self = backwards ? count - 1 - i : i;
        if (fibers[self].state != READY) continue;
        go(scheduler, fibers[self]);
        moved = true;
    }
    return moved;
}
static UNSEEN void run_block(int count) {
    for (int i = 0; i < count; ++i) fibers[i].state = READY, fibers[i].turns = 0;
    // Set bits are NaN: what a kernel takes from there without writing it spoils the result.
    memset(dynamic_shared, 0xff, sizeof dynamic_shared);
    give_clock(&start);
    for (;;) {
        bool moved = run_round(count);
        for (int warp = 0; warp < count; warp += 32) moved |= release(warp, min(warp + 32, count), AT_SHUFFLE);
        if (release(0, count, AT_END)) break;
        if (release(0, count, AT_BARRIER) || moved) continue;
        for (self = 0; fibers[self].state == AT_END;) ++self;
        divergence(self, "waits for threads that will not come");
    }
    take_clock(&finish);  // the scheduler goes on behind all that the block did
}
template <typename Arguments> static void run_launch(bool in_reverse) {
    backwards = in_reverse;
    const int count = threads_of_a_block(), blocks = blocks_of_the_launch();
    block_size = {(unsigned)launch.block[0], (unsigned)launch.block[1], (unsigned)launch.block[2]};
    make_fibers<Arguments>(count);
    for (int i = 0; i < count; ++i) fibers[i].index = place(i, launch.block);
    for (int i = 0; i < blocks; ++i) {
        the_block = place(backwards ? blocks - 1 - i : i, launch.grid);
        run_block(count);
    }
}
