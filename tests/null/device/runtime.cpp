// A CUDA runtime, cuBLAS and cuBLASLt that accept every call and compute nothing: an "H100" for dry runs without one.
//
// Preloaded before torch. Real: device memory (mapped, never touched by kernels; its size is a limit), copies that
// start or end on the host, the order of calls. Counted: launches by kernel, copies by kind, synchronizations, FLOPs of
// matrix products. Missing: values, time on the device, cuDNN, CUDA graphs, a second device.
//
// NULL_GPU_GIB   memory of the device (default 79.11)
// null_reset, null_flops, null_launches, null_syncs, null_dump(path): the counters, through ctypes
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Areas = std::map<char*, size_t>;  // start -> bytes

const size_t CONTEXT_BYTES = 500ul << 20;  // outside PyTorch's allocator
const size_t GUARD_BYTES = 4096;
const int NUM_SMS = 132;

// never destroyed: libraries make calls until the very end of the process
struct State {
  std::recursive_mutex mutex;
  Areas device, host, managed;
  std::map<unsigned long long, size_t> handles;  // physical memory of the virtual-memory calls
  std::unordered_map<const void*, std::string> kernels;
  std::unordered_map<std::string, long> counts;
  size_t used = 0;
  long launches = 0, syncs = 0;
  double flops = 0;
};

State& state() {
  static State* one = new State;
  return *one;
}

#define LOCK std::lock_guard<std::recursive_mutex> guard(state().mutex)

size_t total_bytes() {
  static const char* given = getenv("NULL_GPU_GIB");
  static size_t bytes = (size_t)((given ? atof(given) : 79.11) * (1ul << 30));
  return bytes;
}

bool has_room(size_t bytes) { return state().used + bytes + CONTEXT_BYTES <= total_bytes(); }

bool is_in(const Areas& areas, const void* pointer) {
  auto after = areas.upper_bound((char*)pointer);
  if (after == areas.begin()) return false;
  --after;
  return (char*)pointer < after->first + after->second;
}

