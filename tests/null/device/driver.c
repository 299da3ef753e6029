// The part of libcuda that Triton and torch use at startup: one device, every call accepted.
#define OK return 0

int cuInit(unsigned flags) { OK; }
int cuDriverGetVersion(int* version) { *version = 13000; OK; }
int cuDeviceGet(int* device, int index) { *device = index; return index == 0 ? 0 : 101; }
int cuDeviceGetCount(int* number) { *number = 1; OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;  // capability 9.0, 132 SMs
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
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)0x30; OK; }
int cuFuncSetAttribute(void* function, int attribute, int value) { OK; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = 32; OK; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, void* function, int threads, unsigned long shared) {
  *number = 2;
  OK;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) { OK; }
