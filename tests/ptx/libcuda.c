// A CUDA driver without a GPU, for tests of the launcher: it runs no kernel, it refuses what a real driver refuses.
//
// A launch is refused without a current context, in another context than the module's, with a grid or block beyond the
// limits, with more dynamic shared memory than was asked for, and with arguments of another size than the kernel's. The
// size comes from the cubin itself (its .nv.info sections), as a driver has it. A real driver cannot see how long the
// structure behind a pointer is and reads past a short one; here the test tells it, with `stub_offer`.
//
// Contexts are per thread, as the driver has them: a new thread has none.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };
enum { DEVICES = 2, DEPTH = 16, MODULES = 64, KERNELS = 16, LAUNCHES = 256, ARGUMENT_BYTES = 512, NAME = 64 };
enum { MAX_THREADS = 1024, SHARED_UNASKED = 48 * 1024, MAX_SHARED = 163 * 1024, GRID_Y_Z = 65535 };
enum { DYNAMIC_SHARED_ATTRIBUTE = 8 };

typedef struct { int device; } Context;
typedef struct Module Module;
typedef struct {
    Module* module;
    char name[NAME];
    unsigned argument_bytes, static_shared, dynamic_shared;
} Function;
struct Module {
    Context* context;
    Function functions[KERNELS];
    int count;
};
typedef struct {
    char kernel[NAME];
    unsigned grid[3], block[3], shared, bytes;
    void* stream;
    unsigned char arguments[ARGUMENT_BYTES];
} Launch;

static Context primary[DEVICES] = {{0}, {1}};
static Module modules[MODULES];
static int module_count, launch_count;
static Launch launches[LAUNCHES];
static _Thread_local Context* stack[DEPTH];
static _Thread_local int depth;
static _Thread_local char reason[200];
static _Thread_local const void* offered;
static _Thread_local size_t offered_bytes;

static int refuse(int status, const char* why) {
    snprintf(reason, sizeof reason, "%s", why);
    return status;
}

// What the tests ask.
const char* stub_reason(void) { return reason; }
int stub_launch_count(void) { return launch_count; }
const Launch* stub_launch(int number) { return &launches[number]; }
void stub_offer(const void* arguments, size_t bytes) { offered = arguments, offered_bytes = bytes; }

// NVRTC looks for a driver and calls these two of it, without a look whether they are there.
int cuGetExportTable(const void** table, const void* id) {
    (void)id;
    return *table = NULL, refuse(NOT_FOUND, "the stub exports no table");
}
int cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
int cuDriverGetVersion(int* version) { return *version = 13020, OK; }
int cuDeviceGetCount(int* count) { return *count = DEVICES, OK; }
int cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || ordinal >= DEVICES) return refuse(101, "no such device");
    return *device = ordinal, OK;
}

int cuDevicePrimaryCtxRetain(Context** context, int device) { return *context = &primary[device], OK; }
int cuCtxGetCurrent(Context** context) { return *context = depth ? stack[depth - 1] : NULL, OK; }
int cuCtxPushCurrent_v2(Context* context) {
    if (!context || depth == DEPTH) return refuse(INVALID_CONTEXT, "no context to push");
    return stack[depth++] = context, OK;
}
int cuCtxPopCurrent_v2(Context** context) {
    if (!depth) return refuse(INVALID_CONTEXT, "no context to pop");
    Context* top = stack[--depth];
    if (context) *context = top;
    return OK;
}
// Replaces the top of the thread's stack; null takes it away.
int cuCtxSetCurrent(Context* context) {
    if (depth) --depth;
    return context ? cuCtxPushCurrent_v2(context) : OK;
}

static Function* find(Module* module, const char* name) {
    for (int i = 0; i < module->count; ++i)
        if (!strcmp(module->functions[i].name, name)) return &module->functions[i];
    return NULL;
}

// A section `.nv.info.KERNEL`: attributes of a format byte, a kind byte and 16 bits, which are a value or, for format 4,
// the length of what follows. Kind 0x19 is the size of the kernel's parameters.
static unsigned argument_bytes_of(const unsigned char* info, size_t length) {
    for (size_t at = 0; at + 4 <= length;) {
        const unsigned format = info[at], kind = info[at + 1], value = info[at + 2] | info[at + 3] << 8;
        if (kind == 0x19) return value;
        at += 4 + (format == 4 ? value : 0);
    }
    return 0;
}

