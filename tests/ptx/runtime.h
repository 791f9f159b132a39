// Runs kernels that translate.py made of PTX: the threads of a block are fibers of one OS thread, and every access to
// memory is checked.
//
// What is reported: an access outside the tensors of the launch, outside a shared array or at an address that its size
// does not divide; a byte that two threads touch, one of them writing, with no barrier between them, or two blocks in
// whatever order; shared memory that is read before it was written; threads of a block at different barriers, lanes of
// a warp at different shuffles, and either of them waiting for a thread that has returned; an integer divided by zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <ucontext.h>
#include <vector>

typedef bool pred;
typedef uint8_t u8, b8;
typedef int8_t s8;
typedef uint16_t u16, b16;
typedef int16_t s16;
typedef uint32_t u32, b32;
typedef int32_t s32;
typedef uint64_t u64, b64;
typedef int64_t s64;
typedef float f32;

// --- values: PTX registers have a width, instructions give them a type ----------------------------------------------

template <typename T, typename V> static inline T as(V value) {
    if constexpr (std::is_floating_point_v<T> != std::is_floating_point_v<V>) {
        static_assert(sizeof(T) == sizeof(V), "only the bits are taken over");
        T result;
        memcpy(&result, &value, sizeof result);
        return result;
    } else {
        return static_cast<T>(value);
    }
}
template <typename R, typename V> static inline void set(R& target, V value) { target = as<R>(value); }

