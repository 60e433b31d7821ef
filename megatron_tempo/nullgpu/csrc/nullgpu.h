/* The null GPU: a CUDA device that has memory and a clock that stands still, and computes nothing.
 *
 * Three libraries are built from these files. libnullgpu.so (for LD_PRELOAD) has the state, the CUDA runtime, cuBLAS,
 * cuBLASLt and NCCL. libcuda.so.1 has the driver and libnvidia-ml.so.1 has NVML; both take their answers from
 * libnullgpu.so, and cannot be loaded without it.
 *
 * Every function of NVIDIA's is declared by NVIDIA's header, so the compiler checks each signature. */
#ifndef NULLGPU_H
#define NULLGPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NULLGPU_API __attribute__((visibility("default")))
#define NULLGPU_MAX_DEVICES 16

/* What the device is, from the environment (environment.py writes it). Read once, at the first call. */
struct nullgpu_settings {
    int devices;
    size_t memory;     /* bytes of each device */
    int capability;    /* 90: compute capability 9.0 */
    size_t copy_max;   /* copies of more bytes are counted but not made */
    char name[256];
    const char *stub_log; /* a file that gets the name of each stub that is called, or NULL */
};
NULLGPU_API const struct nullgpu_settings *nullgpu_settings(void);

/* What differs between generations, of the model that a capability stands for. */
struct nullgpu_model {
    int capability, multiprocessors, shared_optin, shared_multiprocessor, threads_multiprocessor, blocks_multiprocessor;
    int l2_bytes, memory_bus, clock_khz, memory_clock_khz;
};
NULLGPU_API const struct nullgpu_model *nullgpu_model(void);
/* A device attribute by its number, which the runtime and the driver share. */
NULLGPU_API int nullgpu_attribute(int attribute);
NULLGPU_API void nullgpu_uuid(int device, char uuid[16]);

/* Counters. A column is "name, unit": counters.py reads them by name. */
#define NULLGPU_COUNTERS(COLUMN)                                                                                       \
    COLUMN(flops) /* of matrix products: 2 m n k */                                                                    \
    COLUMN(products)                                                                                                   \
    COLUMN(kernel_launches) /* through the runtime: torch's and Transformer Engine's kernels */                        \
    COLUMN(triton_launches) /* through the driver: Triton's kernels, and what NVRTC compiled */                        \
    COLUMN(stream_synchronisations)                                                                                    \
    COLUMN(device_synchronisations)                                                                                    \
    COLUMN(event_synchronisations)                                                                                     \
    COLUMN(host_to_device_copies)                                                                                      \
    COLUMN(host_to_device_bytes)                                                                                       \
    COLUMN(device_to_host_copies)                                                                                      \
    COLUMN(device_to_host_bytes)                                                                                       \
    COLUMN(device_to_device_copies)                                                                                    \
    COLUMN(device_to_device_bytes)                                                                                     \
    COLUMN(device_mallocs)                                                                                             \
    COLUMN(device_frees)                                                                                               \
    COLUMN(nccl_communicators)                                                                                         \
    COLUMN(nccl_all_reduce_calls)                                                                                      \
    COLUMN(nccl_all_reduce_bytes)                                                                                      \
    COLUMN(nccl_all_gather_calls)                                                                                      \
    COLUMN(nccl_all_gather_bytes)                                                                                      \
    COLUMN(nccl_reduce_scatter_calls)                                                                                  \
    COLUMN(nccl_reduce_scatter_bytes)                                                                                  \
    COLUMN(nccl_broadcast_calls)                                                                                       \
    COLUMN(nccl_broadcast_bytes)                                                                                       \
    COLUMN(nccl_reduce_calls)                                                                                          \
    COLUMN(nccl_reduce_bytes)                                                                                          \
    COLUMN(nccl_all_to_all_calls)                                                                                      \
    COLUMN(nccl_all_to_all_bytes)                                                                                      \
    COLUMN(nccl_send_calls)                                                                                            \
    COLUMN(nccl_send_bytes)                                                                                            \
    COLUMN(nccl_recv_calls)                                                                                            \
    COLUMN(nccl_recv_bytes)
enum nullgpu_counter {
#define COLUMN(name) NULLGPU_##name,
    NULLGPU_COUNTERS(COLUMN)
#undef COLUMN
        NULLGPU_COUNTER_COUNT
};
NULLGPU_API void nullgpu_count(enum nullgpu_counter counter, double amount);
/* The first call of a stub: `name` is a literal of the generated code. */
NULLGPU_API void nullgpu_stub_called(const char *name);

/* Memory. Addresses are reserved, and the bytes are counted against the device's size. */
enum nullgpu_kind {
    NULLGPU_DEVICE,  /* cudaMalloc */
    NULLGPU_POOLED,  /* cudaMallocAsync */
    NULLGPU_MAPPED,  /* cuMemMap: counted when it was created */
    NULLGPU_IMPORTED, /* of another process, or a symbol: counted there, or not at all */
    NULLGPU_PINNED,  /* cudaHostAlloc */
    NULLGPU_HOST     /* cudaHostRegister: the caller's */
};
struct nullgpu_piece {
    char *at;
    size_t size;
    int device;
    enum nullgpu_kind kind;
    void *owner; /* of a mapped piece: the allocation behind it */
};
/* The device's memory that is in use: false, and nothing changes, where `bytes` do not fit. */
NULLGPU_API bool nullgpu_take(int device, size_t bytes);
NULLGPU_API void nullgpu_give_back(int device, size_t bytes);
NULLGPU_API size_t nullgpu_used(int device);
NULLGPU_API size_t nullgpu_peak(int device);
/* Address space that costs no memory until it is written. NULL where there is none. */
NULLGPU_API void *nullgpu_reserve(size_t bytes);
NULLGPU_API void nullgpu_add(struct nullgpu_piece piece);
/* The piece that an address is in. */
NULLGPU_API bool nullgpu_find(const void *at, struct nullgpu_piece *piece);
/* Forgets the piece that starts at an address. */
NULLGPU_API bool nullgpu_remove(const void *at, struct nullgpu_piece *piece);
/* Whether a kernel on the device can read these bytes: the device's memory, or the host's where it is pinned. */
NULLGPU_API bool nullgpu_is_on_device(const void *at, size_t bytes);
NULLGPU_API bool nullgpu_is_visible(const void *at, size_t bytes);
/* Makes a copy of at most copy_max bytes. */
NULLGPU_API void nullgpu_copy(void *to, const void *from, size_t bytes);
/* A few bytes of device memory that nobody counts: a symbol's. The same for the same key. */
NULLGPU_API void *nullgpu_symbol(const void *key);

/* The current device of the calling thread. */
NULLGPU_API int nullgpu_current_device(void);
NULLGPU_API bool nullgpu_set_current_device(int device);
/* Zeroed memory for an object of ours that NVIDIA's header calls a handle. */
NULLGPU_API void *nullgpu_handle(void);
/* Whether real hardware takes a launch of this size. */
NULLGPU_API bool nullgpu_launch_fits(const unsigned grid[3], const unsigned block[3], size_t shared);
/* Told once in a process, when something first asks for the device outside of a rehearsal. */
NULLGPU_API void nullgpu_warn(void);

#endif