void* map_area(size_t bytes) {
  void* area = mmap(nullptr, bytes + GUARD_BYTES, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return area == MAP_FAILED ? nullptr : area;
}

cudaError_t allocate(Areas& areas, void** pointer, size_t bytes) {
  *pointer = map_area(bytes);
  if (!*pointer) return cudaErrorMemoryAllocation;
  areas[(char*)*pointer] = bytes;
  return cudaSuccess;
}

// Bytes that were freed; 0 for a pointer outside these areas.
size_t release(Areas& areas, void* pointer) {
  auto area = areas.find((char*)pointer);
  if (area == areas.end()) return 0;
  size_t bytes = area->second;
  munmap(pointer, bytes + GUARD_BYTES);
  areas.erase(area);
  return bytes;
}

void count(const std::string& name) { state().counts[name]++; }

void count_sync(const char* name) {
  LOCK;
  state().syncs++;
  count(name);
}

std::string place(const void* pointer) {
  State& now = state();
  return is_in(now.device, pointer) ? "d" : is_in(now.host, pointer) ? "pinned" : "pageable";
}

// Device-to-device copies move nothing: device memory has no values.
void move(void* to, const void* from, size_t bytes) {
  if (!(is_in(state().device, to) && is_in(state().device, from))) memcpy(to, from, bytes);
}

double milliseconds() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

cudaError_t launch(const void* function) {
  LOCK;
  State& now = state();
  now.launches++;
  auto found = now.kernels.find(function);
  count(found == now.kernels.end() ? "unknown kernel" : found->second);
  return cudaSuccess;
}

cublasStatus_t product(const std::string& name, double flops) {
  LOCK;
  state().launches++;
  state().flops += flops;
  count(name);
  return CUBLAS_STATUS_SUCCESS;
}

// --- the driver's virtual memory, used by expandable segments ---

int reserve_address(unsigned long long* address, size_t bytes, size_t, unsigned long long, unsigned long long) {
  *address = (unsigned long long)map_area(bytes);
  return *address ? 0 : 2;
}
int free_address(unsigned long long address, size_t bytes) { return munmap((void*)address, bytes + GUARD_BYTES), 0; }
int create_memory(unsigned long long* handle, size_t bytes, const void*, unsigned long long) {
  LOCK;
  if (!has_room(bytes)) return 2;
  static unsigned long long next = 1;
  *handle = next++;
  state().handles[*handle] = bytes;
  state().used += bytes;
  return 0;
}
int release_memory(unsigned long long handle) {
  LOCK;
  state().used -= state().handles[handle];
  state().handles.erase(handle);
  return 0;
}
int map_memory(unsigned long long address, size_t bytes, size_t, unsigned long long, unsigned long long) {
  LOCK;
  state().device[(char*)address] = bytes;
  return 0;
}
int unmap_memory(unsigned long long address, size_t) {
  LOCK;
  state().device.erase((char*)address);
  return 0;
}
int set_access(unsigned long long, size_t, const void*, size_t) { return 0; }
int get_granularity(size_t* bytes, const void*, int) { return *bytes = 2 << 20, 0; }
int get_error_string(int, const char** text) { return *text = "null device", 0; }
int get_device(int* device, int) { return *device = 0, 0; }
int get_attribute(int* value, int, int) { return *value = 1, 0; }
int accept() { return 0; }

const std::unordered_map<std::string, void*> DRIVER = {
    {"cuMemAddressReserve", (void*)reserve_address},
    {"cuMemAddressFree", (void*)free_address},
    {"cuMemCreate", (void*)create_memory},
    {"cuMemRelease", (void*)release_memory},
    {"cuMemMap", (void*)map_memory},
    {"cuMemUnmap", (void*)unmap_memory},
    {"cuMemSetAccess", (void*)set_access},
    {"cuMemGetAllocationGranularity", (void*)get_granularity},
    {"cuGetErrorString", (void*)get_error_string},
    {"cuDeviceGet", (void*)get_device},
    {"cuDeviceGetAttribute", (void*)get_attribute},
};

}  // namespace

// --- device ---

