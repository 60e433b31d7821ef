/* The driver, for what goes past the runtime: Triton, code compiled by NVRTC, and Transformer Engine. */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <cuda.h>

#pragma GCC visibility push(default)

static CUcontext primary[NULLGPU_MAX_DEVICES];

/* A device has one context, its primary one. */
static CUcontext context_of(int device)
{
    static char contexts[NULLGPU_MAX_DEVICES];
    if (!primary[device]) primary[device] = (CUcontext)&contexts[device];
    return primary[device];
}

static bool is_device(int device) { return device >= 0 && device < nullgpu_settings()->devices; }

CUresult cuInit(unsigned flags)
{
    nullgpu_warn();
    return nullgpu_settings()->devices ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

CUresult cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    *count = nullgpu_settings()->devices;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    snprintf(name, (size_t)length, "%s", nullgpu_settings()->name);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device)
{
    *bytes = nullgpu_settings()->memory;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device)
{
    nullgpu_uuid(device, uuid->bytes);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = nullgpu_attribute((int)attribute);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = context_of(nullgpu_current_device());
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    for (int device = 0; device < nullgpu_settings()->devices; device++)
        if (context_of(device) == context) nullgpu_set_current_device(device);
    return CUDA_SUCCESS;
}

/* The stack of contexts: what torch pushes, it pops again. */
static __thread int pushed[64], depth;

CUresult cuCtxPushCurrent(CUcontext context)
{
    if (!context || depth == 64) return CUDA_ERROR_INVALID_VALUE;
    pushed[depth++] = nullgpu_current_device();
    return cuCtxSetCurrent(context);
}

CUresult cuCtxPopCurrent(CUcontext *context)
{
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = context_of(nullgpu_current_device());
    nullgpu_set_current_device(pushed[--depth]);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device)
{
    *device = nullgpu_current_device();
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void)
{
    nullgpu_count(NULLGPU_device_synchronisations, 1);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *context = context_of(device);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active)
{
    *flags = 0;
    *is_active = 1;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { return cuCtxGetCurrent(context); }

CUresult cuStreamGetCtx_v2(CUstream stream, CUcontext *context, CUgreenCtx *green)
{
    if (green) *green = NULL;
    return cuCtxGetCurrent(context);
}

CUresult cuStreamSynchronize(CUstream stream)
{
    nullgpu_count(NULLGPU_stream_synchronisations, 1);
    return CUDA_SUCCESS;
}

/* Kernels. Whether the code is right for the GPU is the compiler's word (ptxas), which has run before this. */
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values)
{
    if (!image) return CUDA_ERROR_INVALID_VALUE;
    *module = nullgpu_handle();
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
    return cuModuleLoadDataEx(module, image, 0, NULL, NULL);
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadDataEx(module, path, 0, NULL, NULL); }

/* A handle may be a part of a larger object of its library, so it is not given to free. */
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = nullgpu_handle();
    return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal(CUdeviceptr *at, size_t *bytes, CUmodule module, const char *name)
{
    if (at) *at = (CUdeviceptr)nullgpu_symbol(module);
    if (bytes) *bytes = 4096;
    return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit_options, void **jit_values,
                           unsigned jit_count, CUlibraryOption *options, void **values, unsigned count)
{
    *library = nullgpu_handle();
    return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) { return CUDA_SUCCESS; }

CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name)
{
    *kernel = nullgpu_handle();
    return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel)
{
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}

/* Registers are not known: 64, and none spilled. */
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
{
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                  : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > nullgpu_model()->shared_optin)
        return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* A description of a tensor for a kernel's copies: the kernel does not run. What the hardware refuses is checked. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill)
{
    if (!map || rank < 1 || rank > 5 || (uintptr_t)at % 16) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i < rank; i++)
        if (!sizes[i] || sizes[i] > (cuuint64_t)1 << 32 || !box[i] || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i + 1 < rank; i++)
        if (strides[i] % 16 || strides[i] >= (cuuint64_t)1 << 40) return CUDA_ERROR_INVALID_VALUE;
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int block, size_t shared)
{
    *blocks = 1;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config)
{
    *clusters = nullgpu_model()->multiprocessors / 2;
    return CUDA_SUCCESS;
}

static CUresult launch(const unsigned grid[3], const unsigned block[3], size_t shared)
{
    if (!nullgpu_launch_fits(grid, block, shared)) return CUDA_ERROR_INVALID_VALUE;
    nullgpu_count(NULLGPU_triton_launches, 1);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra)
{
    return launch((unsigned[]){grid_x, grid_y, grid_z}, (unsigned[]){block_x, block_y, block_z}, shared);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    return launch((unsigned[]){config->gridDimX, config->gridDimY, config->gridDimZ},
                  (unsigned[]){config->blockDimX, config->blockDimY, config->blockDimZ}, config->sharedMemBytes);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **parameters)
{
    return launch((unsigned[]){grid_x, grid_y, grid_z}, (unsigned[]){block_x, block_y, block_z}, shared);
}

CUresult cuGetErrorName(CUresult error, const char **text)
{
    switch (error) {
    case CUDA_ERROR_INVALID_HANDLE: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
    case CUDA_ERROR_INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
    case CUDA_ERROR_NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
    case CUDA_SUCCESS: *text = "CUDA_SUCCESS"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case CUDA_ERROR_NO_DEVICE: *text = "CUDA_ERROR_NO_DEVICE"; break;
    case CUDA_ERROR_INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
    case CUDA_ERROR_NOT_SUPPORTED: *text = "CUDA_ERROR_NOT_SUPPORTED"; break;
    default: *text = "CUDA_ERROR_UNKNOWN";
    }
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    switch (error) {
    case CUDA_ERROR_INVALID_HANDLE: *text = "invalid resource handle"; break;
    case CUDA_ERROR_INVALID_CONTEXT: *text = "invalid device context"; break;
    case CUDA_ERROR_NOT_FOUND: *text = "named symbol not found"; break;
    case CUDA_SUCCESS: *text = "no error"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; break;
    case CUDA_ERROR_NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
    case CUDA_ERROR_INVALID_DEVICE: *text = "invalid device ordinal"; break;
    case CUDA_ERROR_NOT_SUPPORTED: *text = "operation not supported"; break;
    default: *text = "unknown error";
    }
    return CUDA_SUCCESS;
}

/* Tables of functions without names, through which NVIDIA's libraries talk to their own driver. There are none: those
 * that cannot do without (cuSOLVER, cuDNN) report an error, and NVRTC compiles without a cache. */
CUresult cuGetExportTable(const void **table, const CUuuid *id)
{
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

/* Generated by build.py from the header's macros: cuMemAlloc is called cuMemAlloc_v2. Ends with NULL. */
extern const char *const nullgpu_current_versions[];

static const char *current_version(const char *symbol)
{
    size_t length = strlen(symbol);
    for (const char *const *name = nullgpu_current_versions; *name; name++)
        if (!strncmp(*name, symbol, length) && !strncmp(*name + length, "_v", 2)) return *name;
    return symbol;
}

/* By name, in the version that this header's users get. */
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *result)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = driver ? dlsym(driver, current_version(symbol)) : NULL;
    if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
