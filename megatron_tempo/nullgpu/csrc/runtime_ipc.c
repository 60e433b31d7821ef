/* Memory and events of another process on this machine: addresses of the right size, without the bytes. */
#define _GNU_SOURCE
#include "runtime.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#pragma GCC visibility push(default)

#define MAGIC 0x6e756c6c67707531 /* "nullgpu1" */

struct shared { uint64_t magic, size; int32_t process, device; uint64_t at; };
_Static_assert(sizeof(struct shared) <= sizeof(cudaIpcMemHandle_t), "a handle has 64 bytes");
_Static_assert(sizeof(struct shared) <= sizeof(cudaIpcEventHandle_t), "a handle has 64 bytes");

/* A handle is of the allocation that an address is in, as in CUDA. Expandable segments have none. */
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *at)
{
    struct nullgpu_piece piece;
    if (!nullgpu_find(at, &piece) || piece.kind != NULLGPU_DEVICE) return nullgpu_failed(cudaErrorInvalidValue);
    struct shared shared = {MAGIC, piece.size, getpid(), piece.device, (uint64_t)piece.at};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &shared, sizeof shared);
    return cudaSuccess;
}

/* What CUDA refuses too: this process's own memory, and that of a process that has ended. */
static cudaError_t check(const struct shared *shared)
{
    if (shared->magic != MAGIC) return nullgpu_failed(cudaErrorInvalidValue);
    if (shared->process == getpid()) return nullgpu_failed(cudaErrorDeviceUninitialized);
    if (kill(shared->process, 0) && errno == ESRCH) return nullgpu_failed(cudaErrorInvalidResourceHandle);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **result, cudaIpcMemHandle_t handle, unsigned flags)
{
    struct shared shared;
    memcpy(&shared, &handle, sizeof shared);
    cudaError_t error = check(&shared);
    if (error) return error;
    void *at = nullgpu_reserve(shared.size);
    if (!at) return nullgpu_failed(cudaErrorMapBufferObjectFailed);
    /* Not counted: the process that allocated it counts it. */
    nullgpu_add((struct nullgpu_piece){at, shared.size, nullgpu_current_device(), NULLGPU_IMPORTED, NULL});
    *result = at;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *at)
{
    struct nullgpu_piece piece;
    if (!nullgpu_find(at, &piece) || piece.kind != NULLGPU_IMPORTED || !nullgpu_remove(at, &piece))
        return nullgpu_failed(cudaErrorInvalidValue);
    munmap(piece.at, piece.size);
    return cudaSuccess;
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event)
{
    struct shared shared = {MAGIC, 0, getpid(), nullgpu_current_device(), (uint64_t)event};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &shared, sizeof shared);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle)
{
    struct shared shared;
    memcpy(&shared, &handle, sizeof shared);
    cudaError_t error = check(&shared);
    return error ? error : cudaEventCreateWithFlags(event, cudaEventDisableTiming | cudaEventInterprocess);
}
