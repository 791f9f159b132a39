// A CUDA runtime without a GPU: memory is only reserved, kernels are counted and not run, everything else succeeds.
//
// Preloaded before torch, it takes the place of libcudart, libcublas, libcudnn and the driver for all that PyTorch calls.
// The rest of PyTorch is the real one: dispatcher, caching allocator, autograd engine with its thread for the device. So a
// step costs the host what it costs on a GPU, less the time inside those libraries. Values are never computed.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static atomic_ulong launches;
static atomic_ulong handles = 0x1000;

unsigned long idle_launches(void) { return launches; }

int idle_nothing(void) { return 0; }

static int counted(void) {
    launches++;
    return 0;
}

static int new_handle(void** handle) {
    *handle = (void*)(handles += 64);
    return 0;
}

// Aliases, not definitions: the headers declare other arguments, which a function that does nothing never looks at.
#define NOTHING(name) __asm__(".globl " #name "\n.set " #name ", idle_nothing");
#include "nothing.h"  // what PyTorch's libraries call and this file does not define; written by idle_device.py

cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t t) { return counted(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t t) { return counted(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) { return counted(); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
    return counted();
}
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t t) { return counted(); }

// The runtime's own table of kernels would start the real driver.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return 0;
}

// ---- the device: the numbers of an H100, by which PyTorch chooses grids
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, 0; }
cudaError_t cudaGetDevice(int* device) { return *device = 0; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13020, 0; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13020, 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, 0; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { return *can = 0; }
cudaError_t cudaMemGetInfo(size_t* left, size_t* total) { return *left = *total = 1ull << 40, 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "no GPU, kernels that do nothing");
    p->totalGlobalMem = 1ull << 40;
    p->major = 9;
    p->warpSize = 32;
    p->multiProcessorCount = 132;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->l2CacheSize = 50 << 20;
    p->textureAlignment = 512;
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: return *value = 1024, 0;
        case cudaDevAttrMultiProcessorCount: return *value = 132, 0;
        case cudaDevAttrComputeCapabilityMajor: return *value = 9, 0;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = 227 << 10, 0;
        case cudaDevAttrMaxSharedMemoryPerBlock: return *value = 48 << 10, 0;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return *value = 2048, 0;
        case cudaDevAttrWarpSize: return *value = 32, 0;
        // CUB's scans take steps of this size; of size 0 they would never end.
        case cudaDevAttrMaxGridDimX: return *value = 0x7fffffff, 0;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return *value = 65535, 0;
        default: return *value = 0;
    }
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* f, int b, size_t s) {
    return *blocks = 2, 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* f, int b, size_t s, unsigned flags) {
    return *blocks = 2, 0;
}

// ---- memory: addresses of the device are reserved and cannot be touched, so a batch of any size fits
cudaError_t cudaMalloc(void** address, size_t bytes) {
    void* reserved = mmap(0, bytes ? bytes : 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return cudaErrorMemoryAllocation;
    *address = reserved;
    return 0;
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags) {
    return *address = aligned_alloc(4096, (bytes + 4095) & ~4095ul), 0;
}
cudaError_t cudaFreeHost(void* address) { return free(address), 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    return 0;
}

// ---- streams and events
// A capture counts its launches as any other code does; what matters is that a replay is one.
static atomic_int capturing;

static int capture_status(enum cudaStreamCaptureStatus* status) {
    return *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
    return capture_status(status);
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
    if (id) *id = 1;
    return capture_status(status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { return capturing = 1, 0; }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    return capturing = 0, new_handle((void**)graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
    return new_handle((void**)made);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long flags) {
    return new_handle((void**)made);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) { return *count = 1, 0; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return counted(); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) { return *priority = 0; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return new_handle((void**)stream);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return new_handle((void**)stream); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { return new_handle((void**)event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t a, cudaEvent_t b) { return *milliseconds = 1, 0; }

// ---- cuBLAS and cuDNN: handles, one heuristic that serves, and products and convolutions that are counted
int cublasCreate_v2(void** handle) { return new_handle(handle); }
int cublasLtCreate(void** handle) { return new_handle(handle); }
int cublasGetMathMode(void* handle, int* mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void* handle, int* mode) { return *mode = 0; }
int cublasGemmEx(void) { return counted(); }
int cublasGemmStridedBatchedEx(void) { return counted(); }
int cublasSgemm_v2(void) { return counted(); }
int cublasSgemmStridedBatched(void) { return counted(); }
int cublasLtMatmul(void) { return counted(); }
int cublasLtMatmulAlgoGetHeuristic(
    void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference, int wanted, void* results,
    int* count) {
    return *count = 1, 0;
}
int cudnnCreate(void** handle) { return new_handle(handle); }
int cudnnBackendCreateDescriptor(int type, void** descriptor) { return new_handle(descriptor); }
int cudnnBackendGetAttribute(void* descriptor, int name, int type, long long wanted, long long* count, void* out) {
    if (count) *count = 1;
    return 0;
}
int cudnnBackendExecute(void* handle, void* plan, void* pack) { return counted(); }

// ---- the driver, as PyTorch and cuda.bindings reach it
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)0x100, 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDriverGetVersion(int* version) { return *version = 13020, 0; }
int cuModuleLoadData(void** module, const void* image) { return new_handle(module); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return new_handle(function); }
int cuLaunchKernel(
    void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
    void** arguments, void** extra) {
    return counted();
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* found) {
    char versioned[200];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, versioned);
    if (!*function) *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void*)idle_nothing;
    if (found) *found = 0;
    return 0;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult* found) {
    return *function = (void*)idle_nothing, *found = 0;
}
