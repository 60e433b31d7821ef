/* The runtime's memory: allocation, copies, and what an address is. */
#include "runtime.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#pragma GCC visibility push(default)

/* The driver hands out large allocations in pages of 2 MiB, and takes small ones from such a page. */
static size_t rounded(size_t size)
{
    size_t unit = size > (1 << 20) ? 2 << 20 : 512;
    return (size + unit - 1) & ~(unit - 1);
}

static cudaError_t allocate(void **result, size_t size, enum nullgpu_kind kind)
{
    *result = NULL;
    if (!size) return cudaSuccess;
    int device = nullgpu_current_device();
    size_t taken = rounded(size);
    if (!nullgpu_take(device, taken)) return nullgpu_failed(cudaErrorMemoryAllocation);
    void *at = nullgpu_reserve(taken);
    if (!at) {
        nullgpu_give_back(device, taken);
        return nullgpu_failed(cudaErrorMemoryAllocation);
    }
    nullgpu_add((struct nullgpu_piece){at, taken, device, kind, NULL});
    nullgpu_count(NULLGPU_device_mallocs, 1);
    *result = at;
    return cudaSuccess;
}

static cudaError_t release(void *at)
{
    struct nullgpu_piece piece;
    if (!at) return cudaSuccess;
    if (!nullgpu_find(at, &piece) || piece.kind > NULLGPU_POOLED || !nullgpu_remove(at, &piece))
        return nullgpu_failed(cudaErrorInvalidValue);
    munmap(piece.at, piece.size);
    nullgpu_give_back(piece.device, piece.size);
    nullgpu_count(NULLGPU_device_frees, 1);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **result, size_t size) { return allocate(result, size, NULLGPU_DEVICE); }
cudaError_t cudaFree(void *at) { return release(at); }

/* Stream-ordered memory. Nothing runs, so memory is free at once: the order of streams is not modelled. */
static struct pool { size_t now, high; } pools[NULLGPU_MAX_DEVICES];
static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;

static void pool_changes(int device, size_t more, size_t less)
{
    pthread_mutex_lock(&pool_lock);
    pools[device].now += more - less;
    if (pools[device].now > pools[device].high) pools[device].high = pools[device].now;
    pthread_mutex_unlock(&pool_lock);
}

cudaError_t cudaMallocAsync(void **result, size_t size, cudaStream_t stream)
{
    cudaError_t error = allocate(result, size, NULLGPU_POOLED);
    if (!error && size) pool_changes(nullgpu_current_device(), rounded(size), 0);
    return error;
}

cudaError_t cudaFreeAsync(void *at, cudaStream_t stream)
{
    struct nullgpu_piece piece;
    bool is_pooled = at && nullgpu_find(at, &piece) && piece.kind == NULLGPU_POOLED;
    cudaError_t error = release(at);
    if (!error && is_pooled) pool_changes(piece.device, 0, piece.size);
    return error;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device)
{
    if (device < 0 || device >= nullgpu_settings()->devices) return nullgpu_failed(cudaErrorInvalidDevice);
    *pool = (cudaMemPool_t)&pools[device];
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value)
{
    const struct pool *of = (const struct pool *)pool;
    switch (attribute) {
    case cudaMemPoolAttrReservedMemCurrent:
    case cudaMemPoolAttrUsedMemCurrent: *(uint64_t *)value = of->now; break;
    case cudaMemPoolAttrReservedMemHigh:
    case cudaMemPoolAttrUsedMemHigh: *(uint64_t *)value = of->high; break;
    case cudaMemPoolAttrReleaseThreshold: *(uint64_t *)value = 0; break;
    default: *(int *)value = 1; /* the flags on reuse */
    }
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value)
{
    struct pool *of = (struct pool *)pool;
    if (attribute == cudaMemPoolAttrReservedMemHigh || attribute == cudaMemPoolAttrUsedMemHigh) of->high = of->now;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = nullgpu_settings()->memory;
    *free_bytes = *total - nullgpu_used(nullgpu_current_device());
    return cudaSuccess;
}

/* Pinned memory is known as such: torch's is_pinned asks, and NCCL accepts it. */
cudaError_t cudaHostAlloc(void **result, size_t size, unsigned flags)
{
    size = size ? size : 1;
    if (posix_memalign(result, 4096, size)) return nullgpu_failed(cudaErrorMemoryAllocation);
    nullgpu_add((struct nullgpu_piece){*result, size, nullgpu_current_device(), NULLGPU_PINNED, NULL});
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **result, size_t size) { return cudaHostAlloc(result, size, 0); }