static inline f32 fma_down(f32 a, f32 b, f32 c) {
    const double exact = fma((double)a, (double)b, (double)c);
    const f32 nearest = (f32)exact;
    return (double)nearest > exact ? nextafterf(nearest, -INFINITY) : nearest;
}
static inline f32 exp2_flushed(f32 a) {
    const f32 result = exp2f(a);
    return fabsf(result) < 1.17549435e-38f ? 0.0f : result;
}
static inline f32 saturate(f32 a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }  // NaN gives 0
static inline s32 truncated(f32 a) {
    if (a != a) return 0;
    return a >= 2147483648.0f ? INT32_MAX : a <= -2147483648.0f ? INT32_MIN : (s32)a;
}
static inline f32 from_half(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (f32)half;
}
static inline u16 to_half(f32 value) {
    const _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return value != value ? 0x7fff : bits;
}
static inline u16 to_bfloat16(f32 value) {
    const u32 word = as<u32>(value);
    return value != value ? 0x7fff : (u16)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
// Shifts by the width or more give zero, or the sign.
template <typename T> static inline T shift_left(T value, u32 by) { return by < 8 * sizeof(T) ? (T)(value << by) : 0; }
template <typename T> static inline T shift_right(T value, u32 by) {
    return by < 8 * sizeof(T) ? (T)(value >> by) : value < 0 ? (T)-1 : 0;
}
// The lowest `count` bits of `part` from bit `from` of `whole` on; what would lie past bit 31 is dropped.
static inline u32 insert_bits(u32 part, u32 whole, u32 from, u32 count) {
    const u32 from_zero = count > 31 ? ~0u : (1u << count) - 1u, taken = shift_left(from_zero, from);
    return (whole & ~taken) | (shift_left(part, from) & taken);
}
static inline s32 high(s32 a, s32 b) { return (s32)(((s64)a * b) >> 32); }
static inline u32 high(u32 a, u32 b) { return (u32)(((u64)a * b) >> 32); }
static inline s64 wide(s32 a, s32 b) { return (s64)a * b; }
static inline u64 wide(u32 a, u32 b) { return (u64)a * b; }
static inline s32 wide(s16 a, s16 b) { return (s32)a * b; }
static inline u32 wide(u16 a, u16 b) { return (u32)a * b; }

// --- the launch -----------------------------------------------------------------------------------------------------

struct Array {
    const char* name;
    u32 offset, bytes;
};
struct Kernel {
    const char* name;
    void (*run)();
    const Array* arrays;  // in shared memory; the last has 0 bytes where its size comes with the launch
    int array_count;
    u32 shared_bytes, local_bytes, argument_bytes;
};
struct Dim {
    u32 x, y, z;
};
enum State { READY, AT_BARRIER, AT_SHUFFLE, RETURNED };
struct Access {
    int pc;
    u64 at;
    u32 bytes;
    bool in_shared, write;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack, local;
    std::vector<Access> accesses;
    Dim tid;
    State state;
    int pc;
    u32 exchanged;
};

static const char* const* instruction_text;
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int self;
static Dim tid, ntid, ctaid, nctaid;
static const Kernel* kernel;
static const char* arguments;
static std::vector<char> shared_memory;
static std::vector<Array> shared_arrays;
static u32 block, epoch;  // number of the block, and of the stretch between two of its barriers
static bool counting;
static u64 executed;

enum { MOST_REPORTS = 50 };
static long report_count;
static std::string report_text;
static void report(const char* kind, int pc, const char* detail, u64 at) {
    if (++report_count > MOST_REPORTS) return;
    char line[500];
    snprintf(line, sizeof line, "%s: %s, block (%u, %u, %u), thread %d, `%s`: %s, at %llu\n", kind, kernel->name, ctaid.x,
             ctaid.y, ctaid.z, self, instruction_text[pc], detail, (unsigned long long)at);
    report_text += line;
}

// --- races: who touched a byte last ---------------------------------------------------------------------------------

struct Shadow {
    s32 writer = -1, reader = -1;
    u32 write_block = 0, write_epoch = 0, read_block = 0, read_epoch = 0;
    bool several = false, foreign = false;  // readers since the write: of this block, of several blocks
};

static bool after_write(const Shadow& s) {
    return s.writer < 0 || (s.write_block == block && (s.writer == self || s.write_epoch < epoch));
}
static bool after_reads(const Shadow& s) {
    if (s.reader < 0) return true;
    return !s.foreign && s.read_block == block && (s.read_epoch < epoch || (s.reader == self && !s.several));
}
static bool note_read(Shadow& s) {
    const bool fine = after_write(s);
    const bool first = s.reader < 0, same_stretch = s.read_block == block && s.read_epoch == epoch;
    s.foreign |= !first && s.read_block != block;
    s.several = !first && same_stretch && (s.several || s.reader != self);
    s.reader = self, s.read_block = block, s.read_epoch = epoch;
    return fine;
}
static bool note_write(Shadow& s) {
    const bool fine = after_write(s) && after_reads(s);
    s = Shadow();
    s.writer = self, s.write_block = block, s.write_epoch = epoch;
    return fine;
}
static void note(Shadow* shadows, u32 bytes, bool write, int pc, u64 at) {
    bool fine = true;
    for (u32 i = 0; i < bytes; ++i) fine &= write ? note_write(shadows[i]) : note_read(shadows[i]);
    if (!fine) report("race", pc, write ? "written beside another thread" : "read beside another thread's write", at);
}

// --- memory ---------------------------------------------------------------------------------------------------------

struct Tensor {
    u64 bytes;
    std::vector<Shadow> shadows;
};
static std::map<u64, Tensor> tensors;  // by first address
static char nowhere[64];               // where a refused access goes
static std::vector<Shadow> shared_shadows;

static void trace(int pc, u64 at, u32 bytes, bool in_shared, bool write) {
    if (counting) fibers[self].accesses.push_back({pc, at, bytes, in_shared, write});
}
static char* refused() {
    memset(nowhere, 0, sizeof nowhere);
    return nowhere;
}
static char* in_global(u64 at, u32 bytes, bool write, int pc) {
    if (at % bytes) report("alignment", pc, "global memory", at);
    auto next = tensors.upper_bound(at);
    if (next == tensors.begin()) return report("bounds", pc, "before every tensor", at), refused();
    auto& [first, tensor] = *--next;
    if (at + bytes > first + tensor.bytes) return report("bounds", pc, "bytes past a tensor's first", at - first), refused();
    note(&tensor.shadows[at - first], bytes, write, pc, at - first);
    trace(pc, at, bytes, false, write);
    return (char*)at;
}
static char* in_shared(u64 at, u32 bytes, bool write, int pc) {
    if (at % bytes) report("alignment", pc, "shared memory", at);
    const auto holds = [&](const Array& a) { return at >= a.offset && at + bytes <= a.offset + a.bytes; };
    if (std::none_of(shared_arrays.begin(), shared_arrays.end(), holds))
        return report("bounds", pc, "outside the shared arrays", at), refused();
    for (u32 i = 0; !write && i < bytes; ++i)
        if (shared_shadows[at + i].writer < 0) {
            report("uninitialised", pc, "shared memory that no thread of the block has written", at);
            break;
        }
    note(&shared_shadows[at], bytes, write, pc, at);
    trace(pc, at, bytes, true, write);
    return &shared_memory[at];
}
static char* in_local(u64 at, u32 bytes, bool, int pc) {
    std::vector<char>& local = fibers[self].local;
    return at + bytes <= local.size() ? &local[at] : (report("bounds", pc, "local memory", at), refused());
}
static char* in_param(u64 at, u32 bytes, bool, int pc) {
    if (at + bytes <= kernel->argument_bytes) return const_cast<char*>(arguments) + at;
    return report("bounds", pc, "arguments", at), refused();
}
template <typename T> static inline T peek(const char* from, int place) {
    T value;
    memcpy(&value, from + place * sizeof(T), sizeof(T));
    return value;
}
template <typename T> static inline void poke(char* to, int place, T value) {
    memcpy(to + place * sizeof(T), &value, sizeof(T));
}
template <typename T> static inline T quotient(T a, T b, int pc) {
    return b ? a / b : (report("division", pc, "by zero", 0), T(0));
}
template <typename T> static inline T remainder_of(T a, T b, int pc) {
    return b ? a % b : (report("division", pc, "by zero", 0), T(0));
}

// --- threads --------------------------------------------------------------------------------------------------------

static void park(State state, int pc) {
    Fiber& fiber = fibers[self];
    fiber.state = state, fiber.pc = pc;
    swapcontext(&fiber.context, &scheduler);
}
static void barrier(int pc) { park(AT_BARRIER, pc); }
// A shuffle orders no other memory, so it leaves the epoch as it is.
static u32 shuffle(u32 value, u32 lanes, u32 clamp, u32 members, int pc) {
    const int mine = self, other = (mine & ~31) | ((mine & 31) ^ lanes);
    if (members != 0xffffffffu || clamp != 31 || other >= (int)fibers.size())
        report("divergence", pc, "a shuffle of less than a warp", members);
    fibers[mine].exchanged = value;
    park(AT_SHUFFLE, pc);  // all lanes have given theirs
    const u32 taken = fibers[other % fibers.size()].exchanged;
    park(AT_SHUFFLE, pc);  // all lanes have taken it
    return taken;
}
static bool release(int first, int last, State state) {
    for (int i = first; i < last; ++i)
        if (fibers[i].state != state) return false;
    for (int i = first; i < last; ++i) {
        self = i;
        if (fibers[i].pc != fibers[first].pc) report("divergence", fibers[i].pc, "the others wait elsewhere", i);
        fibers[i].state = READY;
    }
    return true;
}
static void fiber_body() {
    kernel->run();
    fibers[self].state = RETURNED;
    swapcontext(&fibers[self].context, &scheduler);
}
static void prepare(Fiber& fiber, int number) {
    fiber.stack.resize(128 * 1024);
    fiber.local.assign(kernel->local_bytes, (char)0xff);
    fiber.accesses.clear();
    fiber.tid = {number % ntid.x, number / ntid.x % ntid.y, number / (ntid.x * ntid.y)};
    fiber.state = READY;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_body, 0);
}
// Every thread that can go on does so until it waits; true if one did.
static bool run_round(bool reversed, int& returned) {
    const int count = fibers.size();
    bool moved = false;
    for (int i = 0; i < count; ++i) {
        const int number = reversed ? count - 1 - i : i;
        if (fibers[number].state != READY) continue;
        self = number, tid = fibers[number].tid;
        swapcontext(&scheduler, &fibers[number].context);
        returned += fibers[number].state == RETURNED;
        moved = true;
    }
    return moved;
}
static bool run_block(bool reversed) {
    const int count = ntid.x * ntid.y * ntid.z;
    fibers.resize(count);
    for (int i = 0; i < count; ++i) prepare(fibers[i], i);
    // Set bits are NaN: what a kernel takes from shared memory without writing it spoils the result as well.
    std::fill(shared_memory.begin(), shared_memory.end(), (char)0xff);
    std::fill(shared_shadows.begin(), shared_shadows.end(), Shadow());
    epoch = 1;
    for (int returned = 0; returned < count;) {
        bool moved = run_round(reversed, returned);
        for (int warp = 0; warp < count; warp += 32) moved |= release(warp, std::min(warp + 32, count), AT_SHUFFLE);
        if (release(0, count, AT_BARRIER)) ++epoch, moved = true;
        if (moved || returned == count) continue;
        for (self = 0; fibers[self].state == RETURNED;) ++self;
        report("divergence", fibers[self].pc, "waits for threads that will not come", returned);
        return false;
    }
    return true;
}

