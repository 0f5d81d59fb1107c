/* What torch_npu needs of CANN besides its names, so that it begins and finds one Ascend 910B3.

   All else that it is linked to is empty (tests/npu_dispatch.py). Streams are there to be named,
   and memory to have an address: nothing is ever put on the one or into the other. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

static int stream_of_the_device;
static const size_t page = 2 << 20;

/* The device. */
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtGetDevice(int32_t *device) { *device = 0; return 0; }

/* Its settings, which it takes and forgets. */
int aclrtSetDeviceSatMode(int mode) { return 0; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return 0; }
int aclSetCompileopt(int option, const char *value) { return 0; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return 0; }

/* Streams. */
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    *stream = &stream_of_the_device;
    return 0;
}
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return 0; }

/* Memory, which torch.tensor() asks for even where other tensors have none. */
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
