/* What the device is: settings from the environment, and the attributes of the model that they name. */
#include "nullgpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cuda_runtime_api.h>

static struct nullgpu_settings settings;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static double number(const char *name, double otherwise)
{
    const char *text = getenv(name);
    return text && *text ? atof(text) : otherwise;
}

static void read_settings(void)
{
    settings.devices = (int)number("NULLGPU_DEVICES", 1);
    if (settings.devices < 0) settings.devices = 0;
    if (settings.devices > NULLGPU_MAX_DEVICES) settings.devices = NULLGPU_MAX_DEVICES;
    settings.memory = (size_t)number("NULLGPU_MEMORY_BYTES", 80e9);
    settings.capability = (int)number("NULLGPU_CAPABILITY", 90);
    settings.copy_max = (size_t)number("NULLGPU_COPY_MAX_BYTES", 1 << 20);
    const char *name = getenv("NULLGPU_NAME");
    snprintf(settings.name, sizeof settings.name, "%s", name && *name ? name : "null GPU");
    settings.stub_log = getenv("NULLGPU_STUB_LOG");
    if (settings.stub_log && !*settings.stub_log) settings.stub_log = NULL;
}

const struct nullgpu_settings *nullgpu_settings(void)
{
    pthread_once(&once, read_settings);
    return &settings;
}

/* By the whitepapers and the tables of NVIDIA's programming guide. The newest one that a capability reaches is taken:
 * A100, A10 or RTX 30, L40S, H100 SXM, B200, RTX PRO 6000 Blackwell. */
static const struct nullgpu_model models[] = {
    {80, 108, 166912, 167936, 2048, 32, 40 << 20, 5120, 1410000, 1593000},
    {86, 84, 101376, 102400, 1536, 16, 6 << 20, 384, 1740000, 9001000},
    {89, 142, 101376, 102400, 1536, 24, 96 << 20, 384, 2520000, 9001000},
    {90, 132, 232448, 233472, 2048, 32, 50 << 20, 5120, 1980000, 2619000},
    {100, 148, 232448, 233472, 2048, 32, 126 << 20, 8192, 1965000, 3996000},
    {120, 188, 101376, 102400, 1536, 24, 128 << 20, 512, 2617000, 14001000},
};

const struct nullgpu_model *nullgpu_model(void)
{
    const struct nullgpu_model *found = &models[0];
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        if (models[i].capability <= nullgpu_settings()->capability) found = &models[i];
    return found;
}

int nullgpu_attribute(int attribute)
{
    const struct nullgpu_model *model = nullgpu_model();
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxPitch: return 2147483647;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return model->clock_khz;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrMultiProcessorCount: return model->multiprocessors;
    case cudaDevAttrMemoryClockRate: return model->memory_clock_khz;
    case cudaDevAttrGlobalMemoryBusWidth: return model->memory_bus;
    case cudaDevAttrL2CacheSize: return model->l2_bytes;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return model->threads_multiprocessor;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrComputeCapabilityMajor: return nullgpu_settings()->capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return nullgpu_settings()->capability % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return model->shared_multiprocessor;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return model->shared_optin;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return model->blocks_multiprocessor;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported:
    case 102: /* CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, which the runtime does not name */
    case 103: /* CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
        return 1;
    default: return 0; /* what it cannot do: multicast, fabric handles, GPUDirect, managed memory */
    }
}

void nullgpu_uuid(int device, char uuid[16])
{
    memset(uuid, 0, 16);
    memcpy(uuid, "nullgpu", 7);
    uuid[15] = (char)device;
}

void nullgpu_warn(void)
{
    static char is_told;
    if (__atomic_exchange_n(&is_told, 1, __ATOMIC_RELAXED) || getenv("MEGATRON_TEMPO_NULLGPU")) return;
    fprintf(stderr,
            "\n*** NULL GPU: process %d sees a CUDA device that computes nothing (libnullgpu.so in LD_PRELOAD). ***\n"
            "*** Every number that it gives is meaningless. unset LD_PRELOAD to use a real device.            ***\n\n",
            (int)getpid());
}

bool nullgpu_launch_fits(const unsigned grid[3], const unsigned block[3], size_t shared)
{
    if (!grid[0] || !grid[1] || !grid[2] || !block[0] || !block[1] || !block[2]) return false;
    if (grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535) return false;
    if (block[0] > 1024 || block[1] > 1024 || block[2] > 64) return false;
    if ((size_t)block[0] * block[1] * block[2] > 1024) return false;
    return shared <= (size_t)nullgpu_model()->shared_optin;
}

/* What guard.py looks for: it is there whichever way the library came into the process. */
NULLGPU_API int nullgpu_is_loaded(void);
int nullgpu_is_loaded(void) { return 1; }