EXPORT cudaError_t cudaGetDeviceCount(int* number) { return *number = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::unordered_map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMultiProcessorCount, NUM_SMS},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
  };
  auto found = known.find((int)attribute);
  *value = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* facts, int) {
  memset(facts, 0, sizeof *facts);
  strcpy(facts->name, "NVIDIA H100 80GB HBM3 (null)");
  facts->totalGlobalMem = total_bytes();
  facts->sharedMemPerBlock = 49152;
  facts->regsPerBlock = facts->regsPerMultiprocessor = 65536;
  facts->warpSize = 32;
  facts->maxThreadsPerBlock = facts->maxThreadsDim[0] = facts->maxThreadsDim[1] = 1024;
  facts->maxThreadsDim[2] = 64;
  facts->maxGridSize[0] = 2147483647;
  facts->maxGridSize[1] = facts->maxGridSize[2] = 65535;
  facts->major = 9;
  facts->multiProcessorCount = NUM_SMS;
  facts->maxThreadsPerMultiProcessor = 2048;
  facts->maxBlocksPerMultiProcessor = 32;
  facts->sharedMemPerMultiprocessor = 233472;
  facts->sharedMemPerBlockOptin = 232448;
  facts->l2CacheSize = 50 << 20;
  facts->memoryBusWidth = 5120;
  facts->concurrentKernels = facts->managedMemory = facts->concurrentManagedAccess = facts->unifiedAddressing = 1;
  facts->textureAlignment = 512;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) {
  return snprintf(text, length, "0000:01:00.0"), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() { return count_sync("device synchronize"), cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaGetLastError() { return cudaSuccess; }
EXPORT cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  auto found = DRIVER.find(name);
  *function = found == DRIVER.end() ? (void*)accept : found->second;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// --- memory ---

EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  LOCK;
  *pointer = nullptr;
  if (!has_room(bytes)) return cudaErrorMemoryAllocation;
  cudaError_t result = allocate(state().device, pointer, bytes);
  if (result == cudaSuccess) state().used += bytes;
  return result;
}
EXPORT cudaError_t cudaFree(void* pointer) {
  LOCK;
  state().used -= release(state().device, pointer);
  release(state().managed, pointer);  // not counted: it may be on the host
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  LOCK;
  return allocate(state().managed, pointer, bytes);
}
EXPORT cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  LOCK;
  return allocate(state().host, pointer, bytes);
}
EXPORT cudaError_t cudaFreeHost(void* pointer) {
  LOCK;
  release(state().host, pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  LOCK;
  *total = total_bytes();
  *free = *total - state().used - CONTEXT_BYTES;
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* facts, const void* pointer) {
  LOCK;
  memset(facts, 0, sizeof *facts);
  facts->type = is_in(state().device, pointer)    ? cudaMemoryTypeDevice
                : is_in(state().managed, pointer) ? cudaMemoryTypeManaged
                : is_in(state().host, pointer)    ? cudaMemoryTypeHost
                                                  : cudaMemoryTypeUnregistered;
  facts->devicePointer = facts->hostPointer = (void*)pointer;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  LOCK;
  count_sync("memcpy synchronize");
  move(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  LOCK;
  count("memcpy " + place(from) + "->" + place(to));
  move(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind, cudaStream_t) {
  LOCK;
  count("memcpy " + place(from) + "->" + place(to));
  for (size_t row = 0; row < height; row++) move((char*)to + row * to_pitch, (char*)from + row * from_pitch, width);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void*, int, size_t) { return cudaSuccess; }
EXPORT cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
  LOCK;
  count("memset");
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char anything[1 << 20];
  return *pointer = anything, cudaSuccess;
}

// --- streams and events ---

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  LOCK;
  static long next = 0x1000;
  return *stream = (cudaStream_t)(next += 16), cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return count_sync("stream synchronize"), cudaSuccess; }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  LOCK;
  count("wait event");
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*,
                                            cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                            size_t*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return function(stream, cudaSuccess, data), cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = (cudaEvent_t)calloc(1, sizeof(double)), cudaSuccess;  // the host's time when it was recorded
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *(double*)event = milliseconds(), cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) { return count_sync("event synchronize"), cudaSuccess; }
EXPORT cudaError_t cudaEventElapsedTime(float* elapsed, cudaEvent_t first, cudaEvent_t last) {
  return *elapsed = *(double*)last - *(double*)first, cudaSuccess;
}

// --- kernels ---

EXPORT void __cudaRegisterFunction(void** handle, const char* function, char* device_function, const char* name,
                                   int limit, uint3* thread, uint3* block, dim3* block_size, dim3* grid_size,
                                   int* warp_size) {
  {
    LOCK;
    state().kernels[function] = name;
  }
  using Register = void (*)(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
  static auto next = (Register)dlsym(RTLD_NEXT, "__cudaRegisterFunction");
  if (next) next(handle, function, device_function, name, limit, thread, block, block_size, grid_size, warp_size);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch((const void*)kernel);
}
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(function);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) {
  return launch(function);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void*) {
  memset(facts, 0, sizeof *facts);
  facts->maxThreadsPerBlock = 1024;
  facts->numRegs = 32;
  facts->ptxVersion = facts->binaryVersion = 90;
  facts->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* number, const void*, int, size_t,
                                                                          unsigned) {
  return *number = 2, cudaSuccess;
}
EXPORT char __cudaInitModule(void**) { return 1; }

// --- cuBLAS ---

#define BLAS(name, ...) EXPORT cublasStatus_t name(__VA_ARGS__)
#define ACCEPTED CUBLAS_STATUS_SUCCESS
using Handle = cublasHandle_t;
using Op = cublasOperation_t;
using Type = cudaDataType;

