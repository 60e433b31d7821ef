/* NVML: what torch asks it. Its header is not in torch's wheels, so the declarations are here. */
#include "nullgpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include <cuda.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7 };
struct first_process { unsigned pid; unsigned long long bytes; };
struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };
struct memory { unsigned long long total, free, used; };
struct pci { char legacy[16]; unsigned domain, bus, device, pci_id, subsystem; char id[32]; };

static int ordinals[NULLGPU_MAX_DEVICES]; /* a handle points to its device's */

static int ordinal(const void *handle) { return (int)((const int *)handle - ordinals); }

#define DEFINE(name, ...)                                                                                              \
    NULLGPU_API int name(__VA_ARGS__);                                                                                 \
    int name(__VA_ARGS__)

DEFINE(nvmlInit_v2, void) { return SUCCESS; }
DEFINE(nvmlInit, void) { return SUCCESS; }
DEFINE(nvmlInitWithFlags, unsigned flags) { return SUCCESS; }
DEFINE(nvmlShutdown, void) { return SUCCESS; }

NULLGPU_API const char *nvmlErrorString(int error);
const char *nvmlErrorString(int error)
{
    return error == SUCCESS            ? "Success"
           : error == INVALID_ARGUMENT ? "Invalid Argument"
           : error == NOT_SUPPORTED    ? "Not Supported"
                                       : "Unknown Error";
}

DEFINE(nvmlDeviceGetCount_v2, unsigned *count)
{
    *count = (unsigned)nullgpu_settings()->devices;
    return SUCCESS;
}

DEFINE(nvmlDeviceGetHandleByIndex_v2, unsigned index, void **handle)
{
    if (index >= (unsigned)nullgpu_settings()->devices) return INVALID_ARGUMENT;
    *handle = &ordinals[index];
    return SUCCESS;
}

/* "0000:01:00.0" is device 0: the bus that cudaDeviceGetPCIBusId tells. */
DEFINE(nvmlDeviceGetHandleByPciBusId_v2, const char *id, void **handle)
{
    unsigned domain, bus;
    if (sscanf(id, "%x:%x:", &domain, &bus) != 2 || !bus) return INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle);
}

DEFINE(nvmlDeviceGetUUID, void *handle, char *text, unsigned length)
{
    char uuid[16], hex[33];
    nullgpu_uuid(ordinal(handle), uuid);
    for (int i = 0; i < 16; i++) snprintf(hex + 2 * i, 3, "%02x", (unsigned char)uuid[i]);
    snprintf(text, length, "GPU-%.8s-%.4s-%.4s-%.4s-%.12s", hex, hex + 8, hex + 12, hex + 16, hex + 20);
    return SUCCESS;
}

DEFINE(nvmlDeviceGetHandleByUUID, const char *wanted, void **handle)
{
    char uuid[64];
    for (unsigned i = 0; i < (unsigned)nullgpu_settings()->devices; i++) {
        nvmlDeviceGetUUID(&ordinals[i], uuid, sizeof uuid);
        if (!strcasecmp(uuid, wanted)) return nvmlDeviceGetHandleByIndex_v2(i, handle);
    }
    return INVALID_ARGUMENT;
}

DEFINE(nvmlDeviceGetName, void *handle, char *name, unsigned length)
{
    snprintf(name, length, "%s", nullgpu_settings()->name);
    return SUCCESS;
}

DEFINE(nvmlDeviceGetPciInfo_v3, void *handle, struct pci *pci)
{
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)ordinal(handle) + 1;
    snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", pci->bus & 0xff);
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", pci->bus & 0xff);
    return SUCCESS;
}

DEFINE(nvmlDeviceGetMemoryInfo, void *handle, struct memory *memory)
{
    memory->total = nullgpu_settings()->memory;
    memory->used = nullgpu_used(ordinal(handle));
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

/* torch's message for memory that ran out tells what this process has on the device: by the first version, whose struct
 * ends after the bytes. */
DEFINE(nvmlDeviceGetComputeRunningProcesses, void *handle, unsigned *count, struct first_process *processes)
{
    unsigned room = *count;
    *count = 1;
    if (!room || !processes) return INSUFFICIENT_SIZE;
    processes[0] = (struct first_process){(unsigned)getpid(), nullgpu_used(ordinal(handle))};
    return SUCCESS;
}

DEFINE(nvmlDeviceGetComputeRunningProcesses_v3, void *handle, unsigned *count, struct process *processes)
{
    unsigned room = *count;
    *count = 1;
    if (!room || !processes) return INSUFFICIENT_SIZE;
    processes[0] = (struct process){(unsigned)getpid(), nullgpu_used(ordinal(handle)), ~0u, ~0u};
    return SUCCESS;
}

DEFINE(nvmlSystemGetCudaDriverVersion_v2, int *version)
{
    *version = CUDA_VERSION;
    return SUCCESS;
}

DEFINE(nvmlSystemGetDriverVersion, char *text, unsigned length)
{
    snprintf(text, length, "0.0 (null GPU)");
    return SUCCESS;
}

/* A struct whose version has its size in the lower bytes. All zero says: no fabric, so no memory for one. */
DEFINE(nvmlDeviceGetGpuFabricInfoV, void *handle, unsigned *info)
{
    size_t size = *info & 0xffffff;
    if (size > sizeof *info) memset(info + 1, 0, size - sizeof *info);
    return SUCCESS;
}

/* No NVLink: torch's symmetric memory is not offered. */
DEFINE(nvmlDeviceGetNvLinkRemoteDeviceType, void *handle, unsigned link, int *type)
{
    *type = 255; /* NVML_NVLINK_DEVICE_TYPE_UNKNOWN */
    return NOT_SUPPORTED;
}

DEFINE(nvmlDeviceGetNvLinkRemotePciInfo_v2, void *handle, unsigned link, struct pci *pci) { return NOT_SUPPORTED; }
DEFINE(nvmlDeviceGetNvLinkState, void *handle, unsigned link, int *is_active) { return NOT_SUPPORTED; }
