/* The driver's memory: what an address is, and memory by pieces, of which torch makes its expandable segments.
 *
 * cuMemCreate takes memory of the device; cuMemMap puts it under a reserved address. It is free again when its handle
 * is released and nothing is mapped to it. */
#define _GNU_SOURCE
#include "nullgpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda.h>

#pragma GCC visibility push(default)

#define GRANULARITY ((size_t)2 << 20)

struct allocation { size_t size; int device; int references; bool is_imported; };

static void release(struct allocation *allocation)
{
    if (__atomic_sub_fetch(&allocation->references, 1, __ATOMIC_ACQ_REL)) return;
    if (!allocation->is_imported) nullgpu_give_back(allocation->device, allocation->size);
    free(allocation);
}

CUresult cuMemAddressReserve(CUdeviceptr *result, size_t size, size_t alignment, CUdeviceptr wanted,
                             unsigned long long flags)
{
    if (!size || size % GRANULARITY) return CUDA_ERROR_INVALID_VALUE;
    char *at = nullgpu_reserve(size + GRANULARITY);
    if (!at) return CUDA_ERROR_OUT_OF_MEMORY;
    char *aligned = (char *)(((uintptr_t)at + GRANULARITY - 1) & ~(GRANULARITY - 1));
    if (aligned > at) munmap(at, (size_t)(aligned - at)); /* so that cuMemAddressFree knows where it starts */
    munmap(aligned + size, (size_t)(at + GRANULARITY - aligned));
    *result = (CUdeviceptr)aligned;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr at, size_t size)
{
    struct nullgpu_piece piece;
    if (nullgpu_find((void *)at, &piece)) return CUDA_ERROR_INVALID_VALUE; /* still mapped */
    return munmap((void *)at, size) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *property,
                                       CUmemAllocationGranularity_flags option)
{
    *granularity = GRANULARITY;
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *property,
                     unsigned long long flags)
{
    int device = property->location.id;
    if (!size || size % GRANULARITY || property->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return CUDA_ERROR_INVALID_VALUE;
    if (device < 0 || device >= nullgpu_settings()->devices) return CUDA_ERROR_INVALID_DEVICE;
    /* Memory for NVLink's fabric, for which torch has another way if it is refused. */
    if (property->requestedHandleTypes & CU_MEM_HANDLE_TYPE_FABRIC) return CUDA_ERROR_NOT_SUPPORTED;
    struct allocation *made = malloc(sizeof *made);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    if (!nullgpu_take(device, size)) {
        free(made);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *made = (struct allocation){size, device, 1, false};
    *handle = (CUmemGenericAllocationHandle)made;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
{
    if (!handle) return CUDA_ERROR_INVALID_VALUE;
    release((struct allocation *)handle);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags)
{
    struct allocation *allocation = (struct allocation *)handle;
    struct nullgpu_piece there;
    if (!allocation || !size || at % GRANULARITY || offset + size > allocation->size) return CUDA_ERROR_INVALID_VALUE;
    if (nullgpu_find((void *)at, &there) || nullgpu_find((void *)(at + size - 1), &there))
        return CUDA_ERROR_INVALID_VALUE; /* mapped twice */
    __atomic_add_fetch(&allocation->references, 1, __ATOMIC_ACQ_REL);
    nullgpu_add((struct nullgpu_piece){(char *)at, size, allocation->device, NULLGPU_MAPPED, allocation});
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr at, size_t size)
{
    char *end = (char *)at + size;
    for (char *next = (char *)at; next < end;) {
        struct nullgpu_piece piece;
        if (!nullgpu_remove(next, &piece)) return CUDA_ERROR_INVALID_VALUE;
        if (piece.owner) release(piece.owner);
        next = piece.at + piece.size;
    }
    madvise((void *)at, size, MADV_DONTNEED); /* what small copies wrote is the host's memory again */
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc *access, size_t count)
{
    return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *at)
{
    struct nullgpu_piece piece;
    if (!nullgpu_find(at, &piece) || piece.kind != NULLGPU_MAPPED) return CUDA_ERROR_INVALID_VALUE;
    __atomic_add_fetch(&((struct allocation *)piece.owner)->references, 1, __ATOMIC_ACQ_REL);
    *handle = (CUmemGenericAllocationHandle)piece.owner;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *property, CUmemGenericAllocationHandle handle)
{
    memset(property, 0, sizeof *property);
    property->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    property->location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    property->location.id = ((struct allocation *)handle)->device;
    property->requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    return CUDA_SUCCESS;
}

/* Another process gets a file that says how large the allocation is: addresses of the right size, without the bytes. */
CUresult cuMemExportToShareableHandle(void *result, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags)
{
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
    int file = memfd_create("nullgpu", MFD_CLOEXEC);
    if (file < 0) return CUDA_ERROR_OPERATING_SYSTEM;
    if (pwrite(file, (void *)handle, sizeof(struct allocation), 0) != sizeof(struct allocation)) {
        close(file);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    *(int *)result = file;
    return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *from, CUmemAllocationHandleType type)
{
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
    struct allocation *made = malloc(sizeof *made);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    if (pread((int)(uintptr_t)from, made, sizeof *made, 0) != sizeof *made) {
        free(made);
        return CUDA_ERROR_INVALID_VALUE;
    }
    made->references = 1;
    made->is_imported = true; /* counted by the process that created it */
    *handle = (CUmemGenericAllocationHandle)made;
    return CUDA_SUCCESS;
}

/* Triton asks this for each pointer, and raises an error for a tensor of the CPU. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at)
{
    struct nullgpu_piece piece;
    if (!nullgpu_find((void *)at, &piece)) return CUDA_ERROR_INVALID_VALUE;
    bool is_host = piece.kind >= NULLGPU_PINNED;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)value = is_host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: return cuCtxGetCurrent(value);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = at; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (!is_host) return CUDA_ERROR_INVALID_VALUE;
        *(CUdeviceptr *)value = at;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = piece.device; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)value = (CUdeviceptr)piece.at; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = piece.size; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)value = (uintptr_t)piece.at; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)value = 0; break;
    case CU_POINTER_ATTRIBUTE_MAPPED: *(unsigned *)value = 1; break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: *(unsigned *)value = piece.kind == NULLGPU_DEVICE; break;
    default: *(unsigned *)value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange(CUdeviceptr *start, size_t *size, CUdeviceptr at)
{
    struct nullgpu_piece piece;
    if (!nullgpu_find((void *)at, &piece)) return CUDA_ERROR_NOT_FOUND;
    if (start) *start = (CUdeviceptr)piece.at;
    if (size) *size = piece.size;
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = nullgpu_settings()->memory;
    *free_bytes = *total - nullgpu_used(nullgpu_current_device());
    return CUDA_SUCCESS;
}
