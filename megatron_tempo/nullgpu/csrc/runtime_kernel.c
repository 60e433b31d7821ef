/* The runtime's kernels: a launch that real hardware would take is counted, and nothing runs. */
#define _GNU_SOURCE
#include "runtime.h"

#include <dlfcn.h>
#include <string.h>

#pragma GCC visibility push(default)

static cudaError_t launch(dim3 grid, dim3 block, size_t shared)
{
    const unsigned grid_size[3] = {grid.x, grid.y, grid.z}, block_size[3] = {block.x, block.y, block.z};
    if (!nullgpu_launch_fits(grid_size, block_size, shared)) return nullgpu_failed(cudaErrorInvalidConfiguration);
    nullgpu_count(NULLGPU_kernel_launches, 1);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream)
{
    return launch(grid, block, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments)
{
    return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream)
{
    return launch(grid, block, shared);
}

/* What nvcc 13's code calls for <<<>>>; no header declares them. */
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream);
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function);

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream)
{
    return launch(grid, block, shared);
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function)
{
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

/* Registers and occupancy are the compiler's and the hardware's: a plausible answer, on which a grid size may depend. */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = nullgpu_settings()->capability;
    attributes->maxDynamicSharedSizeBytes = nullgpu_model()->shared_optin;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > nullgpu_model()->shared_optin)
        return nullgpu_failed(cudaErrorInvalidValue);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int block_size,
                                                                   size_t shared, unsigned flags)
{
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int block_size,
                                                          size_t shared)
{
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *jit_options,
                                void **jit_values, unsigned jit_count, enum cudaLibraryOption *options, void **values,
                                unsigned count)
{
    *library = nullgpu_handle();
    return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name)
{
    *kernel = nullgpu_handle();
    return cudaSuccess;
}

/* torch and Transformer Engine ask for the driver's functions by name. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    int (*look_up)(const char *, void **, int, uint64_t, int *) =
        driver ? (__typeof__(look_up))dlsym(driver, "cuGetProcAddress_v2") : NULL;
    *function = NULL;
    if (look_up) look_up(symbol, function, (int)version, flags, NULL);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
