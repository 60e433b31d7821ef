/* The driver's functions that the runtime has too: memory, copies, streams and events, for programs that go past the
 * runtime. The runtime's own do the work. Its error codes are the driver's, where both have one. */
#include "nullgpu.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#pragma GCC visibility push(default)

_Static_assert((int)CUDA_ERROR_INVALID_VALUE == (int)cudaErrorInvalidValue, "codes differ");
_Static_assert((int)CUDA_ERROR_OUT_OF_MEMORY == (int)cudaErrorMemoryAllocation, "codes differ");
_Static_assert((int)CUDA_ERROR_INVALID_HANDLE == (int)cudaErrorInvalidResourceHandle, "codes differ");
_Static_assert((int)CUDA_ERROR_INVALID_DEVICE == (int)cudaErrorInvalidDevice, "codes differ");

/* The driver has no last error, so the runtime's is put back as it was: empty. */
static CUresult of(cudaError_t error)
{
    if (error) cudaGetLastError();
    return (CUresult)error;
}

CUresult cuMemAlloc(CUdeviceptr *at, size_t bytes)
{
    return bytes ? of(cudaMalloc((void **)at, bytes)) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemFree(CUdeviceptr at) { return of(cudaFree((void *)at)); }

CUresult cuMemAllocAsync(CUdeviceptr *at, size_t bytes, CUstream stream)
{
    return of(cudaMallocAsync((void **)at, bytes, stream));
}

CUresult cuMemFreeAsync(CUdeviceptr at, CUstream stream) { return of(cudaFreeAsync((void *)at, stream)); }
CUresult cuMemHostAlloc(void **at, size_t bytes, unsigned flags) { return of(cudaHostAlloc(at, bytes, flags)); }
CUresult cuMemAllocHost(void **at, size_t bytes) { return of(cudaMallocHost(at, bytes)); }
CUresult cuMemFreeHost(void *at) { return of(cudaFreeHost(at)); }
CUresult cuMemHostRegister(void *at, size_t bytes, unsigned flags) { return of(cudaHostRegister(at, bytes, flags)); }
CUresult cuMemHostUnregister(void *at) { return of(cudaHostUnregister(at)); }

/* Copies, waiting and not waiting: nothing runs, so both are done at once. */
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    return of(cudaMemcpy((void *)to, (const void *)from, bytes, cudaMemcpyDefault));
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return cuMemcpy(to, from, bytes);
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes)
{
    return of(cudaMemcpy((void *)to, from, bytes, cudaMemcpyHostToDevice));
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    return cuMemcpyHtoD(to, from, bytes);
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes)
{
    return of(cudaMemcpy(to, (const void *)from, bytes, cudaMemcpyDeviceToHost));
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return cuMemcpyDtoH(to, from, bytes);
}

CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    return of(cudaMemcpy((void *)to, (const void *)from, bytes, cudaMemcpyDeviceToDevice));
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return cuMemcpyDtoD(to, from, bytes);
}

CUresult cuMemsetD8(CUdeviceptr at, unsigned char value, size_t count)
{
    return of(cudaMemset((void *)at, value, count));
}

CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t count, CUstream stream)
{
    return cuMemsetD8(at, value, count);
}

CUresult cuMemsetD32(CUdeviceptr at, unsigned value, size_t count)
{
    if (at % sizeof value || !nullgpu_is_visible((void *)at, count * sizeof value)) return CUDA_ERROR_INVALID_VALUE;
    if (count * sizeof value > nullgpu_settings()->copy_max) return CUDA_SUCCESS;
    for (size_t i = 0; i < count; i++) ((unsigned *)at)[i] = value;
    return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream)
{
    return cuMemsetD32(at, value, count);
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return of(cudaStreamCreateWithFlags(stream, flags)); }

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    return of(cudaStreamCreateWithPriority(stream, flags, priority));
}

CUresult cuStreamDestroy(CUstream stream) { return of(cudaStreamDestroy(stream)); }
CUresult cuStreamQuery(CUstream stream) { return of(cudaStreamQuery(stream)); }
CUresult cuStreamGetPriority(CUstream stream, int *priority) { return of(cudaStreamGetPriority(stream, priority)); }

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    return of(cudaStreamWaitEvent(stream, event, flags));
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuEventCreate(CUevent *event, unsigned flags) { return of(cudaEventCreateWithFlags(event, flags)); }
CUresult cuEventDestroy(CUevent event) { return of(cudaEventDestroy(event)); }
CUresult cuEventRecord(CUevent event, CUstream stream) { return of(cudaEventRecord(event, stream)); }
CUresult cuEventQuery(CUevent event) { return of(cudaEventQuery(event)); }
CUresult cuEventSynchronize(CUevent event) { return of(cudaEventSynchronize(event)); }

CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end)
{
    return of(cudaEventElapsedTime(milliseconds, start, end));
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer)
{
    return of(cudaDeviceCanAccessPeer(can, device, peer));
}

CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device)
{
    return of(cudaDeviceGetPCIBusId(text, length, device));
}