// --- counts: a warp's accesses by one instruction, the n-th of each lane together, as if the warp ran in step ---------

enum Count { LOADS, LOAD_SECTORS, STORES, STORE_SECTORS, BYTES, SHARED, SHARED_PASSES, COUNTS };
static long counts[COUNTS];

static void count_global(const std::vector<Access>& request) {
    std::set<u64> sectors;
    for (const Access& a : request) {
        for (u64 sector = a.at / 32; sector <= (a.at + a.bytes - 1) / 32; ++sector) sectors.insert(sector);
        counts[BYTES] += a.bytes;
    }
    const bool write = request[0].write;
    ++counts[write ? STORES : LOADS];
    counts[write ? STORE_SECTORS : LOAD_SECTORS] += sectors.size();
}
// 32 banks of 4 bytes: a pass serves one word of each, and a request of 8 or 16 bytes a lane takes two or four at least.
static void count_shared(const std::vector<Access>& request) {
    std::map<u64, std::set<u64>> banks;
    size_t most = 1;
    for (const Access& a : request)
        for (u64 word = a.at / 4; word * 4 < a.at + a.bytes; ++word) {
            auto& words = banks[word % 32];
            words.insert(word);
            most = std::max(most, words.size());
        }
    ++counts[SHARED];
    counts[SHARED_PASSES] += most;
}
static void count_warp(int first) {
    std::map<std::pair<int, int>, std::vector<Access>> requests;  // (instruction, n-th time)
    for (int lane = first; lane < std::min(first + 32, (int)fibers.size()); ++lane) {
        std::map<int, int> times;
        for (const Access& a : fibers[lane].accesses) requests[{a.pc, times[a.pc]++}].push_back(a);
    }
    for (const auto& [key, request] : requests) request[0].in_shared ? count_shared(request) : count_global(request);
}

