/* The runtime's errors: the last one of a thread, and their texts. NVIDIA's own functions for the texts start a device. */
#include "runtime.h"

#pragma GCC visibility push(default)

static __thread cudaError_t last_error;

cudaError_t nullgpu_failed(cudaError_t error)
{
    last_error = error;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

/* Those that these files return, in the words of the runtime. */
static const struct { cudaError_t error; const char *name, *text; } texts[] = {
#define ERROR(name, text) {name, #name, text},
    ERROR(cudaSuccess, "no error")
    ERROR(cudaErrorInvalidValue, "invalid argument")
    ERROR(cudaErrorMemoryAllocation, "out of memory")
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument")
    ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument")
    ERROR(cudaErrorInvalidSymbol, "invalid device symbol")
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected")
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal")
    ERROR(cudaErrorDeviceUninitialized, "invalid device context")
    ERROR(cudaErrorMapBufferObjectFailed, "mapping of buffer object failed")
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle")
    ERROR(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped")
    ERROR(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region")
    ERROR(cudaErrorNotSupported, "operation not supported")
#undef ERROR
};

const char *cudaGetErrorName(cudaError_t error)
{
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].error == error) return texts[i].name;
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].error == error) return texts[i].text;
    return "unrecognized error code";
}
