// The part of libcuda that torch uses at startup and Triton throughout: one device, every call accepted.
#include <stddef.h>
#include <string.h>
#define OK return 0

// Triton's kernels, by name, are counted with the runtime's (libnull.so, which is loaded first).
__attribute__((weak)) void null_count_kernel(const char* name);
static const char* names[4096];
static size_t num_names;

int cuInit(unsigned flags) { OK; }
int cuDriverGetVersion(int* version) { *version = 13000; OK; }
int cuDeviceGet(int* device, int index) { *device = index; return index == 0 ? 0 : 101; }
int cuDeviceGetCount(int* number) { *number = 1; OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  // capability 9.0, 132 SMs, 227 KiB of shared memory for a block
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 97 ? 232448 : 1;
  OK;
}
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { *flags = 0; *active = 1; OK; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)0x10; OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { OK; }
int cuCtxGetCurrent(void** context) { *context = (void*)0x10; OK; }
int cuCtxSetCurrent(void* context) { OK; }
int cuCtxGetDevice(int* device) { *device = 0; OK; }
int cuGetErrorString(int error, const char** text) { *text = "null device"; OK; }
int cuGetErrorName(int error, const char** text) { *text = "null device"; OK; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)0x20; OK; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  names[num_names % 4096] = strdup(name);
  *function = &names[num_names++ % 4096];
  OK;
}
int cuCtxGetLimit(size_t* value, int limit) { *value = 1 << 20; OK; }
int cuCtxSetLimit(int limit, size_t value) { OK; }
int cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  *(unsigned long long*)value = pointer;  // Triton asks for the device's address
  OK;
}
int cuFuncSetCacheConfig(void* function, int config) { OK; }
int cuFuncSetAttribute(void* function, int attribute, int value) { OK; }
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : attribute == 3 ? 0 : 32;  // threads of a block, spills, registers
  OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, void* function, int threads, unsigned long shared) {
  *number = 2;
  OK;
}
static int launched(void* function) {
  if (null_count_kernel) null_count_kernel(*(const char**)function);
  OK;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) { return launched(function); }
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { return launched(function); }
int cuOccupancyMaxActiveClusters(int* number, void* function, const void* config) { *number = 1; OK; }
