/* The runtime's devices. */
#include "runtime.h"

#include <stdio.h>
#include <string.h>

#pragma GCC visibility push(default)

static bool is_device(int device) { return device >= 0 && device < nullgpu_settings()->devices; }

cudaError_t cudaGetDeviceCount(int *count)
{
    nullgpu_warn();
    *count = nullgpu_settings()->devices;
    return *count ? cudaSuccess : nullgpu_failed(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device)
{
    *device = nullgpu_current_device();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    nullgpu_warn();
    return nullgpu_set_current_device(device) ? cudaSuccess : nullgpu_failed(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    if (!is_device(device)) return nullgpu_failed(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    memcpy(p->name, nullgpu_settings()->name, sizeof p->name);
    nullgpu_uuid(device, p->uuid.bytes);
    p->totalGlobalMem = nullgpu_settings()->memory;
    p->major = nullgpu_attribute(cudaDevAttrComputeCapabilityMajor);
    p->minor = nullgpu_attribute(cudaDevAttrComputeCapabilityMinor);
    p->multiProcessorCount = nullgpu_attribute(cudaDevAttrMultiProcessorCount);
    p->warpSize = nullgpu_attribute(cudaDevAttrWarpSize);
    p->sharedMemPerBlock = (size_t)nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = (size_t)nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = (size_t)nullgpu_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->reservedSharedMemPerBlock = (size_t)nullgpu_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    p->regsPerBlock = nullgpu_attribute(cudaDevAttrMaxRegistersPerBlock);
    p->regsPerMultiprocessor = nullgpu_attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    p->maxThreadsPerBlock = nullgpu_attribute(cudaDevAttrMaxThreadsPerBlock);
    p->maxThreadsPerMultiProcessor = nullgpu_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = nullgpu_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = nullgpu_attribute(cudaDevAttrMaxBlockDimX + i);
        p->maxGridSize[i] = nullgpu_attribute(cudaDevAttrMaxGridDimX + i);
    }
    p->l2CacheSize = nullgpu_attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = nullgpu_attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->totalConstMem = (size_t)nullgpu_attribute(cudaDevAttrTotalConstantMemory);
    p->memPitch = (size_t)nullgpu_attribute(cudaDevAttrMaxPitch);
    p->textureAlignment = (size_t)nullgpu_attribute(cudaDevAttrTextureAlignment);
    p->asyncEngineCount = nullgpu_attribute(cudaDevAttrAsyncEngineCount);
    p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->cooperativeLaunch = 1;
    p->hostRegisterSupported = p->memoryPoolsSupported = p->streamPrioritiesSupported = 1;
    p->pciBusID = 1 + device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    if (!is_device(device)) return nullgpu_failed(cudaErrorInvalidDevice);
    *value = nullgpu_attribute((int)attribute);
    return cudaSuccess;
}

/* The version of the headers: what torch was built with. */
cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    if (!is_device(device) || !is_device(peer)) return nullgpu_failed(cudaErrorInvalidDevice);
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device)
{
    if (!is_device(device)) return nullgpu_failed(cudaErrorInvalidDevice);
    snprintf(text, (size_t)length, "0000:%02x:00.0", (unsigned)(1 + device));
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    nullgpu_count(NULLGPU_device_synchronisations, 1);
    return cudaSuccess;
}