// --- what the tests call --------------------------------------------------------------------------------------------

extern const Kernel kernels[];
extern const int kernel_count;

static void lay_out_shared(u32 dynamic) {
    shared_arrays.assign(kernel->arrays, kernel->arrays + kernel->array_count);
    for (Array& array : shared_arrays)
        if (!array.bytes) array.bytes = dynamic;
    shared_memory.resize(kernel->shared_bytes + dynamic);
    shared_shadows.resize(shared_memory.size());
}

extern "C" void clear_tensors() { tensors.clear(); }
extern "C" void add_tensor(u64 address, u64 bytes) {
    Tensor& tensor = tensors[address];
    tensor.bytes = std::max(tensor.bytes, bytes);
}
extern "C" const char* reports() { return report_text.c_str(); }
extern "C" void start_counting(int on) {
    counting = on, executed = 0;
    std::fill(counts, counts + COUNTS, 0);
}
extern "C" void read_counts(long* into) {
    std::copy(counts, counts + COUNTS, into);
    into[COUNTS] = executed;
}
// Number of reports; -1: there is no such kernel, -2: its arguments have another size.
extern "C" long run_kernel(const char* name, const char* given, u64 bytes, const u32* grid, const u32* threads,
                           u32 dynamic, int reversed) {
    kernel = std::find_if(kernels, kernels + kernel_count, [&](const Kernel& k) { return !strcmp(k.name, name); });
    if (kernel == kernels + kernel_count) return -1;
    if (kernel->argument_bytes != bytes) return -2;
    arguments = given, report_count = 0, report_text.clear();
    nctaid = {grid[0], grid[1], grid[2]}, ntid = {threads[0], threads[1], threads[2]};
    lay_out_shared(dynamic);
    for (auto& [address, tensor] : tensors) tensor.shadows.assign(tensor.bytes, Shadow());
    const u32 total = grid[0] * grid[1] * grid[2];
    for (u32 i = 0; i < total && report_count < MOST_REPORTS; ++i) {
        block = reversed ? total - 1 - i : i;
        ctaid = {block % grid[0], block / grid[0] % grid[1], block / (grid[0] * grid[1])};
        if (!run_block(reversed)) break;
        for (int warp = 0; counting && warp < (int)fibers.size(); warp += 32) count_warp(warp);
    }
    return report_count;
}
