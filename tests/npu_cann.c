/* What torch_npu needs of CANN besides its names, so that it begins and finds one Ascend 910B3.

   Everything else that it looks for is empty (tests/npu_dispatch.py). Memory of the device is the
   host's; streams are there to be named, and nothing is ever put on one. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int anything;
static const size_t page = 2 << 20;
static const size_t memory = (size_t)64 << 30;

/* The device. */
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtGetDevice(int32_t *device) { *device = 0; return 0; }
int aclrtGetCurrentContext(void **context) { *context = &anything; return 0; }

/* Its settings, which it takes and forgets. */
int aclrtSetDeviceSatMode(int mode) { return 0; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return 0; }
int aclSetCompileopt(int option, const char *value) { return 0; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return 0; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return 0; }

/* Streams. */
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    *stream = &anything;
    return 0;
}
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return 0; }
int aclrtDestroyStreamForce(void *stream) { return 0; }

/* Memory: what torch.tensor() makes of numbers lies in it even where other tensors have none. */
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *bytes)
{
    *free_bytes = *bytes = memory;
    return 0;
}
int aclrtMalloc(void **address, size_t bytes, int policy)
{
    *address = aligned_alloc(page, (bytes + page - 1) / page * page);
    return *address == NULL;
}
int aclrtFree(void *address)
{
    free(address);
    return 0;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind)
{
    memcpy(to, from, bytes);
    return 0;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream)
{
    return aclrtMemcpy(to, room, from, bytes, kind);
}
