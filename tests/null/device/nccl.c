// NCCL for one rank: every call accepted, nothing sent.
#include <string.h>

#define ACCEPT(name) int name(void) { return 0; }
ACCEPT(ncclAllGather) ACCEPT(ncclAllReduce) ACCEPT(ncclAlltoAll) ACCEPT(ncclBcast) ACCEPT(ncclBroadcast)
ACCEPT(ncclReduce) ACCEPT(ncclReduceScatter) ACCEPT(ncclSend) ACCEPT(ncclRecv)
ACCEPT(ncclGroupStart) ACCEPT(ncclGroupEnd) ACCEPT(ncclGroupSimulateEnd)
ACCEPT(ncclCommAbort) ACCEPT(ncclCommDestroy) ACCEPT(ncclCommFinalize)
ACCEPT(ncclCommRegister) ACCEPT(ncclCommDeregister) ACCEPT(ncclCommWindowRegister) ACCEPT(ncclCommWindowDeregister)
ACCEPT(ncclMemFree) ACCEPT(ncclRedOpDestroy)

struct id { char bytes[128]; };
static void* COMMUNICATOR = (void*)0x1000;

int ncclGetVersion(int* version) { *version = 22809; return 0; }
int ncclGetUniqueId(struct id* one) { memset(one, 1, sizeof *one); return 0; }
int ncclCommInitRank(void** made, int size, struct id one, int rank) { *made = COMMUNICATOR; return 0; }
int ncclCommInitRankConfig(void** made, int size, struct id one, int rank, void* config) { *made = COMMUNICATOR; return 0; }
int ncclCommInitRankScalable(void** made, int size, int rank, int number, void* ids, void* config) { *made = COMMUNICATOR; return 0; }
int ncclCommInitAll(void** made, int number, int* devices) { *made = COMMUNICATOR; return 0; }
int ncclCommSplit(void* from, int color, int key, void** made, void* config) { *made = COMMUNICATOR; return 0; }
int ncclCommCount(void* communicator, int* number) { *number = 1; return 0; }
int ncclCommUserRank(void* communicator, int* rank) { *rank = 0; return 0; }
int ncclCommGetAsyncError(void* communicator, int* error) { *error = 0; return 0; }
int ncclRedOpCreatePreMulSum(int* made, void* scalar, int type, int place, void* communicator) { *made = 5; return 0; }
const char* ncclGetErrorString(int error) { return "null device"; }
const char* ncclGetLastError(void* communicator) { return "null device"; }