BLAS(cublasCreate_v2, Handle* handle) { return *handle = (Handle)calloc(1, 64), ACCEPTED; }
BLAS(cublasDestroy_v2, Handle) { return ACCEPTED; }
BLAS(cublasSetStream_v2, Handle, cudaStream_t) { return ACCEPTED; }
BLAS(cublasSetWorkspace_v2, Handle, void*, size_t) { return ACCEPTED; }
BLAS(cublasSetMathMode, Handle, cublasMath_t) { return ACCEPTED; }
BLAS(cublasGetMathMode, Handle, cublasMath_t* mode) { return *mode = CUBLAS_DEFAULT_MATH, ACCEPTED; }
BLAS(cublasSetPointerMode_v2, Handle, cublasPointerMode_t) { return ACCEPTED; }
BLAS(cublasGetPointerMode_v2, Handle, cublasPointerMode_t* mode) { return *mode = CUBLAS_POINTER_MODE_HOST, ACCEPTED; }
BLAS(cublasGemmEx, Handle, Op, Op, int m, int n, int k, const void*, const void*, Type, int, const void*, Type, int,
     const void*, void*, Type result, int, cublasComputeType_t, cublasGemmAlgo_t) {
  std::string name = "gemm " + std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k);
  return product(result == CUDA_R_32F ? name + " fp32 out" : name, 2.0 * m * n * k);
}
BLAS(cublasSgemm_v2, Handle, Op, Op, int m, int n, int k, const float*, const float*, int, const float*, int,
     const float*, float*, int) {
  return product("sgemm", 2.0 * m * n * k);
}
BLAS(cublasDgemm_v2, Handle, Op, Op, int m, int n, int k, const double*, const double*, int, const double*, int,
     const double*, double*, int) {
  return product("dgemm", 2.0 * m * n * k);
}
BLAS(cublasGemmStridedBatchedEx, Handle, Op, Op, int m, int n, int k, const void*, const void*, Type, int, long long,
     const void*, Type, int, long long, const void*, void*, Type, int, long long, int batch, cublasComputeType_t,
     cublasGemmAlgo_t) {
  return product("gemm batched", 2.0 * m * n * k * batch);
}
BLAS(cublasSgemmStridedBatched, Handle, Op, Op, int m, int n, int k, const float*, const float*, int, long long,
     const float*, int, long long, const float*, float*, int, long long, int batch) {
  return product("sgemm batched", 2.0 * m * n * k * batch);
}
BLAS(cublasSdot_v2, Handle, int, const float*, int, const float*, int, float*) { return product("sdot", 0); }
BLAS(cublasDotEx, Handle, int, const void*, Type, int, const void*, Type, int, void*, Type, Type) {
  return product("dot", 0);
}
BLAS(cublasSgemv_v2, Handle, Op, int, int, const float*, const float*, int, const float*, int, const float*, float*,
     int) {
  return product("sgemv", 0);
}
BLAS(cublasLtMatmul, cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t,
     const void*, cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void*,
     cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
  return product("cublasLt", 0);
}
BLAS(cublasLtMatmulAlgoGetHeuristic, cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
     cublasLtMatmulHeuristicResult_t* result, int* number) {
  memset(result, 0, sizeof *result);
  return *number = 1, ACCEPTED;
}

// --- the counters ---

EXPORT void null_count_kernel(const char* name) {  // launched through the driver
  LOCK;
  state().launches++;
  count(name);
}

EXPORT void null_reset() {
  LOCK;
  state().counts.clear();
  state().launches = state().syncs = 0;
  state().flops = 0;
}
EXPORT double null_flops() { return state().flops; }
EXPORT long null_launches() { return state().launches; }
EXPORT long null_syncs() { return state().syncs; }
EXPORT void null_dump(const char* path) {  // lines of: number, tab, name
  LOCK;
  FILE* file = fopen(path, "w");
  for (auto& [name, number] : state().counts) fprintf(file, "%ld\t%s\n", number, name.c_str());
  fclose(file);
}