cudaError_t cudaFreeHost(void *at)
{
    struct nullgpu_piece piece;
    if (!at) return cudaSuccess;
    if (!nullgpu_find(at, &piece) || piece.kind != NULLGPU_PINNED || !nullgpu_remove(at, &piece))
        return nullgpu_failed(cudaErrorInvalidValue);
    free(at);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *at, size_t size, unsigned flags)
{
    struct nullgpu_piece piece;
    if (!at || !size) return nullgpu_failed(cudaErrorInvalidValue);
    if (nullgpu_find(at, &piece) || nullgpu_find((char *)at + size - 1, &piece))
        return nullgpu_failed(cudaErrorHostMemoryAlreadyRegistered);
    nullgpu_add((struct nullgpu_piece){at, size, nullgpu_current_device(), NULLGPU_HOST, NULL});
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *at)
{
    struct nullgpu_piece piece;
    if (!nullgpu_find(at, &piece) || piece.kind != NULLGPU_HOST || !nullgpu_remove(at, &piece))
        return nullgpu_failed(cudaErrorHostMemoryNotRegistered);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *at)
{
    struct nullgpu_piece piece;
    memset(attributes, 0, sizeof *attributes); /* cudaMemoryTypeUnregistered: ordinary host memory */
    attributes->device = cudaInvalidDeviceId;
    if (!nullgpu_find(at, &piece)) return cudaSuccess;
    bool is_host = piece.kind >= NULLGPU_PINNED;
    attributes->type = is_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = piece.device;
    attributes->devicePointer = (void *)at;
    attributes->hostPointer = is_host ? (void *)at : NULL;
    return cudaSuccess;
}

static enum cudaMemcpyKind kind_of(const void *to, const void *from)
{
    if (nullgpu_is_on_device(from, 1))
        return nullgpu_is_on_device(to, 1) ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost;
    return nullgpu_is_on_device(to, 1) ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost;
}

/* Counts a copy. Refuses one whose direction does not agree with its addresses, as the driver does. */
static cudaError_t count_copy(const void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    if (kind == cudaMemcpyDefault) kind = kind_of(to, from);
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if ((to_device && !nullgpu_is_visible(to, bytes)) || (from_device && !nullgpu_is_visible(from, bytes)))
        return nullgpu_failed(cudaErrorInvalidValue);
    if (to_device && from_device) {
        nullgpu_count(NULLGPU_device_to_device_copies, 1);
        nullgpu_count(NULLGPU_device_to_device_bytes, (double)bytes);
    } else if (to_device) {
        nullgpu_count(NULLGPU_host_to_device_copies, 1);
        nullgpu_count(NULLGPU_host_to_device_bytes, (double)bytes);
    } else if (from_device) {
        nullgpu_count(NULLGPU_device_to_host_copies, 1);
        nullgpu_count(NULLGPU_device_to_host_bytes, (double)bytes);
    }
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    if (!bytes) return cudaSuccess;
    cudaError_t error = count_copy(to, from, bytes, kind);
    if (!error) nullgpu_copy(to, from, bytes);
    return error;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream)
{
    return copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    if (!width || !height) return cudaSuccess;
    if (width > to_pitch || width > from_pitch) return nullgpu_failed(cudaErrorInvalidPitchValue);
    cudaError_t error = count_copy(to, from, width * height, kind);
    if (error || width * height > nullgpu_settings()->copy_max) return error;
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind)
{
    return cudaSuccess; /* no kernel reads it */
}

cudaError_t cudaGetSymbolAddress(void **result, const void *symbol)
{
    *result = nullgpu_symbol(symbol);
    return *result ? cudaSuccess : nullgpu_failed(cudaErrorInvalidSymbol);
}

cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream)
{
    if (!bytes) return cudaSuccess;
    if (!nullgpu_is_visible(at, bytes)) return nullgpu_failed(cudaErrorInvalidValue);
    if (bytes <= nullgpu_settings()->copy_max) memset(at, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *at, int value, size_t bytes) { return cudaMemsetAsync(at, value, bytes, NULL); }