int cuModuleLoadData(Module** result, const void* image) {
    if (!depth) return refuse(INVALID_CONTEXT, "a module is loaded without a current context");
    const unsigned char* base = image;
    const Elf64_Ehdr* header = image;
    if (memcmp(base, ELFMAG, SELFMAG) || module_count == MODULES) return refuse(INVALID_IMAGE, "no cubin");
    Module* module = &modules[module_count++];
    module->context = stack[depth - 1];
    const Elf64_Shdr* sections = (const Elf64_Shdr*)(base + header->e_shoff);
    const char* names = (const char*)base + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; ++i) {
        const char* name = names + sections[i].sh_name;
        if (strncmp(name, ".nv.info.", 9) || module->count == KERNELS) continue;
        Function* function = &module->functions[module->count++];
        snprintf(function->name, NAME, "%s", name + 9);
        function->module = module;
        function->dynamic_shared = SHARED_UNASKED;
        function->argument_bytes = argument_bytes_of(base + sections[i].sh_offset, sections[i].sh_size);
    }
    // Only now is every kernel known, whatever the order of the sections.
    for (int i = 0; i < header->e_shnum; ++i) {
        const char* name = names + sections[i].sh_name;
        Function* function = strncmp(name, ".nv.shared.", 11) ? NULL : find(module, name + 11);
        if (function) function->static_shared = sections[i].sh_size;
    }
    return *result = module, OK;
}

int cuModuleGetFunction(Function** result, Module* module, const char* name) {
    *result = find(module, name);
    return *result ? OK : refuse(NOT_FOUND, "no such kernel in the module");
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != DYNAMIC_SHARED_ATTRIBUTE || value < 0 || value + function->static_shared > MAX_SHARED)
        return refuse(INVALID_VALUE, "an attribute that the function cannot have");
    function->dynamic_shared = value > SHARED_UNASKED ? value : SHARED_UNASKED;
    return OK;
}

static int in_limits(const unsigned* grid, const unsigned* block) {
    for (int i = 0; i < 3; ++i)
        if (!grid[i] || !block[i] || (i && grid[i] > GRID_Y_Z) || block[i] > MAX_THREADS) return 0;
    return grid[0] <= 0x7fffffff && block[0] * block[1] * block[2] <= MAX_THREADS;
}

int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    Launch launch = {.grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared, .stream = stream};
    if (!depth) return refuse(INVALID_CONTEXT, "no context is current in this thread");
    if (stack[depth - 1] != function->module->context) return refuse(INVALID_HANDLE, "the module is another context's");
    if (!in_limits(launch.grid, launch.block)) return refuse(INVALID_VALUE, "grid or block beyond the limits");
    if (shared + function->static_shared > function->dynamic_shared)
        return refuse(INVALID_VALUE, "more shared memory than was asked for");
    if (extra || !arguments || arguments[0] != offered) return refuse(INVALID_VALUE, "arguments of unknown size");
    if (offered_bytes != function->argument_bytes) return refuse(INVALID_VALUE, "arguments of the wrong size");
    if (launch_count == LAUNCHES || offered_bytes > ARGUMENT_BYTES) return refuse(INVALID_VALUE, "the stub is full");
    snprintf(launch.kernel, NAME, "%s", function->name);
    launch.bytes = offered_bytes;
    memcpy(launch.arguments, offered, offered_bytes);
    launches[launch_count++] = launch;
    return OK;
}

static int missing(void) { return refuse(801, "the stub has no such entry point"); }

// Entry points are asked for by their plain names; some are exported under a later version's.
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
    Dl_info own;
    char later[100];
    (void)version, (void)flags;
    dladdr((void*)cuInit, &own);
    void* library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    snprintf(later, sizeof later, "%s_v2", name);
    void* found = dlsym(library, later);
    if (!found) found = dlsym(library, name);
    *function = found ? found : (void*)missing;
    if (status) *status = 0;
    return OK;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
